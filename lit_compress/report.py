"""What a network costs: parameters, mult-adds and time; and the tables that say so."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from lit_compress.counting import LayerCost, layer_costs
from lit_compress.surgery import ForwardFn, call


def count_parameters(model: nn.Module, *, trainable: bool = True) -> int:
    """Number of elements in the parameters of a network, shared ones counted once.

    Args:
        model: The network.
        trainable: Count only those with ``requires_grad``.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad or not trainable)


def count_bytes(model: nn.Module) -> int:
    """Bytes of a network's weights and buffers, shared ones counted once.

    Example:
        >>> count_bytes(nn.Linear(3, 2))
        32
    """
    return sum(tensor.nbytes for tensor in {id(one): one for one in (*model.parameters(), *model.buffers())}.values())


def count_mult_adds(model: nn.Module, example_inputs: Any, *, count_relu: bool = False, forward_fn: ForwardFn = call) -> int:
    """Multiply-adds of one forward in evaluation mode, over the whole batch given.

    Convolutions, linear layers and matrix products count, as PyTorch's own flop counter counts them (half of its figure); biases,
    norms and activations do not. A compressed linear layer counts as the path that its evaluation takes.

    Args:
        model: The network.
        example_inputs: Inputs of the size meant; a batch of one gives the usual figure. A tuple or list holds positional
            arguments.
        count_relu: Count as the tables of *Efficient machine learning under a budget* (T2) do. Added are one for every number
            that an ``nn.ReLU`` gives, one for every bias that a linear layer adds, and the window for every number that a pooling
            module gives; ReLUs and pools that are no modules do not count. Hashed and tensor layers count as dense ones, ACDC
            layers by their transforms.
        forward_fn: How to run the network, where ``model(*example_inputs)`` is not it.

    Example:
        >>> count_mult_adds(nn.Linear(3, 2), torch.zeros(1, 3))
        6
    """
    return cost_table(model, example_inputs, count_relu=count_relu, forward_fn=forward_fn).mult_adds


@dataclass(frozen=True)
class CostTable:
    """Parameters and mult-adds of a network, layer by layer. ``str()`` gives the table for people.

    Args:
        rows: Modules with parameters or mult-adds of their own.
    """

    rows: tuple[LayerCost, ...]

    @property
    def parameters(self) -> int:
        """Of the whole network, shared ones counted once."""
        return sum(row.parameters for row in self.rows)

    @property
    def mult_adds(self) -> int:
        """Of one forward."""
        return sum(row.mult_adds for row in self.rows)

    def renderable(self) -> Table:
        """The table for a rich console."""
        table = Table(title="Parameters and mult-adds")
        for column in ("layer", "kind", "output", "parameters", "mult-adds"):
            table.add_column(column, justify="left" if column in ("layer", "kind") else "right")
        for row in self.rows:
            shape = ", ".join(map(str, row.shape or ()))
            table.add_row(escape(row.name), row.kind, shape, f"{row.parameters:,}", f"{row.mult_adds:,}")
        table.add_section()
        table.add_row("[bold]together[/bold]", "", "", f"{self.parameters:,}", f"{self.mult_adds:,}")
        return table

    def __str__(self) -> str:
        return as_text(self.renderable())


def cost_table(model: nn.Module, example_inputs: Any, *, count_relu: bool = False, forward_fn: ForwardFn = call) -> CostTable:
    """Parameters and mult-adds of each layer; arguments and conventions are those of :func:`count_mult_adds`.

    Example:
        >>> table = cost_table(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)), torch.zeros(1, 3))
        >>> [(row.name, row.parameters, row.mult_adds) for row in table.rows]
        [('0', 8, 6), ('2', 3, 2)]
    """
    return CostTable(layer_costs(model, lambda: forward_fn(model, example_inputs), count_relu=count_relu))


@dataclass(frozen=True)
class Latency:
    """Time of one forward in milliseconds: median and quartiles of several runs after warm-up."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ms ({self.lower:.2f}-{self.upper:.2f})"

    @classmethod
    def of(cls, times: Sequence[float]) -> Latency:
        """Of the times of single runs, at least two."""
        lower, median, upper = statistics.quantiles(times, n=4)
        return cls(median, lower, upper)


def timed(run: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Milliseconds that one run takes; an accelerator is waited for, before and after."""
    on_cuda = torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if on_cuda:
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def measure_latency(
    run: Callable[[], Any], *, device: torch.device | str = "cpu", seconds: float = 0.5, runs: int = 50
) -> Latency:
    """Time a forward.

    Args:
        run: Runs the network once.
        device: Where it runs; an accelerator is waited for.
        seconds: Stop after about this time, but not before five runs; the warm-up takes as long at most.
        runs: Stop after this many runs.
    """

    def repeat(least: int, most: int) -> list[float]:
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < least or (len(times) < most and time.perf_counter() < end):
            times.append(timed(run, device))
        return times

    with torch.no_grad():
        repeat(2, 5)
        return Latency.of(repeat(5, max(runs, 5)))


@dataclass(frozen=True)
class LayerRow:
    """One layer of a :class:`LayerTable`: channels and weights before and after, and why it is as it is."""

    name: str
    channels: int
    kept: int
    parameters: int
    parameters_kept: int
    note: str = ""


@dataclass(frozen=True)
class LayerTable:
    """What a recipe does to each layer. ``str()`` gives the table for people.

    Args:
        method: What chose the channels.
        rows: The layers in the order of the forward.
        sizes: Name of a size of the whole network to its value before and after.
    """

    method: str
    rows: tuple[LayerRow, ...]
    sizes: Mapping[str, tuple[int, int]]

    def cells(self) -> tuple[list[str], list[list[Any]]]:
        """The columns' names, and the rows, for a logger's table."""
        columns = ["layer", "channels", "channels kept", "weights", "weights kept", "note"]
        return columns, [list(astuple(row)) for row in self.rows]

    def renderable(self) -> Table:
        """The table for a rich console."""
        table = Table(title=escape(self.method))
        for column in ("layer", "channels", "kept", "weights", "kept", "note"):
            table.add_column(column, justify="left" if column in ("layer", "note") else "right")
        for row in self.rows:
            numbers = (str(row.channels), str(row.kept), f"{row.parameters:,}", f"{row.parameters_kept:,}")
            table.add_row(escape(row.name), *numbers, escape(row.note))
        for name, (before, after) in self.sizes.items():
            table.add_row(
                f"[bold]{escape(name)}[/bold]", "", "", f"{before:,}", f"{after:,}", f"{after / max(before, 1):.1%} kept"
            )
        return table

    def __str__(self) -> str:
        return as_text(self.renderable())


def as_text(table: Table, width: int = 130) -> str:
    """A rich table as plain text."""
    console = Console(file=StringIO(), width=width)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
