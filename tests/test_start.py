"""StartFrom: a training that begins with the weights of another."""

import copy

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback
from torch import nn

from lit_compress.callbacks import PFAPruning, StartFrom
from lit_compress.plan import plan_of
from tests.modules import Small, every_epoch, new_trainer, same, small_loaders


class First(Callback):
    """The weights that training begins with."""

    def on_train_start(self, trainer, pl_module):
        self.weights = copy.deepcopy(pl_module.state_dict())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of a run that was cut before its second epoch."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    pruning = PFAPruning(energy=0.9, at_epoch=1)
    new_trainer(folder, pruning, every_epoch(folder), enable_checkpointing=True).fit(Small(), *small_loaders())
    return folder


def begun(folder, *callbacks, module=None, **options):
    """The module and the weights with which it began to train."""
    module, first = module or Small(), First()
    new_trainer(folder, *callbacks, first, max_epochs=1).fit(module, *small_loaders(), **options)
    return module, first.weights


def test_training_begins_with_the_weights_of_the_file(trained, tmp_path):
    _, weights = begun(tmp_path, StartFrom(trained / "epoch=0.ckpt"))
    assert same(weights, torch.load(trained / "epoch=0.ckpt", weights_only=True)["state_dict"])


def test_new_layers_keep_the_weights_they_were_built_with(trained, tmp_path):
    module = Small()
    module.net[4] = nn.Linear(16, 5)  # other classes
    built = copy.deepcopy(module.state_dict())
    _, weights = begun(tmp_path, StartFrom(trained / "epoch=0.ckpt", new_layers=["net.4"]), module=module)
    theirs = torch.load(trained / "epoch=0.ckpt", weights_only=True)["state_dict"]
    for name, value in weights.items():
        assert torch.equal(value, (built if name.startswith("net.4.") else theirs)[name]), name


def test_a_cut_network_is_started_from_cut_and_may_be_cut_again(trained, tmp_path):
    file = trained / "epoch=2.ckpt"
    module, weights = begun(tmp_path, StartFrom(file))
    assert same(weights, torch.load(file, weights_only=True)["state_dict"])
    assert module.net[2].out_features < 16
    before = plan_of(module).recipe.widths
    again, _ = begun(tmp_path, PFAPruning(keep_params=0.3, at_epoch=0), StartFrom(file))
    assert sum(plan_of(again).recipe.widths.values()) < sum(before.values())


def test_a_resumed_run_goes_on_with_its_own_weights(trained, tmp_path):
    torch.manual_seed(1)
    start = StartFrom(trained / "epoch=0.ckpt")
    new_trainer(tmp_path, start, every_epoch(tmp_path), enable_checkpointing=True, max_epochs=2).fit(Small(), *small_loaders())
    first = First()
    new_trainer(tmp_path, start, first).fit(Small(), *small_loaders(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(first.weights, torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"])


def test_only_a_first_fit_starts_from_the_file(trained, tmp_path):
    trainer = new_trainer(tmp_path, StartFrom(trained / "epoch=0.ckpt"), max_epochs=1)
    module = Small()
    trainer.fit(module, *small_loaders())
    learnt = copy.deepcopy(module.state_dict())
    trainer.validate(module, small_loaders()[1], verbose=False)
    trainer.fit_loop.max_epochs = 1  # nothing more to train
    trainer.fit(module, *small_loaders())
    assert same(module.state_dict(), learnt)


@pytest.mark.parametrize(
    ("arguments", "width", "error", "said"),
    [
        (
            {},
            12,
            MisconfigurationException,
            r"Small cannot start from .*epoch=0.ckpt: .*size mismatch for net.0.*by `new_layers`",
        ),
        ({"new_layers": ["net.3"]}, 16, MisconfigurationException, r"'net.3' of `new_layers` matches no layer of Small"),
        ({"checkpoint": "nowhere.ckpt"}, 16, FileNotFoundError, "nowhere.ckpt"),
    ],
    ids=["another size", "no such layer", "no file"],
)
def test_what_cannot_be_started_from_is_refused(arguments, width, error, said, trained, tmp_path):
    start = StartFrom(**{"checkpoint": trained / "epoch=0.ckpt", **arguments})
    with pytest.raises(error, match=f"(?s){said}"):
        begun(tmp_path, start, module=Small(width))


def test_one_pattern_is_still_a_list():
    with pytest.raises(MisconfigurationException, match="`new_layers` is a list of patterns"):
        StartFrom("some.ckpt", new_layers="net.4")
