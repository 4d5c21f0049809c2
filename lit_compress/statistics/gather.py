"""One pass over the data, with a hook on every layer that is to be analysed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler, Subset
from torch.utils._pytree import tree_leaves, tree_map

from lit_compress import rng
from lit_compress.graph import evaluating
from lit_compress.statistics.covariance import StreamingCovariance

# Wraps an iterable of batches, of a known number or None, in a progress bar.
Progress: TypeAlias = Callable[[Iterable[Any], "int | None"], Iterable[Any]]


def gather_covariances(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, int],
    run: Callable[[Any], Any],
    *,
    max_samples: int | None = None,
) -> dict[str, StreamingCovariance]:
    """Covariance of the responses of many layers, from one pass in evaluation mode that leaves the network as it was.

    A convolution's response to a sample is the spatial max of each channel. A linear layer's is its output; over tokens or
    positions ``(N, L, C)`` it is the max as well, since the layer is then a pointwise convolution.

    Args:
        model: The network.
        batches: Inputs.
        layers: Names of layers, as in ``model.named_modules()``, to their number of output channels.
        run: Runs the network on a batch.
        max_samples: Stop after the batch that reaches this number of samples. None for all.

    Returns:
        A filled :class:`StreamingCovariance` for each layer; memory does not grow with the number of samples.

    Raises:
        ValueError: If a response is not finite, naming the layer, or if there is no batch.
    """
    modules = dict(model.named_modules())
    covariances = {name: StreamingCovariance(channels) for name, channels in layers.items()}

    def listen(name: str, channels_last: bool) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            try:
                covariances[name].update(output.movedim(-1, 1) if channels_last and output.ndim > 2 else output)
            except ValueError as error:
                raise ValueError(f"Layer {name!r} cannot be analysed: {error}") from error

        return hook

    seen = 0
    with ExitStack() as stack:
        stack.enter_context(rng.isolated())
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        for name in layers:
            handle = modules[name].register_forward_hook(listen(name, isinstance(modules[name], nn.Linear)))
            stack.callback(handle.remove)
        for batch in batches:
            run(batch)
            seen += batch_size(batch)
            if max_samples is not None and seen >= max_samples:
                break
    if seen == 0:
        raise ValueError("The analysis needs data, but the loader gave no batch.")
    return covariances


def batch_size(batch: Any) -> int:
    """Samples in a batch of tensors, or of lists of samples as detectors take them; 1 where there is neither."""
    if _lists_samples(batch):
        return len(batch[0])
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def first_samples(batch: Any, count: int = 2) -> Any:
    """The first samples of a batch of tensors in any nesting, or of lists of samples as detectors take them."""
    if _lists_samples(batch):
        return type(batch)(samples[:count] for samples in batch)
    size = batch_size(batch)

    def shorten(value: Any) -> Any:
        return value[:count] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    return tree_map(shorten, batch)


def _lists_samples(batch: Any) -> bool:
    """Whether a batch is made of lists, ``(images, targets)``, rather than of tensors that stack the samples."""
    return type(batch) in (tuple, list) and bool(batch) and all(isinstance(part, (tuple, list)) and part for part in batch)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor on the device."""
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, batch)


def in_order(loader: Any, *, max_samples: int | None = None, seed: int = 0) -> Any:
    """A loader over the same samples in a fixed order, none left out or repeated.

    A plain shuffled or sequential ``DataLoader`` is built anew; ``max_samples`` then draws that many at random, by ``seed``. What has
    a sampler of its own (a weighted one, say) or is another kind of iterable is returned as it is.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader
    if type(loader.sampler) not in (RandomSampler, SequentialSampler, DistributedSampler):
        return loader
    dataset = loader.dataset
    size = len(dataset)  # type: ignore[arg-type]
    if max_samples is not None and max_samples < size:
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:max_samples]
        dataset = Subset(dataset, sorted(chosen.tolist()))
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
