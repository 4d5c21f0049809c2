"""Files of earlier versions, brought to the present format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Migration: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def migrated(data: Mapping[str, Any], present: int, migrations: Mapping[int, Migration], what: str) -> Mapping[str, Any]:
    """Bring what was read to the present format, one format after the other.

    Args:
        data: With its ``format``.
        present: The format that this version writes.
        migrations: For each earlier format, what makes the next one of it.
        what: What it is, for the message.

    Raises:
        ValueError: If the format is from the future, or none that ever was.

    Example:
        >>> migrated({"format": 1, "wide": 3}, 2, {1: lambda data: {"width": data["wide"]}}, "layer")
        {'width': 3, 'format': 2}
    """
    while (found := data.get("format")) != present:
        if not isinstance(found, int) or found not in migrations:
            raise ValueError(
                f"The {what} has format {found} but this version of lit-compress reads formats up to {present}; "
                "upgrade lit-compress."
            )
        data = {**migrations[found](data), "format": found + 1}
    return data
