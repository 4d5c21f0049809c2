"""What the library costs, each question beside a plain baseline and, where there is one, a peer; see docs/benchmarks.md."""
