"""A cut proves itself: the cut network must compute what the uncut one does with the removed channels silenced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_compress import rng
from lit_compress.compiled import eagerly
from lit_compress.graph import ChannelGraph, evaluating, in_training
from lit_compress.padding import padded_for_now
from lit_compress.plan import Plan
from lit_compress.slicing import all_tensors, substituted
from lit_compress.tracing import tensors_in

# Rounding of two sums over the same terms in another order, through a deep network. Wrong channels give errors of order 1. In
# float64 the bound leaves room for a forward that goes through float32 in between (1.2e-7).
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 1e-1,
              torch.complex128: 1e-6, torch.complex64: 1e-3}  # fmt: skip


class SelfCheck:
    """Output of every layer of the uncut network with the removed channels silenced, to hold the cut network against.

    The cut is tried on copies of the tensors, so that a network whose cut fails was never touched.

    Channels are silenced in the weights that read them: a weight column of zeros is an input of zeros. The check runs in float64
    where the network allows it, otherwise in its own precision.

    Args:
        model: The network before the cut.
        graph: Its graph.
        plan: The cut that is going to be made.
        forward_fn: Runs the network on the inputs.
        inputs: Real inputs.

    Raises:
        ValueError: If the uncut network does not run on ``inputs``.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, plan: Plan, forward_fn: Callable[[nn.Module, Any], Any], inputs: Any
    ) -> None:
        self._model, self._graph, self._plan, self._forward_fn, self._inputs = model, graph, plan, forward_fn, inputs
        removed: list[int] = []
        for name, dims in plan.keep.items():
            for dim, kept in dims.items():
                classes = graph.tensors.get(name, {}).get(dim)
                removed += [] if classes is None else np.delete(classes, kept).tolist()
        self._removed = graph.mark(removed)
        self._double = True
        try:
            self._expected = self._run(silenced=True)
        except Exception:  # whatever a network may raise in a precision that it was not written for
            self._double = False
            try:
                self._expected = self._run(silenced=True)
            except Exception as error:
                raise ValueError(f"{type(model).__name__} does not run on the example inputs: {error}") from error

    def compare(self) -> float:
        """Run the network as the cut would leave it, and compare it layer by layer.

        Returns:
            The largest error met, relative to the largest value of the layer's output.

        Raises:
            ValueError: If an output differs, or the cut network does not run. It names the first layer where it shows.
        """
        advice = "Leave the layer out with `exclude`, or write the forward without fixed channel numbers."
        try:
            found = self._run(silenced=False)
        except Exception as error:
            last = repr(self._seen[-1][0]) if self._seen else "none"
            raise ValueError(f"The cut network does not run (last layer that did: {last}): {error}. {advice}") from error
        if [name for name, _ in found] != [name for name, _ in self._expected]:
            raise ValueError(f"The cut is not exact: the forward runs other layers than before. {advice}")
        worst, tolerance = 0.0, 0.0
        for (name, expected), (_, actual) in zip(self._expected, found, strict=True):
            remaining = self._remaining(name, expected)
            if remaining is not None:
                # What comes after a layer in half precision is no more precise, whatever its dtype.
                tolerance = max(tolerance, _TOLERANCE.get(actual.dtype, 1e-1 if actual.is_floating_point() else 0.0))
                worst = max(worst, self._error(name, remaining, actual, tolerance, advice))
        return worst

    def _error(self, name: str | None, expected: Tensor, actual: Tensor, tolerance: float, advice: str) -> float:
        place = "the output of the network" if name is None else f"layer {name!r}"
        if expected.shape != actual.shape:
            raise ValueError(
                f"The cut is not exact: {place} gives shape {tuple(actual.shape)} instead of {tuple(expected.shape)}. {advice}"
            )
        if not expected.numel():
            return 0.0
        if not actual.is_floating_point() and not actual.is_complex():
            actual, expected = actual.double(), expected.double()
        if not torch.equal(torch.isfinite(actual), torch.isfinite(expected)):
            raise ValueError(f"The cut is not exact: {place} gives NaN or infinity where it did not before. {advice}")
        finite = torch.isfinite(expected)
        difference = torch.where(finite, actual - expected, 0).abs().max().item()
        scale = torch.where(finite, expected, 0).abs().max().item()
        error = difference / scale if scale > 0 else difference
        if error > tolerance:
            raise ValueError(f"The cut is not exact: {place} differs by {error:.1e} of its largest value. {advice}")
        return error

    def _remaining(self, name: str | None, expected: Tensor) -> Tensor | None:
        """The channels of a layer's output that the cut keeps; None where a module gives something else than its weight makes."""
        point = next((point for point in self._graph.pads if point.module == name), None)
        if point is not None and name in self._plan.pads:  # a layer at the end of a block, which gives the width of the skip
            slots = torch.from_numpy(np.flatnonzero(~self._removed[point.slots]))
            return expected.index_select(1, slots.to(expected.device))
        kept = None if name is None else self._plan.recipe.keep.get(name)
        if name is None or kept is None:
            return expected
        weight_dims = len(self._graph.shapes[self._graph.layers[name].weight])
        # A convolution's channels come before its spatial dimensions; a linear layer's are last.
        dim = expected.ndim - weight_dims + 1 if weight_dims > 2 else expected.ndim - 1
        if not 0 <= dim < expected.ndim or expected.shape[dim] != self._plan.recipe.original[name]:
            return None
        return expected.index_select(dim, torch.tensor(kept, device=expected.device))

    def _run(self, *, silenced: bool) -> list[tuple[str | None, Tensor]]:
        """Layer name and output in the order of the forward, the network's own outputs last, without a name."""
        self._seen: list[tuple[str | None, Tensor]] = []
        with ExitStack() as stack:
            stack.enter_context(rng.isolated())
            stack.enter_context(evaluating(self._model))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(eagerly())
            stack.enter_context(torch.no_grad())
            stack.enter_context(substituted(self._model, self._values(silenced)))
            if silenced:
                stack.enter_context(self._silent_blocks())
            else:
                stack.enter_context(padded_for_now(self._model, self._plan.pads))
            stack.enter_context(self._listening())
            torch.manual_seed(0)
            inputs = tree_map(self._precise, self._inputs) if self._double else self._inputs
            outputs = self._forward_fn(self._model, inputs)
            self._seen += [(None, tensor.detach().clone()) for tensor in tensors_in(outputs)]
            if self._graph.trained:
                with in_training(self._model, self._graph.trained):
                    outputs = self._forward_fn(self._model, inputs)
                self._seen += [(None, tensor.detach().clone()) for tensor in tensors_in(outputs)]
        return self._seen

    def _precise(self, value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def _values(self, silenced: bool) -> dict[Tensor, Tensor]:
        tensors = all_tensors(self._model)
        values = {tensor: self._precise(tensor.data) for tensor in tensors.values()} if self._double else {}
        if silenced:
            for use in self._graph.uses:
                kept = self._plan.keep.get(use.weight, {}).get(use.in_dim)
                if kept is not None:
                    weight = tensors[use.weight]
                    data = values.get(weight, weight.data)
                    mask = torch.zeros(data.shape[use.in_dim], dtype=data.dtype, device=data.device)
                    mask[list(kept)] = 1
                    shape = [1] * data.ndim
                    shape[use.in_dim] = -1
                    values[weight] = data * mask.view(shape)
        else:
            for tensor, name in {tensors[name]: name for name in self._plan.keep}.items():
                values[tensor] = self._plan.take(name, values.get(tensor, tensor.data))
        return values

    @contextmanager
    def _silent_blocks(self) -> Iterator[None]:
        """Silence the removed channels of blocks that are padded back where they enter the sum."""

        def silence(keep: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            return lambda module, inputs, output: output * keep.to(output).view(1, -1, *[1] * (output.ndim - 2))

        handles = []
        for point in self._graph.pads:
            keep = torch.zeros(len(point.slots))
            keep[point.positions] = torch.from_numpy(~self._removed[point.sources]).float()
            handles.append(self._model.get_submodule(point.module).register_forward_hook(silence(keep)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        modules = dict(self._model.named_modules())

        def listen(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    self._seen.append((name, output.detach().clone()))

            return hook

        layers = [name for name in self._graph.layers if name and name in modules]  # the network itself is compared as output
        handles = [modules[name].register_forward_hook(listen(name)) for name in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
