"""Reading what named layers of a network give, while it runs and without changing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import Tensor, nn

OUTPUT = ""  # of the network itself, which `named_modules()` lists under this name


def pairs_of(taps: Mapping[str, str] | Sequence[str], argument: str) -> dict[str, str]:
    """The student's layers to the teacher's, from a mapping, or from a list of names that both have.

    Raises:
        ValueError: If it is one name alone.

    Example:
        >>> pairs_of(["layer1", "layer2"], "taps")
        {'layer1': 'layer1', 'layer2': 'layer2'}
    """
    if isinstance(taps, str):
        raise ValueError(f"Argument `{argument}` must list layers, or map the student's to the teacher's, but got {taps!r}.")
    return dict(taps) if isinstance(taps, Mapping) else {name: name for name in taps}


class Taps:
    """Outputs of layers by name, read during a forward.

    Args:
        network: The network. Hooks are on it inside :meth:`reading` alone.
        names: Names of layers, as in ``network.named_modules()``; ``""`` is the network's own output.

    Raises:
        ValueError: If the network has no layer of a name.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
        >>> with Taps(network, ["0", ""]).reading() as found:
        ...     _ = network(torch.ones(4, 2))
        >>> found["0"].shape, bool((found[""] == found["0"].relu()).all())
        (torch.Size([4, 3]), True)
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        layers = dict(network.named_modules())
        self._layers = {}
        for name in names:
            if name not in layers:
                close = get_close_matches(name, [known for known in layers if known], n=3)
                hint = f"; perhaps {' or '.join(map(repr, close))}" if close else ""
                raise ValueError(f"{type(network).__name__} has no layer {name!r} to read{hint}.")
            self._layers[name] = layers[name]
        # Layers whose output may be changed in place by what follows, as by `ReLU(inplace=True)`. The first forward shows which.
        self._overwritten: set[str] | None = None

    @contextmanager
    def reading(self, *, or_nothing: bool = False) -> Iterator[dict[str, Tensor]]:
        """Fill the yielded dict, by name, with what the layers give in the one forward that runs inside.

        Args:
            or_nothing: Whether it is fine that none of the layers runs.

        Raises:
            ValueError: If a layer does not run, runs twice, or gives something else than one tensor.
        """
        found: dict[str, Tensor] = {}
        given: dict[str, tuple[Tensor, int]] = {}
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.callback(layer.register_forward_hook(partial(self._keep, name, found, given)).remove)
            yield found
        if not found and or_nothing:
            return
        if missing := [name for name in self._layers if name not in found]:
            raise ValueError(f"Layer {missing[0]!r} is to be read, but this forward does not run it.")
        changed = {name for name, (output, version) in given.items() if output._version != version}
        if self._overwritten is None:
            self._overwritten = changed
        elif new := changed - self._overwritten:
            raise ValueError(
                f"What layer {min(new)!r} gives is changed in place in this forward but was not in the first one. Read the layer "
                "that changes it, or let that one work out of place."
            )

    def _keep(
        self,
        name: str,
        found: dict[str, Tensor],
        given: dict[str, tuple[Tensor, int]],
        layer: nn.Module,
        inputs: Any,
        output: Any,
    ) -> None:
        if name in found:
            raise ValueError(
                f"Layer {name!r} runs more than once in a forward, so that its name does not say which output to read."
            )
        if not isinstance(output, Tensor):
            raise ValueError(
                f"Layer {name!r} gives a {type(output).__name__}, and only a tensor can be read: name a layer inside it instead."
            )
        given[name] = output, output._version
        found[name] = output.clone() if self._overwritten is None or name in self._overwritten else output
