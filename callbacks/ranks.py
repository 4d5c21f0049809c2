"""What a Trainer of several processes needs around a cut: one network on all ranks before, one wrapper after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from lit_compress.ranks import share, world_size


def shards(trainer: Trainer) -> bool:
    """Whether the strategy splits parameters among the processes."""
    return any(kind in type(trainer.strategy).__name__ for kind in ("FSDP", "DeepSpeed", "ModelParallel"))


def refuse_strategy(trainer: Trainer) -> None:
    """Refuse, by name, what cannot be cut while it trains.

    Raises:
        MisconfigurationException: If the strategy is neither of one device nor DDP, starts its processes from the running one, or
            has a communication hook that keeps a state.
    """
    strategy = trainer.strategy
    name = type(strategy).__name__
    if shards(trainer):
        raise MisconfigurationException(
            f"{name} shards the parameters, which cannot be cut in flight. Find a recipe on one device, and train the small "
            "network with `ApplyRecipe`, which cuts before sharding."
        )
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise MisconfigurationException(
            f"Pruning runs on one device or under DDP, but the Trainer uses {trainer.world_size} processes under {name}. Set "
            '`strategy="ddp"`, or `devices=1, strategy="auto"`.'
        )
    start = getattr(strategy, "_start_method", "popen")
    if start != "popen":  # `ddp_spawn`, `ddp_fork`, `ddp_notebook`
        raise MisconfigurationException(
            f"{name} starts its processes by {start!r}, and Lightning then loads their weights into the network of the process "
            'that started them, which is not cut and has other sizes. Run a script with `strategy="ddp"`.'
        )
    state = getattr(strategy, "_ddp_comm_state", None)
    if state is not None:  # of PowerSGD or post-local SGD
        raise MisconfigurationException(
            f"The communication hook of {name} keeps a state, {type(state).__name__}, of the gradients' sizes, which a cut "
            "changes. Leave `ddp_comm_state` out; hooks without a state may stay."
        )


@contextmanager
def buffers_of_first(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Give all ranks the buffers of rank 0, as their next training step would; if anything fails inside, each has its own back.

    The running statistics of norms differ between ranks from one step to the next, and an analysis is to see one network.
    """
    wrapper = trainer.strategy.model
    if world_size() == 1 or not (isinstance(wrapper, DistributedDataParallel) and wrapper.broadcast_buffers):
        yield
        return
    ignored = getattr(pl_module, "_ddp_params_and_buffers_to_ignore", ())
    buffers = [buffer for name, buffer in pl_module.named_buffers() if name not in ignored]
    own = [buffer.detach().clone(memory_format=torch.contiguous_format) for buffer in buffers]
    with torch.no_grad():
        for buffer, value in zip(buffers, own, strict=True):
            first = value.clone()
            dist.broadcast(first, 0)
            buffer.copy_(first)
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, value in zip(buffers, own, strict=True):
                buffer.copy_(value)
        raise


@contextmanager
def rewrapped(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Wrap the module for DDP anew afterwards, cut or put back: the old wrapper's buckets and hooks know the old sizes.

    Whatever fails inside must fail on all ranks, since wrapping talks to them: see :func:`~lit_compress.ranks.as_one`.
    """
    try:
        yield
    except Exception:
        _wrap(trainer, pl_module)
        raise
    _wrap(trainer, pl_module)


def _wrap(trainer: Trainer, pl_module: LightningModule) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model = pl_module  # the old wrapper goes first, and its hooks with it
        strategy.configure_ddp()


def over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Mean of each value over the ranks that have logged it; of a value that is synced already, the value."""
    given: dict[str, list[float]] = {}
    for one in share(dict(values)):
        for name, value in one.items():
            given.setdefault(name, []).append(value)
    return {name: sum(logged) / len(logged) for name, logged in given.items()}


def own_state(trainer: Trainer, states: Sequence[Any], whose: str) -> Any:
    """This rank's entry of a list with one of each rank, or None, with a warning, if there are as many ranks no more."""
    if len(states) == trainer.world_size:
        return states[trainer.global_rank]
    rank_zero_warn(
        f"{whose} does not restore the states of the random number generators: the checkpoint holds those of {len(states)} "
        f"process(es) and the Trainer has {trainer.world_size}. The run goes on with other random numbers than it would have had."
    )
    return None
