"""LightningModules for tests, written as users write them, and the small trainers that run them."""

import contextlib
import copy
import random

import numpy as np
import pytest
import pytorch_lightning
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from lit_compress.callbacks import PruningCallback
from lit_compress.plan import plan_of

EPOCHS, BATCHES = 7, 9  # the odd batch leaves half an accumulation at the end of each epoch


def digits(first: int, count: int) -> TensorDataset:
    """Embedded digits, images ``(1, 8, 8)`` in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[first : first + count] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    return TensorDataset(images, torch.tensor(labels[first : first + count]))


def train_loader(**options) -> DataLoader:
    return DataLoader(digits(0, 32 * BATCHES), batch_size=32, **{"shuffle": True, **options})


def val_loader(count: int = 150) -> DataLoader:
    return DataLoader(digits(1000, count), batch_size=64)  # batches of 64, 64 and 22


class Theirs(LightningModule):
    """Knows nothing of the package. Odd names of arguments, outputs kept in a list, list states, dropout, two param groups."""

    def __init__(self, width: int = 12, rate: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
        )
        self.head = nn.Linear(4 * width, 10)
        self.areas = MulticlassAUROC(10)  # keeps all predictions in lists
        self.right = MulticlassAccuracy(10, average="micro")
        self.losses: list[torch.Tensor] = []
        self.rate = rate

    def forward(self, images):
        return self.head(self.body(images))

    def training_step(self, pair, position):
        images, labels = pair
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, pair, position):
        images, labels = pair
        logits = self(images)
        self.losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        self.right(logits, labels)
        self.areas.update(logits.softmax(1), labels)
        self.log("val/right", self.right)
        self.log("val/area", self.areas)
        self.log("val/mean", logits.mean())
        self.log("val/loss", F.cross_entropy(logits, labels))

    def on_validation_epoch_end(self):
        self.log("val/total", torch.stack(self.losses).sum())
        self.losses.clear()

    test_step = validation_step

    def on_test_epoch_end(self):
        self.losses.clear()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            [
                {"params": self.body.parameters(), "weight_decay": 0.1, "part": "body"},
                {"params": self.head.parameters(), "lr": 2 * self.rate, "part": "head"},
            ],
            lr=self.rate,
        )
        steps = EPOCHS * ((BATCHES + 1) // 2)  # two batches a step
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [self.rate, 2 * self.rate], total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Small(LightningModule):
    """Two hidden layers on vectors of 6; the least that trains."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def vectors(count: int = 96, seed: int = 0) -> TensorDataset:
    """Vectors of 6 with a class of three that they show."""
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def small_loaders(batch_size: int = 32):
    return DataLoader(vectors(), batch_size, shuffle=True), DataLoader(vectors(50, seed=1), batch_size)


def new_trainer(folder, *callbacks, **options) -> Trainer:
    """A Trainer that says nothing and writes under ``folder``."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options = {"accelerator": "cpu", "max_epochs": 3, "enable_checkpointing": False, **quiet, **options}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **options)


def every_epoch(folder, **options) -> ModelCheckpoint:
    """Keeps the file of every epoch: ``epoch=0.ckpt`` and so on."""
    return ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", **options)


def fit_theirs(folder, *callbacks, module=None, ckpt_path=None, **options):
    """Train :class:`Theirs` as its users do: clipped, accumulated, in bf16, shuffled. Returns module and trainer."""
    seed_everything(3, verbose=False)
    module = module or Theirs()
    hard = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "precision": "bf16-mixed", "enable_checkpointing": True}
    trainer = new_trainer(folder, *callbacks, **{"max_epochs": EPOCHS, **hard, **options})
    trainer.fit(module, train_loader(), val_loader(), ckpt_path=ckpt_path)
    return module, trainer


# ---------------------------------------------------------------- what older versions lack

needs_averaging = pytest.mark.skipif(
    not hasattr(pytorch_lightning.callbacks, "EMAWeightAveraging"), reason="this Lightning averages no weights"
)


# ---------------------------------------------------------------- time


class Clock:
    """A clock that only sleeping moves, so that no other load on the machine is measured."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        self.now += 1e-12  # what never sleeps takes some time as well
        return self.now


CLOCK = Clock()  # in place of `lit_compress.report.time`


# ---------------------------------------------------------------- what there is to remember


def rng_states():
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def same(one, other) -> bool:
    """Whether two nested values are equal to the bit."""
    if isinstance(one, torch.Tensor):
        alike = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return alike and bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def without_times(callback_state: dict) -> dict:
    """A pruning callback's state without the latencies, which no two runs share."""
    state = copy.deepcopy(callback_state)
    for report in state["reports"]:
        del report["before"]["latency"], report["after"]["latency"], report["time_share"]
    return state


def everything(trainer, module) -> dict:
    """All that a cut may touch, copied."""
    states = [metric.metric_state for metric in module.modules() if hasattr(metric, "metric_state")]
    return copy.deepcopy(
        {
            "weights": dict(module.state_dict()),
            "grads": {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None},
            "trainable": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
            "modes": {name: part.training for name, part in module.named_modules()},
            "hooks": {name: len(part._forward_hooks) for name, part in module.named_modules()},
            "sizes": {name: repr(part) for name, part in module.named_modules()},
            "plain": {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str, list))},
            "plan": "lit_compress_plan" in vars(module),
            "metrics": states,
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "logged": dict(trainer.callback_metrics),
            "loops": trainer.fit_loop.state_dict(),
            "stage": str(trainer.state.stage),
            "loggers": [id(logger) for logger in trainer.loggers],
            "rng": rng_states(),
        }
    )


class Draws(Callback):
    """Draws how much to drop out at the start of each epoch."""

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.body[-1].p = 0.1 + 0.1 * torch.rand(1).item() + 0.1 * np.random.rand() + 0.1 * random.random()


def outcome(trainer, module):
    """All that a run ends with, but for times."""
    (pruning,) = (callback for callback in trainer.callbacks if isinstance(callback, PruningCallback))
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "callback": without_times(pruning.state_dict()),
        "metrics": dict(trainer.callback_metrics),
        "steps": trainer.global_step,
        "plan": plan_of(module),
        "rng": rng_states(),
    }


class At(Callback):
    """Calls a function at the start of an epoch."""

    def __init__(self, epoch: int, function):
        self.epoch, self.function = epoch, function

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.function(trainer, pl_module)


@contextlib.contextmanager
def leaving_no_trace(trainer, module, *, of=None):
    """Fails if anything that :func:`everything` copies is different afterwards, an exception or not."""
    before = everything(trainer, module)
    identities = [id(parameter) for parameter in module.parameters()]
    try:
        yield
    finally:
        after = everything(trainer, module)
        assert identities == [id(parameter) for parameter in module.parameters()]
        for key in of or before:
            assert same(before[key], after[key]), key
