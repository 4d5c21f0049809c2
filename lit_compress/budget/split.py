"""A total budget, split over contexts by a softmax that is learnt with the model."""

from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor, nn

from lit_compress.budget.noise import NoiseProcess, Process, noise_process

# A context at the edge of the simplex would need a logit of -inf.
_SMALLEST_SHARE = 1e-6


class BudgetSplit(nn.Module):
    r"""How a total budget is shared out over contexts, and the noise on the features of each that follows.

    .. math:: r_c = \frac{B}{p_c} \operatorname{softmax}_c(\gamma / T), \qquad \tilde x_c = x_c + \sigma(r_c) \, \varepsilon

    with the price :math:`p_c` of a unit. The parameter ``logits`` (γ) starts at 0, the uniform split, and is learnt by
    backpropagation through the noise, together with the model that reads :math:`\tilde x`.

    With a minimum, the softmax shares out what is left after it. A maximum is approached and never passed: of the room
    :math:`m_c` below it a context takes :math:`m_c (1 - e^{-k s_c / m_c})`, with s the softmax and k such that the total is
    spent. Without a maximum that is the softmax, and every logit has a gradient always.

    Args:
        contexts: Their number, or their names.
        total: Budget B for one prediction, in units of money. ``None`` takes it at run time, as an argument of every method.
        process: ``"sampling"`` (B observations), ``"rate"``, ``"quantization"`` (B bits), or a process of your own.
        minimum: Units that each context gets in any case, one number or one a context; whole numbers.
        maximum: Units that no context exceeds, likewise; ``None`` for no limit.
        price: Money that one unit costs, likewise. With the default of 1 the total counts units.
        temperature: T. Above 1 it makes the split change more slowly.
        samples: L, draws of the noise for every example.

    Shape:
        - input: features ``(N, C)`` or ``(N, C, F)``.
        - output: ``(L·N, C)`` or ``(L·N, C, F)``; the first N are the first draw.

    Raises:
        ValueError: If a number is out of range, or the total lies below what the minima cost or not below what the maxima cost.

    Source: *Resource-Efficient Feature Gathering at Test Time*, section 3.2.1. Minimum, maximum and price are ours.

    Example:
        >>> budget = BudgetSplit(["wind", "rain"], total=10)
        >>> with torch.no_grad():
        ...     _ = budget.logits.copy_(torch.tensor([1.0, 0.0]))
        >>> budget.shares().detach()
        tensor([0.7311, 0.2689])
        >>> budget.spend()
        tensor([7, 3])
        >>> budget.sigma(variance=2.0).detach()
        tensor([0.5230, 0.8624])
    """

    price: Tensor
    minimum: Tensor
    maximum: Tensor

    def __init__(
        self,
        contexts: int | Sequence[str],
        total: float | None = None,
        process: Process | NoiseProcess = "sampling",
        *,
        minimum: float | Sequence[float] = 0.0,
        maximum: float | Sequence[float] | None = None,
        price: float | Sequence[float] = 1.0,
        temperature: float = 1.0,
        samples: int = 1,
    ) -> None:
        super().__init__()
        names = tuple(f"context{index}" for index in range(contexts)) if isinstance(contexts, int) else tuple(contexts)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Argument `contexts` must be a positive number, or names without repeats, but got {contexts!r}.")
        if temperature <= 0:
            raise ValueError(f"Argument `temperature` must be positive but got {temperature}.")
        if samples < 1:
            raise ValueError(f"Argument `samples` must be at least 1 but got {samples}.")
        self.names = names
        self.process = noise_process(process)
        self.temperature = temperature
        self.samples = samples
        self.total = total
        self.logits = nn.Parameter(torch.zeros(len(names)))
        self.register_buffer("price", self._one_each("price", price), persistent=False)
        self.register_buffer("minimum", self._one_each("minimum", minimum), persistent=False)
        self.register_buffer("maximum", self._one_each("maximum", inf if maximum is None else maximum), persistent=False)
        if not (self.price > 0).all():
            raise ValueError(f"Argument `price` must be positive but got {price}.")
        if not (self.minimum >= 0).all() or not (self.minimum < self.maximum).all():
            raise ValueError(f"Every `minimum` must be at least 0 and below its `maximum` but got {minimum} and {maximum}.")
        for name, limits in (("minimum", self.minimum), ("maximum", self.maximum)):
            if not torch.equal(limits, limits.round()):
                raise ValueError(f"Argument `{name}` counts whole units but got {limits.tolist()}.")
        if total is not None:
            self._checked(total)

    def shares(self, total: float | Tensor | None = None) -> Tensor:
        """Share of the money that each context gets, ``(C,)``, summing to 1; differentiable.

        Args:
            total: Budget, if none was given to the constructor; a tensor ``(N,)`` gives ``(N, C)``.
        """
        if total is None and self.total is None and not self._bounded:
            return self._softmax()
        money = self._money(total)
        return money / money.sum(-1, keepdim=True)

    def resources(self, total: float | Tensor | None = None) -> Tensor:
        """Units that each context gets, ``(C,)``, before rounding; differentiable.

        Args:
            total: As in :meth:`shares`.
        """
        return self._money(total) / self.price

    def sigma(self, variance: float | Tensor = 1.0, total: float | Tensor | None = None) -> Tensor:
        """Standard deviation of the noise on each context's features; differentiable.

        Args:
            variance: Squared scale that the process starts from, as its docstring says: one number, ``(C,)`` or ``(C, F)``.
            total: As in :meth:`shares`.

        Returns:
            ``(C,)``, or ``(C, F)``; with totals ``(N,)``, each for every one of them.
        """
        resources = self.resources(total)
        scale = torch.as_tensor(variance, dtype=resources.dtype, device=resources.device)
        # The root of a measured variance of 0 (a context whose images were all black) has no gradient.
        scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)
        return self.process.sigma(resources.reshape(*resources.shape, *[1] * (scale.ndim - 1)), scale)

    def spend(self, total: float | None = None) -> Tensor:
        """Whole units to gather of each context: the largest remainder gets what rounding down leaves over.

        Args:
            total: Budget, if none was given to the constructor.

        Returns:
            ``(C,)`` int64. They cost at most the total, and no further unit below its maximum could be paid. At a price of 1 and
            a whole total, they sum to it.
        """
        budget = float(self._checked(self.total if total is None else total))
        with torch.no_grad():
            resources = self.resources(budget)
        return largest_remainder(resources, budget, self.price, self.minimum, self.maximum)

    def fix(self, shares: Sequence[float] | Tensor | None = None) -> None:
        """Set the split, and learn it no more.

        Args:
            shares: Of the money, ``(C,)``, summing to 1; ``None`` fixes the present split. A share below 1e-6 counts as 1e-6.

        Raises:
            ValueError: If the shares are no shares, or there is a minimum or a maximum: then shares are no plain softmax.
        """
        if shares is not None:
            given = torch.as_tensor(shares, dtype=self.logits.dtype, device=self.logits.device)
            if self._bounded:
                raise ValueError("Shares can be set only without `minimum` and `maximum`.")
            if given.shape != self.logits.shape or (given < 0).any() or not torch.isclose(given.sum(), given.new_ones(())):
                raise ValueError(f"Expected {len(self.names)} shares that sum to 1 but got {given.tolist()}.")
            with torch.no_grad():
                self.logits.copy_(self.temperature * given.clamp_min(_SMALLEST_SHARE).log())
        self.logits.requires_grad_(False)

    def forward(
        self, features: Tensor, variance: float | Tensor = 1.0, total: float | Tensor | None = None, samples: int | None = None
    ) -> Tensor:
        """Features with the noise that the budget leaves on them.

        Args:
            features: ``(N, C)`` or ``(N, C, F)``, as good as free of noise.
            variance: As in :meth:`sigma`.
            total: As in :meth:`shares`.
            samples: Draws for each example; those of the constructor by default.
        """
        if features.ndim < 2 or features.shape[1] != len(self.names):
            raise ValueError(f"Expected features of {len(self.names)} contexts, (N, C) or more, but got {tuple(features.shape)}.")
        sigma = self.sigma(variance, total)
        contexts = 2 if isinstance(total, Tensor) and total.ndim else 1  # dimensions up to that of the contexts
        sigma = sigma.reshape(*sigma.shape, *[1] * (features.ndim - 2 + contexts - sigma.ndim))
        draws = features.repeat(samples or self.samples, *[1] * (features.ndim - 1))
        if contexts == 2:
            sigma = sigma.repeat(samples or self.samples, *[1] * (sigma.ndim - 1))
        return draws + sigma * torch.randn_like(draws)

    def extra_repr(self) -> str:
        """What stands in the brackets of the printed module."""
        return f"contexts={len(self.names)}, total={self.total}, process={type(self.process).__name__}"

    @property
    def _bounded(self) -> bool:
        return bool((self.minimum > 0).any() or self.maximum.isfinite().any())

    def _softmax(self) -> Tensor:
        return (self.logits / self.temperature).softmax(0)

    def _money(self, total: float | Tensor | None) -> Tensor:
        budget = self._checked(self.total if total is None else total)
        base = self.price * self.minimum
        rest = budget.unsqueeze(-1) - base.sum()
        if not self.maximum.isfinite().any():
            return base + rest * self._softmax()
        return base + _saturated(self._softmax(), self.price * self.maximum - base, rest)

    def _checked(self, total: float | Tensor | None) -> Tensor:
        if total is None:
            raise ValueError("This budget has no total of its own; give `total` here, or to the constructor.")
        budget = torch.as_tensor(total, dtype=self.logits.dtype, device=self.logits.device)
        least, most = float((self.price * self.minimum).sum()), float((self.price * self.maximum).sum())
        if not ((budget > least) & (budget < most)).all():
            raise ValueError(
                f"The total must lie above {least:g}, what the minima cost, and below {most:g}, what the maxima cost, but is "
                f"{budget.tolist()}."
            )
        return budget

    def _one_each(self, name: str, value: float | Sequence[float]) -> Tensor:
        numbers = torch.as_tensor(value, dtype=torch.float32)
        if numbers.ndim > 1 or (numbers.ndim == 1 and len(numbers) != len(self.names)):
            raise ValueError(f"Argument `{name}` must be one number or {len(self.names)} but got {value}.")
        return numbers.expand(len(self.names)).clone()


def largest_remainder(
    resources: Tensor,
    total: float,
    price: Tensor | None = None,
    minimum: Tensor | None = None,
    maximum: Tensor | None = None,
) -> Tensor:
    """Whole units near ``resources`` that cost at most ``total``.

    All are rounded down. Then one unit after another goes to the context that lacks most of its resources, among those that what
    is left can pay and that are below their maximum.

    Args:
        resources: ``(C,)``, costing ``total`` together.
        total: Money there is.
        price: Of one unit, ``(C,)``; 1 by default.
        minimum: ``(C,)``; 0 by default.
        maximum: ``(C,)``; no limit by default.

    Returns:
        ``(C,)`` int64.

    Example:
        >>> largest_remainder(torch.tensor([1.6, 2.7, 5.7]), total=10)
        tensor([1, 3, 6])
    """
    wanted = resources.detach().double().cpu()
    price = torch.ones_like(wanted) if price is None else price.double().cpu()
    most = torch.full_like(wanted, inf) if maximum is None else maximum.double().cpu()
    units = wanted.floor()
    if minimum is not None:
        units = units.maximum(minimum.double().cpu())  # of resources in single precision, a hair may be missing
    left = total - float(price @ units)
    while True:
        payable = (price <= left + 1e-9 * total) & (units < most)
        if not payable.any():
            return units.long()
        chosen = int((wanted - units).masked_fill(~payable, -inf).argmax())
        units[chosen] += 1
        left -= float(price[chosen])


def _saturated(shares: Tensor, room: Tensor, rest: Tensor) -> Tensor:
    """``room * (1 - exp(-k shares / room))`` with k such that the sum is ``rest``; infinite room gives ``k * shares``.

    Args:
        shares: ``(C,)``, positive.
        room: ``(C,)``, positive.
        rest: ``(*, 1)``, below the sum of the room.
    """
    finite = room.isfinite()
    bounded = room.where(finite, 1.0)

    def taken(k: Tensor) -> tuple[Tensor, Tensor]:
        decay = torch.where(finite, torch.exp(-k * shares / bounded), 1.0)
        return torch.where(finite, bounded * (1 - decay), k * shares), shares * decay  # and its derivative by k

    with torch.no_grad():
        # The sum grows with k and lies below it, so k is at least the rest. Bisection on its logarithm, up to e^40 times that.
        low, high = torch.zeros_like(rest), torch.full_like(rest, 40.0)
        for _ in range(60):
            middle = (low + high) / 2
            enough = taken(rest * middle.exp())[0].sum(-1, keepdim=True) >= rest
            low, high = low.where(enough, middle), middle.where(enough, high)
        root = rest * ((low + high) / 2).exp()
        slope = taken(root)[1].sum(-1, keepdim=True)
    # One step of Newton from the root carries the gradient of the implicit function.
    money, _ = taken(root)
    return taken(root + (rest - money.sum(-1, keepdim=True)) / slope)[0]
