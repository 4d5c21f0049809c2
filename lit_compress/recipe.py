"""Which output channels of each layer stay: plain data between choosing and cutting."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import index
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lit_compress.migration import migrated

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which output channels of each layer survive.

    Plain data on purpose: it reads in a diff, logs as an artifact, and cuts a fresh network before weights load. Indices are
    always relative to the network that was never cut; :meth:`then` composes one cut with the next.

    Args:
        keep: Layer name, as in ``model.named_modules()``, to the ascending indices of the output channels kept. A layer
            that is tied to a named one (by a skip connection, say) follows it and need not be named.
        method: What chose them, written so that a reader can redo it, e.g. ``"pfa(energy=0.95)"``.
        original: Output channels of every layer of the network that the recipe was made on. It is the recipe's
            fingerprint: a network that differs is refused. Empty for a recipe written by hand.
        padded: Module at the end of a residual block to the channels of the skip that its own are scattered to, after the cut.
            Such a block is cut on its own. Its skip must be an identity, or zero-padded.

    Raises:
        ValueError: If a layer keeps nothing, its indices are not ascending and distinct, or one lies outside the layer.

    Example:
        >>> Recipe(keep={"conv1": (0, 3)}, method="by hand").widths
        {'conv1': 2}
    """

    keep: Mapping[str, tuple[int, ...]]
    method: str = "by hand"
    original: Mapping[str, int] = field(default_factory=dict)
    padded: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("keep", "original", "padded"):
            given = getattr(self, name)
            if not isinstance(given, Mapping) or not all(isinstance(layer, str) for layer in given):
                raise ValueError(f"Argument `{name}` must map layer names but got {given!r}.")
        keep = {layer: _indices(layer, channels) for layer, channels in self.keep.items()}
        original = {layer: _integer(layer, width) for layer, width in self.original.items()}
        for layer, channels in keep.items():
            if original and layer not in original:
                raise ValueError(f"Layer {layer!r} is in `keep` but not in `original`, which lists every layer of the network.")
            if channels[-1] >= original.get(layer, channels[-1] + 1):
                raise ValueError(f"Layer {layer!r} has {original[layer]} channels but would keep channel {channels[-1]}.")
        # Frozen to the bottom: nobody can edit a recipe that a checkpoint or a plan also holds.
        object.__setattr__(self, "keep", MappingProxyType(keep))
        object.__setattr__(self, "original", MappingProxyType(original))
        padded = {module: _integer(module, width) for module, width in self.padded.items()}
        object.__setattr__(self, "padded", MappingProxyType(padded))

    def __reduce__(self) -> tuple[Any, ...]:
        return Recipe.from_dict, (self.to_dict(),)

    @property
    def widths(self) -> dict[str, int]:
        """Output channels left in each layer named."""
        return {layer: len(channels) for layer, channels in self.keep.items()}

    def then(self, following: Recipe) -> Recipe:
        """One recipe for two cuts in a row; its method is ``"a then b"``, or of the same one twice ``"a, 2 times"``.

        Args:
            following: A recipe made on the network that this one has cut.

        Returns:
            A recipe relative to the network that was never cut.

        Raises:
            ValueError: If ``following`` keeps a channel that this recipe has removed, or was made on a network of other widths.

        Example:
            >>> first = Recipe(keep={"conv1": (0, 3, 5)})
            >>> dict(first.then(Recipe(keep={"conv1": (1, 2)})).keep)
            {'conv1': (3, 5)}
        """
        for layer, width in following.original.items():
            left = len(self.keep[layer]) if layer in self.keep else self.original.get(layer, width)
            if width != left:
                raise ValueError(
                    f"The following recipe was made on {width} channels of layer {layer!r}, but this one leaves {left}."
                )
        keep = dict(self.keep)
        for layer, channels in following.keep.items():
            before = keep.get(layer)
            if before is not None and channels[-1] >= len(before):
                raise ValueError(f"Layer {layer!r} was cut to {len(before)} channels but would keep channel {channels[-1]}.")
            keep[layer] = channels if before is None else tuple(before[channel] for channel in channels)
        # Layers that only the second forward ran were whole until then.
        later = {layer: width for layer, width in following.original.items() if layer not in self.keep}
        original = {**later, **self.original} if self.original or not self.keep else {}
        methods = [method for recipe in (self, following) if recipe.keep for method in single_methods(recipe.method)]
        padded = {**self.padded, **following.padded}
        return Recipe(keep=keep, method=joint_method(methods) or following.method, original=original, padded=padded)

    def renamed(self, *, add: str = "", drop: str = "") -> Recipe:
        """The same recipe for a network that holds this one's as a submodule, or is held by it.

        Args:
            add: Prefix to put before every layer name, with its dot: ``"net."``.
            drop: Prefix to take away. Layers without it are left out.

        Example:
            >>> dict(Recipe(keep={"conv1": (0,)}).renamed(add="net.").keep)
            {'net.conv1': (0,)}
        """

        def rename(names: Mapping[str, Any]) -> dict[str, Any]:
            return {add + name.removeprefix(drop): value for name, value in names.items() if name.startswith(drop)}

        return Recipe(keep=rename(self.keep), method=self.method, original=rename(self.original), padded=rename(self.padded))

    def to_dict(self) -> dict[str, Any]:
        """Builtin types only, so that JSON and ``torch.load(weights_only=True)`` take it."""
        return {
            "format": FORMAT,
            "method": self.method,
            "keep": {layer: list(channels) for layer, channels in self.keep.items()},
            "original": dict(self.original),
            "padded": dict(self.padded),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: If the format is from the future, or a field is missing or malformed.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("keep"), Mapping):
            raise ValueError("Expected a recipe with a field `keep` (layer name to kept channels) but got something else.")
        migrated({"format": FORMAT, **data}, FORMAT, {}, "recipe")  # one written by hand may say no format
        fields = {name: data.get(name, {}) for name in ("original", "padded")}
        return cls(keep=data["keep"], method=data.get("method", "by hand"), **fields)

    def to_json(self) -> str:
        """The recipe as JSON, one layer a line."""
        data = self.to_dict()
        lines = [f"    {json.dumps(layer)}: {json.dumps(channels)}" for layer, channels in data.pop("keep").items()]
        head = json.dumps(data, indent=2).removesuffix("\n}")
        return f'{head},\n  "keep": {{\n' + ",\n".join(lines) + "\n  }\n}\n"

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_json` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file is not a recipe.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no text at all
            raise ValueError(f"{path} is not a recipe: {error}.") from error
        return cls.from_dict(data)


def single_methods(method: str) -> list[str]:
    """What a recipe's method says of each cut, one by one.

    Example:
        >>> single_methods("a then b, 2 times")
        ['a', 'b', 'b']
    """
    found = []
    for part in method.split(" then ") if method else []:
        name, _, count = part.removesuffix(" times").rpartition(", ") if part.endswith(" times") else ("", "", "")
        found += [name] * int(count) if name and count.isdigit() else [part]
    return found


def joint_method(methods: Iterable[str]) -> str:
    """Inverse of :func:`single_methods`: methods in a row that are the same are said once.

    Example:
        >>> joint_method(["a", "b", "b"])
        'a then b, 2 times'
    """
    counted = [(method, sum(1 for _ in alike)) for method, alike in groupby(methods)]
    return " then ".join(method if count == 1 else f"{method}, {count} times" for method, count in counted)


def _indices(layer: str, channels: Iterable[int]) -> tuple[int, ...]:
    try:
        indices = tuple(channels)
    except TypeError:
        raise ValueError(f"Layer {layer!r} must keep a list of channel indices but got {channels!r}.") from None
    if not indices:
        raise ValueError(f"Layer {layer!r} would keep no channel; leave it out of `keep` to leave it whole.")
    indices = tuple(_integer(layer, index) for index in indices)
    if indices[0] < 0 or any(a >= b for a, b in pairwise(indices)):
        raise ValueError(f"Channels of layer {layer!r} must be non-negative and ascend without repeats but got {indices}.")
    return indices


def _integer(layer: str, value: Any) -> int:
    try:
        if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):  # a mask is not a list of indices
            raise TypeError
        return index(value)
    except TypeError:
        raise ValueError(f"Channels of layer {layer!r} must be integers but got {value!r}.") from None
