"""The LightningModule that learns what to gather, how to summarise it and how to predict from it, all at once."""

from collections.abc import Callable, Iterable
from math import log
from typing import Literal

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from typing_extensions import override

from lit_compress.budget import BudgetSplit

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]

# Share of a batch in the running mean and variance of statistics, as in batch norm.
_MOMENTUM = 0.1


class LitFeatureGatherer(LightningModule):
    r"""Learn a statistic of observations, a split of the budget over contexts, and a predictor (φ, γ, θ) in one training.

    In training and validation each context's statistics are averaged over all observations of a set, and the noise that the
    budget would leave on them is added. The test *really* gathers: of each context only as many observations as the budget
    buys are looked at and averaged (or features kept in as many bits, or read at that rate), and a context that gets nothing
    is replaced by its mean in training.

    Batch: ``(observations (N, C, I, *), targets)``, I observations of each of C contexts, and optionally ``flags (N, K)``
    that go to the predictor as they are. Targets are classes ``(N,)``, or numbers ``(N, K)`` with NaN for a missing one, which
    the loss leaves out.
    Logs, as means over an epoch and over ranks: ``train/loss``, ``val/loss``, ``test/loss`` (nats or squared units of the
    targets) and ``val/error``, ``test/error`` (the metric, if there is one).

    Args:
        budget: The split. Its total may be left open; then ``totals`` are needed.
        predictor: From ``(N, C·F + K)`` to outputs ``(N, K')``; with ``totals`` one more input, the last, says the total.
        features: F, statistics of each context.
        statistic: From observations ``(M, *)`` to statistics ``(M, F)``; ``None`` takes the observations themselves.
        loss: ``"cross_entropy"`` or ``"squared_error"``.
        variance: Squared scale of the noise, see the budget's process. ``"measured"`` takes it from each batch, with its
            gradient, so that a learnt statistic cannot outgrow the noise; in evaluation, the running mean of it.
        metric: Updated with outputs and targets.
        totals: Range of totals to train for, drawn log-uniformly for each example: one model for all of them.
        test_total: Total to test at, where the budget has none of its own.
        learn: Whether the split is learnt; otherwise it stays uniform (or what :meth:`BudgetSplit.fix` made it).
        optimizer: From parameters to an optimizer. By default Adam with a learning rate of 1e-3.
        budget_speed: Learning rate of the split, relative to that of the networks.

    Raises:
        ValueError: If the arguments do not fit together, or a batch does not fit them.

    Source: *Resource-Efficient Feature Gathering at Test Time*, sections 3.2.1 and 3.2.3. The measured variance, and the mean in
    place of what is not gathered, are ours.

    Example:
        >>> from lit_compress.models import NormedMLP
        >>> gatherer = LitFeatureGatherer(
        ...     BudgetSplit(["wind", "rain"], total=6),
        ...     predictor=NormedMLP(in_features=2, hidden=(16,), out_features=1),
        ...     features=1,
        ...     loss="squared_error",
        ... )
        >>> gatherer.eval().gather(torch.randn(5, 2, 3, 1)).shape  # three observations of each, all used
        torch.Size([5, 1])
    """

    centre: Tensor
    variance: Tensor
    batches_seen: Tensor

    def __init__(
        self,
        budget: BudgetSplit,
        predictor: nn.Module,
        features: int,
        statistic: nn.Module | None = None,
        loss: Literal["cross_entropy", "squared_error"] = "cross_entropy",
        variance: float | Literal["measured"] = "measured",
        metric: Metric | None = None,
        totals: tuple[float, float] | None = None,
        test_total: float | None = None,
        learn: bool = True,
        optimizer: OptimizerCallable = torch.optim.Adam,
        budget_speed: float = 1.0,
    ) -> None:
        super().__init__()
        if loss not in ("cross_entropy", "squared_error"):
            raise ValueError(f"Argument `loss` must be 'cross_entropy' or 'squared_error' but got {loss!r}.")
        if variance != "measured" and not (isinstance(variance, (int, float)) and variance > 0):
            raise ValueError(f"Argument `variance` must be 'measured' or a positive number but got {variance!r}.")
        if (budget.total is None) == (totals is None):
            raise ValueError("Either the budget has a total or `totals` gives a range of them, and not both.")
        if totals is not None and not 0 < totals[0] < totals[1]:
            raise ValueError(f"Argument `totals` must ascend from above 0 but got {totals}.")
        self.save_hyperparameters(ignore=["budget", "predictor", "statistic", "metric", "optimizer"])
        self.budget = budget
        self.predictor = predictor
        self.statistic = statistic
        self.features = features
        self.loss = loss
        self.measured = variance == "measured"
        self.totals = totals
        self.test_total = budget.total if test_total is None else test_total
        self.optimizer = optimizer
        self.budget_speed = budget_speed
        self.val_error = None if metric is None else metric.clone()
        self.test_error = None if metric is None else metric.clone()
        if not learn:
            budget.fix()
        shape = (len(budget.names), features)
        self.register_buffer("centre", torch.zeros(shape))
        self.register_buffer("variance", torch.full(shape, 1.0 if variance == "measured" else float(variance)))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))

    @override
    def forward(self, observations: Tensor, flags: Tensor | None = None, total: float | Tensor | None = None) -> Tensor:
        """Outputs ``(L·N, K')`` from all observations, with the noise of the budget on their statistics.

        Args:
            observations: ``(N, C, I, *)``.
            flags: ``(N, K)``.
            total: Budget, one number or ``(N,)``, if the budget has none of its own.
        """
        statistics = self._statistics(observations)
        variance = self.variance
        if self.training:
            variance = self.budget.process.spread(statistics) if self.measured else variance
            self._remember(statistics, variance)
        noisy = self.budget(statistics.mean(dim=2), variance, total)
        return self._predict(noisy, flags, total)

    @torch.no_grad()
    def gather(self, observations: Tensor, flags: Tensor | None = None, total: float | None = None) -> Tensor:
        """Outputs ``(N, K')`` from what the budget really buys.

        Args:
            observations: ``(N, C, I, *)``, with at least as many observations as the budget buys of any context.
            flags: ``(N, K)``.
            total: Budget, by default ``test_total``.
        """
        return self._gathered(
            # What is not bought is never looked at, as it would not be there.
            lambda context, bought: self._statistics(observations[:, context : context + 1, bought])[:, 0],
            flags,
            len(observations),
            total,
        )

    @torch.no_grad()
    def summarise(self, batches: Iterable[Batch]) -> list[Batch]:
        """A set with the statistics ``(N, C, I, F)`` of every observation in place of the observations, for :meth:`error_at`.

        Args:
            batches: Batches of a test set.
        """
        training = self.training
        self.eval()
        try:
            summaries: list[Batch] = []
            for batch in batches:
                observations, *rest = (part.to(self.device) for part in batch)
                summaries.append((self._statistics(observations), *rest))  # type: ignore[arg-type]  # as long as the batch
        finally:
            self.train(training)
        return summaries

    @torch.no_grad()
    def error_at(self, summaries: Iterable[Batch], total: float | None = None) -> float:
        """The metric (or without one, the loss) over a set, really gathered at a total.

        Args:
            summaries: What :meth:`summarise` made of the set, once for all totals.
            total: Budget, by default ``test_total``.
        """
        training, metric = self.training, None if self.test_error is None else self.test_error.clone().to(self.device)
        if metric is not None:
            metric.reset()
        losses, counts = [], []
        self.eval()
        try:
            for batch in summaries:
                statistics, targets, flags = _parts(batch)
                outputs = self._gathered(_picked(statistics), flags, len(statistics), total)
                losses.append(float(self._loss(outputs, targets)))
                counts.append(self._counted(targets))
                if metric is not None:
                    metric.update(outputs, targets)
        finally:
            self.train(training)
        if metric is not None:
            return float(metric.compute())
        return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        observations, targets, flags = _parts(batch)
        outputs = self(observations, flags, self._drawn_totals(len(targets)))
        targets = targets.repeat(self.budget.samples, *[1] * (targets.ndim - 1))
        loss = self._loss(outputs, targets)
        self._log("train/loss", loss, self._counted(targets))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        observations, targets, flags = _parts(batch)
        outputs = self(observations, flags, self._drawn_totals(len(targets)))
        targets = targets.repeat(self.budget.samples, *[1] * (targets.ndim - 1))
        self._evaluate("val", outputs, targets, self.val_error)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        observations, targets, flags = _parts(batch)
        self._evaluate("test", self.gather(observations, flags), targets, self.test_error)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Outputs from what the budget really buys."""
        observations, _, flags = _parts(batch)
        return self.gather(observations, flags)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        networks = [parameter for name, parameter in self.named_parameters() if name != "budget.logits"]
        if not self.budget.logits.requires_grad:
            return self.optimizer(networks)
        optimizer = self.optimizer([{"params": networks}, {"params": [self.budget.logits]}])
        optimizer.param_groups[1]["lr"] *= self.budget_speed
        return optimizer

    def _statistics(self, observations: Tensor) -> Tensor:
        """``(N, C, I, F)``."""
        outer = observations.shape[:3]
        flat = observations.flatten(0, 2)
        statistics = flat.flatten(1) if self.statistic is None else self.statistic(flat)
        if statistics.shape[1:] != (self.features,):
            raise ValueError(
                f"Expected {self.features} statistics of an observation, as `features` says, but got shape "
                f"{tuple(statistics.shape[1:])}."
            )
        return statistics.reshape(*outer, self.features)

    @torch.no_grad()
    def _remember(self, statistics: Tensor, variance: Tensor) -> None:
        share = max(_MOMENTUM, 1 / (int(self.batches_seen) + 1))
        self.centre.lerp_(statistics.mean(dim=(0, 2)), share)
        self.variance.lerp_(variance, share)
        self.batches_seen += 1

    def _gathered(
        self, statistics: Callable[[int, slice], Tensor], flags: Tensor | None, count: int, total: float | None
    ) -> Tensor:
        """Outputs from statistics ``(N, I, F)`` of a context's observations, as far as they are bought."""
        total = self.test_total if total is None else total
        process = self.budget.process
        gathered = self.centre.expand(count, -1, -1).clone()
        for context, amount in enumerate(self.budget.spend(total).tolist()):
            if amount:
                bought = statistics(context, slice(amount) if process.counts_observations else slice(None))
                gathered[:, context] = process.gather(bought, amount, self.variance[context], self.centre[context])
        return self._predict(gathered, flags, total)

    def _predict(self, gathered: Tensor, flags: Tensor | None, total: float | Tensor | None) -> Tensor:
        inputs = [gathered.flatten(1)]
        draws = len(gathered)
        if flags is not None:
            inputs.append(flags.repeat(draws // len(flags), 1))
        if self.totals is not None:
            if total is None:
                raise ValueError("This model is for a range of totals; give `total`, or `test_total` to the constructor.")
            low, high = map(log, self.totals)
            known = torch.as_tensor(total, dtype=gathered.dtype, device=gathered.device).reshape(-1, 1)
            inputs.append(((known.log() - low) / (high - low)).repeat(draws // len(known), 1))  # 0 to 1 over the range
        outputs: Tensor = self.predictor(torch.cat(inputs, dim=1))
        return outputs

    def _drawn_totals(self, count: int) -> Tensor | None:
        if self.totals is None:
            return None
        low, high = map(log, self.totals)
        return (low + (high - low) * torch.rand(count, device=self.device)).exp()

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.loss == "cross_entropy":
            return F.cross_entropy(outputs, targets)
        if outputs.shape != targets.shape:
            raise ValueError(f"Expected outputs of shape {tuple(targets.shape)} but the predictor gave {tuple(outputs.shape)}.")
        present = ~targets.isnan()
        # Of a batch without any target the loss is 0, with a gradient of 0.
        return (outputs - targets)[present].square().sum() / present.sum().clamp_min(1)

    def _counted(self, targets: Tensor) -> int:
        return len(targets) if self.loss == "cross_entropy" else int((~targets.isnan()).sum())

    def _evaluate(self, split: str, outputs: Tensor, targets: Tensor, error: Metric | None) -> None:
        self._log(f"{split}/loss", self._loss(outputs, targets), self._counted(targets))
        if error is not None:
            error.update(outputs, targets)
            self.log(f"{split}/error", error, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(targets))

    def _log(self, name: str, loss: Tensor, count: int) -> None:
        self.log(name, loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=count, sync_dist=True)


def _parts(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    return batch if len(batch) == 3 else (*batch, None)


def _picked(statistics: Tensor) -> Callable[[int, slice], Tensor]:
    return lambda context, bought: statistics[:, context, bought]
