"""Pruning by scores that the weights themselves hold: their size, and the scales of batch norms."""

from __future__ import annotations

from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lit_compress.analysis import Analysis
from lit_compress.callbacks.added_loss import add_loss, remove_loss
from lit_compress.callbacks.pruning import PruningCallback
from lit_compress.callbacks.targets import for_this_cut, one_target
from lit_compress.rankings import Method
from lit_compress.recipe import Recipe
from lit_compress.scores import Magnitude, Scope, Slimming


class ScorePruning(PruningCallback):
    """What callbacks share whose method scores channels one by one and needs a target.

    Args:
        keep_channels: Share of the channels to keep, in (0, 1].
        keep_params: Share of the original network's trainable parameters to keep, in (0, 1). The result is at or below it,
            counted on the network as cut.
        keep_mult_adds: The same for mult-adds.
        keep_latency: The same for the time of a validation step, as for :class:`~lit_compress.callbacks.PFAPruning`.
        kwargs: When, where and on what, as for :class:`PruningCallback`. With several cuts, a target for the whole is approached
            in equal ratios: 0.25 in two cuts is 0.5 and then 0.25 of the original; ``keep_channels`` is of each cut.
    """

    def __init__(
        self,
        *,
        keep_channels: float | None = None,
        keep_params: float | None = None,
        keep_mult_adds: float | None = None,
        keep_latency: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        sizes = {"keep_params": keep_params, "keep_mult_adds": keep_mult_adds, "keep_latency": keep_latency}
        self.target = one_target("keep_channels", {"keep_channels": keep_channels, **sizes}, needed=True)

    @override
    def choose(self, analysis: Analysis) -> Recipe:
        return self.limited_recipe(analysis, for_this_cut(self.target, self.schedule, own="keep_channels"))


class MagnitudePruning(ScorePruning):
    r"""Prune the filters whose weights are small: those of the least :math:`\ell_1` norm.

    Args:
        scope: ``"layer"``: each layer keeps the same share of its filters. ``"global"``: all are compared, each relative to the
            mean of its layer.
        kwargs: One of the targets ``keep_channels``, ``keep_params``, ``keep_mult_adds`` and ``keep_latency``, and when and
            where, as for :class:`PruningCallback`.

    Raises:
        MisconfigurationException: If not exactly one target is given, a value is out of range, or the scope is unknown.

    Source: Li et al., *Pruning Filters for Efficient ConvNets*, 2017.

    Example::

        trainer = Trainer(max_epochs=20, callbacks=[MagnitudePruning(keep_params=0.4, at_epoch=10)])
    """

    def __init__(self, *, scope: Scope = "layer", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scope = _checked(scope)

    @property
    @override
    def method(self) -> Method:
        return Magnitude(self.scope)


class SlimmingPruning(ScorePruning):
    r"""Train with a penalty on the scales of all batch norms, then prune the channels whose scale is small.

    The penalty :math:`\lambda \sum |\gamma|` is added to the loss of any module until the last cut, and logged as
    ``train/slimming``. Channels are pruned whose layer's output a batch norm alone takes; other layers are left whole.

    Args:
        strength: :math:`\lambda`. Higher drives more scales towards 0.
        scope: ``"global"``: all scales are compared. ``"layer"``: each layer keeps the same share of its channels.
        kwargs: One of the targets ``keep_channels``, ``keep_params``, ``keep_mult_adds`` and ``keep_latency``, and when and
            where, as for :class:`PruningCallback`.

    Raises:
        MisconfigurationException: If not exactly one target is given, a value is out of range, or the scope is unknown. From the
            start of ``fit``: if the module optimizes manually, or has no batch norm with a scale.

    Source: Liu et al., *Learning Efficient Convolutional Networks through Network Slimming*, 2017.

    Example::

        trainer = Trainer(max_epochs=20, callbacks=[SlimmingPruning(keep_params=0.4, at_epoch=10)])
    """

    def __init__(self, *, strength: float = 1e-4, scope: Scope = "global", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if strength < 0:
            raise MisconfigurationException(f"Argument `strength` must not be negative but got {strength}.")
        self.strength, self.scope = strength, _checked(scope)

    @property
    @override
    def method(self) -> Method:
        return Slimming(self.scope)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not _scales(pl_module):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has no batch norm with a scale, which `SlimmingPruning` needs; `MagnitudePruning` "
                "does without."
            )
        if self.schedule.remaining:
            add_loss(pl_module, "slimming", self._penalty)

    @override
    def cut_now(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().cut_now(trainer, pl_module)
        if not self.schedule.remaining:
            remove_loss(pl_module, "slimming")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        remove_loss(pl_module, "slimming")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        remove_loss(pl_module, "slimming")

    def _penalty(self, module: Any) -> Tensor:
        sums: list[Tensor] = [scale.abs().sum() for scale in _scales(module)]
        return self.strength * sum(sums[1:], start=sums[0])


def _scales(module: LightningModule) -> list[Tensor]:
    return [part.weight for part in module.modules() if isinstance(part, _BatchNorm) and part.affine]


def _checked(scope: Scope) -> Scope:
    if scope not in ("global", "layer"):
        raise MisconfigurationException(f"Argument `scope` must be 'global' or 'layer' but got {scope!r}.")
    return scope
