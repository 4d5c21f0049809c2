"""Names of layers: under a pattern, and as another network gives them."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import NamedTuple


class Relocation(NamedTuple):
    """How names change between a network and one that holds it: a prefix to add, and one to drop."""

    add: str
    drop: str


def relocation(names: Collection[str], present: Collection[str]) -> Relocation | None:
    """Find names in a network that holds theirs as a submodule, or is held by it.

    Args:
        names: Names wanted, of layers or of parameters.
        present: Names there are.

    Returns:
        The change that makes all of ``names`` present, or None if there is none or more than one.

    Example:
        >>> relocation(["conv1"], ["net.conv1", "net.fc"])
        Relocation(add='net.', drop='')
        >>> relocation(["net.conv1"], ["conv1", "fc"])
        Relocation(add='', drop='net.')
    """
    there = set(present)
    if there.issuperset(names):
        return Relocation("", "")
    first = min(names, key=len)
    found = {
        Relocation(prefix, "")
        for prefix in (name.removesuffix(first) for name in there if name.endswith("." + first))
        if there.issuperset(prefix + name for name in names)
    }
    parts = first.split(".")
    for depth in range(1, len(parts)):
        prefix = ".".join(parts[:depth]) + "."
        if all(name.startswith(prefix) for name in names) and there.issuperset(name.removeprefix(prefix) for name in names):
            found.add(Relocation("", prefix))
    return found.pop() if len(found) == 1 else None


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern such as ``"layer1.*"`` matches a layer's name; a name matches itself, whatever characters it holds."""
    return name == pattern or fnmatchcase(name, pattern)
