"""Losses added to any module's training step: added, logged, several at once, and gone when they are to go."""

import copy
import pickle

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lit_compress.callbacks.added_loss import add_loss, remove_loss
from tests.modules import Small, new_trainer, same, small_loaders, vectors


def squares(module):
    return 0.01 * sum(parameter.square().sum() for parameter in module.net.parameters())


def ones(module):
    return 0.02 * sum(parameter.abs().sum() for parameter in module.net.parameters())


class Adds(Callback):
    def __init__(self, **losses):
        self.losses = losses

    def on_fit_start(self, trainer, pl_module):
        for name, loss in self.losses.items():
            add_loss(pl_module, name, loss)


class ByHand(Small):
    """Has in its own step what the others have added."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + squares(self) + ones(self)


class GivesDict(Small):
    def training_step(self, batch, batch_idx):
        return {"loss": super().training_step(batch, batch_idx), "more": 1}


class TakesBatchOnly(Small):
    def training_step(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Skips(Small):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class SkipsByHand(Skips):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if loss is None else loss + squares(self) + ones(self)


def trained(kind, folder, *callbacks, **options):
    seed_everything(4, verbose=False)
    module = kind()
    trainer = new_trainer(folder, *callbacks, **options)
    trainer.fit(module, *small_loaders())
    return module, trainer


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}], ids=str
)
@pytest.mark.parametrize(("kind", "like"), [(Small, ByHand), (GivesDict, ByHand), (TakesBatchOnly, ByHand), (Skips, SkipsByHand)])
@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_a_loss_that_is_added_trains_as_one_written_into_the_step(kind, like, options, tmp_path):
    module, trainer = trained(kind, tmp_path, Adds(squares=squares), Adds(ones=ones), **options)
    expected, _ = trained(like, tmp_path, **options)
    torch.testing.assert_close(dict(module.state_dict()), dict(expected.state_dict()), rtol=1e-6, atol=1e-7)
    assert {"train/squares", "train/ones"} <= trainer.callback_metrics.keys()


def test_what_is_logged_is_the_mean_over_the_epoch(tmp_path):
    seen = []

    def loss(module):
        seen.append(squares(module).item())
        return squares(module)

    _, trainer = trained(Small, tmp_path, Adds(mine=loss), max_epochs=1)
    assert len(seen) == 3
    assert len(set(seen)) == 3
    assert trainer.callback_metrics["train/mine"].item() == pytest.approx(sum(seen) / 3, rel=1e-6)


def test_an_added_loss_takes_its_own_place_and_leaves_none_behind():
    module = Small()
    own = module.training_step
    batch = next(iter(DataLoader(vectors(), 8)))
    plain = own(batch, 0)
    add_loss(module, "a", lambda module: torch.tensor(1.0))
    add_loss(module, "b", lambda module: torch.tensor(2.0))
    add_loss(module, "a", lambda module: torch.tensor(4.0))
    torch.testing.assert_close(module.training_step(batch, 0), plain + 6)
    remove_loss(module, "a")
    remove_loss(module, "never there")
    torch.testing.assert_close(module.training_step(batch, 0), plain + 2)
    remove_loss(module, "b")
    assert "training_step" not in vars(module)
    remove_loss(module, "b")


def test_a_step_that_is_on_the_instance_already_is_put_back():
    module = Small()
    step = lambda batch, batch_idx: torch.tensor(3.0)  # noqa: E731  # as compiling a module leaves it
    vars(module)["training_step"] = step
    add_loss(module, "a", lambda module: torch.tensor(1.0))
    assert module.training_step(None, 0).item() == 4
    remove_loss(module, "a")
    assert vars(module)["training_step"] is step


def test_a_copy_steps_on_its_own_weights():
    module = Small()
    add_loss(module, "a", squares)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.net[0].weight.mul_(3)
    batch = next(iter(DataLoader(vectors(), 8)))
    torch.testing.assert_close(twin.training_step(batch, 0), type(twin).training_step(twin, batch, 0) + squares(twin))
    assert not torch.allclose(twin.training_step(batch, 0), module.training_step(batch, 0))
    again = pickle.loads(pickle.dumps(twin))
    torch.testing.assert_close(again.training_step(batch, 0), type(twin).training_step(twin, batch, 0))
    assert same(dict(again.state_dict()), dict(twin.state_dict()))


def test_manual_optimization_is_refused_by_name(tmp_path):
    class ManuallyTrained(Small):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(MisconfigurationException, match=r"ManuallyTrained optimizes manually.*`train/a` cannot be added"):
        add_loss(ManuallyTrained(), "a", squares)


def test_a_parameter_that_only_the_added_loss_uses_is_trained(tmp_path):
    class Held(Small):
        def __init__(self):
            super().__init__()
            self.extra = nn.Parameter(torch.ones(3))

    module, _ = trained(Held, tmp_path, Adds(extra=lambda module: module.extra.square().sum()))
    assert (module.extra < 0.9).all()
