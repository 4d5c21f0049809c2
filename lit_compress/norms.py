"""Batch norms whose running statistics are taken anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lit_compress import ranks, rng
from lit_compress.statistics.gather import batch_size


def reestimate_norms(model: nn.Module, batches: Iterable[Any], run: Callable[[Any], Any]) -> int:
    """Take the running mean and variance of every batch norm anew: their averages over batches, with the weights as they are.

    After a cut, a norm sees inputs that lack what the removed channels gave, and its running statistics are those of before.
    Everything but the norms is in evaluation mode. Several ranks average what they saw.

    Args:
        model: The network; modes and momenta are left as they were.
        batches: This rank's batches. One with a single sample is left out, for it may have no variance.
        run: Runs the network on a batch.

    Returns:
        How many norms there are.

    Raises:
        ValueError: If there are norms but no batch with two samples or more.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> inputs = torch.randn(64, 2)
        >>> reestimate_norms(net, inputs.split(16), net)
        1
        >>> torch.allclose(net[1].running_mean, net[0](inputs).mean(0), atol=1e-6)
        True
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return 0
    before = [(module, module.training) for module in model.modules()]
    kept = [(norm, norm.momentum, [buffer.clone() for buffer in norm.buffers(recurse=False)]) for norm in norms]
    for norm in norms:
        for buffer in norm.buffers(recurse=False):
            buffer.data = buffer.data.clone()  # whoever has kept the storage can go back to it
    seen = 0
    try:
        with ranks.as_one(), rng.isolated(), torch.no_grad():
            for module, _ in before:
                module.training = False
            for norm in norms:
                norm.reset_running_stats()
                norm.training, norm.momentum = True, None  # an average over all batches alike
            for batch in batches:
                if batch_size(batch) > 1:
                    run(batch)
                    seen += 1
            counts = ranks.share(seen)
            if not sum(counts):
                raise ValueError("Batch norms need batches of two samples or more to take their statistics anew.")
            for norm in norms:
                for name in ("running_mean", "running_var"):
                    statistic: Tensor = getattr(norm, name)
                    found = ranks.share(statistic.cpu())
                    statistic.copy_(
                        torch.stack([count * one for count, one in zip(counts, found, strict=True)]).sum(0) / sum(counts)
                    )
    except BaseException:
        for norm, _, buffers in kept:
            for buffer, value in zip(norm.buffers(recurse=False), buffers, strict=True):
                buffer.copy_(value)
        raise
    finally:
        for norm, momentum, _ in kept:
            norm.momentum = momentum
        for module, training in before:
            module.training = training
    return len(norms)
