"""From a network and data to a recipe: trace, gather, and ask a method how much is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from math import ceil, prod
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from lit_compress import ranks, rng
from lit_compress.graph import ChannelGraph, ChannelGroup, trace
from lit_compress.information import PIB
from lit_compress.inputs import LayerInput, inputs_of, watched_inputs
from lit_compress.labels import FIXED
from lit_compress.latency import Stopwatch, widest_within
from lit_compress.naming import matches
from lit_compress.plan import Plan, plan_of
from lit_compress.rankings import Method, Ranking, Rankings
from lit_compress.recipe import Recipe
from lit_compress.report import LayerRow, LayerTable, count_parameters
from lit_compress.scores import Magnitude, Slimming
from lit_compress.skips import Marks, Vector
from lit_compress.spectra import PFA, GroupSpectrum
from lit_compress.statistics.gather import Progress, batch_size, first_samples, gather, in_order, to_device
from lit_compress.surgery import ForwardFn, call, make_plan, removed_by

METHODS: Mapping[str, type[Method]] = {"pfa": PFA, "pib": PIB, "magnitude": Magnitude, "slimming": Slimming}


class _Limits(NamedTuple):
    """Bounds on every width."""

    min_width: int
    round_to: int

    @classmethod
    def checked(cls, min_width: int, round_to: int) -> _Limits:
        """Refuses what is below 1."""
        if min_width < 1:
            raise ValueError(f"Argument `min_width` must be at least 1 but got {min_width}.")
        if round_to < 1:
            raise ValueError(f"Argument `round_to` must be at least 1 but got {round_to}.")
        return cls(min_width, round_to)


class Analysis:
    """The statistics of one pass over the data: every recipe that they give can be asked for without another pass.

    Made by :func:`analyze`.

    Attributes:
        graph: Which channels are tied.
        method: What the statistics are for.
        rankings: Name of a group (of its first layer) to what the method found out about it.
        whole: Layer to the reason why it is left whole.
        samples: Samples seen.
        inputs: Layer to what it was given, if asked for, to compensate a cut.
        stopwatch: What times the network as a recipe would cut it, for ``keep_latency``.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        method: Method,
        rankings: Rankings,
        whole: Mapping[str, str],
        samples: int,
        example_batch: int,
        parameters: int,
        before: Plan | None,
        inputs: Mapping[str, LayerInput] | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.graph, self.method, self.rankings, self.whole, self.samples = graph, method, dict(rankings), dict(whole), samples
        self._batch = example_batch
        self._parameters = parameters
        self._before = before
        self.inputs, self.stopwatch = inputs, stopwatch

    @property
    def spectra(self) -> dict[str, GroupSpectrum]:
        """Name of a group to its spectrum; empty for other methods than PFA."""
        return {name: found for name, found in self.rankings.items() if isinstance(found, GroupSpectrum)}

    def recipe(
        self,
        *,
        energy: float | None = None,
        keep_channels: float | None = None,
        keep_params: float | None = None,
        keep_mult_adds: float | None = None,
        keep_latency: float | None = None,
        min_width: int = 1,
        round_to: int = 1,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> Recipe:
        """The channels to keep: by the method's own rule, such as PFA-KL, or to meet one target.

        Args:
            energy: PFA alone: share of each layer's response energy to keep, in (0, 1].
            keep_channels: Methods that score channels one by one: share of the channels to keep, in (0, 1].
            keep_params: Share of the original network's trainable parameters to keep, in (0, 1). The largest energy (or share of
                the channels) that meets it is searched for, with the real size of the cut network; the result is at or below.
            keep_mult_adds: The same for mult-adds.
            keep_latency: The same for the time of a forward, measured with :attr:`stopwatch` on networks of the sizes in question
                and on the original, in turns. Time is noisy and may rise where a network gets narrower: the search is that of
                :func:`~lit_compress.latency.widest_within`. In a running process group, rank 0's measurements count.
            min_width: Channels that each layer keeps at least.
            round_to: Round each width up to a multiple of this, which some hardware is faster with. A target is met all the same.
            include: Patterns (``"layer1.*"``) of the layers to cut; tied layers are cut only if all of them match.
            exclude: Patterns of layers to leave whole.

        Returns:
            A recipe relative to the network that was analysed. Hand it to :func:`~lit_compress.cut`.

        Raises:
            ValueError: If more than one target is given, or one that is another method's, a value is out of range, a pattern
                matches no layer, the target cannot be reached (the message names the smallest size that can), or there is nothing
                to time.
        """
        sizes = {"keep_params": keep_params, "keep_mult_adds": keep_mult_adds, "keep_latency": keep_latency}
        given = {"energy": energy, "keep_channels": keep_channels, **sizes}
        targets = {name: value for name, value in given.items() if value is not None}
        knob = self.method.knob
        for name in targets.keys() & {"energy", "keep_channels"} - {knob}:
            raise ValueError(f"`{name}` is no target of {self.method.name}: give {self.method.targets}.")
        if len(targets) > 1:
            raise ValueError(f"Give at most one of {self.method.targets} but got {sorted(targets)}.")
        limits = _Limits.checked(min_width, round_to)
        chosen = self._chosen(include, exclude)
        if not targets:
            widths, rule = self.method.own_widths(chosen)
            return self._recipe(self._removed(chosen, widths, limits), self.method.describe(rule))
        ((name, value),) = targets.items()
        if name == knob:
            return self._recipe(
                self._removed(chosen, self.method.widths(chosen, value), limits), self.method.describe(f"{name}={value:g}")
            )
        return self._search(chosen, name, value, limits)

    def random_recipe(
        self,
        *,
        keep_params: float,
        seed: int,
        min_width: int = 1,
        round_to: int = 1,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> Recipe:
        """Random widths and random channels at a size, to compare a method with chance.

        Each group of channels keeps a share drawn uniformly and raised to one common power, the smallest that meets the size.

        Args:
            keep_params: Share of the original network's trainable parameters to keep, in (0, 1); the result is at or below.
            seed: Of the draw.
            min_width: As for :meth:`recipe`.
            round_to: As for :meth:`recipe`.
            include: As for :meth:`recipe`.
            exclude: As for :meth:`recipe`.

        Raises:
            ValueError: If a value is out of range, a pattern matches no layer, or ``keep_params`` is below what the fewest
                channels in each layer leave.

        Source: the random recipes of PFA, section 4.1.
        """
        if not 0 < keep_params < 1:
            raise ValueError(f"Argument `keep_params` must lie in (0, 1) but got {keep_params}.")
        limits, chosen = _Limits.checked(min_width, round_to), self._chosen(include, exclude)
        generator = torch.Generator().manual_seed(seed)
        drawn = {name: float(torch.rand((), generator=generator)) for name in chosen}
        shuffled = {
            name: replace(found, order=torch.randperm(len(found.order), generator=generator), inactive=0)
            for name, found in chosen.items()
        }

        def at(power: float) -> Marks:
            widths = {name: max(ceil(len(found.order) * drawn[name] ** power), 1) for name, found in shuffled.items()}
            return self._removed(shuffled, widths, limits)

        target, low, high = keep_params * self.original("parameters"), 0.0, 1e3
        if self._parameters_without(at(high)) > target:
            raise ValueError(
                f"`keep_params={keep_params:g}` cannot be reached: with `min_width={min_width}` and `round_to={round_to}` the "
                "smallest network is larger."
            )
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if self._parameters_without(at(middle)) <= target else (middle, high)
        return self._recipe(at(high), f"random(keep_params={keep_params:g}, seed={seed})")

    def milder(self, recipe: Recipe, share: float) -> Recipe:
        """A recipe that removes, of the channels that another one removes, those that go first.

        Args:
            recipe: Of this analysis, or for the network that was analysed.
            share: Share of its removed channels to remove, in [0, 1], in each group of tied channels (rounded down).

        Raises:
            ValueError: If ``share`` is out of range, or the recipe does not fit the network.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"Argument `share` must lie in [0, 1] but got {share}.")
        removed = removed_by(self.graph, recipe)
        chosen, widths = {}, {}
        for name, found in self.rankings.items():
            gone = torch.from_numpy(removed[found.group.classes])[found.order]
            chosen[name] = replace(found, order=torch.cat([found.order[gone], found.order[~gone]]), inactive=0)
            widths[name] = len(gone) - int(share * int(gone.sum()))
        return self._recipe(self._removed(chosen, widths, _Limits(1, 1)), f"{share:g} of {recipe.method}")

    def parameters(self, recipe: Recipe | None = None) -> int:
        """Trainable parameters of the network as analysed, or as a recipe would cut it."""
        return self._parameters_without(self._marks(recipe))

    def mult_adds(self, recipe: Recipe | None = None) -> int:
        """Mult-adds of convolutions and linear layers for one sample, as analysed or as a recipe would cut it.

        Products that hold no weight (attention) are not in it: no cut changes them.
        """
        return self._mult_adds_without(self._marks(recipe))

    def original(self, size: Literal["parameters", "mult_adds"]) -> int:
        """The same figure for the network before anything was ever cut out of it."""
        if self._before is None:
            return self.parameters() if size == "parameters" else self.mult_adds()
        shapes = {**self.graph.shapes, **self._before.shapes}
        if size == "mult_adds":
            return self.graph.mult_adds(shapes) // self._batch
        grown = [prod(shape) - prod(self.graph.shapes[name]) for name, shape in self._before.shapes.items()
                 if name in self.graph.trainable]  # fmt: skip
        return self._parameters + sum(grown)

    def ratios(self, recipe: Recipe | None = None) -> dict[str, float]:
        """``R_n`` and ``R_w``: what is left of all layers' outputs and of their weights, as analysed or as a recipe cuts it.

        Fractions of the network before anything was ever cut out of it, as :class:`~lit_compress.metrics.CompressionRatios`
        counts them, over all layers that the forward analysed runs: classifiers that a training step adds count, too.
        """
        removed = self._marks(recipe)
        now = {use.weight: self.graph.shape_without(use.weight, removed) for use in self.graph.uses}
        built = {**self.graph.shapes, **({} if self._before is None else self._before.shapes)}
        left, whole = self.graph.outputs_and_weights(now), self.graph.outputs_and_weights(built)
        return {name: part / max(of, 1) for name, part, of in zip(("R_n", "R_w"), left, whole, strict=True)}

    def preview(self, recipe: Recipe) -> LayerTable:
        """What a recipe would do, layer by layer, without doing it.

        Args:
            recipe: As :meth:`recipe` gives it, or written by hand.

        Returns:
            A table whose ``str()`` is for people and whose rows are for programs.

        Raises:
            ValueError: If the recipe does not fit the network.
        """
        removed = removed_by(self.graph, recipe)
        rows = []
        for name, layer in self.graph.layers.items():
            rows.append(
                LayerRow(
                    name=name,
                    channels=len(layer.classes),
                    kept=int((~removed[layer.classes]).sum()),
                    parameters=prod(self.graph.shapes[layer.weight]),
                    parameters_kept=prod(self.graph.shape_without(layer.weight, removed)),
                    note=self._note(name),
                )
            )
        sizes = {
            "parameters": (self.parameters(), self._parameters_without(removed)),
            "mult-adds": (self.mult_adds(), self._mult_adds_without(removed)),
        }
        return LayerTable(method=recipe.method, rows=tuple(rows), sizes=sizes)

    def kept(self, recipe: Recipe) -> dict[str, int]:
        """How many channels a recipe keeps of each group in ``rankings``."""
        kept = {}
        for name, found in self.rankings.items():
            position = found.group.members[found.group.name]
            stays = list(recipe.keep.get(found.group.name, range(len(position))))
            kept[name] = int((position[stays] != FIXED).sum())
        return kept

    def figures(self, recipe: Recipe) -> dict[str, Figure]:
        """Pictures of what the method found and of where a recipe cuts, by name."""
        return self.method.figures(self.rankings, self.kept(recipe))

    def _note(self, layer: str) -> str:
        tied = [
            found.group.name for found in self.rankings.values() if layer in found.group.members and found.group.name != layer
        ]
        return self.whole.get(layer, f"follows {tied[0]}" if tied else "")

    def _chosen(self, include: Sequence[str], exclude: Sequence[str]) -> dict[str, Ranking]:
        for pattern in (*include, *exclude):
            if not any(matches(name, pattern) for name in self.graph.layers):
                raise ValueError(f"Pattern {pattern!r} matches no layer; the layers are {', '.join(self.graph.layers)}.")
        return {name: found for name, found in self.rankings.items() if wanted(found.group, include, exclude)}

    def _removed(self, chosen: Mapping[str, Ranking], widths: Mapping[str, int], limits: _Limits) -> Marks:
        """The classes that leave, if each group keeps about as many channels as ``widths`` says."""
        padded = {source for pad in self.graph.pads for source in pad.sources.tolist()}
        removed = self.graph.mark()
        # A padded block chooses among the channels whose slot in the skip stays, so the skips choose first.
        for name, found in sorted(chosen.items(), key=lambda item: not padded.isdisjoint(item[1].group.classes.tolist())):
            available = torch.from_numpy(~removed[found.group.classes])
            stays = found.kept(widths[name], limits.min_width, limits.round_to, available).numpy()
            stays = self._with_a_slot_each(found, stays, available.numpy())
            removed[np.delete(found.group.classes, stays)] = True
            self.graph.mark_slots(removed)
        return removed

    def _recipe(self, removed: Marks, method: str) -> Recipe:
        keep = {}
        for name, layer in self.graph.layers.items():
            left = ~removed[layer.classes]
            if layer.own and not left.all():
                keep[name] = tuple(np.flatnonzero(left).tolist())
        original = {name: len(layer.classes) for name, layer in self.graph.layers.items()}
        recipe = Recipe(
            keep=keep, method=method, original=original, padded={pad.module: len(pad.slots) for pad in self.graph.pads}
        )
        return replace(recipe, padded=make_plan(self.graph, recipe).recipe.padded)

    def _with_a_slot_each(self, found: Ranking, stays: Vector, available: Any) -> Vector:
        """As many of a skip's channels, but with at least one slot for each block that is padded back to it."""
        place = {position: index for index, position in enumerate(found.order.tolist())}
        needed: set[int] = set()
        for pad in self.graph.pads:
            mine = np.flatnonzero(np.isin(found.group.classes, pad.slots[pad.positions]) & available)
            if len(mine):
                needed.add(max(mine.tolist(), key=lambda position: place[position]))
        others = sorted(set(stays.tolist()) - needed, key=lambda position: -place[position])
        return np.array(sorted({*needed, *others[: max(len(stays) - len(needed), 0)]}), dtype=np.int64)

    def _search(self, chosen: Mapping[str, Ranking], name: str, share: float, limits: _Limits) -> Recipe:
        """The largest value of the method's own target whose cut network is at most the share of the original one."""
        if not 0 < share < 1:
            raise ValueError(f"Argument `{name}` must lie in (0, 1) but got {share}.")
        steps = self.method.steps(chosen)

        @cache
        def at(step: int) -> Marks:
            return self._removed(chosen, self.method.widths(chosen, steps[step]), limits)

        find = self._widest_in_time if name == "keep_latency" else self._widest_of_size
        step, smallest = find(name, share, len(steps), at)
        if step is None:
            rounded = f" and `round_to={limits.round_to}`" if limits.round_to > 1 else ""
            raise ValueError(
                f"`{name}={share:g}` cannot be reached: with `min_width={limits.min_width}`{rounded} the smallest network has "
                f"{smallest}.{self._largest_whole()} Raise `{name}`, or leave fewer layers out."
            )
        return self._recipe(at(step), self.method.describe(f"{name}={share:g}"))

    def _largest_whole(self) -> str:
        """A sentence on the layers that are left whole, which may be why a target is out of reach."""
        whole = self.whole.keys() & self.graph.layers.keys()
        if not whole:
            return ""
        largest = max(sorted(whole), key=lambda name: prod(self.graph.shapes[self.graph.layers[name].weight]))
        count = f"{len(whole)} of {len(self.graph.layers)} layers are left whole"
        return f" {count}; the largest of them is {largest!r}: {self.whole[largest]}."

    def _widest_of_size(self, name: str, share: float, steps: int, at: Callable[[int], Marks]) -> tuple[int | None, str]:
        """The last step within a size, which grows along the path, and what the first one has."""
        what: Literal["parameters", "mult_adds"] = "parameters" if name == "keep_params" else "mult_adds"
        size = self._parameters_without if name == "keep_params" else self._mult_adds_without
        original = self.original(what)
        smallest = size(at(0))
        low, high = 0, steps - 1  # the recipe at `low` meets the target, if any does
        while low < high:
            middle = (low + high + 1) // 2
            if size(at(middle)) <= share * original:
                low = middle
            else:
                high = middle - 1
        reached = smallest <= share * original
        return low if reached else None, f"{smallest / original:.4f} of the original's {original} {what}"

    def _widest_in_time(self, name: str, share: float, steps: int, at: Callable[[int], Marks]) -> tuple[int | None, str]:
        """The widest step that was measured to be within a time, and what the fastest one took."""
        stopwatch = self.stopwatch
        if stopwatch is None:
            raise ValueError(f"`{name}` needs something to time: `analyze(..., stopwatch=Stopwatch(model, batch))`.")

        def ratio(step: int) -> float:
            plan = make_plan(self.graph, self._recipe(at(step), name))
            return ranks.share(stopwatch.compare(plan).ratio if ranks.rank() == 0 else 0.0)[0]

        with ranks.as_one():
            step, fastest = widest_within(steps, lambda step: at(step).tobytes(), ratio, share)
        return step, f"{fastest:.4f} of the original's latency at batch size {stopwatch.batch_size}"

    def _marks(self, recipe: Recipe | None) -> Marks:
        return self.graph.mark() if recipe is None else removed_by(self.graph, recipe)

    def _parameters_without(self, removed: Marks) -> int:
        graph = self.graph
        trainable = graph.tensors.keys() & graph.trainable
        return self._parameters - sum(prod(graph.shapes[name]) - prod(graph.shape_without(name, removed)) for name in trainable)

    def _mult_adds_without(self, removed: Marks) -> int:
        graph = self.graph
        return sum(use.positions * prod(graph.shape_without(use.weight, removed)) for use in graph.uses) // self._batch


def analyze(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    method: Literal["pfa", "pib", "magnitude", "slimming"] | Method = "pfa",
    example_inputs: Any = None,
    forward_fn: ForwardFn | None = None,
    max_samples: int | None = None,
    progress: Progress | None = None,
    skips: Literal["share", "pad"] = "share",
    compensate: bool | Literal["linear"] = False,
    stopwatch: Stopwatch | None = None,
) -> Analysis:
    """Find out how many channels each layer of a network needs on some data, changing nothing.

    In a running process group, all ranks call it on the same network, and all get the same analysis: of a plain ``DataLoader``
    each reads its share, of what cannot be shared out each reads what it is given.

    Args:
        model: The network, on its device. It is analysed in evaluation mode and left as it was.
        loader: Batches. A plain shuffled ``DataLoader`` is read in its data set's order. The data decide the recipe: give the
            domain that the small network is for.
        method: What the statistics are for: Principal Filter Analysis (``"pfa"``), the information of sigmoid units (``"pib"``),
            the size of weights (``"magnitude"``) or of the scales of batch norms (``"slimming"``); or one of the objects behind
            these names, with options of its own.
        example_inputs: Inputs to trace the network with; the first samples of ``loader`` if None.
        forward_fn: Runs the network on a batch as ``loader`` gives it. By default the first entry of a batch that is a tuple or a
            list (of inputs and targets) goes to ``model``.
        max_samples: Use this many samples, drawn at random with a fixed seed where the loader is a plain ``DataLoader``,
            otherwise the first ones up to the end of a batch. None for all. Each layer needs at least as many samples as it has
            channels, or it is left whole.
        progress: Wraps the loader in a progress bar, given the number of batches or None.
        skips: ``"share"``: layers tied by a skip connection keep the same channels, chosen on the sum of the branches.
            ``"pad"``: a block with an identity or zero-padded skip is cut on its own, and its output scattered back to the
            width of the skip.
        compensate: Also gather the mean input of each layer, so that ``cut(..., inputs=analysis.inputs)`` can fold what the
            removed channels gave on average into biases. ``"linear"``: the covariances as well, to fold what the channels kept
            tell about them into weights.
        stopwatch: What times the network for ``analysis.recipe(keep_latency=...)``. By default one on the first batch of
            ``loader``, or none if ``example_inputs`` are given.

    Returns:
        The analysis.

    Raises:
        ValueError: If the method is unknown, the loader is empty, a response is not finite, or another rank fails.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> analysis = analyze(net, [torch.randn(32, 4)])
        >>> analysis.recipe(energy=0.9).widths
        {'0': 3}
    """
    chosen = METHODS[method]() if isinstance(method, str) and method in METHODS else method
    if not isinstance(chosen, Method):
        raise ValueError(f"Argument `method` must be one of {sorted(METHODS)} or a Method but got {method!r}.")
    if skips not in ("share", "pad"):
        raise ValueError(f"Argument `skips` must be 'share' or 'pad' but got {skips!r}.")
    if compensate not in (False, True, "linear"):
        raise ValueError(f"Argument `compensate` must be True, False or 'linear' but got {compensate!r}.")
    pad_back: Any = "identity" if skips == "pad" else ()
    run_batch = forward_fn or _run_first
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with ranks.as_one(), rng.isolated():
        whole = in_order(loader, max_samples=max_samples)
        if example_inputs is None:  # all ranks trace with the same samples, where the loader allows it
            first, whole = _peek(whole)
            example = to_device(first_samples(first), device)
            stopwatch = stopwatch or Stopwatch(model, to_device(first, device), forward_fn=run_batch)
            graph = trace(model, lambda: run_batch(model, example), pad_back=pad_back)
        else:
            example = to_device(example_inputs, device)
            graph = trace(model, lambda: (forward_fn or call)(model, example), pad_back=pad_back)
        watched = chosen.watched(model, graph)
        asked = watched_inputs(model, graph, covariances=compensate == "linear") if compensate else {}
        watched = {**asked, **watched}
        mine = in_order(loader, max_samples=max_samples, rank=ranks.rank(), world_size=ranks.world_size())
        loader = whole if ranks.world_size() == 1 or mine is loader else mine
        batches = loader if progress is None else progress(loader, _length(loader))
        samples = 0
        if watched:
            samples = gather(
                model,
                batches,
                watched,
                lambda batch: run_batch(model, to_device(batch, device)),
                max_samples=None if max_samples is None else ceil(max_samples / ranks.world_size()),
            )
        found = chosen.rank(model, graph, watched)
    return Analysis(
        graph,
        chosen,
        *found,
        samples=samples,
        example_batch=batch_size(example),
        parameters=count_parameters(model),
        before=plan_of(model),
        inputs=inputs_of(graph, watched, covariances=compensate == "linear") if compensate else None,
        stopwatch=stopwatch,
    )


def _peek(loader: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and what still gives all of them."""
    batches = iter(loader)
    for first in batches:
        return first, chain([first], batches) if batches is loader else loader
    raise ValueError("The analysis needs data, but the loader gave no batch.")


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # a stream
        return None


def _run_first(model: nn.Module, batch: Any) -> Any:
    """Run the network on the inputs of a batch of inputs and targets."""
    if isinstance(batch, Mapping):
        raise ValueError("Batches are dicts: give `forward_fn=lambda model, batch: ...`, which runs the network on one.")
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


def wanted(group: ChannelGroup, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether patterns let a group of tied layers be cut: all of them must be included, and none excluded."""
    return all(any(matches(member, pattern) for pattern in include) for member in group.members) and not any(
        matches(member, pattern) for pattern in exclude for member in group.members
    )
