"""The experiments behind docs/results.md run, at a size at which their figures mean nothing."""

import json
import subprocess
import sys

import pytest


@pytest.mark.long
def test_figure_1_of_p3_runs_on_mnist(data_dir, root, tmp_path):
    arguments = ["--networks", "lenet5", "--seeds", "0", "--epochs", "1", "--train_size", "512", "--randoms", "1"]
    arguments += ["--data", str(data_dir("MNIST")), "--out", str(tmp_path / "f")]
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks.experiments.p3_figure1", *arguments],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    runs = json.loads((tmp_path / "f.json").read_text())
    assert {run["arm"] for run in runs} == {
        "full", "right after the cut", "right after the cut, compensated", "filter selection", "random weights", "random recipe",
        "narrow from scratch",
    }  # fmt: skip
    assert all(run["size"] <= 1 for run in runs)
    assert "| lenet5 | PFA-KL | filter selection |" in shown
    assert (tmp_path / "f.png").stat().st_size > 1000
