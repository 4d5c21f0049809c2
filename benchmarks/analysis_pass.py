"""What an analysis costs beside a plain evaluation pass over the same data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.page import Section, main
from benchmarks.subjects import observations, resnet56
from benchmarks.timing import CPU, Candidate, interleaved, ratio_text, threads
from lit_compress import analyze
from lit_compress.graph import evaluating, trace
from lit_compress.skips import Tap
from lit_compress.statistics import gather_covariances

PASS = "gather_covariances"


def measure(quick: bool, rounds: int | None, device: torch.device = CPU) -> Section:
    """ResNet-56 on images of CIFAR's shape, with one and two threads."""
    batch = 8 if quick else 128
    name, net, images = resnet56(quick=quick, batch=batch, device=device)
    batches = [images + 0.1 * shift for shift in range(2 if quick else 6)]
    graph = trace(net, lambda: net(images[:1]))
    layers, taps = observations(graph)
    tables, verdicts = {}, []
    for count in (1, 2) if device == CPU else (1,):
        with threads(count):
            compared = interleaved(
                Candidate("plain evaluation pass", lambda _: evaluation_pass(net, batches)),
                [
                    Candidate(PASS, lambda _: gather_covariances(net, batches, layers, net, taps=taps)),
                    Candidate("analyze: trace, pass and spectra", lambda _: analyze(net, batches)),
                    Candidate("analyze, with compensate='linear'", lambda _: analyze(net, batches, compensate="linear")),
                    Candidate("keeping all responses, then torch.cov", lambda _: kept_responses(net, batches, layers, taps)),
                ],
                rounds=rounds or (2 if quick else 10),
            )
        caption = f"{count} thread{'s' * (count > 1)}"
        tables[caption] = compared.table()
        wall, cpu = (compared[PASS].ratio(compared.baseline, cpu=cpu) for cpu in (False, True))
        met = "met" if wall.median <= 1.2 else "NOT met"
        verdicts.append(
            f"{caption}: {met}, `{PASS}` takes {ratio_text(wall)}× a plain pass; of the CPU's time {ratio_text(cpu)}×"
        )
    return Section(
        question="What does an analysis cost beside a plain evaluation pass?",
        target="at most 1.2× a plain evaluation pass over the same data.",
        tables=tables,
        verdicts=verdicts,
        settings={"network": name, "batches": len(batches), "batch size": batch},
    )


def evaluation_pass(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """What everybody writes."""
    with evaluating(net), torch.no_grad():
        for batch in batches:
            net(batch)


def kept_responses(
    net: nn.Module, batches: Iterable[Tensor], layers: Mapping[str, int], taps: Mapping[str, Tap]
) -> dict[str, Tensor]:
    """The obvious way: keep the responses to all samples, and ask for their covariance."""
    responses: dict[str, list[Tensor]] = {name: [] for name in layers}

    def listen(name: str) -> torch.utils.hooks.RemovableHandle:
        tap = taps.get(name, Tap(name))
        module = net.get_submodule(tap.module)
        keep = responses[name].append
        if tap.side == "input":
            return module.register_forward_pre_hook(lambda module, inputs: keep(inputs[tap.position].flatten(2).amax(2)))
        return module.register_forward_hook(lambda module, inputs, output: keep(output.flatten(2).amax(2)))

    handles = [listen(name) for name in layers]
    evaluation_pass(net, batches)
    for handle in handles:
        handle.remove()
    return {name: torch.cov(torch.cat(parts).double().T) for name, parts in responses.items()}


if __name__ == "__main__":
    main("analysis_pass", measure)
