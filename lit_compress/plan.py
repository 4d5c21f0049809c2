"""Which indices of which dimension of every tensor remain, and how to bring anything that holds such tensors along."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from lit_compress.migration import Migration, migrated
from lit_compress.naming import relocation
from lit_compress.optimizer_state import prepared
from lit_compress.padding import Pad, pad_modules
from lit_compress.recipe import Recipe
from lit_compress.slicing import all_tensors, cut_tensors

FORMAT = 2
# Format that a file may have -> its plan in the next format.
_MIGRATIONS: Mapping[int, Migration] = {1: lambda data: {"transient": [], "pads": {}, **data}}  # blocks were not padded back yet
Dims: TypeAlias = Mapping[int, tuple[int, ...]]
_ATTRIBUTE = "lit_compress_plan"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a cut does to every parameter and buffer; all that must follow a cut follows from it.

    Args:
        recipe: The channels kept in every layer that lost some, tied layers included.
        keep: Name of a parameter or buffer to, for each dimension that is cut, the ascending indices kept. A tensor that is
            registered under several names (tied weights) is listed under each.
        shapes: Shape before the cut of each tensor in ``keep``.
        transient: Those in ``keep`` that a state dict does not hold (buffers that are not persistent).
        pads: Modules that are padded back after the cut, and how.
    """

    recipe: Recipe
    keep: Mapping[str, Dims]
    shapes: Mapping[str, tuple[int, ...]]
    transient: tuple[str, ...] = ()
    pads: Mapping[str, Pad] = field(default_factory=dict)
    _names: Any = field(default=None, repr=False, compare=False)  # parameter of the model cut -> its name

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.from_dict, (self.to_dict(),)

    def shape_after(self, name: str, before: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Shape of a tensor after the cut; ``before`` is needed for one that the plan leaves whole."""
        dims = self.keep.get(name, {})
        shape = self.shapes.get(name, before)
        if shape is None:
            raise ValueError(f"The plan does not know tensor {name!r}.")
        return tuple(len(dims[dim]) if dim in dims else size for dim, size in enumerate(shape))

    def then(self, following: Plan) -> Plan:
        """One plan for two cuts in a row, relative to the network before the first.

        Raises:
            ValueError: If the second cut is not one of the network that the first leaves.
        """
        keep = {name: dict(dims) for name, dims in self.keep.items()}
        shapes = dict(self.shapes)
        for name, dims in following.keep.items():
            self._refuse_other(name, self.shape_after(name, following.shapes[name]), following.shapes[name])
            shapes.setdefault(name, following.shapes[name])
            mine = keep.setdefault(name, {})
            for dim, indices in dims.items():
                before = mine.get(dim)
                mine[dim] = indices if before is None else tuple(before[index] for index in indices)
        transient = tuple(sorted({*self.transient, *following.transient}))
        pads = {**self.pads, **following.pads}
        return Plan(recipe=self.recipe.then(following.recipe), keep=keep, shapes=shapes, transient=transient, pads=pads)

    def renamed(self, *, add: str = "", drop: str = "") -> Plan:
        """The same plan for a network that holds this one's as a submodule (``add="net."``), or is held by it."""
        names = {name: add + name.removeprefix(drop) for name in self.keep if name.startswith(drop)}
        return Plan(
            recipe=self.recipe.renamed(add=add, drop=drop),
            keep={new: self.keep[name] for name, new in names.items()},
            shapes={new: self.shapes[name] for name, new in names.items()},
            transient=tuple(names[name] for name in self.transient if name in names),
            pads={add + path.removeprefix(drop): pad for path, pad in self.pads.items() if path.startswith(drop)},
        )

    def bound_to(self, model: nn.Module) -> Plan:
        """The plan with the parameters of the network that it cuts, so that an optimizer's can be told apart."""
        names: Any = WeakTensorKeyDictionary()
        for name, parameter in model.named_parameters():
            names[parameter] = name
        return replace(self, _names=names)

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """What remains of a tensor that has the shape of parameter or buffer ``name``.

        Raises:
            ValueError: If the tensor does not have the shape that ``name`` had before the cut.
        """
        dims = self.keep.get(name)
        if not dims:
            return tensor
        self._refuse_other(name, tuple(tensor.shape), self.shapes[name])
        taken = tensor.detach()
        for dim, indices in dims.items():
            taken = taken.index_select(dim, torch.tensor(indices, device=tensor.device))
        return _laid_out_as(tensor, taken)

    def widened(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the size that ``name`` had before the cut, from what the cut has left of it.

        In place of each channel that is gone stands a copy of one that is left.

        Raises:
            ValueError: If the tensor does not have the shape that the cut gave to ``name``.
        """
        if tuple(tensor.shape) != self.shape_after(name):
            raise ValueError(
                f"Tensor {name!r} should have shape {self.shape_after(name)} after the cut but has {tuple(tensor.shape)}."
            )
        wide = tensor.detach()
        for dim, indices in self.keep[name].items():
            kept = torch.tensor(indices)
            places = torch.bucketize(torch.arange(self.shapes[name][dim]), kept).clamp(max=len(kept) - 1)
            wide = wide.index_select(dim, places.to(tensor.device))
        return _laid_out_as(tensor, wide)

    @staticmethod
    def _refuse_other(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise ValueError(
                f"Tensor {name!r} should have shape {expected} before the cut but has {found}; "
                "it was cut already, or belongs to another network."
            )

    def apply_to(self, target: Optimizer | nn.Module | MutableMapping[str, Tensor]) -> None:
        """Cut, in place, something that goes with the network: it follows the cut and stays the object it was.

        Args:
            target: An optimizer over the network's parameters (its state is sliced; groups and options stay), a copy of the
                network (an average of its weights, say, however wrapped), or a state dict of it. What was cut out of a copy,
                :func:`plan_of` knows.

        Raises:
            ValueError: If ``target`` does not fit the plan. It is then unchanged.
            TypeError: If ``target`` is none of these.
        """
        if isinstance(target, Optimizer):
            self.prepare(target)()
        elif isinstance(target, nn.Module):
            fitted, before = self._fitted(all_tensors(target).keys(), "module"), plan_of(target)
            composed = fitted if before is None else before.then(fitted)
            fitted.cut_module(target)
            note_plan(target, composed)
        elif isinstance(target, MutableMapping):
            stored = replace(self, keep={name: dims for name, dims in self.keep.items() if name not in self.transient})
            fitted = stored._fitted(target.keys(), "state dict")
            target.update({name: fitted.take(name, target[name]) for name in fitted.keep})
            target.update({f"{path}.slots": torch.tensor(pad.slots) for path, pad in fitted.pads.items()})
        else:
            raise TypeError(f"Expected an optimizer, a module or a state dict but got {type(target).__name__}.")

    def cut_module(self, model: nn.Module) -> None:
        """Slice the tensors of a network that has exactly the plan's names, and pad back what is cut on its own."""
        unpad = pad_modules(model, self.pads)
        try:
            cut_tensors(model, self.keep, self.take)
        except BaseException:
            unpad()
            raise

    def prepare(self, optimizer: Optimizer) -> Callable[[], None]:
        """Work out what an optimizer's state will be after the cut; calling the result puts it there, and cannot fail.

        Raises:
            ValueError: If the optimizer holds state that cannot follow the cut. It is never changed by this method.
        """
        if self._names is None:
            raise ValueError(
                "This plan knows no parameters, only names; bind it to the network that was cut: plan.bound_to(model)."
            )
        return prepared(self, optimizer, self._names)

    def _fitted(self, names: Collection[str], what: str) -> Plan:
        """This plan under the names that the target uses."""
        change = relocation(self.keep, names)
        if change is None:
            missing = sorted(set(self.keep) - set(names))
            raise ValueError(
                f"The {what} lacks {missing[:3]}, which the plan cuts; it belongs to another network, "
                "or holds more than one copy of this one."
            )
        return self.renamed(add=change.add, drop=change.drop)

    def to_dict(self) -> dict[str, Any]:
        """Builtin types only, so that JSON and ``torch.load(weights_only=True)`` take it."""
        keep = {name: {str(dim): list(indices) for dim, indices in dims.items()} for name, dims in self.keep.items()}
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        transient = list(self.transient)
        pads = {path: {"width": pad.width, "slots": list(pad.slots)} for path, pad in self.pads.items()}
        fields = {"keep": keep, "shapes": shapes, "transient": transient, "pads": pads}
        return {"format": FORMAT, "recipe": self.recipe.to_dict(), **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: If the format is from the future, or a field is missing.
        """
        data = migrated(data, FORMAT, _MIGRATIONS, "plan")
        if missing := sorted({"recipe", "keep", "shapes", "transient", "pads"} - set(data)):
            raise ValueError(f"Expected a plan but {missing} are missing.")
        keep = {name: {int(dim): tuple(indices) for dim, indices in dims.items()} for name, dims in data["keep"].items()}
        shapes = {name: tuple(shape) for name, shape in data["shapes"].items()}
        pads = {path: Pad(pad["width"], tuple(pad["slots"])) for path, pad in data["pads"].items()}
        recipe, transient = Recipe.from_dict(data["recipe"]), tuple(data["transient"])
        return cls(recipe=recipe, keep=keep, shapes=shapes, transient=transient, pads=pads)


def _laid_out_as(tensor: Tensor, result: Tensor) -> Tensor:
    """A result in the memory format of the tensor that it was made from."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    if channels_last and tensor.is_contiguous(memory_format=channels_last) and not tensor.is_contiguous():
        return result.contiguous(memory_format=channels_last)
    return result


def plan_of(model: nn.Module) -> Plan | None:
    """Everything that was cut out of a network so far, relative to the network as it was built; None if nothing was.

    Also finds what was cut out of a submodule on its own.
    """
    found: Plan | None = vars(model).get(_ATTRIBUTE)
    for path, module in model.named_modules():
        inner: Plan | None = vars(module).get(_ATTRIBUTE) if path else None
        if inner is not None:
            inner = inner.renamed(add=path + ".")
            found = inner if found is None else found.then(inner)
    return found


def note_plan(model: nn.Module, plan: Plan | None) -> None:
    """Make ``plan`` what :func:`plan_of` answers. It travels with copies and pickles of the network, not in its state dict."""
    for module in model.modules():
        vars(module).pop(_ATTRIBUTE, None)
    if plan is not None:
        vars(model)[_ATTRIBUTE] = plan
