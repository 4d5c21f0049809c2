"""States of the random number generators: kept aside, stored in a checkpoint, put back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def collect() -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators (every CUDA device included), as builtin types and tensors.

    ``torch.load(weights_only=True)`` reads the result.
    """
    version, keys, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state()
    states: dict[str, Any] = {
        "python": [version, list(keys), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(words).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore(states: Mapping[str, Any]) -> None:
    """Put back what :func:`collect` returned."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, words.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


@contextmanager
def isolated() -> Iterator[None]:
    """Whatever draws random numbers inside leaves no trace outside."""
    states = collect()
    try:
        yield
    finally:
        restore(states)
