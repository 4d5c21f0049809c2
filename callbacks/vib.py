"""Pruning by the Variational Information Bottleneck inside a running Trainer."""

from __future__ import annotations

from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Adam, Optimizer
from typing_extensions import override

from lit_compress.analysis import Analysis, wanted
from lit_compress.callbacks.added_loss import add_loss, refuse_manual, remove_loss
from lit_compress.callbacks.companions import all_or_nothing, averages_of, step_own
from lit_compress.callbacks.pruning import PruningCallback
from lit_compress.callbacks.ranks import rewrapped
from lit_compress.callbacks.steps import silent_step
from lit_compress.callbacks.targets import one_target
from lit_compress.gates import (
    Gates,
    find_sites,
    fold_gates,
    gates_back_on_error,
    gates_of,
    hide_gates,
    put_gates,
    show_gates,
)
from lit_compress.graph import trace
from lit_compress.information import VIB
from lit_compress.layers import VIBGate
from lit_compress.layers.vib_gate import MapScale
from lit_compress.rankings import Method
from lit_compress.ranks import as_one
from lit_compress.recipe import Recipe
from lit_compress.selection import vib


class VIBPruning(PruningCallback):
    r"""Train with a gate of noise after each activation, then prune the channels that stand much noise.

    When training starts, gates are put into the network where layers are cut on their own: after the activation, before pooling.
    Their penalty, :math:`\frac{1}{2} \sum \log(1 + \mu^2 / \sigma^2)` of each layer, is added to the loss of any module and
    logged as ``train/vib``. They are trained by an Adam of their own. At the cut they are folded into the weights that read
    their channels, and channels without information are removed: what goes on training is a plain network. Only where a max-pool
    takes a channel whose factor is negative, a sign stays behind (see ``keep_signs``).

    Checkpoints before the cut hold the gates and say where they are; ``load_pruned`` gives the network with its gates.

    Args:
        kl_scale: Weight of the penalty. Higher prunes more.
        warmup_epochs: The weight grows to ``kl_scale`` over this many epochs.
        threshold: Channels go whose :math:`\log \alpha` is this or more. Higher keeps more.
        keep_params: Instead of the threshold, a share of the original network's trainable parameters to keep, in (0, 1).
        keep_mult_adds: The same for mult-adds.
        keep_latency: The same for the time of a validation step, as for :class:`~lit_compress.callbacks.PFAPruning`.
        gate_lr: Learning rate of the gates. It falls as that of the module's own optimizer does by its schedule.
        gate_weight_decay: Their weight decay, in the gradient as Adam has it. It pulls towards pruning.
        map_scale: How a layer's penalty grows with its feature map; see :class:`~lit_compress.layers.VIBGate`.
        keep_signs: Keep negative signs before a max-pool, as factors of ±1. Otherwise such channels are removed as well.
        kwargs: When and where, as for :class:`PruningCallback`. There is one cut.

    Raises:
        MisconfigurationException: If a value is out of range, or several cuts are asked for. From the start of training: if the
            module optimizes manually, there is no place for a gate, a gate could not be folded, or another callback averages the
            weights.

    Source: Dai et al., *Compressing Neural Networks Using the Variational Information Bottleneck* (VIBNet), 2018.

    Example::

        trainer = Trainer(max_epochs=100, callbacks=[VIBPruning(kl_scale=1e-5, at_epoch=80)])
    """

    def __init__(
        self,
        *,
        kl_scale: float = 1e-5,
        warmup_epochs: int = 0,
        threshold: float = 0.0,
        keep_params: float | None = None,
        keep_mult_adds: float | None = None,
        keep_latency: float | None = None,
        gate_lr: float = 1e-3,
        gate_weight_decay: float = 5e-5,
        map_scale: MapScale = "height",
        keep_signs: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        numbers = {"kl_scale": kl_scale, "warmup_epochs": warmup_epochs, "gate_weight_decay": gate_weight_decay}
        for name, value in numbers.items():
            if value < 0:
                raise MisconfigurationException(f"Argument `{name}` must not be negative but got {value}.")
        if gate_lr <= 0:
            raise MisconfigurationException(f"Argument `gate_lr` must be positive but got {gate_lr}.")
        if map_scale not in ("height", "area", "one"):
            raise MisconfigurationException(f"Argument `map_scale` must be 'height', 'area' or 'one' but got {map_scale!r}.")
        if self.schedule.max_cuts > 1:
            raise MisconfigurationException(
                "VIBPruning folds its gates at one cut: give `at_epoch`, or `when` without `max_cuts`."
            )
        sizes = {"keep_params": keep_params, "keep_mult_adds": keep_mult_adds, "keep_latency": keep_latency}
        self.target = one_target("", sizes, needed=False)
        self.kl_scale, self.warmup_epochs, self.threshold = kl_scale, warmup_epochs, threshold
        self.gate_lr, self.gate_weight_decay, self.map_scale, self.keep_signs = gate_lr, gate_weight_decay, map_scale, keep_signs
        self.own_optimizer: Adam | None = None
        self._optimizer_state: dict[str, Any] | None = None  # from a checkpoint
        self._hidden: Gates | None = None  # while the module's own optimizer is made
        self._log_alphas: dict[str, Tensor] = {}

    @property
    @override
    def method(self) -> Method:
        return VIB(self._log_alphas, self.threshold)

    @override
    def choose(self, analysis: Analysis) -> Recipe:
        if not self._log_alphas:
            raise ValueError("VIBPruning goes by its gates, which it puts into the network when training starts: run `fit`.")
        return self.limited_recipe(analysis, self.target)

    # ---------------------------------------------------------------- hooks, in the order in which they fire

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.own_optimizer = self._optimizer_state = None
            self._log_alphas = {}
            self._hidden = hide_gates(pl_module)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # the module made room for the checkpoint's gates
            self._hidden = hide_gates(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        refuse_manual(pl_module, "vib")
        if averages_of(trainer):
            raise MisconfigurationException(
                "VIBPruning puts gates into the network, which the copy lacks that another callback averages the weights in. "
                "Average the weights of the pruned network in a run of its own."
            )
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, PruningCallback) and other is not self and other.fallback is not None:
                raise MisconfigurationException(
                    f"`max_drop` of {type(other).__name__} may go back to a network with gates, when VIBPruning has folded them. "
                    "Leave it out, or prune in two runs."
                )
        held, self._hidden = self._hidden, None
        if held is not None:
            with rewrapped(trainer, pl_module), as_one():
                show_gates(pl_module, held)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.schedule.remaining and not _noise(pl_module):
            with rewrapped(trainer, pl_module), as_one():
                self._put_in(trainer, pl_module)
        gates = _noise(pl_module)
        if not gates:
            return
        parameters = [parameter for gate in gates.values() for parameter in gate.parameters()]
        optimizer = Adam(parameters, lr=self.gate_lr, weight_decay=self.gate_weight_decay)
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
        self._train_gates(pl_module, optimizer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.own_optimizer is None:
            return
        group = optimizer.param_groups[0]
        falls = min(group["lr"] / group.get("initial_lr", group["lr"]), 1.0) if group["lr"] > 0 else 0.0
        self.own_optimizer.param_groups[0]["lr"] = self.gate_lr * falls
        step_own(trainer, self.own_optimizer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._leave_gates(pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._leave_gates(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        optimizer = None if self.own_optimizer is None else self.own_optimizer.state_dict()
        return {**super().state_dict(), "gate_optimizer": optimizer, "log_alphas": dict(self._log_alphas)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._optimizer_state, self._log_alphas = state_dict["gate_optimizer"], dict(state_dict["log_alphas"])

    # ---------------------------------------------------------------- gates

    def _put_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with gates_back_on_error(pl_module), self.traced(trainer, pl_module) as (graph, example):
            sites, without = find_sites(graph, threshold=self.threshold, map_scale=self.map_scale)
            chosen = [sites[group.name] for group in graph.groups()
                      if group.name in sites and wanted(group, self.include, self.exclude)]  # fmt: skip
            if not chosen:
                reasons = "; ".join(f"{name!r}: {why}" for name, why in without.items())
                raise MisconfigurationException(f"VIBPruning finds no place for a gate. {reasons or 'All layers are left out'}.")
            put_gates(pl_module, chosen)
            gated = trace(pl_module, lambda: silent_step(pl_module, example))
            fold_gates(pl_module, gated, example, silent_step, keep_signs=self.keep_signs, only_check=True)

    def _penalty(self, module: Any) -> Tensor:
        penalties = [gate.penalty() for gate in _noise(module).values()]
        ramp = min((module.current_epoch + 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0
        return self.kl_scale * ramp * torch.stack(penalties).sum()

    @override
    def cut_now(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fold the gates, then cut; if anything fails, network and gates are as they were.

        Where ``max_drop`` has gone back to the folded network, the cut goes by what the gates had found.
        """
        gates, optimizer = _noise(pl_module), self.own_optimizer
        if optimizer is None:
            super().cut_now(trainer, pl_module)
            return
        self._log_alphas = {name: vib.log_alpha(gate.mu.detach(), gate.log_var.detach()).cpu() for name, gate in gates.items()}
        try:
            with rewrapped(trainer, pl_module), as_one(), gates_back_on_error(pl_module), all_or_nothing([pl_module], []):
                with self.traced(trainer, pl_module) as (graph, example):
                    signs = fold_gates(pl_module, graph, example, silent_step, keep_signs=self.keep_signs)
                self._leave_gates(pl_module)
                super().cut_now(trainer, pl_module)
        except BaseException:
            self._train_gates(pl_module, optimizer)
            raise
        for layer, channels in signs.items():
            fate = "keep a factor of -1 before it" if self.keep_signs else "were switched off"
            rank_zero_warn(f"A max-pool takes channels {channels} of {layer!r}, whose gates are negative: they {fate}.")

    def _train_gates(self, pl_module: LightningModule, optimizer: Adam) -> None:
        self.own_optimizer = optimizer
        add_loss(pl_module, "vib", self._penalty)

    def _leave_gates(self, pl_module: LightningModule) -> None:
        remove_loss(pl_module, "vib")
        self.own_optimizer = None


def _noise(module: Any) -> dict[str, VIBGate]:
    held = gates_of(module)
    return {} if held is None else held.of_noise()
