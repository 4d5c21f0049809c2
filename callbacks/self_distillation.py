"""The network before its first cut as the teacher of what is left of it, in any module's training step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lit_compress.callbacks.added_loss import add_loss, remove_loss
from lit_compress.losses import KnowledgeDistillation, Term
from lit_compress.losses.terms import Readings, loss_parts, student_taps, teacher_for
from lit_compress.plan import plan_of
from lit_compress.slicing import all_tensors
from lit_compress.snapshot import Snapshot
from lit_compress.taps import OUTPUT, Taps
from lit_compress.teacher import Teacher

NAME = "unpruned"


@dataclass
class _Seen:
    """What one training step shows: which module it calls as its network, and what student and teacher gave there."""

    network: str | None = None
    depth: int = 0
    ours: Readings = field(default_factory=dict)
    theirs: Readings = field(default_factory=dict)


class SelfDistillation:
    """Adds to a module's own loss what tells the pruned network from the one before the first cut, on the same batch.

    The network is the module that ``training_step`` calls: the LightningModule itself where it calls ``self(x)``, ``net`` where
    it calls ``self.net(x)``. The first step shows it. It must be one that is called once, since a step in several parts has no
    place where a copy could take over.

    Args:
        terms: Of the loss, which name layers of that network; without any, nothing ever happens. True for the softened outputs
            alone: the module's own loss has the labels.

    Raises:
        MisconfigurationException: If a term reads labels, which only the module knows, or holds parameters, which nobody trains.
    """

    def __init__(self, terms: bool | Sequence[Term]) -> None:
        if isinstance(terms, bool):
            terms = [by_default()] if terms else []
        elif not terms:
            raise MisconfigurationException("Argument `distill_from_unpruned` must be True, False, or hold at least one term.")
        for term in terms:
            if not isinstance(term, Term):
                raise MisconfigurationException(
                    f"Argument `distill_from_unpruned` lists terms of `lit_compress.losses` but holds a {type(term).__name__}."
                )
            if term.reads_labels:
                raise MisconfigurationException(
                    f"{type(term).__name__} in `distill_from_unpruned` reads labels, which are in the module's own loss already. "
                    "Leave it out, or give `KnowledgeDistillation` without weight on them: `alpha=1.0`."
                )
            if any(True for _ in term.parameters()):
                raise MisconfigurationException(
                    f"{type(term).__name__} in `distill_from_unpruned` has parameters, which no optimizer trains. Distil with "
                    "`LitDistiller`, from a copy of the unpruned network."
                )
        self.terms = tuple(terms)
        self.reset()

    def reset(self) -> None:
        """Another run begins."""
        self._network: str | None = None  # its name, once a step has shown it
        self._resumed: Snapshot | None = None
        self._hold(None)

    def _hold(self, unpruned: nn.Module | None) -> None:
        self._unpruned = unpruned
        self._teacher: Teacher | None = None  # made of it in the first step that shows the network

    @property
    def lacks_teacher(self) -> bool:
        """Whether there is something to learn and, as yet, nobody to learn from."""
        return bool(self.terms) and self._unpruned is None

    def begin(self, pl_module: LightningModule) -> None:
        """Training begins or goes on: watch the module's steps, and learn from the unpruned network if there is one."""
        if not self.terms:
            return
        if self._resumed is not None:
            unpruned = _copied(pl_module)
            self._resumed.restore(unpruned)
            self._resumed = None
            self._hold(unpruned)
        add_loss(pl_module, NAME, self._loss, self._watch)

    def end(self, pl_module: LightningModule) -> None:
        """Leave nothing on the module."""
        remove_loss(pl_module, NAME)

    @contextmanager
    def cutting(self, pl_module: LightningModule) -> Iterator[None]:
        """Keep a copy of the network, unless one is kept from before, and learn from it; not if anything fails inside."""
        if not self.lacks_teacher:
            yield
            return
        self._hold(_copied(pl_module))
        try:
            yield
        except BaseException:
            self._hold(None)
            raise

    def forget_if_whole(self, pl_module: LightningModule) -> None:
        """The network was put back: if it is the unpruned one, there is nothing to learn from itself."""
        if self._unpruned is not None and plan_of(pl_module) == plan_of(self._unpruned):
            self._hold(None)

    def state_dict(self) -> dict[str, Any] | None:
        """The teacher's tensors and what was cut out of it, as builtin types; None if there is none yet."""
        if self._unpruned is None:
            return None if self._resumed is None else self._resumed.to_dict()
        tensors = {name: tensor.detach() for name, tensor in all_tensors(self._unpruned).items()}
        return Snapshot(tensors, plan_of(self._unpruned)).to_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Inverse of :meth:`state_dict`; the teacher is there after :meth:`begin`."""
        self._hold(None)
        self._resumed = None if state is None else Snapshot.from_dict(state)

    # ---------------------------------------------------------------- a training step

    @contextmanager
    def _watch(self, module: LightningModule) -> Iterator[_Seen]:
        seen = _Seen()
        with ExitStack() as stack:
            for name, layer in self._candidates(module):
                stack.callback(layer.register_forward_pre_hook(partial(self._enter, seen, stack, name), with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(partial(self._leave, seen, name)).remove)
            yield seen

    def _candidates(self, module: LightningModule) -> list[tuple[str, nn.Module]]:
        """Modules that may be the network: any that holds parameters, until a step has shown it."""
        if self._network is None:
            return [(name, layer) for name, layer in module.named_modules() if any(True for _ in layer.parameters())]
        return [] if self.lacks_teacher else [(self._network, module.get_submodule(self._network))]

    def _enter(
        self, seen: _Seen, stack: ExitStack, name: str, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        seen.depth += 1
        if seen.depth > 1:
            return
        if seen.network is not None:
            raise MisconfigurationException(
                f"`distill_from_unpruned` compares what one call of a network gives, but the training step calls "
                f"{_called(seen.network)} and then {_called(name)}. Let it call one module, once, as by `self(x)`."
            )
        seen.network = name
        taps = student_taps(self.terms)
        try:
            if self._unpruned is None:  # nothing to learn yet; but a layer that does not exist is told at once
                Taps(layer, [*taps, *(tap for term in self.terms for tap in (*term.teacher_taps, *term.sampled_taps))])
                return
            if self._teacher is None:
                self._teacher = teacher_for(self._unpruned.get_submodule(name), self.terms)
            seen.theirs = self._teacher.read(*inputs, **named)  # first: it leaves no activations behind
        except ValueError as error:
            raise MisconfigurationException(f"`distill_from_unpruned`: {error}") from error
        seen.ours = stack.enter_context(Taps(layer, taps).reading())

    def _leave(self, seen: _Seen, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        seen.depth -= 1
        if seen.depth == 0 and OUTPUT in student_taps(self.terms) and not isinstance(output, Tensor):
            raise MisconfigurationException(
                f"`distill_from_unpruned` reads what {_called(name)} gives, but that is a {type(output).__name__} and no tensor. "
                'Name layers inside it, by terms such as `[ScoreDivergence("score")]` for a layer `score`.'
            )

    def _loss(self, module: LightningModule, seen: _Seen) -> dict[str, Tensor]:
        if seen.network is None and (self._network is None or not self.lacks_teacher):
            missed = "no module with parameters" if self._network is None else f"{_called(self._network)} no longer"
            raise MisconfigurationException(
                f"`distill_from_unpruned` needs a training step that calls a network, but that of {type(module).__name__} calls "
                f"{missed}. Let it call `self(x)`, or a module that it holds."
            )
        if seen.network is not None:
            self._network = seen.network
        return {} if self.lacks_teacher else loss_parts(self.terms, seen.ours, seen.theirs, None)


def by_default() -> KnowledgeDistillation:
    """Softened outputs alone, weighed so that their gradient is at most as large as that of a cross-entropy.

    At temperature T, the gradient of T² times the divergence is T times a difference of probabilities. Unweighed, it made a
    LeNet-5 diverge, right after a cut, at the rate that it was trained with.
    """
    return KnowledgeDistillation(temperature=4.0, alpha=1.0, form="zagoruyko", weight=0.25)


def _called(name: str) -> str:
    return repr(name) if name else "the module itself"


def _copied(pl_module: LightningModule) -> LightningModule:
    try:
        return copy.deepcopy(pl_module)
    except Exception as error:  # whatever a user's attributes may raise
        raise MisconfigurationException(
            f"`distill_from_unpruned` keeps a copy of the unpruned network, but {type(pl_module).__name__} cannot be copied: "
            f"{error}"
        ) from error
