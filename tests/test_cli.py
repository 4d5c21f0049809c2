"""The command line, run as a shell would, on every config."""

import html
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from lit_compress import Recipe
from lit_compress.cli import main

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweeps")
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
DIGITS = next(path for path in CONFIGS if path.stem == "pfa_digits")
SMALL = [
    "--trainer.max_epochs", "2", "--data.train_size", "256", "--trainer.enable_progress_bar", "false",
    "--trainer.callbacks.init_args.at_epoch", "1",
]  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Fit the digits config for two epochs in a folder of its own; returns that folder and what was written."""
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(DIGITS), *SMALL])
    return next((tmp_path / "lit_compress_runs" / "pfa_digits").iterdir())


def checkpoint_of(run):
    return str(next((run / "checkpoints").glob("*.ckpt")))


def test_fit_prunes_and_writes_what_it_did(run, capsys):
    recipe = Recipe.load(run / "compress" / "recipe.json")
    summary = json.loads((run / "compress" / "summary.json").read_text())
    assert summary["after_cut"]["parameters"] <= 0.4 * summary["before"]["parameters"]
    weights = torch.load(checkpoint_of(run), weights_only=True)["state_dict"]
    for layer, width in recipe.widths.items():
        assert len(weights[f"{layer}.weight"]) == width
    assert {path.name for path in (run / "compress").iterdir()} >= {
        "cut_0_spectra.png",
        "cut_0_widths.png",
        "cut_0_layers.txt",
    }


def test_a_pruned_checkpoint_is_tested_and_gone_on_with(run, capsys):
    main(["test", "--config", str(DIGITS), *SMALL, "--ckpt_path", checkpoint_of(run)])
    assert "test/accuracy" in capsys.readouterr().out
    main(["fit", "--config", str(DIGITS), *SMALL, "--trainer.max_epochs", "3", "--ckpt_path", checkpoint_of(run)])
    content = [torch.load(path, weights_only=True) for path in run.parent.rglob("*.ckpt")]
    assert max(checkpoint["epoch"] for checkpoint in content) == 2
    sizes = {sum(tensor.numel() for tensor in checkpoint["state_dict"].values()) for checkpoint in content}
    assert len(sizes) == 1, "the run that went on was cut once more, or not rebuilt"


def test_analyze_says_what_a_cut_would_do_and_changes_nothing(run, tmp_path, capsys):
    checkpoint = checkpoint_of(run)
    before = Path(checkpoint).read_bytes()
    main(
        ["analyze", "--config", str(DIGITS), "--ckpt", checkpoint, "--energy", "0.8", "--out", "what", "--data.train_size", "256"]
    )
    shown = capsys.readouterr().out
    recipe = Recipe.load(tmp_path / "what" / "recipe.json")
    assert recipe.method == "pfa(select=reconstruction, energy=0.8)"
    for layer, width in recipe.widths.items():
        row = next(line for line in shown.splitlines() if f" {layer} " in line)
        assert f" {width} " in row
    assert Path(checkpoint).read_bytes() == before
    assert {path.name for path in (tmp_path / "what").iterdir()} == {"recipe.json", "layers.txt", "spectra.png", "widths.png"}


@pytest.mark.filterwarnings("ignore:.*lie between 0.1 and 0.9")
def test_analyze_goes_by_the_method_of_the_config(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["analyze", "--config", str(DIGITS.with_name("pib_digits.yaml")), "--out", "what", "--data.train_size", "256"])
    assert "scores.png" in capsys.readouterr().out
    assert Recipe.load(tmp_path / "what" / "recipe.json").method == "pib(variant=A, marginal=jensen)"
    with pytest.raises(SystemExit):
        main(["analyze", "--config", str(DIGITS.with_name("vib_digits.yaml")), "--data.train_size", "256"])
    assert "VIBPruning goes by its gates" in capsys.readouterr().err


def test_shrink_cuts_a_file_that_training_goes_on_from(run, tmp_path, capsys):
    source, out = checkpoint_of(run), tmp_path / "deep" / "small.ckpt"
    recipe = tmp_path / "again.json"
    layer, width = next(iter(Recipe.load(run / "compress" / "recipe.json").widths.items()))
    kept = width // 2
    Recipe(keep={layer: range(kept)}).save(recipe)
    given = ["shrink", "--config", str(DIGITS), "--ckpt", source, "--recipe", str(recipe), "--out", str(out)]
    main([*given, "--data.train_size", "256"])
    assert "% of all numbers in the weights" in capsys.readouterr().out
    assert len(torch.load(out, weights_only=True)["state_dict"][f"{layer}.weight"]) == kept
    main(["fit", "--config", str(DIGITS), *SMALL, "--trainer.max_epochs", "3", "--ckpt_path", str(out)])
    with pytest.raises(SystemExit, match="1"):
        main(given)
    assert "exists; give another file" in capsys.readouterr().err


def test_export_writes_checks_and_times(run, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    main(["export", "--config", str(DIGITS), "--ckpt", checkpoint_of(run), "--out", str(out), "--verify", "--batch_size", "3"])
    shown = capsys.readouterr().out
    assert "Compared with the network and written to" in shown
    for row in ("before any cut", "the checkpoint's", "model.onnx"):
        assert row in shown
    session = onnxruntime.InferenceSession(str(out))
    assert session.run(None, {session.get_inputs()[0].name: torch.rand(4, 1, 8, 8).numpy()})[0].shape == (4, 10)


def test_the_verb_tells_what_int8_adds_to_the_cut(run, tmp_path, capsys):
    given = ["export", "--config", str(DIGITS), "--ckpt", checkpoint_of(run), "--data.train_size", "256"]
    capsys.readouterr()
    main([*given, "--out", "model.onnx", "--int8"])
    shown = capsys.readouterr().out
    whole, small = (
        next(line for line in shown.splitlines()[::-1] if f" {name} " in line) for name in ("model.onnx", "model.int8.onnx")
    )
    tuned = json.loads((run / "compress" / "summary.json").read_text())["fine_tuned"]
    assert all(f"{value:.4f}" in whole for value in tuned.values()), "the file is the checkpoint's network"
    assert f"{(tmp_path / 'model.int8.onnx').stat().st_size / 1024:.1f}" in small
    assert "int8 adds" in shown
    with pytest.raises(SystemExit):
        main([*given, "--out", "model.pt2", "--int8", "--format", "torch-export"])
    assert "`--int8` quantises ONNX files, but `--format` is torch-export" in capsys.readouterr().err


def test_a_report_tells_how_to_repeat_the_run(run, capsys):
    main(["report", "--run", str(run)])
    commands = re.findall(r"<pre><code>lit-compress (.*?)</code></pre>", (run / "report.html").read_text(encoding="utf-8"))
    assert [command.split()[0] for command in commands] == ["fit", "export"]
    for command in commands:
        main(shlex.split(html.unescape(command)))
    again = max((path for path in run.parent.iterdir()), key=lambda path: path.stat().st_mtime)
    assert again != run
    assert Recipe.load(again / "compress" / "recipe.json") == Recipe.load(run / "compress" / "recipe.json")
    assert Path("model.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, ""),
        (["shrivel"], 2, "unknown verb 'shrivel'"),
        (["analyze"], 2, "--config"),
        (["fit", "--config", str(DIGITS), "--trainer.callbacks.init_args.at_epoch", "99"], 1, "training ends after 40 epochs"),
        (["fit", "--config", str(DIGITS), "--trainer.callbacks.init_args.keep_params", "1.5"], None, "must lie in"),
        (["analyze", "--config", str(DIGITS), "--ckpt", "nowhere.ckpt"], 1, "no checkpoint nowhere.ckpt"),
        (["analyze", "--config", str(DIGITS), "--ckpt", "."], 1, "Is a directory"),
        (["analyze", "--config", str(DIGITS), "--keep_params", "0.00001"], 1, "cannot be reached"),
    ],
    ids=lambda value: " ".join(word for word in value if "/" not in word) if isinstance(value, list) else None,
)
def test_a_mistake_is_told_in_one_line(arguments, status, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    errors = capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    if status is not None:
        assert stopped.value.code == status
    assert said in errors
    assert "Traceback" not in errors
    if status == 1:
        assert [line for line in errors.splitlines() if line.startswith("lit-compress: error:")] == errors.strip().splitlines()[
            -1:
        ]


def test_packages_that_are_missing_are_told_in_one_line(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit) as stopped:
        main(["export", "--config", str(DIGITS), "--ckpt", checkpoint_of(run), "--out", "model.onnx"])
    assert stopped.value.code == 1
    assert "pip install 'lit-compress[export]'" in capsys.readouterr().err.splitlines()[-1]


def test_a_config_may_name_a_module_that_lies_where_the_command_is_run(tmp_path):
    """The folder of an installed command, which Python looks in instead, is another one."""
    here, command = tmp_path / "here", tmp_path / "bin" / "lit-compress"
    here.mkdir()
    command.parent.mkdir()
    command.write_text("from lit_compress.cli import main; main()")
    (here / "mine.py").write_text(
        "from lit_compress.datamodules import DigitsDataModule\n\n\nclass Digits(DigitsDataModule):\n    pass\n"
    )
    arguments = ["fit", "--config", str(DIGITS), "--data.class_path", "mine.Digits", "--print_config"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        [sys.executable, str(command), *arguments], cwd=here, env=environ, capture_output=True, text=True, check=False
    )
    assert "class_path: mine.Digits" in shown.stdout, shown.stderr


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from lit_compress.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "analyze" in shown
    assert shown.rstrip().endswith("0 False")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_complete(config):
    """Its classes exist and take its arguments; that it trains is shown above, or in the long tests."""
    content = yaml.safe_load(config.read_text())
    assert {"trainer", "model", "data"} <= content.keys()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), "--print_config"])
    assert stopped.value.code in (0, None)


def command_of(sweep, choose):
    """The command of one run of a sweep, filled in by W&B's own code, with `choose` of each parameter's values."""
    content = load_sweep_config(str(sweep))
    arguments = {name: {"value": choose(parameter["values"])} for name, parameter in content["parameters"].items()}
    filled = {"${program}": [content["program"]], "${args}": create_sweep_command_args({"args": arguments})["args"]}
    return content, [part for piece in create_sweep_command(content["command"]) for part in filled.get(piece, [piece])]


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_sweep_is_a_command_that_is_understood(sweep, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for choose in (min, max):
        content, (program, *arguments) = command_of(sweep, choose)
        assert program == "lit-compress"
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--print_config"])
        assert stopped.value.code in (0, None)
        printed = yaml.safe_load(capsys.readouterr().out)
        assert printed["seed_everything"] == choose(content["parameters"]["seed_everything"]["values"])
        pruning, monitor = printed["trainer"]["callbacks"]
        assert pruning["init_args"]["energy"] == choose(content["parameters"]["trainer.callbacks.init_args.energy"]["values"])
        assert monitor["init_args"]["alert_drop"] == 2
        assert printed["trainer"]["logger"]["class_path"] == "pytorch_lightning.loggers.WandbLogger"


def test_a_run_of_the_sweep_logs_what_the_sweep_is_sorted_by(tmp_path, monkeypatch, offline_wandb):
    monkeypatch.chdir(tmp_path)
    (sweep,) = SWEEPS
    content, (_, *arguments) = command_of(sweep, min)
    arguments = [str(ROOT / part) if part.startswith("configs/") else part for part in arguments]
    small = ["--trainer.max_epochs=2", "--data.train_size=256", "--trainer.enable_progress_bar=false"]
    small.append("--trainer.logger.init_args.offline=true")
    at = arguments.index("--trainer.callbacks.init_args.keep_params=null")
    arguments.insert(at, "--trainer.callbacks.init_args.at_epoch=1")
    main([*arguments, *small])
    summary = offline_wandb("lit_compress_runs").summary
    assert content["metric"]["name"] in summary
    assert summary["compress/share_of_parameters"] < 1
