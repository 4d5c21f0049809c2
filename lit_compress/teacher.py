"""A frozen network and what a student reads of it: outputs, layers by name, and how sure it is of them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_compress import rng
from lit_compress.statistics.covariance import with_float64
from lit_compress.taps import OUTPUT, Taps

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def mean_of(tap: str) -> str:
    """Name of the reading that holds the mean of a sampled layer."""
    return f"mean({tap})"


def covariance_of(tap: str) -> str:
    """Name of the reading that holds the covariance of a sampled layer."""
    return f"covariance({tap})"


class Teacher:
    """A network that is frozen, in evaluation mode, and read by the names of its layers.

    It is no :class:`~torch.nn.Module`: a module that holds one has none of its parameters, neither for an optimizer nor for DDP
    nor in a state dict. It follows its inputs to their device and floating-point type. Copies share the network.

    **Confidence.** With ``sampled``, each input also passes ``passes`` times with the teacher's own dropout layers active, and
    the mean and covariance of those layers over the passes are read. One forward does it all: up to the first dropout layer the
    passes are the same and run once; there the batch is repeated, and what follows runs on all passes at once, along with the
    plain evaluation of each input. Dropout has to be a layer (``nn.Dropout`` and its kin); ``F.dropout`` stays inactive.

    Args:
        network: The network; its parameters are frozen and it is put into evaluation mode, in place.
        taps: Names of layers to read, ``""`` for the output.
        sampled: Names of layers of vectors ``(N, D)`` whose mean and covariance are read.
        passes: With dropout active, for each input.
        rows_at_once: Bound on the rows that run behind the first dropout layer at a time; lower takes less memory.

    Raises:
        ValueError: If a layer is unknown, or a number is out of range.

    Source: *In Teacher We Trust: Learning Compressed Models for Pedestrian Detection*, section 4.2.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2))
        >>> teacher = Teacher(network, taps=["1", ""], sampled=["3"], passes=50)
        >>> {name: tuple(value.shape) for name, value in teacher.read(torch.rand(5, 4)).items()}
        {'1': (5, 8), '': (5, 2), 'mean(3)': (5, 2), 'covariance(3)': (5, 2, 2)}
    """

    def __init__(
        self,
        network: nn.Module,
        taps: Collection[str] = (OUTPUT,),
        *,
        sampled: Collection[str] = (),
        passes: int = 200,
        rows_at_once: int = 16_384,
    ) -> None:
        for name, number in [("passes", passes), ("rows_at_once", rows_at_once)]:
            if number < 1:
                raise ValueError(f"Argument `{name}` must be at least 1 but got {number}.")
        self.network = network.requires_grad_(False).eval()
        self.taps, self.sampled = tuple(dict.fromkeys(taps)), tuple(dict.fromkeys(sampled))
        self.passes, self.rows_at_once = passes, rows_at_once
        self._reader = Taps(network, dict.fromkeys([*self.taps, *self.sampled]))

    @property
    def readings(self) -> tuple[str, ...]:
        """Names of what :meth:`read` returns."""
        return (*self.taps, *(name for tap in self.sampled for name in (mean_of(tap), covariance_of(tap))))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the architecture and every parameter and buffer, as they were when it was first asked for."""
        digest = hashlib.sha256(repr(self.network).encode())
        for name, tensor in self.network.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def read(self, *inputs: Any, **named: Any) -> dict[str, Tensor]:
        """What the teacher gives for a batch.

        Args:
            inputs: What its forward takes, batches ``(N, *)``; one tensor if layers are sampled.
            named: Likewise, by name.

        Returns:
            Name of each reading to a tensor without gradient, with N entries; moments of sampled layers are float32.

        Raises:
            ValueError: If a layer to read does not run, runs twice, or does not give a tensor; if no dropout layer is active
                before a sampled one, its vectors have as many dimensions as there are passes, or there are other inputs than one.
        """
        self._follow([leaf for leaf in tree_leaves((inputs, named)) if isinstance(leaf, Tensor)])
        if not self.sampled:
            return self._plain(inputs, named)
        if named or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise ValueError("Confidence is read of networks that take one tensor, whose samples can be repeated.")
        parts = [self._with_samples(part) for part in inputs[0].split(max(1, self.rows_at_once // self.passes))]
        return {name: torch.cat([part[name] for part in parts]) for name in self.readings}

    def _plain(self, inputs: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Tensor]:
        # What draws in evaluation mode, as a detector that chooses boxes to look at, draws the same for the student.
        with torch.no_grad(), rng.isolated(), self._reader.reading() as found:
            self.network(*inputs, **named)
        return {name: found[name] for name in self.taps}

    def _with_samples(self, inputs: Tensor) -> dict[str, Tensor]:
        size = len(inputs)
        with torch.no_grad(), _repeating_from_first_dropout(self.network, size, self.passes), self._reader.reading() as found:
            self.network(inputs)
        readings = {name: found[name][:size] for name in self.taps}
        for tap in self.sampled:
            rows = found[tap]
            if len(rows) != (self.passes + 1) * size:
                raise ValueError(
                    f"No dropout layer runs before layer {tap!r} of the teacher, so that all passes give the same. Confidence "
                    "needs a teacher with an `nn.Dropout` in front of the layer that is read."
                )
            if rows.ndim != 2:
                raise ValueError(f"Layer {tap!r} gives {tuple(rows.shape[1:])} for an input, but confidence is of vectors.")
            mean, covariance = moments(rows[size:].unflatten(0, (self.passes, size)))
            readings[mean_of(tap)] = mean.to(rows.device, torch.float32)
            readings[covariance_of(tap)] = covariance.to(rows.device, torch.float32)
        return readings

    def _follow(self, inputs: Sequence[Tensor]) -> None:
        parameter = next((one for one in self.network.parameters() if one.is_floating_point()), None)
        if parameter is None or not inputs:
            return
        dtype = next((one.dtype for one in inputs if one.is_floating_point()), parameter.dtype)
        if (parameter.device, parameter.dtype) != (inputs[0].device, dtype):
            _ = self.fingerprint  # before a narrower type rounds what it is taken of
            self.network.to(inputs[0].device, dtype)

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Teacher:
        return self


def copy_layers(student: nn.Module, teacher: nn.Module, layers: Mapping[str, str]) -> None:
    """Let layers of the student begin with the teacher's weights, in place.

    Args:
        student: Network that is changed.
        teacher: Network that gives.
        layers: Names of the student's layers to those of the teacher's.

    Raises:
        ValueError: If there is no such layer, or it is of another shape.
    """
    for ours, theirs in layers.items():
        for network, name in ((student, ours), (teacher, theirs)):
            Taps(network, [name])  # refuses an unknown name
        try:
            student.get_submodule(ours).load_state_dict(teacher.get_submodule(theirs).state_dict())
        except RuntimeError as error:
            raise ValueError(f"The teacher's layer {theirs!r} does not fit the student's {ours!r}: {error}") from error


def moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance over the first dimension, for each input.

    Args:
        samples: ``(passes, *, D)``.

    Returns:
        Mean ``(*, D)`` and unbiased covariance ``(*, D, D)``, in float64.

    Raises:
        ValueError: If there are not more passes than dimensions: the covariance would have no inverse.

    Example:
        >>> moments(torch.tensor([[1.0], [3.0], [2.0]]))
        (tensor([2.], dtype=torch.float64), tensor([[1.]], dtype=torch.float64))
    """
    if samples.ndim < 2:
        raise ValueError(f"Expected samples (passes, *, D) but got shape {tuple(samples.shape)}.")
    passes, dimension = samples.shape[0], samples.shape[-1]
    if passes <= dimension:
        raise ValueError(
            f"{passes} passes give no covariance of {dimension} dimensions that could be inverted: take more passes than "
            f"dimensions, at least {dimension + 1}, or read a narrower layer."
        )
    samples = samples.to(with_float64(samples.device), torch.float64)
    mean = samples.mean(0)
    centred = (samples - mean).movedim(0, -1)  # (*, D, passes)
    return mean, centred @ centred.mT / (passes - 1)


@contextmanager
def _repeating_from_first_dropout(network: nn.Module, size: int, passes: int) -> Iterator[None]:
    """Let a forward on ``size`` inputs go on, from the first dropout layer, with their evaluation and then all passes."""

    def drop(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (values,) = inputs  # in evaluation mode, the output is no other
        samples = values.repeat(passes, *[1] * (values.ndim - 1)) if len(values) == size else values[size:].clone()
        layer.training = True
        try:
            samples = layer.forward(samples)
        finally:
            layer.training = False
        return torch.cat([values[:size], samples])

    layers = [layer for layer in network.modules() if isinstance(layer, _DROPOUTS) and layer.p > 0]
    handles = [layer.register_forward_hook(drop) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
