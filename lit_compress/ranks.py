"""Several processes that act as one: each sees what the others have, and what fails on one fails on all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class OtherRankError(ValueError):
    """Something failed on another rank; the message says on which, and what."""


@dataclass(frozen=True)
class _Failure:
    """Stands in for what a rank would have shared."""

    text: str


def world_size() -> int:
    """Processes of the running group; 1 if there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the running group; 0 if there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def share(value: T) -> list[T]:
    """What every rank gives, by rank. All ranks must call it, in the same order.

    Args:
        value: Anything that can be pickled; tensors on the CPU.

    Raises:
        OtherRankError: If a rank has failed inside :func:`as_one` instead.

    Example:
        >>> share("what the only process has")
        ['what the only process has']
    """
    if world_size() == 1:
        return [value]
    given = _gather(value)
    failures = [f"Rank {number} failed: {one.text}" for number, one in enumerate(given) if isinstance(one, _Failure)]
    if failures:
        raise OtherRankError("; ".join(failures))
    return given


@contextmanager
def as_one() -> Iterator[None]:
    """What raises inside on any rank raises on every rank, so that none waits for one that has left.

    A rank that fails gives its failure in place of what it would have given to its next :func:`share`; the others meet it at
    theirs, at the latest when they leave the context. Other collective calls inside need a ``share`` right before them. Contexts
    may be nested.

    Raises:
        OtherRankError: If another rank failed, and this one did not.

    Example:
        >>> with as_one():
        ...     share(1)
        [1]
    """
    try:
        yield
        share(None)
    except Exception as error:
        if world_size() > 1 and not _is_told(error):
            _gather(_Failure(f"{type(error).__name__}: {error}"))
            vars(error)["_lit_compress_told"] = True
        raise


def _is_told(error: BaseException | None) -> bool:
    """Whether all ranks know of an error, or of one that it was made from."""
    while error is not None:
        if isinstance(error, OtherRankError) or "_lit_compress_told" in vars(error):
            return True
        error = error.__cause__
    return False


def _gather(value: Any) -> list[Any]:
    given: list[Any] = [None] * world_size()
    dist.all_gather_object(given, value)
    return given
