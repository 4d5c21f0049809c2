"""P3's experiments start: every config, cut and all, on data and networks so small that their figures mean nothing."""

import json
from pathlib import Path

import pytest
import torch
import torchvision

from lit_compress import Recipe
from lit_compress.cli import main
from lit_compress.models import VGGCIFAR
from lit_compress.modules import LitClassifier
from tests.images import write_cifar, write_folders

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs" / "p3").glob("*.yaml"))
NET = "--model.init_args.net.init_args."
# Of each network: what makes it small.
SMALL = {
    "simplecnn": {f"{NET}width": "6"},
    "vgg16_imagenet": {f"{NET}width": "0.04", f"{NET}image_size": "32"},
    "vgg16": {f"{NET}width": "0.06"},
    "domain": {f"{NET}width": "0.06"},
    "resnet56": {f"{NET}depth": "8", f"{NET}width": "8"},
    "resnet34": {f"{NET}layers": "[1,1,1,1]"},
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Overrides that point a config at images made for the test."""
    for dataset in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
        made = write_cifar(tmp_path, dataset, train=40 if dataset.__name__ == "CIFAR10" else 10, test=1)
        # CIFAR100 is a subclass of CIFAR10, so that each needs its own.
        for name, value in made["files"].items():
            monkeypatch.setattr(dataset, name, value)
    write_folders(tmp_path / "imagenet", {f"n{number:02}": 20 for number in range(4)})

    def of(config):
        if "imagenet" in config.stem:
            one = {"strategy": "auto", "num_nodes": "1", "devices": "1"}
            few = {"--data.image_size": "32", "--data.num_workers": "0", "--data.batch_size": "8"}
            folder = {"--data.data_dir": str(tmp_path / "imagenet")}
            return folder | few | {f"--trainer.{name}": value for name, value in one.items()}
        return {"--data.data_dir": str(tmp_path), "--data.batch_size": "64"}

    return of


def overrides(config, tmp_path):
    """What makes the network of a config small, and gives it a network to start from where it wants one."""
    small = next(options for name, options in SMALL.items() if config.stem.startswith(name))
    if config.stem.startswith("domain") and config.stem != "domain_full_scratch":
        trained = LitClassifier(VGGCIFAR(num_classes=100, width=0.06), num_classes=100)
        torch.save({"state_dict": trained.state_dict()}, tmp_path / "full.ckpt")
        small = {**small, "--trainer.callbacks.init_args.checkpoint": str(tmp_path / "full.ckpt")}
    return small


def fit(config, **options):
    quiet = {"accelerator": "cpu", "enable_progress_bar": "false", "enable_model_summary": "false"}
    options = {f"--trainer.{name}": value for name, value in quiet.items()} | options
    main(["fit", "--config", str(config), *(word for option in options.items() for word in option)])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_config_starts(config, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(config, **data(config), **overrides(config, tmp_path), **{"--trainer.fast_dev_run": "true"})


@pytest.mark.parametrize("name", ["resnet56_cifar10", "resnet56_cifar100"])
def test_the_skips_of_resnet56_keep_their_width(name, data, tmp_path, monkeypatch):
    """P3, appendix C.2: blocks are cut and padded back, whatever comes in over a skip has all its channels."""
    monkeypatch.chdir(tmp_path)
    (config,) = (config for config in CONFIGS if config.stem == name)
    options = data(config) | overrides(config, tmp_path)
    main(["analyze", "--config", str(config), "--energy", "0.8", *(word for option in options.items() for word in option)])
    recipe = Recipe.load(tmp_path / "analysis" / "recipe.json")
    blocks = [f"net.stage{stage}.0" for stage in (1, 2, 3)]
    assert recipe.padded == {f"{block}.bn2": width for block, width in zip(blocks, (8, 16, 32), strict=True)}
    assert recipe.keep.keys() == {f"{block}.conv{place}" for block in blocks for place in (1, 2)}


@pytest.mark.long
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_config_runs_two_epochs_with_the_cut_between(config, data, data_dir, tmp_path, monkeypatch):
    """On real images where they are to be had."""
    monkeypatch.chdir(tmp_path)
    options = data(config) | overrides(config, tmp_path)
    if config.stem.endswith("cifar10"):
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        options |= {"--data.data_dir": str(data_dir("cifar-10-batches-py")), "--data.train_size": "640"}
    if config.stem == "resnet56_cifar100":  # on noise, PFA-KL finds nothing to remove from 8 channels
        options["--trainer.callbacks.init_args.energy"] = "0.9"
    if not config.stem.startswith("domain"):
        options["--trainer.callbacks.init_args.at_epoch"] = "1"
    fit(config, **options, **{"--trainer.max_epochs": "2"})
    (run,) = (tmp_path / "lit_compress_runs" / "p3" / config.stem).iterdir()
    logged = (run / "metrics.csv").read_text()
    assert "train/loss" in logged
    if "domain_full" not in config.stem:
        summary = json.loads((run / "compress" / "summary.json").read_text())
        assert summary["after_cut"]["parameters"] < summary["before"]["parameters"]
        assert "compress/parameters" in logged
