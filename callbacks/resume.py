"""How a run goes on from a checkpoint of a pruned network as if it had not stopped."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from lit_compress import rng
from lit_compress.callbacks.companions import rebuild_module
from lit_compress.callbacks.ranks import own_state
from lit_compress.checkpoint import write_plan
from lit_compress.ranks import share


def keep_plan_in_checkpoints(pl_module: LightningModule) -> None:
    """Let the module note in each checkpoint what was cut, and be cut to a checkpoint's sizes before the weights load.

    A callback's own load hooks run after the weights, and its save hooks not at all for a file of weights alone. The module's get
    the whole checkpoint, always. They are methods bound to the instance, so that copies and pickles of the module hold their own.
    """
    for hook in (on_load_checkpoint, on_save_checkpoint):
        own = vars(pl_module).get(hook.__name__)
        if getattr(own, "__func__", None) is hook:
            continue
        if own is not None:  # somebody else's, on the instance as well
            vars(pl_module)[f"_lit_compress_{hook.__name__}"] = own
        vars(pl_module)[hook.__name__] = types.MethodType(hook, pl_module)


# Named as on the module: a bound method is pickled by its name.
def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Cut the module to the sizes of the checkpoint, before its weights load."""
    rebuild_module(self, checkpoint)
    own = vars(self).get("_lit_compress_on_load_checkpoint")
    type(self).on_load_checkpoint(self, checkpoint) if own is None else own(checkpoint)


def on_save_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Note in the checkpoint what was cut."""
    write_plan(self, checkpoint)
    own = vars(self).get("_lit_compress_on_save_checkpoint")
    type(self).on_save_checkpoint(self, checkpoint) if own is None else own(checkpoint)


class RandomStates:
    """States of the random number generators of every rank, in the state of a callback, so that a resumed run is the same run.

    Args:
        whose: The callback, for a warning.
    """

    def __init__(self, whose: Callback) -> None:
        self._whose = type(whose).__name__
        self.reset()

    def reset(self) -> None:
        """A run begins; what is resumed loads its states later."""
        self._states: list[dict[str, Any]] | None = None
        self._failed = False

    def on_train_start(self, trainer: Trainer) -> None:
        """Resumed in the middle of an epoch, the rest of that epoch comes first."""
        if trainer.fit_loop.restarted_mid_epoch and (states := self._own(trainer)) is not None:
            rng.restore(states)

    def on_train_epoch_start(self, trainer: Trainer) -> None:
        """Resumed between epochs."""
        if (states := self._own(trainer)) is not None:
            resume_rng(trainer, states)

    def on_exception(self) -> None:
        """Perhaps on this rank alone: a checkpoint that is written now cannot ask the others."""
        self._failed = True

    def state_dict(self) -> list[dict[str, Any]]:
        """One entry a rank; all ranks must call it."""
        return [rng.collect()] if self._failed else share(rng.collect())

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Inverse of :meth:`state_dict`; they are restored where training goes on."""
        self._states = states

    def _own(self, trainer: Trainer) -> Mapping[str, Any] | None:
        """This rank's, only once."""
        states, self._states = self._states, None
        return None if states is None else own_state(trainer, states, self._whose)


def resume_rng(trainer: Trainer, states: Mapping[str, Any]) -> None:
    """Go on with the random numbers where the checkpoint was written, so that a resumed run is the same run.

    The Trainer has made the iterator of a resumed epoch before this, with other random numbers. It is made again where an
    uninterrupted run makes it: after the hooks at the start of the epoch, right before the first batch.
    """
    rng.restore(states)
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    if fetcher is None or not (getattr(loop, "is_resuming", False) or loop.epoch_loop.restarting):
        return
    if fetcher.length is None:  # it has fetched ahead, to see the end come
        iter(fetcher)
    else:
        fetcher.iterator = _Later(fetcher)


class _Later(Iterator[Any]):
    """An iterator over a fetcher's loader that is made when the first batch is asked for."""

    def __init__(self, fetcher: Any) -> None:
        self._fetcher = fetcher

    @override
    def __next__(self) -> Any:
        self._fetcher.iterator = iter(self._fetcher.combined_loader)
        return next(self._fetcher.iterator)
