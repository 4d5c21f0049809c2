"""Back to before a cut, inside a running Trainer, if fine-tuning does not bring back what the cut has cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from lit_compress.callbacks.companions import averages_of, forget_bests, optimizers_of
from lit_compress.callbacks.loggers import Outlets
from lit_compress.callbacks.outcome import CutReport
from lit_compress.callbacks.ranks import rewrapped
from lit_compress.callbacks.recovery import Recovery
from lit_compress.plan import plan_of
from lit_compress.snapshot import Snapshot


@dataclass(frozen=True)
class Kept:
    """A moment of a run that can be gone back to.

    Args:
        networks: The module with its optimizers, and the averages of its weights.
        reports: The cuts that had been made.
    """

    networks: list[Snapshot]
    reports: list[CutReport]

    @classmethod
    def of(cls, trainer: Trainer, pl_module: LightningModule, reports: list[CutReport]) -> Kept:
        """Copy what is trained as it is now."""
        averages = [Snapshot.of(average) for average in averages_of(trainer)]
        return cls([Snapshot.of(pl_module, optimizers_of(trainer)), *averages], list(reports))

    def restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put module, optimizers and averages back; schedules go on as they are."""
        first, *averages = self.networks
        with rewrapped(trainer, pl_module):
            first.restore(pl_module, optimizers_of(trainer))
            for snapshot, average in zip(averages, averages_of(trainer), strict=True):
                snapshot.restore(average)
        forget_bests(trainer)
        outlets, plan = Outlets(trainer), plan_of(pl_module)
        if outlets.open and plan is None:
            outlets.write("recipe.json", lambda path: path.unlink(missing_ok=True))
        elif outlets.open and plan is not None:
            outlets.recipe(plan.recipe, {"restored": True})

    def to_dict(self) -> dict[str, Any]:
        """Tensors and builtin types only, for a checkpoint."""
        return {"networks": [one.to_dict() for one in self.networks], "reports": [one.to_dict() for one in self.reports]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Kept:
        """Inverse of :meth:`to_dict`."""
        reports = [CutReport.from_dict(one) for one in data["reports"]]
        return cls([Snapshot.from_dict(one) for one in data["networks"]], reports)


class Fallback:
    """Sees to it that a run does not end with a network that has lost more than it may.

    Args:
        max_drop: Points that ``monitor`` may be worse by than before the first cut, as for :class:`Recovery`.
        monitor: A fraction, such as ``"val/accuracy"``, that the module logs on its validation data.
        mode: Whether it is better smaller or larger.
        patience: Validations without a new best after which fine-tuning has failed.
    """

    def __init__(self, *, max_drop: float, monitor: str, mode: Literal["min", "max"], patience: int) -> None:
        self.monitor = monitor
        self._arguments: dict[str, Any] = {"max_drop": max_drop, "mode": mode, "patience": patience}
        self.reset()

    def reset(self) -> None:
        """Another run begins."""
        self.recovery = Recovery(**self._arguments)
        self.must_go_back = False
        self._before: Kept | None = None  # the cut that is being tried
        self._held: Kept | None = None  # the last network that was within the bound
        self._ended = False

    @property
    def strength(self) -> float:
        """Share of the channels chosen for removal that the next cut removes."""
        return self.recovery.strength

    @property
    def searching(self) -> bool:
        """Whether it is not decided yet how much can be cut."""
        return self.recovery.searching

    @property
    def open(self) -> bool:
        """Whether a cut was made that the end of the run may still have to go back from."""
        return not self._ended and (self._held or self._before) is not None and self.recovery.reference is not None

    def check(self, metrics: Mapping[str, float]) -> None:
        """Refuse what ``max_drop`` cannot be measured by.

        Raises:
            MisconfigurationException: If the metric is not logged in validation, or is no fraction.
        """
        if self.monitor not in metrics:
            raise MisconfigurationException(
                f"`max_drop` goes by `monitor={self.monitor!r}`, which the module does not log on its validation data; there are "
                f"{sorted(metrics)}."
            )
        if not 0 <= metrics[self.monitor] <= 1:
            raise MisconfigurationException(
                f"`max_drop` is in points, hundredths of a fraction, but `{self.monitor}` is {metrics[self.monitor]:.4g}. Give a "
                "`monitor` such as 'val/accuracy', with its `mode`."
            )

    def begin(self, before: Kept, metrics: Mapping[str, float]) -> None:
        """A cut was made, of a network with these metrics."""
        if not self.searching:
            self._before = before
        self.recovery.begin(metrics[self.monitor])

    def settle(self) -> None:
        """Nothing was left to cut: there is nothing to recover from."""
        self.recovery.settle()
        self._before = None

    def watch(self, trainer: Trainer, pl_module: LightningModule, reports: list[CutReport], metrics: Mapping[str, float]) -> None:
        """Look at a validation after the first cut, and decide whether to go back before the next epoch."""
        if self.recovery.reference is None:
            return
        value = metrics[self.monitor]
        outlets = Outlets(trainer)
        if outlets.open:
            outlets.values({"compress/drop": self.recovery.drop(value)})
        if self.recovery.holds(value):
            self._held = Kept.of(trainer, pl_module, reports)
        if self.searching and not self.must_go_back:
            tried = self.strength
            verdict = self.recovery.watch(value)
            self.must_go_back = verdict == "back"
            if verdict == "held":
                self.settle()
            elif self.must_go_back:
                self._tell(value, tried)

    def go_back(self, trainer: Trainer, pl_module: LightningModule) -> list[CutReport]:
        """Put back the network before the cut, or the best that has held if no other cut is to be tried.

        Returns:
            The reports of the cuts that it has. Unless :attr:`searching` is over, it is to be cut again, by :attr:`strength`.
        """
        self.must_go_back = False
        kept = self._before
        if self.recovery.exhausted:
            kept = self._before if self.strength == 0 else self._held
            self.settle()
        if kept is None:
            raise RuntimeError("There is nothing to go back to.")
        kept.restore(trainer, pl_module)
        return list(kept.reports)

    def end(self, trainer: Trainer, pl_module: LightningModule, value: float) -> list[CutReport] | None:
        """The last epoch is over: if the network is not within the bound, put back one that was.

        Returns:
            The reports of the cuts of what was put back; None if the network stays.
        """
        kept = self._held or self._before
        if not self.open or kept is None:
            return None
        self._ended = True
        if self.recovery.holds(value):
            return None
        kept.restore(trainer, pl_module)
        self.settle()
        rank_zero_warn(
            f"Training ends with {self._found(value)} The network is put back to "
            + ("the last one within it." if kept.reports else "before the cut: no compression was possible.")
        )
        return list(kept.reports)

    def _found(self, value: float) -> str:
        return f"{self.monitor} {self.recovery.drop(value):.2f} points below; max_drop allows {self.recovery.max_drop:g}."

    def _tell(self, value: float, tried: float) -> None:
        found = f"Cut by {tried:g} of what was chosen, the network has {self._found(value)}"
        if not self.recovery.exhausted:
            rank_zero_info(f"{found} Going back to before the cut; {self.strength:g} of it is tried next.")
        elif self.strength:
            rank_zero_info(f"{found} Going back to the network cut by {self.strength:g} of it.")
        else:
            rank_zero_warn(f"{found} No compression was possible within it: going back to before the cut.")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: builtin types and tensors."""
        kept = {"before": self._before, "held": self._held}
        return {
            "recovery": self.recovery.state_dict(),
            "must_go_back": self.must_go_back,
            **{name: None if one is None else one.to_dict() for name, one in kept.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.reset()
        self.recovery.load_state_dict(state["recovery"])
        self.must_go_back = state["must_go_back"]
        self._before, self._held = (None if state[name] is None else Kept.from_dict(state[name]) for name in ("before", "held"))
