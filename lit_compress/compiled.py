"""Networks compiled by ``torch.compile``: seen as they are written, and compiled anew after a cut."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled code runs as it is written, so that hooks and traces see every operation."""
    if not _in_use():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def forget() -> None:
    """Drop all compiled code; what is still used is compiled anew.

    Code for sizes that are gone would be looked through on each call, and counts against the limit of recompilations, after
    which a function is not compiled at all.
    """
    if _in_use():
        torch._dynamo.reset()


def _in_use() -> bool:
    return "torch._dynamo" in sys.modules  # importing it takes a second
