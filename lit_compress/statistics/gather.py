"""One pass over the data, with a hook on every layer that is to be analysed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler, Subset
from torchmetrics import Metric

from lit_compress import ranks, rng
from lit_compress.compiled import eagerly
from lit_compress.graph import evaluating
from lit_compress.padding import PaddedBack
from lit_compress.skips import Tap
from lit_compress.statistics.covariance import StreamingCovariance, spatial_max

# Wraps an iterable of batches, of a known number or None, in a progress bar.
_WHOLE = (RandomSampler, SequentialSampler, DistributedSampler)  # they may go through the whole data set
Progress: TypeAlias = Callable[[Iterable[Any], "int | None"], Iterable[Any]]


def gather_covariances(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, int],
    run: Callable[[Any], Any],
    *,
    max_samples: int | None = None,
    taps: Mapping[str, Tap] | None = None,
) -> dict[str, StreamingCovariance]:
    """Covariance of the responses of many layers, from one pass in evaluation mode that leaves the network as it was.

    In a running process group, every rank calls it with its own share of the batches, possibly none, and gets what all have seen.

    A convolution's response to a sample is the spatial max of each channel. A linear layer's is its output; over tokens or
    positions ``(N, L, C)`` it is the max as well, since the layer is then a pointwise convolution.

    Args:
        model: The network.
        batches: Inputs.
        layers: Names of layers, as in ``model.named_modules()``, to their number of output channels; or names in ``taps``.
        run: Runs the network on a batch.
        max_samples: Stop after the batch that reaches this number of samples, on this rank. None for all.
        taps: Where to find what is not a layer's output, such as the sum of two branches.

    Returns:
        A filled :class:`StreamingCovariance` for each layer; memory does not grow with the number of samples.

    Raises:
        ValueError: If a response is not finite, naming the layer, if there is no batch, or if another rank fails.
    """
    covariances = {name: StreamingCovariance(channels, sync_on_compute=False) for name, channels in layers.items()}
    watched = {name: Watched((taps or {}).get(name, Tap(name)), metric, spatial_max) for name, metric in covariances.items()}
    gather(model, batches, watched, run, max_samples=max_samples)
    return covariances


@dataclass(frozen=True)
class Watched:
    """A tensor inside a network and the metric that it fills.

    Args:
        tap: Where it is found.
        metric: Updated with it after each batch, its channels in the second dimension.
        summary: What the metric is to see of it, taken right away; a tensor of its own, or the very tensor.
        dim: The dimension of its channels. None for a layer's own responses, whose weight tells.
        at_once: Update the metric as soon as the tensor is there: for summaries too large to be kept until the batch ends.
    """

    tap: Tap
    metric: Metric
    summary: Callable[[Tensor], Tensor] = lambda value: value
    dim: int | None = None
    at_once: bool = False


def gather(
    model: nn.Module,
    batches: Iterable[Any],
    watched: Mapping[str, Watched],
    run: Callable[[Any], Any],
    *,
    max_samples: int | None = None,
) -> int:
    """Fill metrics from one pass in evaluation mode that leaves the network as it was.

    Args:
        model: The network.
        batches: Inputs; this rank's share of them.
        watched: Name of a layer, for errors, to what is looked at.
        run: Runs the network on a batch.
        max_samples: As for :func:`gather_covariances`, and the rest as there.

    Returns:
        The samples that all ranks have seen.

    Raises:
        ValueError: As :func:`gather_covariances`.
    """
    # One batch's responses, added after its forward: between the layers, from a cold cache, that takes several times as long.
    responses: list[tuple[str, Tensor]] = []

    def respond(name: str, output: Tensor) -> None:
        with _naming(name):
            summary = watched[name].summary(output)
            if watched[name].at_once:
                watched[name].metric.update(summary)
                return
        # The network may go on to change the output in place.
        responses.append((name, summary.clone() if summary is output else summary))

    seen = 0
    with ranks.as_one(), ExitStack() as stack:
        stack.enter_context(rng.isolated())
        stack.enter_context(eagerly())
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        watches = [_Watch(model, what.tap, partial(respond, name), what.dim) for name, what in watched.items()]
        for watch in watches:
            stack.callback(watch.handle.remove)
        for batch in batches:
            run(batch)
            for name, summary in responses:
                with _naming(name):
                    watched[name].metric.update(summary)
            responses.clear()
            for watch in watches:
                watch.calls = 0
            seen += batch_size(batch)
            if max_samples is not None and seen >= max_samples:
                break
    with ranks.as_one():
        if (together := sum(ranks.share(seen))) == 0:
            raise ValueError("The analysis needs data, but the loader gave no batch.")
        _add_up([(name, what.metric) for name, what in watched.items()])
    return together


def _add_up(metrics: Sequence[tuple[str, Metric]]) -> None:
    """Let each metric hold what all ranks have seen; merged in the same order on each, to the same bits."""
    if ranks.world_size() == 1:
        return
    names = ranks.share([name for name, _ in metrics])
    if any(theirs != names[0] for theirs in names):
        raise ValueError("The ranks have traced different networks: their layers, or what their inputs run, are not the same.")
    for _, metric in metrics:  # one at a time: there is room for one layer's states of all ranks
        states = ranks.share({name: value.cpu() for name, value in metric.metric_state.items()})  # type: ignore[union-attr]
        metric.reset()
        for state in states:
            metric.merge_state(state)


class _Watch:
    """A hook on a tap, which hands on what it sees with the channels in the second dimension."""

    def __init__(self, model: nn.Module, tap: Tap, see: Callable[[Tensor], None], dim: int | None = None) -> None:
        module = model.get_submodule(tap.module)
        self._tap, self._see, self._dim = tap, see, dim
        weight = getattr(module, "weight", None)
        self._channels_last = tap.call is None and isinstance(weight, Tensor) and weight.ndim == 2
        self.calls = 0  # of the module, in this batch
        self.handle = (
            module.register_forward_hook(lambda module, inputs, output: self._look(_own_channels(module, output)))
            if tap.side == "output"
            else module.register_forward_pre_hook(
                lambda module, inputs, named: self._look(_input(module, inputs, named, tap.position)), with_kwargs=True
            )
        )

    def _look(self, value: Tensor) -> None:
        if self._tap.call in (None, self.calls):
            dim = self._dim if self._dim is not None else -1 if self._channels_last else 1
            self._see(value.movedim(dim, 1) if value.ndim > 2 else value)
        self.calls += 1


def _input(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any], position: int) -> Any:
    """One of a module's inputs, by its position in the signature of `forward`, however it was given."""
    return inputs[position] if position < len(inputs) else inspect.signature(module.forward).bind(*inputs, **named).args[position]


def _own_channels(module: nn.Module, output: Tensor) -> Tensor:
    """The output of a layer, without the zeros between its channels if it is padded back."""
    return output.index_select(1, module.slots) if isinstance(module, PaddedBack) else output


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Say in an error which layer it is about."""
    try:
        yield
    except ValueError as error:
        what = layer if layer.startswith("the ") else f"Layer {layer!r}"  # some are sums, or what a layer is given
        raise ValueError(f"{what[0].upper()}{what[1:]} cannot be analysed: {error}") from error


def batch_size(batch: Any) -> int:
    """Samples in a batch of tensors, or of lists of samples as detectors take them; 1 where there is neither."""
    if _lists_samples(batch):
        return len(batch[0])
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def first_samples(batch: Any, count: int = 2) -> Any:
    """The first samples of a batch of tensors in any nesting, or of lists of samples as detectors take them.

    Example:
        >>> first_samples((torch.zeros(3, 1, 4, 4), [{"boxes": 1}, {"boxes": 2}, {"boxes": 3}]))[1]
        [{'boxes': 1}, {'boxes': 2}]
    """
    if _lists_samples(batch):
        return type(batch)(samples[:count] for samples in batch)
    size = batch_size(batch)

    def shorten(value: Any) -> Any:
        return value[:count] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    return tree_map(shorten, batch)


def _lists_samples(batch: Any) -> bool:
    """Whether a batch is made of lists, ``(images, targets)``, rather than of tensors that stack the samples.

    The images may be stacked where the targets are a list of as many dicts.
    """
    if type(batch) not in (tuple, list) or not batch:
        return False
    if all(isinstance(part, (tuple, list)) and part for part in batch):
        return True
    lists = [part for part in batch if isinstance(part, (tuple, list)) and part and isinstance(part[0], Mapping)]
    tensors = [part for part in batch if isinstance(part, Tensor) and part.ndim]
    return bool(lists) and len(lists) + len(tensors) == len(batch) and len({len(part) for part in batch}) == 1


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor on the device."""
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, batch)


def in_order(loader: Any, *, max_samples: int | None = None, seed: int = 0, rank: int = 0, world_size: int = 1) -> Any:
    """A loader over the same samples in a fixed order, none left out or repeated.

    A plain shuffled or sequential ``DataLoader`` is built anew; ``max_samples`` then draws that many at random, by ``seed``. Of
    several ranks, each then takes every ``world_size``-th sample: together they have each once, and one may have none. What has
    a sampler of its own (a weighted one, say, or one that draws with replacement) or is another kind of iterable is returned as
    it is.
    """
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__ or loader.batch_size is None:
        return loader
    if isinstance(loader.dataset, IterableDataset) or type(loader.sampler) not in _WHOLE:
        return loader
    dataset = loader.dataset
    size = len(dataset)  # type: ignore[arg-type]
    if isinstance(loader.sampler, RandomSampler) and (loader.sampler.replacement or loader.sampler.num_samples != size):
        return loader
    if max_samples is not None and max_samples < size:
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:max_samples]
        dataset = Subset(dataset, sorted(chosen.tolist()))
    if world_size > 1:
        dataset = Subset(dataset, range(rank, len(dataset), world_size))  # type: ignore[arg-type]
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        shuffle=False,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )
