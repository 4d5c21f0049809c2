"""A checkpoint on disk is cut, with all that goes with it, and training goes on as after a cut in the running Trainer."""

import copy
import math

import pytest
import pytorch_lightning
import torch
from pytorch_lightning import seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_compress import Recipe, load_pruned, shrink_checkpoint
from lit_compress.callbacks import PFAPruning
from lit_compress.modules import PrunableMixin
from lit_compress.plan import plan_of
from tests.modules import Small, every_epoch, new_trainer, same, vectors


class Prunable(PrunableMixin, Small):
    """Adam in two groups, and a schedule."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))

    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters(), "lr": 0.01}, {"params": self.net[2:].parameters(), "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


def fit(folder, *callbacks, ckpt_path=None, epochs=4):
    seed_everything(0, verbose=False)
    module = Prunable()
    average = pytorch_lightning.callbacks.EMAWeightAveraging(decay=0.7)
    trainer = new_trainer(folder, average, *callbacks, max_epochs=epochs, enable_checkpointing=True)
    trainer.fit(module, DataLoader(vectors(), 32), DataLoader(vectors(50, seed=1), 32), ckpt_path=ckpt_path)
    return module, trainer


def step_of(module, x):
    return module.net(x)


def shrunk(content, recipe):
    module = Prunable()
    return shrink_checkpoint(
        module, content, recipe, torch.rand(2, 6), optimizers=module.configure_optimizers()[0], forward_fn=step_of
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if not hasattr(pytorch_lightning.callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning averages no weights")
    """A plain run's file after two epochs, and the recipe, file and weights of a run that was cut right then."""
    folder = tmp_path_factory.mktemp("runs")
    pruning = PFAPruning(energy=0.8, at_epoch=2)
    cut, _ = fit(folder / "cut", pruning, every_epoch(folder / "cut_files"))
    best = ModelCheckpoint(folder / "files", monitor="val/loss", save_top_k=-1, filename="{epoch}")
    fit(folder / "plain", best, EarlyStopping("val/loss", patience=100), epochs=2)
    content = torch.load(folder / "files" / "epoch=1.ckpt", weights_only=True)
    last = torch.load(folder / "cut_files" / "epoch=3.ckpt", weights_only=True)
    return folder, content, pruning.reports[0].recipe, cut, last


def test_training_goes_on_as_after_the_same_cut_in_a_running_trainer(run, tmp_path):
    _, content, recipe, expected, last = run
    before = copy.deepcopy(content)
    torch.save(shrunk(content, recipe), tmp_path / "small.ckpt")
    assert same(content, before)
    module, _ = fit(tmp_path, every_epoch(tmp_path / "files"), ckpt_path=tmp_path / "small.ckpt")
    assert recipe.widths == {"net.0": module.net[0].out_features, "net.2": module.net[2].out_features}
    assert same(dict(module.state_dict()), dict(expected.state_dict()))
    mine = torch.load(tmp_path / "files" / "epoch=3.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert same(mine[key], last[key]), key
    assert plan_of(module).to_dict() == plan_of(expected).to_dict()


def test_the_small_file_loads_anywhere(run):
    _, content, recipe, _, _ = run
    module = load_pruned(Prunable, shrunk(content, recipe))
    torch.testing.assert_close(
        module.net(torch.ones(1, 6)), load_pruned(Prunable(), shrunk(content, recipe)).net(torch.ones(1, 6))
    )
    assert module.net[0].out_features == recipe.widths["net.0"] < 20


def test_a_file_is_cut_twice(run):
    _, content, recipe, _, _ = run
    again = Recipe(keep={"net.0": range(recipe.widths["net.0"] - 1)})
    twice = shrunk(shrunk(content, recipe), again)
    module = load_pruned(Prunable, twice)
    assert module.net[0].out_features == recipe.widths["net.0"] - 1
    assert plan_of(module).recipe.keep["net.0"] == recipe.keep["net.0"][:-1]


def test_rankings_begin_anew(run):
    states = shrunk(run[1], run[2])["callbacks"]
    best = next(state for name, state in states.items() if name.startswith("ModelCheckpoint"))
    assert best["best_model_score"] is None
    assert best["best_k_models"] == {}
    assert math.isinf(best["kth_value"])
    stopping = next(state for name, state in states.items() if name.startswith("EarlyStopping"))
    assert stopping["best_score"] == math.inf
    assert stopping["wait_count"] == 0
    assert any(state.get("best_k_models") for state in run[1]["callbacks"].values())  # there was something to forget


@pytest.mark.parametrize(
    ("recipe", "optimizers", "says"),
    [
        (Recipe(keep={"net.0": (0, 20)}), True, "20 channels"),
        (Recipe(keep={"net.9": (0,)}), True, "'net.9'"),
        (Recipe(keep={"net.0": (0,)}), False, r"1 optimizer\(s\), but 0 came"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_content_stays(run, recipe, optimizers, says):
    content = copy.deepcopy(run[1])
    module = Prunable()
    given = module.configure_optimizers()[0] if optimizers else ()
    with pytest.raises(ValueError, match=says):
        shrink_checkpoint(module, content, recipe, torch.rand(2, 6), optimizers=given, forward_fn=step_of)
    assert same(content, run[1])


def test_averages_of_stochastic_weight_averaging_are_cut(run):
    content = copy.deepcopy(run[1])
    average = {f"module.{name}": tensor for name, tensor in content["state_dict"].items()}
    content["callbacks"]["StochasticWeightAveraging"] = {"n_averaged": 2, "average_model_state": average}
    smaller = shrunk(content, run[2])
    cut = smaller["callbacks"]["StochasticWeightAveraging"]["average_model_state"]
    assert same({f"module.{name}": tensor for name, tensor in smaller["state_dict"].items()}, cut)
    assert F.linear(torch.ones(1, 6), cut["module.net.0.weight"]).shape[1] == run[2].widths["net.0"]
