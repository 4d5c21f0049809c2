"""Tensors inside a network that hooks can see: sums of branches, activations, and the blocks that can be padded back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

Vector: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.int64]]"
# One entry for each class of channels and a last one, never set, that -1 (a channel that stays whatever is cut) reads.
Marks: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]"


@dataclass(frozen=True)
class Tap:
    """A tensor that a hook can see: what a module takes or gives.

    Args:
        module: Its path.
        side: Whether it is an input or the output.
        call: Which call of the module in one forward, from 0; None for all.
        position: Which of the positional inputs.
    """

    module: str
    side: Literal["input", "output"] = "output"
    call: int | None = None
    position: int = 0


@dataclass(frozen=True)
class SumPoint:
    """A sum of two branches.

    Args:
        channels: The class of each of its channels; -1 for one that stays whatever is cut.
        tap: Where a hook can see it, before any activation; None if no module takes or gives it.
        projection: Whether both branches end in a layer of their own, so that neither is an identity.
        block: The module at the end of the one branch that does, if the other is an identity: it can be padded back.
    """

    channels: Vector
    tap: Tap | None
    projection: bool
    block: str | None


@dataclass(frozen=True)
class ActivationPoint:
    """What an activation function gives.

    Args:
        function: Its name, as ``"relu"`` or ``"sigmoid"``.
        channels: The class of each of its channels; -1 for one that stays whatever is cut.
        dim: The dimension that they lie along.
        shape: Of the tensor, for the samples traced.
        tap: Where a hook can see it, in all calls of a module if that runs only once; None if no module takes or gives it.
        pooled: Classes of them whose maximum over positions is taken afterwards.
    """

    function: str
    channels: Vector
    dim: int
    shape: tuple[int, ...]
    tap: Tap | None
    pooled: frozenset[int] = frozenset()


@dataclass(frozen=True)
class PadPoint:
    """A module whose channels are scattered to the slots of a skip, so that they may be cut without the skip.

    Args:
        module: Its path.
        sources: The class of each of its own channels.
        positions: The slot of each of them.
        slots: The class of each slot, that is, of each channel of the skip.
        present: Whether it is padded back already.
    """

    module: str
    sources: Vector
    positions: Vector
    slots: Vector
    present: bool
