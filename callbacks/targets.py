"""The one size or share that a pruning callback is asked for."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_fabric.utilities.exceptions import MisconfigurationException

from lit_compress.callbacks.schedule import CutSchedule


def one_target(own: str, values: Mapping[str, float | None], *, needed: bool) -> dict[str, float]:
    """The target given, by name.

    Args:
        own: The method's own target, in (0, 1]; the others are shares of the original network, in (0, 1).
        values: All that may be given.
        needed: Whether one must be.

    Raises:
        MisconfigurationException: If more than one is given, none where one is needed, or a value is out of range.
    """
    target = {name: value for name, value in values.items() if value is not None}
    if len(target) > 1 or (needed and not target):
        many = "exactly" if needed else "at most"
        raise MisconfigurationException(f"Give {many} one of {sorted(values)} but got {sorted(target)}.")
    for name, value in target.items():
        if not 0 < value <= 1 or (value == 1 and name != own):
            raise MisconfigurationException(f"Argument `{name}` must lie in (0, 1{']' if name == own else ')'} but got {value}.")
    return target


def for_this_cut(target: Mapping[str, float], schedule: CutSchedule, own: str) -> dict[str, float]:
    """The target of the next of several cuts: one for the whole network is approached in equal ratios."""
    return {name: value if name == own else value**schedule.progress for name, value in target.items()}
