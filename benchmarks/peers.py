"""Other tools that cut networks, and ours, each asked to take half of the channels as its own documentation says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from os import devnull
from typing import Any

from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.detection import FasterRCNN
from torchvision.models.swin_transformer import ShiftedWindowAttention

from benchmarks.zoo import Specimen
from lit_compress import analyze, cut
from lit_compress.tracing import tensors_in

SHARE = 0.5
PRODUCTS = ("Convolution", "Addmm", "Mm", "Linear")


@dataclass(frozen=True)
class Tool:
    """Something that cuts networks.

    Args:
        prune: Cuts a network, in place, given its specimen, its inputs, and the layers whose channels must stay.
        modules: What is to be imported before.
    """

    prune: Callable[[Specimen, nn.Module, Any, list[nn.Module]], None]
    modules: tuple[str, ...]

    @property
    def package(self) -> str:
        """What its modules are in."""
        return self.modules[0].partition(".")[0]

    @property
    def missing(self) -> bool:
        """Whether it is not installed: ``pip install lit-compress[peers]``."""
        return find_spec(self.package) is None

    @property
    def version(self) -> str:
        """Its version, or that it is not installed."""
        return "not installed" if self.missing else metadata.version(self.package)


def _ours(specimen: Specimen, model: nn.Module, inputs: Any, leave: list[nn.Module]) -> None:
    """It finds by itself what must stay."""
    analysis = analyze(model, [inputs], method="magnitude", example_inputs=inputs, forward_fn=specimen.run)
    recipe = analysis.recipe(keep_channels=1 - SHARE)
    cut(model, recipe, inputs, forward_fn=specimen.run, graph=analysis.graph)


def _torch_pruning(specimen: Specimen, model: nn.Module, inputs: Any, leave: list[nn.Module]) -> None:
    """As its example for torchvision's networks, with the heads of attention named as its documentation has it."""
    tp = import_module("torch_pruning")
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=SHARE,
        ignored_layers=leave,
        num_heads=dict(_heads(model)),
        forward_fn=specimen.run,
    )
    pruner.step()
    _note_width(model)


def _fasterai(specimen: Specimen, model: nn.Module, inputs: Any, leave: list[nn.Module]) -> None:
    """As its tutorial; the layers to leave alone are named where it does not look for them itself, in attention."""
    pruner_of, criteria = import_module("fasterai.prune.pruner").Pruner, import_module("fasterai.core.criteria")
    finds_them = any(isinstance(module, ShiftedWindowAttention) for module in model.modules())
    with open(devnull, "w") as nothing, redirect_stdout(nothing):
        pruner_of(
            model,
            SHARE,
            "local",
            criteria.large_final,
            ignored_layers=None if finds_them else leave,
            example_inputs=next(tensors_in(inputs)),  # it takes one tensor
            forward_fn=lambda network, _: specimen.run(network, inputs),
        ).prune_model()
    _note_width(model)


TOOLS = {
    "ours": Tool(_ours, ("lit_compress.analysis", "lit_compress.surgery")),
    "Torch-Pruning": Tool(_torch_pruning, ("torch_pruning",)),
    "fasterai": Tool(_fasterai, ("fasterai.prune.pruner", "fasterai.core.criteria")),
}


def output_layers(specimen: Specimen, model: nn.Module, inputs: Any) -> list[nn.Module]:
    """The layers whose channels leave the network, which a user tells a tool to leave alone.

    They are found by autograd: those that are met first on the way back from the outputs. Of a detector, they are the parts that
    Torch-Pruning's example names.
    """
    if isinstance(model, FasterRCNN):
        return [model.rpn.head.cls_logits, model.rpn.head.bbox_pred, model.backbone.fpn, model.roi_heads]
    owners = {parameter: module for module in model.modules() for parameter in module.parameters(recurse=False)}
    waiting = [tensor.grad_fn for tensor in tensors_in(specimen.run(model, inputs))]
    met: dict[nn.Module, None] = {}
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith(PRODUCTS):
            met.update((owners[parameter], None) for parameter in _parameters(node) if parameter in owners)
        else:
            waiting += [before for before, _ in node.next_functions]
    return list(met)


def _parameters(node: Any) -> Iterator[Tensor]:
    """The parameters that an operation multiplies or adds, directly or transposed."""
    for before, _ in node.next_functions:
        for reached in (before, *(further for further, _ in getattr(before, "next_functions", ()))):
            if hasattr(reached, "variable") and (reached is before or before.name().startswith(("T", "Permute"))):
                yield reached.variable


def _heads(model: nn.Module) -> Iterable[tuple[nn.Module, int]]:
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            yield module, module.num_heads
        elif isinstance(module, ShiftedWindowAttention):
            yield module.qkv, module.num_heads


def _note_width(model: nn.Module) -> None:
    """The forward of torchvision's ViT compares with a number of its own; Torch-Pruning's example sets it so."""
    if isinstance(model, VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels
