"""The experiments behind docs/results.md run, at a size at which their figures mean nothing."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from benchmarks.experiments import compare_peers
from benchmarks.experiments.pedestrian_students import compared
from lit_compress import count_parameters
from lit_compress.datamodules import DigitsDataModule


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
def test_students_on_mnist_run_and_go_on_where_they_were_stopped(data_dir, root, tmp_path):
    out = tmp_path / "s.json"
    arguments = ["mnist", "--seeds", "0", "--epochs", "1", "--data", str(data_dir("MNIST"))]
    arguments += ["--teachers", str(tmp_path / "teachers"), "--out", str(out.with_suffix(""))]
    shown = run(root, "distillation", arguments)
    runs = json.loads(out.read_text())
    assert [run["arm"] for run in runs] == ["teacher", "alone", "knowledge distillation", "attention transfer"]
    assert len({run["parameters"] for run in runs[1:]}) == 1 < runs[0]["parameters"] / runs[1]["parameters"]
    out.write_text(json.dumps(runs[:2]))
    assert run(root, "distillation", arguments).splitlines()[-4:] == shown.splitlines()[-4:]


@pytest.mark.long
def test_self_distillation_runs_on_mnist(data_dir, root, tmp_path):
    arguments = ["--seeds", "0", "--epochs", "1", "--fine_tuning", "1", "--train_size", "512", "--data", str(data_dir("MNIST"))]
    run(root, "self_distillation", [*arguments, "--out", str(tmp_path / "s")])
    full, *runs = json.loads((tmp_path / "s.json").read_text())
    assert full["arm"] == "full"
    for alone, taught in zip(runs[::2], runs[1::2], strict=True):
        assert (alone["size"], alone["cut"]) == (taught["size"], taught["cut"])
        assert alone["size"] <= alone["kept"]
    assert [run["arm"] for run in runs] == ["labels alone", "labels and the unpruned network"] * 3


@pytest.mark.long
def test_compressed_layers_are_trained_in_all_arms_and_a_run_goes_on(data_dir, root, tmp_path):
    arguments = ["--kinds", "hashed", "acdc", "--budgets", "7750", "--seeds", "0", "--epochs", "1", "--teacher_epochs", "1"]
    arguments += ["--train_size", "200", "--data", str(data_dir("MNIST")), "--out", str(tmp_path / "c")]
    shown = run(root, "compressed_training", arguments)
    runs = json.loads((tmp_path / "c.json").read_text())
    arms = ["plain", "CRS", "AT", "CRS, AT"]
    assert [(one["kind"], one["arm"]) for one in runs[2:]] == [(kind, arm) for kind in ("hashed", "acdc") for arm in arms]
    assert all(one["parameters"] <= 7750 for one in runs[2:])
    assert "| hashed | 7,7" in shown
    assert (tmp_path / "c.png").stat().st_size > 1000

    (tmp_path / "c.json").write_text(json.dumps(runs[:-1]))  # stopped before the last
    shown = run(root, "compressed_training", arguments)
    assert [line.partition(", seed")[0] for line in shown.splitlines() if ", seed" in line] == [
        "{'kind': 'acdc', 'budget': 7750, 'arm': 'CRS, AT'}"
    ]
    assert len(json.loads((tmp_path / "c.json").read_text())) == len(runs)


@pytest.mark.long
def test_dimensions_and_permutations_are_compared(data_dir, root, tmp_path):
    arguments = ["--seeds", "0", "--epochs", "1", "--train_size", "100", "--steps", "2"]
    shown = run(root, "compressed_settings", [*arguments, "--data", str(data_dir("MNIST")), "--out", str(tmp_path / "s")])
    runs = json.loads((tmp_path / "s.json").read_text())
    assert sorted({one["dims"] for one in runs if one["part"] == "grid"}) == [2, 3, 4, 5]
    assert {one["kind"] for one in runs if one["part"] == "regression"} == {"riffle", "random"}
    assert "| tucker | 5 |" in shown
    assert (tmp_path / "s.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("row", "epochs"),
    [
        ("120-100 A", 12),
        ("300-100 VIB", 6),
        pytest.param("120-100 A, max_drop", 12, marks=pytest.mark.long),
        pytest.param("300-100 C", 3, marks=pytest.mark.long),
    ],
)
def test_rows_of_the_information_bottleneck_run_on_digits(row, epochs, root, tmp_path):
    arguments = ["--digits", "--rows", row, "--seeds", "0", "--epochs", str(epochs)]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "p")]
    shown = run(root, "pib_mnist", arguments)
    (one,) = json.loads((tmp_path / "p.json").read_text())
    assert (one["row"], one["seed"], len(one["epochs"])) == (row, 0, epochs)
    assert one["after"]["R_w"] <= one["before"]["R_w"] == 1
    assert f"| {row} | ours | {'-'.join(map(str, one['after']['widths']))} |" in shown
    assert "| 4.3 | LeNet-5 C | ours | open |" in shown
    again = run(root, "pib_mnist", arguments)
    assert f"{row}, seed 0" in shown
    assert f"{row}, seed 0" not in again


@pytest.mark.long
@pytest.mark.parametrize("row", ["LeNet-5 C", "LeNet-5 VIB"])
def test_rows_of_lenet_5_run_on_mnist(row, data_dir, root, tmp_path):
    arguments = ["--data", str(data_dir("MNIST")), "--rows", row, "--seeds", "0", "--epochs", "3"]
    run(root, "pib_mnist", [*arguments, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "p")])
    (one,) = json.loads((tmp_path / "p.json").read_text())
    assert one["after"]["error"] < 0.2
    assert (tmp_path / "p_ratios_4.3.png").stat().st_size > 1000


def test_all_methods_are_compared_on_digits_at_equal_size(root, tmp_path):
    arguments = ["--digits", "--seeds", "0", "--epochs", "2", "--fine_tune", "1", "--looks", "1", "--randoms", "1"]
    shown = run(root, "compare_methods", [*arguments, "--out", str(tmp_path / "c")])
    runs = json.loads((tmp_path / "c.json").read_text())
    of_kl = {"PFA-KL", "PFA-KL by reconstruction"}
    methods = {*of_kl, "PFA-En", "PFA-En by reconstruction", "PIB", "VIB", "FP", "NS", "random"}
    assert {one["method"] for one in runs} == methods | {"uncut"}
    for size, share in (("20 %", 0.2), ("10 %", 0.1), ("5 %", 0.05)):
        sizes = {one["method"]: one["parameters"] for one in runs if one["size"] == size}
        assert sizes.keys() == methods - of_kl
        assert all(0.9 * share < found <= share for found in sizes.values()), sizes
    assert "| 20 % | VIB |" in shown
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.long
def test_other_tools_are_compared_with_ours_and_a_run_goes_on(root, tmp_path):
    arguments = ["--digits", "--seeds", "0", "--epochs", "1", "--fine_tune", "1", "--rounds", "1", "--out", str(tmp_path / "c")]
    shown = run(root, "compare_peers", arguments)
    runs = json.loads((tmp_path / "c.json").read_text())
    there = {name for name in compare_peers.PEERS if not compare_peers.TOOLS[name.partition(":")[0]].missing}
    methods = {"uncut", *compare_peers.OURS, *there, compare_peers.MASK}
    methods |= {compare_peers.AT_THEIR_WIDTHS} if compare_peers.WIDTHS_OF in there else set()
    assert {one["method"] for one in runs} == methods
    for size, share in zip(compare_peers.SIZES[1:], compare_peers.SHARES, strict=True):
        found = {one["method"]: one for one in runs if one["size"] == size}
        assert found.keys() == methods - {"uncut"}
        masked = found.pop(compare_peers.MASK)
        assert all(0.8 * share < one["parameters"] <= share for one in found.values()), found
        assert masked["parameters"] == 1
        assert masked["not_zero"] == pytest.approx(share, rel=0.02)
    assert f"| {compare_peers.CLAIM} |" in shown
    assert (tmp_path / "c.png").stat().st_size > 1000

    (tmp_path / "c.json").write_text(json.dumps(runs[:-2]))  # stopped before the last two
    shown = run(root, "compare_peers", arguments)
    lines = [line for line in shown.splitlines() if line.startswith("seed 0")]
    assert [line.partition(": ")[2].partition(" at ")[0] for line in lines] == [
        one["method"].partition(" at ")[0] for one in runs[-2:]
    ]


@pytest.mark.parametrize("method", list(compare_peers.PEERS))
def test_a_tool_takes_channels_until_a_share_is_met_and_leaves_the_classes(method):
    for module in compare_peers.TOOLS[method.partition(":")[0]].modules:
        pytest.importorskip(module)
    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=8, train_size=160)
    data.setup("fit")
    net = compare_peers.build(data).eval()
    for norm in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)  # a tool that ranks by scales cannot tell equal ones apart
    whole, step = count_parameters(net), compare_peers.PEERS[method](net, data)
    shares = {"a tenth": 0.1, "half": 0.5}
    small = dict(compare_peers.on_the_way_down(net, step, shares))
    for size, share in shares.items():
        assert 0.8 * share < count_parameters(small[size]) / whole <= share
        assert small[size](compare_peers.example_of(data)).shape == (2, 10)


def test_squared_gradients_are_means_over_samples():
    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=4, train_size=100)
    data.setup("fit")
    net = compare_peers.build(data).eval()
    images, labels = (torch.cat(parts) for parts in zip(*compare_peers.looks(data), strict=True))
    assert len(images) == 40
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(parameters, image, label):
        return F.cross_entropy(functional_call(net, parameters, image[None]), label[None])

    expected = vmap(grad(loss), (None, 0, 0))(parameters, images, labels)
    compare_peers.with_squared_gradients(net, data)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad**2, expected[name].square().mean(0), rtol=1e-3, atol=1e-10)


def test_ours_is_judged_by_the_best_of_the_others_on_the_seeds_that_all_have():
    """By hand: over seeds 0 and 1, ours has 95 %, the tools 94 and 95.5 %; seed 2 is not finished."""
    accuracies = {
        compare_peers.CLAIM: (0.94, 0.96, 0.5),
        "Torch-Pruning: LAMP": (0.93, 0.95),
        "Torch-Pruning: Taylor": (0.945, 0.965),
    }
    runs = [
        {"method": method, "size": "5 %", "seed": seed, "accuracy": accuracy}
        for method, by_seed in accuracies.items()
        for seed, accuracy in enumerate(by_seed)
    ]
    told = compare_peers.verdict(runs, "5 %")
    assert told == "5 %: NOT met, -0.50 points (deviation 0.00) to Torch-Pruning: Taylor, 2 seed(s)"
    assert compare_peers.verdict(runs[:5], "5 %").startswith("5 %: met, +1.00 points")
    assert compare_peers.verdict(runs, "2 %").startswith("2 %: open")


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


@pytest.mark.long
def test_students_of_patches_are_compared_and_go_on_where_they_were_stopped(root, tmp_path):
    out, work = tmp_path / "p.json", tmp_path / "work"
    small = [
        "--seeds",
        "0",
        "1",
        "--students",
        "small",
        "--arms",
        "direct",
        "hint + confidence",
        "--epochs",
        "1",
        "--teacher_epochs",
        "1",
    ]
    small += ["--batches", "3", "--passes", "70", "--streets", "8", "--proposer_epochs", "1", "--resources", "small"]
    small += ["--resources_side", "64", "--work", str(work), "--data", str(tmp_path), "--out", str(out.with_suffix(""))]
    shown = run(root, "pedestrian_students", small)
    runs = json.loads(out.read_text())
    arms = [(one["inputs"], one["arm"]) for one in runs if one.get("seed") == 1]
    assert arms == [(inputs, arm) for arm in ("direct", "hint + confidence") for inputs in ("rgb", "acf")]
    assert [one["seed"] for one in runs if one.get("arm") == "teacher"] == [0]
    assert all(0 <= one["streets"] <= 1 for one in runs if "arm" in one)
    assert [one["resources"] for one in runs if "resources" in one] == ["identity", "small"]
    assert "| small | rgb | 158,626 | direct |" in shown
    assert "| small (acf) | hint + confidence |" in shown
    for picture in ("logits", "filters"):
        assert (tmp_path / f"p_{picture}.png").stat().st_size > 1000

    stopped = [one for one in runs if one.get("seed") != 1]
    out.write_text(json.dumps(stopped))
    again = run(root, "pedestrian_students", small)
    assert [line for line in again.splitlines() if line.startswith("seed")] == [
        line for line in shown.splitlines() if line.startswith("seed 1, small")
    ]


def test_a_difference_of_students_is_judged_by_seeds_that_have_both():
    """By hand: differences of -2, -3 and -4 percentage points, deviation 1, Student's t of 4.303 for two degrees of freedom."""
    one, other = ("small", "rgb", "hint"), ("small", "rgb", "direct")
    runs = [
        {"seed": seed, "student": "small", "inputs": "rgb", "arm": arm, "streets": rate}
        for seed, rates in enumerate([(0.28, 0.30), (0.27, 0.30), (0.26, 0.30), (0.90, None)])
        for arm, rate in zip(("hint", "direct"), rates, strict=True)
        if rate is not None
    ]
    reach = 4.303 / 3**0.5
    assert compared(runs, "streets", one, other) == f"-3.0 ± {reach:.1f}: confirmed"
    assert compared(runs, "streets", other, one) == f"+3.0 ± {reach:.1f}: refuted"
    assert compared(runs[:4], "streets", one, other).endswith("open")
    assert compared(runs, "photographs", one, other) == ""


@pytest.mark.long
def test_table_3_1_runs_on_drawn_streets_and_goes_on_where_it_was_stopped(root, tmp_path):
    out = tmp_path / "r.json"
    arguments = ["--seeds", "0", "--images", "8", "--steps", "4", "--test_images", "8", "--out", str(out.with_suffix(""))]
    shown = run(root, "roi_autoencoder", arguments)
    runs = json.loads(out.read_text())
    assert [one["arm"] for one in runs] == ["baseline", "without BatchNorm", "SWWAE", "ROIAE"]
    assert all(0 <= one[split] <= 1 for one in runs for split in ("train", "test"))
    assert "| 8 streets |  | ROIAE | 0.1 | adam | 1 |" in shown

    out.write_text(json.dumps(runs[:-1]))  # stopped before the last
    shown = run(root, "roi_autoencoder", arguments)
    assert [line.partition("'arm': ")[2][:7] for line in shown.splitlines() if line.startswith("done")] == ["'ROIAE'"]
    again = json.loads(out.read_text())
    assert [{**one, "cpu_minutes": 0} for one in again] == [{**one, "cpu_minutes": 0} for one in runs]


@pytest.mark.long
def test_a_detector_is_trained_cut_and_taught_and_goes_on_where_it_was_stopped(root, tmp_path):
    out = tmp_path / "p.json"
    few = [
        "--trainer.max_epochs=4",
        "--data.train_size=80",
        "--data.val_size=8",
        "--model.net.init_args.backbone.init_args.width=0.125",
    ]
    arguments = ["--seeds", "0", "--epochs", "1", "--test_images", "8", "--work", str(tmp_path / "work")]
    arguments += ["--out", str(out.with_suffix("")), *few]
    run(root, "pruned_detector", arguments)
    runs = json.loads(out.read_text())
    assert [one["arm"] for one in runs] == [
        "as trained",
        "trained on, uncut",
        *(f"cut{how}, labels{taught}" for how in ("", " by reconstruction") for taught in ("", " and the unpruned detector")),
    ]
    assert [one["parameters"] < 0.26 * runs[0]["parameters"] for one in runs] == [False] * 2 + [True] * 4
    assert [one["mult_adds"] < runs[0]["mult_adds"] for one in runs] == [False] * 2 + [True] * 4
    assert runs[2]["right_after"] == runs[3]["right_after"], "the same cut"
    assert runs[4]["right_after"] == runs[5]["right_after"], "the same cut"

    out.write_text(json.dumps(runs[:-1]))  # stopped before the last
    shown = run(root, "pruned_detector", arguments)
    assert [line.partition(":")[0] for line in shown.splitlines() if line.startswith("seed")] == [
        "seed 0, cut by reconstruction, labels and the unpruned detector"
    ]
    timeless = [[{**one, "cpu_minutes": 0} for one in some] for some in (runs, json.loads(out.read_text()))]
    assert timeless[0] == timeless[1]
