"""The experiments behind docs/results.md run, at a size at which their figures mean nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image


def run(root, experiment, arguments):
    """What an experiment prints."""
    command = [sys.executable, "-m", f"benchmarks.experiments.{experiment}", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


@pytest.mark.long
def test_figure_1_of_p3_runs_on_mnist(data_dir, root, tmp_path):
    arguments = ["--networks", "lenet5", "--seeds", "0", "--epochs", "1", "--train_size", "512", "--randoms", "1"]
    arguments += ["--data", str(data_dir("MNIST")), "--out", str(tmp_path / "f")]
    shown = run(root, "p3_figure1", arguments)
    runs = json.loads((tmp_path / "f.json").read_text())
    assert {run["arm"] for run in runs} == {
        "full", "right after the cut", "right after the cut, compensated", "filter selection", "random weights", "random recipe",
        "narrow from scratch",
    }  # fmt: skip
    assert all(run["size"] <= 1 for run in runs)
    assert "| lenet5 | PFA-KL | filter selection |" in shown
    assert (tmp_path / "f.png").stat().st_size > 1000


@pytest.mark.long
def test_domain_adaptation_of_p3_runs_on_mnist_and_goes_on_where_it_was_stopped(data_dir, root, tmp_path):
    out = tmp_path / "d.json"
    arguments = ["--subsets", "R1", "S1", "--seeds", "0", "--epochs", "1", "--train_size", "600"]
    arguments += ["--data", str(data_dir("MNIST")), "--work", str(tmp_path / "work"), "--out", str(out.with_suffix(""))]
    shown = run(root, "p3_domains", arguments)
    runs = json.loads(out.read_text())
    arms = ["full scratch", "full fine", "PFA scratch", "PFA fine"]
    assert [(run["subset"], run["arm"]) for run in runs] == [(subset, arm) for subset in ("R1", "S1") for arm in arms]
    assert [run["size"] < 1 for run in runs] == [False, False, True, True] * 2
    assert "| S1 | 0 1 |" in shown
    assert out.with_suffix(".png").stat().st_size > 1000

    out.write_text(json.dumps(runs[:-1]))  # stopped before the last
    shown = run(root, "p3_domains", arguments)
    assert [line.rpartition(": ")[0] for line in shown.splitlines() if line.startswith("seed")] == ["seed 0, S1: PFA fine"]
    assert json.loads(out.read_text()) == runs


@pytest.mark.long
def test_budgets_are_compared_on_rotated_mnist_and_a_run_goes_on(data_dir, root, tmp_path):
    arguments = ["--seeds", "0", "--epochs", "1", "--sets", "64", "--test_sets", "32", "--trials", "2"]
    arguments += ["--data", str(data_dir("MNIST")), "--out", str(tmp_path / "f")]
    first, again = (run(root, "rotated_mnist", arguments) for _ in range(2))
    assert "done" in first
    assert "done" not in again
    assert again in first
    assert "| Bayesian optimisation |" in first
    assert "| strong | 20 |" in first
    assert (tmp_path / "f.png").stat().st_size > 1000


@pytest.mark.long
def test_buoys_are_told_from_each_other(root, tmp_path):
    arguments = ["--synthetic", "--seeds", "0", "1", "--targets", "3", "--epochs", "1", "--out", str(tmp_path / "t")]
    shown = run(root, "tao_buoys", arguments)
    assert {run["target"] for run in json.loads((tmp_path / "t.json").read_text())} == {3}
    assert "| 3 (8N165E) |" in shown
    assert (tmp_path / "t.png").stat().st_size > 1000


@pytest.mark.long
def test_jpeg_tables_are_compared_and_a_run_goes_on(root, tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for index in range(2):
        waves = np.cumsum(np.cumsum(generator.normal(size=(192, 192, 3)), axis=0), axis=1)
        pixels = (128 + 40 * waves / waves.std() + generator.normal(0, 5, waves.shape)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / f"{index}.png")
    arguments = [str(tmp_path / "images"), "--sizes", "1.0", "--shown", "1.0", "--out", str(tmp_path / "f")]
    first, again = (run(root, "jpeg_kodak", arguments) for _ in range(2))
    assert "done" in first
    assert "done" not in again
    assert again in first
    runs = json.loads((tmp_path / "f.json").read_text())
    learnt = [run for run in runs if run["arm"] in ("squared_error", "mlp", "ms_ssim")]
    assert len(learnt) == 6
    assert all(abs(run["bits"] - 1) < 0.03 for run in learnt)
    assert "| squared_error | 1 |" in first
    assert (tmp_path / "f.png").stat().st_size > 1000
    assert (tmp_path / "f_picture.png").stat().st_size > 1000
