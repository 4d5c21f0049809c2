"""What every operation does to the channels that enter it.

Data movement is applied to the labels by the very same operation. Element-wise operations tie the labels of their operands.
Convolution and linear *end* labels on their input side and start new ones on their output side. Everything that is not known to
keep channels apart freezes the channels that meet there: no guess is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves, tree_map

from lit_compress.labels import FIXED, aligned, collapsed, fixed, splits, spread, to_numpy, varies, vector_along
from lit_compress.padding import PaddedBack
from lit_compress.skips import ActivationPoint, SumPoint, Vector
from lit_compress.tracing import SIZES_CHECKED, Axis, Trace, WeightUse

_BATCH_NORMS = {
    "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm", "_batch_norm_no_update",
    "_batch_norm_with_update", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
}  # fmt: skip
# Mix positions, never channels. The digit in the name is the number of trailing dimensions that are mixed.
_POOLS = (
    "max_pool", "avg_pool", "_adaptive_avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "max_unpool", "upsample_",
    "_upsample_", "reflection_pad", "replication_pad", "grid_sampler_", "fractional_max_pool",
)  # fmt: skip
# Reduce or mix along `dim`; harmless to channels that lie along other dimensions.
_ALONG_DIM = {
    "mean", "sum", "nansum", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "std_mean", "norm",
    "linalg_vector_norm", "logsumexp", "any", "all", "argmax", "argmin", "median", "_softmax", "_log_softmax", "softmax",
    "log_softmax", "cumsum", "cumprod", "sort", "topk",
}  # fmt: skip
_SHAPE_ONLY = {
    "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "clone", "contiguous", "_to_copy", "alias", "detach",
    "lift_fresh", "lift", "repeat", "flip", "view_as_real", "_conj",
}  # fmt: skip
_RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
# Pick by position along a dimension: on a dimension that carries channels, the positions would be others after a cut.
_POSITIONAL = {
    "slice", "select", "split", "split_with_sizes", "unbind", "narrow", "roll", "index_select", "index", "gather", "unfold",
}  # fmt: skip
_SAME_SHAPE = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
_NO_EFFECT = {
    "size", "sym_size", "sym_numel", "stride", "new_empty", "new_zeros", "new_ones", "new_full", "is_same_size",
    "_has_same_storage_numel",
}  # fmt: skip
# Element-wise, though not tagged so in every version of torch.
_POINTWISE = {
    "copy", "hardswish", "hardtanh", "hardsigmoid", "leaky_relu", "elu", "silu", "gelu", "clamp", "masked_fill", "where",
    "native_dropout", "bernoulli", "relu", "relu6", "threshold", "_prelu_kernel", "celu", "selu", "mish", "softplus",
    "log_sigmoid_forward",
}  # fmt: skip
# Of one tensor: what makes a layer's output what the next one reads.
_ACTIVATIONS = {
    "relu", "relu6", "sigmoid", "tanh", "leaky_relu", "_prelu_kernel", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus",
    "hardtanh", "hardswish", "hardsigmoid", "log_sigmoid_forward",
}  # fmt: skip


class LabelMode(Trace):
    """Runs everything inside it on labels as well: every operation is followed by its rule."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        laid = args[0].stride() if func is torch.ops.aten.as_strided_.default else ()
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor in self._labels or tensor in self._origins for tensor in tensors):
            schema = func._schema.arguments
            bound = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
            bound |= dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
            call = _Call(func, args, kwargs, bound, tensors, out, laid)
            self._taken.update(self._product[tensor] for tensor in tensors if tensor in self._product)
            if call.name.endswith("_") and call.outputs:
                self._sum_of.pop(call.first, None)  # overwritten in place, though maybe by the next sum
                self._activation_of.pop(call.first, None)
            if call.outputs and not call.first.numel():
                why = f"{call.name} in {self.where} gives an empty tensor on the example inputs"
                self._barrier(call, why)
                if call.name in ("convolution", "addmm", "mm", "linear"):
                    self.refused.setdefault(self.path, why)
            else:
                self._rule(func)(call)
            self.count(self._label(call.first) if call.outputs else None)
            if call.name.endswith("_") and call.outputs:
                self._product.pop(call.first, None)  # overwritten in place: no longer a layer's own output
        return out

    def _rule(self, func: Any) -> Callable[[_Call], None]:
        name = func.overloadpacket.__name__
        plain = name.removesuffix("_") if not name.startswith("__") else name
        if name == "convolution":
            return self._convolution
        if name in ("addmm", "mm", "linear"):
            return self._linear
        if name in _BATCH_NORMS:
            return self._batch_norm
        if name == "native_group_norm":
            return self._group_norm
        if name in ("cat", "stack"):
            return self._concatenation
        if name == "constant_pad_nd":
            return self._constant_pad
        if name.startswith(_POOLS) and any(f"{digit}d" in name for digit in "123"):
            return self._pool
        if plain in _RESHAPES:
            return self._reshape
        if plain in _SHAPE_ONLY or plain in _POSITIONAL:
            return self._movement
        if name in _SAME_SHAPE:
            return self._same_shape
        if name == "index_copy":
            return self._index_copy
        if name == "as_strided_":
            return self._strides
        if name == "glu":
            return self._gated
        if name in ("channel_shuffle", "native_channel_shuffle", "pixel_shuffle", "pixel_unshuffle"):
            return self._shuffled
        if name in _NO_EFFECT:
            return self._no_effect
        if name in _ALONG_DIM and "dim" in {argument.name for argument in func._schema.arguments}:
            return self._along_dim
        if (plain in _POINTWISE or torch.Tag.pointwise in func.tags) and not name.startswith("_foreach"):
            return self._pointwise
        return self._barrier

    def _barrier(self, call: _Call, why: str = "") -> None:
        if isinstance(self.module, SIZES_CHECKED):
            why = self.checks_its_sizes(self.module)
        elif call.name == "native_layer_norm":
            why = f"{self.where} normalises over all channels at once"
        why = why or f"{call.name} in {self.where} is not known to keep channels apart"
        for tensor in call.tensors:
            self.freeze(self._label(tensor), why)
            self.pin(tensor, why)
        for tensor in call.outputs:
            self._labels.pop(tensor, None)  # an operation in place may have overwritten what was labelled

    def _no_effect(self, call: _Call) -> None:
        pass

    def _convolution(self, call: _Call) -> None:
        x, weight, bias = call.bound["input"], call.bound["weight"], call.bound.get("bias")
        groups, transposed = call.bound["groups"], call.bound["transposed"]
        spatial = weight.ndim - 2
        size = x.shape if transposed else call.first.shape
        positions = int(np.prod(size[-spatial:])) * (size[0] if len(size) > spatial + 1 else 1)
        out_dim, in_dim = (1, 0) if transposed else (0, 1)
        self._contract(call, x, x.ndim - spatial - 1, weight, out_dim, in_dim, bias, positions, groups)

    def _linear(self, call: _Call) -> None:
        if call.name == "linear":
            x, weight, bias, out_dim, in_dim = call.bound["input"], call.bound["weight"], call.bound.get("bias"), 0, 1
        else:
            x, weight = call.bound.get("mat1", call.bound["self"]), call.bound["mat2"]
            bias, out_dim, in_dim = (call.bound["self"] if call.name == "addmm" else None), 1, 0
        if self._origins.get(weight) is None and self._label(weight) is not None:
            return self._barrier(call)  # a product of two activations
        return self._contract(call, x, x.ndim - 1, weight, out_dim, in_dim, bias, int(np.prod(x.shape[:-1])), 1)

    def _contract(
        self,
        call: _Call,
        x: Tensor,
        dim: int,
        weight: Tensor,
        out_dim: int,
        in_dim: int,
        bias: Tensor | None,
        positions: int,
        groups: int,
    ) -> None:
        """End the labels of `x` along `dim` and start new ones on the output."""
        origin, labels = self._origins.get(weight), self._label(x)
        self.pin(x, f"{call.name} in {self.where} multiplies a parameter like an activation")
        if origin is None or not _is_weight(origin[out_dim], origin[in_dim]):
            why = (
                f"the weight of {call.name} in {self.where} is computed from other tensors; fold them in first, as "
                "`remove_parametrizations` does"
            )
            self.refused.setdefault(self.path, why)
            self.freeze(labels, why)
            self.pin(weight, why)
            if bias is not None:
                self.freeze(self._label(bias), why)
                self.pin(bias, why)
            return
        entering = np.full(x.shape[dim], FIXED)
        if labels is not None:
            vector = vector_along(labels, dim)
            if vector is None:
                self.freeze(labels, f"channels are mixed with positions where they enter {self.where}")
            else:
                entering = vector.numpy().astype(np.int64)
                self.occupy(entering)
        width = call.first.shape[dim]
        transposed = bool(call.bound.get("transposed", False))
        # Depthwise: each input channel makes output channels of its own.
        depthwise = groups > 1 and groups == x.shape[dim] and not transposed
        leaving = entering.repeat(width // groups) if depthwise else np.arange(self.atoms, self.atoms + width)
        if not depthwise:
            self._own.add((self.atoms, width))
            self.atoms += width
        why = f"{self.where} is shared with a part of the network that is left whole"
        if groups > 1 and transposed:
            whole = f"{self.where} is a transposed convolution in groups, which is left whole"
            self.freeze(np.concatenate([entering, leaving]), whole)
            self.pin(weight, whole)
        elif depthwise:
            self.meet(origin[in_dim], np.full(1, FIXED), why)
            self.meet(origin[out_dim], leaving, why)
        elif groups > 1:
            self._contract_groups((origin[out_dim], origin[in_dim]), entering, leaving, groups)
        else:
            self.meet(origin[in_dim], entering, why)
            self.meet(origin[out_dim], leaving, why)
        if bias is not None and bias.shape[-1] == width:
            axis = self._origins[bias][-1] if bias in self._origins else frozenset()
            if axis and self._label(bias) is None:
                self.meet(axis, leaving, why)
            else:
                computed = f"the bias of {self.where} is computed from other tensors"
                self.freeze(leaving, computed)
                self.freeze(self._label(bias), computed)
        name, dimension = min(origin[out_dim], key=lambda pair: (pair[0] not in self._parameters, pair))
        self.leaving[name] = self.leaving.get(name, False) or not depthwise
        self.made.setdefault(name, leaving)
        plain = weight not in self._computed
        self.uses.append(WeightUse(name, dimension, dict(origin[in_dim])[name], positions, plain, groups))
        self._product[call.first] = name
        self._labels[call.first] = spread(torch.from_numpy(leaving), call.first.shape, dim)

    def _contract_groups(self, axes: Sequence[Axis], entering: Vector, leaving: Vector, groups: int) -> None:
        """The groups of a grouped convolution stay of one size, so each loses channels at the same places."""
        why = f"{self.where} is a grouped convolution, whose groups must stay of one size"
        for vector in (entering, leaving):
            first, *others = np.split(vector, groups)
            for other in others:
                self.tie(first, other, why)
        out_axis, in_axis = axes
        self.meet(out_axis, leaving, why)
        self.meet(in_axis, entering[: len(entering) // groups], why)

    def _batch_norm(self, call: _Call) -> None:
        x = call.bound["input"]
        labels = self._label(x)
        vector = fixed(x.shape[1:2]) if labels is None else vector_along(labels, 1)
        if vector is None:
            return self._barrier(call)
        why = f"{self.where} is shared with a part of the network that is left whole"
        for key in ("weight", "bias", "running_mean", "running_var"):
            tensor = call.bound.get(key)
            if tensor is None:
                continue
            tensor = self._repeated.get(tensor, tensor)
            if tensor not in self._origins or not self._origins[tensor][0]:
                self.freeze(labels, f"the {key} of {self.where} is computed from other tensors")
            else:
                for part in vector.numpy().astype(np.int64).reshape(-1, len(tensor)):
                    self.meet(self._origins[tensor][0], part, why)
        mean = call.bound.get("running_mean")
        if x in self._product and mean is not None and mean in self._origins and len(self._origins[mean][0]) == 1:
            ((self._norms[self._product[x]], _),) = self._origins[mean][0]
        if labels is not None:
            self._labels[call.first] = labels
        return None

    def _group_norm(self, call: _Call) -> None:
        """A group is normalised by itself, so it goes or stays as one; :class:`torch.nn.GroupNorm` knows their number."""
        groups, labels = call.bound["group"], self._label(call.bound["input"])
        vector = None if labels is None else vector_along(labels, 1)
        module = self.module
        if vector is None or labels is None or groups == 1 or not isinstance(module, nn.GroupNorm) or module.weight is None:
            why = f"{call.name} in {self.where} normalises over all channels at once" if groups == 1 else ""
            return self._barrier(call, why)  # without a weight, nothing would tell the module of fewer channels
        why = f"{self.where} normalises groups of channels, one of which meets something of fixed size"
        atoms = vector.numpy().astype(np.int64)
        first, *others = atoms.reshape(groups, -1).T
        for other in others:
            self.tie(first, other, why)
        for key in ("weight", "bias"):
            tensor = call.bound.get(key)
            if tensor is not None and self._origins.get(tensor) is None:
                self.freeze(atoms, f"the {key} of {self.where} is computed from other tensors")
            elif tensor is not None:
                self.meet(self._origins[tensor][0], atoms, why)
        self._labels[call.first] = labels
        return None

    def _pointwise(self, call: _Call) -> None:
        ndim = call.first.ndim
        if any(tensor.ndim > ndim for tensor in call.tensors):
            return self._barrier(call)
        parts = [
            (tensor, aligned(collapsed(label), ndim)) for tensor in call.tensors if (label := self._label(tensor)) is not None
        ]
        if parts:
            operands = self._operands(call)
            united = self._unite(call, parts)
            self._join_unlabelled(call, united)
            for tensor in call.outputs:
                self._labels[tensor] = united.expand(call.first.shape)
            self._note_sum(call, operands)
            self._note_activation(call)
        else:
            self._derive(call)
        return None

    def _unite(self, call: _Call, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Tie the labels of the operands of an element-wise operation; returns one label tensor for the result."""
        shape = torch.broadcast_shapes(*(labels.shape for _, labels in parts))
        full: list[Tensor] = []
        for tensor, labels in parts:
            one = [dim for dim in range(len(shape)) if labels.shape[dim] == 1 < shape[dim]]
            if one:
                # One channel (a spatial attention map, say) that meets many: it cannot be tied to all of them.
                self.freeze(labels, f"one channel is applied to many in {self.where} ({call.name})")
                if not all(_stretched(tensor, dim - len(shape)) for dim in one):
                    for _, others in parts:
                        self.freeze(others, f"they meet a tensor of fixed size in {self.where} ({call.name})")
            else:
                full.append(labels)
        united = full[0] if full else parts[0][1]
        for labels in full[1:]:
            first, second = torch.broadcast_tensors(united, labels)
            self.tie(
                first.reshape(-1).numpy(), second.reshape(-1).numpy(),
                f"they meet something of fixed size in {self.where} ({call.name}), such as zero padding",
            )  # fmt: skip
            united = torch.where(first == FIXED, second, first)
        return united

    def _join_unlabelled(self, call: _Call, united: Tensor) -> None:
        """Operands without labels: parameters follow the channels, anything else of the same extent freezes them."""
        why = f"they meet a tensor of fixed size in {self.where} ({call.name})"
        vectors = [vector_along(united, dim) for dim in range(united.ndim)]
        for tensor in call.tensors:
            if self._label(tensor) is not None:
                continue
            lead = united.ndim - tensor.ndim
            origin = self._origins.get(tensor)
            for dim in range(tensor.ndim):
                if _stretched(tensor, dim):
                    continue
                carrying, vector = united.shape[lead + dim] > 1, vectors[lead + dim]
                if origin is not None and origin[dim] and (vector is not None or not carrying):
                    # Along a dimension without channels, a parameter keeps its size.
                    along = (
                        vector.numpy().astype(np.int64) if carrying and vector is not None else np.full(tensor.shape[dim], FIXED)
                    )
                    self.meet(origin[dim], along, why)
                elif carrying:
                    self.freeze(united, why)
                    self.pin(tensor, why)

    def _derive(self, call: _Call) -> None:
        """An element-wise operation on parameters alone: the result runs along the same dimensions."""
        ndim = call.first.ndim
        axes: list[frozenset[tuple[str, int]]] = [frozenset()] * ndim
        for tensor in call.tensors:
            origin, lead = self._origins.get(tensor), ndim - tensor.ndim
            for dim in range(tensor.ndim):
                if tensor.shape[dim] > 1 and origin is not None:
                    axes[lead + dim] |= origin[dim]
        for tensor in call.tensors:
            lead = ndim - tensor.ndim
            origin = self._origins.get(tensor)
            for dim in range(tensor.ndim):
                if tensor.shape[dim] > 1 and axes[lead + dim] and (origin is None or not origin[dim]):
                    # Meets something of fixed size, so the parameters that run along this dimension keep theirs.
                    self.meet(axes[lead + dim], np.full(tensor.shape[dim], FIXED), f"{self.where} uses a tensor of fixed size")
        for tensor in call.outputs:
            if tensor.shape == call.first.shape:
                self._origins[tensor] = tuple(axes)
                self._computed[tensor] = True

    def _pool(self, call: _Call) -> None:
        mixed = next(int(digit) for digit in "123" if f"{digit}d" in call.name)
        x, *others = call.tensors
        labels = self._label(x)
        if labels is None or any(varies(labels, dim) for dim in range(labels.ndim - mixed, labels.ndim)):
            return self._barrier(call)
        if call.name.startswith("max_unpool"):
            labels = self._side_by_side([labels, *map(self._label_or_fixed, others)], call)
        elif any(self._label(tensor) is not None or tensor in self._origins for tensor in others):
            return self._barrier(call)
        for tensor in call.outputs:
            self._labels[tensor] = collapsed(labels).expand(tensor.shape)
        if "max_pool" in call.name:
            self._note_maximum(labels)
        return None

    def _along_dim(self, call: _Call) -> None:
        x = call.bound.get("self", call.bound.get("input"))
        labels = self._label(x)
        if labels is None or len([t for t in call.tensors if self._label(t) is not None]) > 1:
            return self._barrier(call)
        dims = call.bound.get("dim")
        listed = list(range(x.ndim)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        listed = [dim % max(x.ndim, 1) for dim in listed]
        if any(varies(labels, dim) for dim in listed):
            return self._barrier(call)
        small = collapsed(labels)
        if call.name in ("amax", "max"):
            self._note_maximum(labels)
        for tensor in call.outputs:
            if tensor.ndim == x.ndim:
                self._labels[tensor] = small.expand(tensor.shape)
            else:
                kept = small
                for dim in sorted(listed, reverse=True):
                    kept = kept.select(dim, 0)
                self._labels[tensor] = kept.expand(tensor.shape)
        return None

    def _concatenation(self, call: _Call) -> None:
        parts = call.bound["tensors"]
        dim = call.bound.get("dim", 0) % call.first.ndim
        if all(self._label(part) is None for part in parts):
            return self._barrier(call)  # of parameters
        for part in parts:
            self.pin(part, f"{self.where} concatenates a parameter with activations")
        parts = [part for part in parts if part.shape != (0,) or call.first.ndim == 1]  # `cat` passes over these
        labels = [self._label_or_fixed(part) for part in parts]
        if call.name == "stack":
            labels = [label.unsqueeze(dim) for label in labels]
        small = [collapsed(label) for label in labels]
        if any(size > 1 for label in small for d, size in enumerate(label.shape) if d != dim):
            # Joined along another dimension than that of the channels, which the parts therefore share.
            if any(label.shape[dim] > 1 for label in small):
                return self._barrier(call)
            self._labels[call.first] = self._side_by_side(small, call).expand(call.first.shape)
            return None
        constant = [all(label.shape[d] == 1 for label in small) for d in range(call.first.ndim)]
        shape = [1 if constant[d] else size for d, size in enumerate(call.first.shape)]
        resized = [
            label.expand([part.shape[dim] if d == dim else size for d, size in enumerate(shape)])
            for label, part in zip(small, labels, strict=True)
        ]
        self._labels[call.first] = torch.cat(resized, dim).expand(call.first.shape)
        return None

    def _side_by_side(self, labels: Sequence[Tensor], call: _Call) -> Tensor:
        """Tie parts whose extents must agree where they carry channels; returns the labels of all of them, collapsed."""
        small = [collapsed(label) for label in labels]
        why = f"they meet a tensor of fixed size in {self.where} ({call.name})"
        if any(label.shape != small[0].shape for label in small):
            for label in small:
                self.freeze(label, why)
            return fixed((1,) * small[0].ndim)
        for label in small[1:]:
            self.tie(small[0].reshape(-1).numpy(), label.reshape(-1).numpy(), why)
        return small[0]

    def _constant_pad(self, call: _Call) -> None:
        labels = self._label(call.bound["self"])
        if labels is None:
            return self._barrier(call)
        small = collapsed(labels)
        # Where channels lie along another dimension, padding belongs to the channel it pads; along the channels it is fixed.
        pads = list(call.bound["pad"])
        for index in range(len(pads) // 2):
            if small.shape[small.ndim - 1 - index] == 1:
                pads[2 * index] = pads[2 * index + 1] = 0
        if min(pads, default=0) < 0:
            self.freeze(labels, f"{self.where} crops channels by their position ({call.name})")
        self._labels[call.first] = torch.constant_pad_nd(small, pads, FIXED).expand(call.first.shape)
        return None

    def _reshape(self, call: _Call) -> None:
        x = call.bound["self"]
        labels, after = self._label(x), tuple(call.first.shape)
        if labels is None:
            return self._reshape_parameter(x, call.first)
        carrying = [varies(labels, dim) for dim in range(x.ndim)]
        self._labels[call.first] = moved = labels.reshape(after)
        for split in splits(x.shape, after, carrying):
            # Only what is innermost can shrink: the channels of a group, and not the number of groups.
            *outer, _ = [dim for dim in split if moved.shape[dim] > 1]
            parts = moved.permute(*outer, *(dim for dim in range(moved.ndim) if dim not in outer)).flatten(0, len(outer) - 1)
            why = f"{self.where} splits the channels by a reshape to {after}; to a number of groups and -1, they could be cut"
            self.suppose(labels, list(parts), why)
        return None

    def _reshape_parameter(self, x: Tensor, out: Tensor) -> None:
        """Extents of 1 may come and go; any other reshape of a parameter is not followed."""
        wide = [dim for dim in range(x.ndim) if x.shape[dim] > 1]
        if [x.shape[dim] for dim in wide] != [size for size in out.shape if size > 1]:
            return self.pin(x, f"{self.where} reshapes a parameter to {tuple(out.shape)}")
        if x in self._computed:
            self._computed[out] = True
        axes = iter([self._origins[x][dim] for dim in wide])
        self._origins[out] = tuple(next(axes) if size > 1 else frozenset() for size in out.shape)
        return None

    def _movement(self, call: _Call) -> None:
        x = call.bound["self"]
        labels = self._label(x)
        others = [tensor for tensor in call.tensors if tensor is not x]
        for tensor in others:
            if self._label(tensor) is not None or tensor in self._origins:
                return self._barrier(call)
        if labels is None:
            return self._move_parameter(call, x)
        why = f"{self.where} picks channels by their position ({call.name}); equal parts by `chunk` could be cut"
        moved = [dim for dim in self._positions_of(call, x) if varies(labels, dim)]
        if moved and (parts := _equal_parts(call, x, labels)):
            self.suppose(labels, parts, why)
        elif moved:
            self.freeze(labels, why)
        if call.name in ("clone", "contiguous", "_to_copy", "alias", "detach", "lift_fresh", "lift", "_conj"):
            result: Any = labels
        else:
            kwargs = {key: value for key, value in call.kwargs.items() if key not in ("dtype", "device", "memory_format")}
            # Labels lie on the CPU. `detach` gives an alias of its own, which an operation in place may reshape.
            args = tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, call.args[1:])
            result = call.func(labels.detach(), *args, **kwargs)
        for tensor, label in zip(call.outputs, tree_leaves(result), strict=True):
            self._labels[tensor] = label
        return None

    def _positions_of(self, call: _Call, x: Tensor) -> list[int]:
        """Dimensions along which the operation picks by position."""
        name = call.name
        if name == "slice":
            dim = call.bound.get("dim", 0)
            start, end = call.bound.get("start") or 0, call.bound.get("end")
            whole = start in (0, -x.shape[dim]) and (end is None or end >= x.shape[dim]) and call.bound.get("step", 1) == 1
            return [] if whole else [dim]
        if name == "index":
            return [dim for dim, index in enumerate(call.bound["indices"]) if index is not None]
        if name == "roll":
            dims = call.bound.get("dims")
            return list(range(x.ndim)) if not dims else list(dims)
        if name == "gather":
            return list(range(x.ndim))  # it takes as many of every dimension as the index has
        if name == "unfold":
            return [call.bound["dimension"]]
        return [call.bound.get("dim", 0)] if name in _POSITIONAL else []

    def _move_parameter(self, call: _Call, x: Tensor) -> None:
        """Follow a parameter through a transposition or an added dimension; anything else pins it."""
        origin, out = self._origins[x], call.first
        axes: Sequence[frozenset[tuple[str, int]]]
        if call.name in ("clone", "contiguous", "_to_copy", "alias", "detach", "lift_fresh", "lift"):
            axes = origin
        elif call.name == "t":
            axes = origin[::-1]
        elif call.name == "transpose":
            axes = list(origin)
            first, second = call.bound["dim0"], call.bound["dim1"]
            axes[first], axes[second] = axes[second], axes[first]
        elif call.name == "permute":
            axes = [origin[dim] for dim in call.bound["dims"]]
        elif call.name in ("unsqueeze", "squeeze"):
            return self._reshape_parameter(x, out)
        elif call.name == "repeat" and isinstance(self.module, _InstanceNorm):
            self._repeated[out] = x
            return None
        elif call.name == "expand" or (call.name == "slice" and out.shape == x.shape):
            lead = out.ndim - x.ndim
            axes = [frozenset() if dim < lead or x.shape[dim - lead] == 1 else origin[dim - lead] for dim in range(out.ndim)]
        else:
            return self.pin(x, f"{self.where} takes a part of a parameter ({call.name})")
        if x in self._computed:
            self._computed[out] = True
        self._origins[out] = tuple(axes)
        return None

    def _same_shape(self, call: _Call) -> None:
        labels = self._label(call.bound["self"])
        if labels is not None:
            self._labels[call.first] = labels
        elif call.bound["self"] in self._origins:
            self._origins[call.first] = self._origins[call.bound["self"]]

    def _index_copy(self, call: _Call) -> None:
        """The scatter of a module that is padded back already; any other is not followed."""
        module = self.module
        if not isinstance(module, PaddedBack) or call.bound["index"] is not module.slots:
            return self._barrier(call)
        source = call.bound["source"]
        labels = self._label(source)
        vector = fixed(source.shape[1:2]) if labels is None else vector_along(labels, 1)
        if vector is None:
            return self._barrier(call)
        positions = module.slots.cpu().numpy().astype(np.int64)
        self._scatter(self.path, call.first, vector.numpy().astype(np.int64), positions, present=True)
        return None

    def _gated(self, call: _Call) -> None:
        """One half of the channels gates the other, however many they are."""
        labels, dim = self._label(call.bound["self"]), call.bound["dim"]
        if labels is None:
            return self._barrier(call)
        one, other = labels.chunk(2, dim)
        why = f"they meet something of fixed size in {self.where} (glu)"
        self.tie(one.reshape(-1).numpy(), other.reshape(-1).numpy(), why)
        self._labels[call.first] = torch.where(one == FIXED, other, one)
        return None

    def _shuffled(self, call: _Call) -> None:
        """Operations that part the channels into a number of groups, or join that number of them, whatever their count."""
        x = call.bound["self"]
        dim = 1 if "channel" in call.name else x.ndim - 3
        labels = self._label(x)
        vector = None if labels is None else vector_along(labels, dim)
        if vector is None:
            return self._barrier(call)
        if call.name == "pixel_unshuffle":
            result = vector.repeat_interleave(call.bound["downscale_factor"] ** 2)
        else:
            # A pixel shuffle lays neighbours out as positions of one channel; a channel shuffle deals the groups out in turn.
            groups = len(vector) // call.bound["upscale_factor"] ** 2 if "pixel" in call.name else call.bound["groups"]
            rows = vector.reshape(groups, -1)
            first, *others = (rows.T if "pixel" in call.name else rows).numpy().astype(np.int64)
            for other in others:
                self.tie(first, other, f"{self.where} parts channels that meet something of fixed size ({call.name})")
            result = rows[:, 0] if "pixel" in call.name else rows.T.reshape(-1)
        self._labels[call.first] = spread(result, call.first.shape, dim)
        return None

    def _strides(self, call: _Call) -> None:
        """Other strides for extents of 1, as a pool to one position gives them in channels-last, move nothing."""
        x, labels = call.first, self._label(call.first)
        same = labels is not None and tuple(labels.shape) == tuple(x.shape) and len(call.laid) == x.ndim
        moved = [dim for dim in range(x.ndim) if x.shape[dim] > 1 and same and call.laid[dim] != x.stride(dim)]
        if not same or moved or x.storage_offset():
            self._barrier(call)

    def _operands(self, call: _Call) -> list[tuple[bool, str | None]]:
        """Of a sum of two branches: whether each ends in a layer of its own, and in which module."""
        found: list[tuple[bool, str | None]] = []
        if call.name in ("add", "add_") and call.bound.get("alpha", 1) == 1 and len(call.tensors) == 2 and call.first.ndim >= 2:
            # What is tied, or was read by a layer before, does not end here: it is an identity.
            for tensor in call.tensors:
                labels = self._label(tensor)
                vector = None if labels is None or tensor.shape != call.first.shape else vector_along(labels, 1)
                if vector is None:
                    return []
                atoms = vector.numpy()
                own = (
                    (int(atoms[0]), len(atoms)) in self._own
                    and bool((np.diff(atoms) == 1).all())
                    and not self._busy[atoms[atoms < len(self._busy)]].any()
                )
                end = self._ends.get(tensor)
                found.append((own, end))
        return found

    def _note_sum(self, call: _Call, operands: list[tuple[bool, str | None]]) -> None:
        labels = self._label(call.first)
        vector = None if labels is None else vector_along(labels, 1)
        if vector is None or not operands:
            return
        ends = [end for own, end in operands if own]
        block = ends[0] if len(ends) == 1 else None
        self._sum_of[call.first] = len(self.sums)
        self.sums.append(SumPoint(vector.numpy().astype(np.int64), None, projection=len(ends) == 2, block=block))

    def _note_activation(self, call: _Call) -> None:
        labels = self._label(call.first)
        if call.name.removesuffix("_") not in _ACTIVATIONS or labels is None:
            return
        dims = [dim for dim in range(labels.ndim) if varies(labels, dim)]
        vector = vector_along(labels, dims[0]) if len(dims) == 1 else None
        if vector is None:
            return
        self._activation_of[call.first] = len(self.activations)
        name, shape = call.name.removesuffix("_"), tuple(call.first.shape)
        self.activations.append(ActivationPoint(name, vector.numpy().astype(np.int64), dims[0], shape, None))
        self.activation_taps.append([])

    def _note_maximum(self, labels: Tensor) -> None:
        self.maxima.append((len(self.activations), np.unique(to_numpy(labels))))


@dataclass(frozen=True)
class _Call:
    """One operation: what it was called with and what came out."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    bound: Mapping[str, Any]
    tensors: list[Tensor]
    out: Any
    laid: tuple[int, ...] = ()  # strides of the first argument before `as_strided_`

    @property
    def name(self) -> str:
        name: str = self.func.overloadpacket.__name__
        return name

    @property
    def outputs(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self.out) if isinstance(leaf, Tensor)]

    @property
    def first(self) -> Tensor:
        return self.outputs[0]


def _is_weight(out_axis: frozenset[tuple[str, int]], in_axis: frozenset[tuple[str, int]]) -> bool:
    """Whether something used as a weight is a parameter, or as many of one shape combined element by element.

    Hooks that recompute a module's `weight` from `weight_orig` leave a copy in the module that no cut would reach.
    """
    names = dict(out_axis).keys()
    return bool(names) and names == dict(in_axis).keys() and not any(name.endswith("_orig") for name in names)


def _equal_parts(call: _Call, x: Tensor, labels: Tensor) -> list[Tensor]:
    """The parts of a split or a slice that takes one of several equal parts of a tensor; none for any other operation."""
    if call.name not in ("slice", "split", "split_with_sizes"):
        return []
    dim = call.bound.get("dim", 0)
    extents = {tensor.shape[dim] for tensor in call.outputs}
    size = call.first.shape[dim]
    if len(extents) > 1 or x.shape[dim] % size or size == x.shape[dim]:
        return []
    if call.name == "slice" and (call.bound.get("step", 1) != 1 or (call.bound.get("start") or 0) % size):
        return []
    return list(labels.split(size, dim))


def _stretched(tensor: Tensor, dim: int) -> bool:
    """Whether a tensor has one value along a dimension, however often an `expand` repeats it."""
    return -dim > tensor.ndim or tensor.shape[dim] == 1 or tensor.stride(dim) == 0
