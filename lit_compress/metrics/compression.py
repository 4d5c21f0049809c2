"""How much of a network a cut has left: of its units, and of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lit_compress.graph import trace
from lit_compress.plan import plan_of
from lit_compress.statistics.gather import batch_size
from lit_compress.surgery import ForwardFn, call


class CompressionRatios(Metric):
    r"""What is left of a pruned network's layer outputs and weights, relative to the network as it was built.

    .. math:: R_n = \frac{\sum_l |\tilde Z_l|}{\sum_l |Z_l|}, \qquad R_w = \frac{\sum_l |\tilde W_l|}{\sum_l |W_l|}

    where :math:`|Z_l|` counts the outputs of a convolution or linear layer for one sample (channels times positions) and
    :math:`|W_l|` its weights. The output layer counts, the input and biases do not. A pruned network knows what was cut out of
    it, so the original is not needed.

    Args:
        kwargs: Passed to :class:`~torchmetrics.Metric`.

    Shape:
        - ``update``: a network, and inputs that it runs on; a batch of one is enough.
        - ``compute``: ``{"R_n": scalar, "R_w": scalar}``, fractions in (0, 1]; over several networks, of all together.

    Raises:
        ValueError: From ``update``, if the network does not run on the inputs; from ``compute``, if it has seen no network.

    Source: PIBprune, equations 4.8.1 and 4.8.2.

    Example:
        >>> from lit_compress import Recipe, cut
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = cut(net, Recipe(keep={"0": (1, 5, 6)}), torch.rand(1, 4))
        >>> ratios = CompressionRatios()
        >>> ratios.update(net, torch.rand(1, 4))
        >>> {name: round(float(value), 3) for name, value in ratios.compute().items()}  # 5 of 10 units, 18 of 48 weights
        {'R_n': 0.5, 'R_w': 0.375}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    left: Tensor
    built: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Outputs and weights. All ranks hold the same network, so that their sums would say the same.
        self.add_state("left", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("built", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(self, model: nn.Module, example_inputs: Any, *, forward_fn: ForwardFn = call) -> None:
        """Count a network's.

        Args:
            model: The network, pruned or not; it is left as it was.
            example_inputs: Inputs; a tuple or list holds positional arguments.
            forward_fn: How to run it, where ``model(*example_inputs)`` is not it.
        """
        graph, plan = trace(model, lambda: forward_fn(model, example_inputs)), plan_of(model)
        shapes = {**graph.shapes, **({} if plan is None else plan.shapes)}
        samples = batch_size(example_inputs)
        for counts, sizes in ((self.left, graph.shapes), (self.built, shapes)):
            outputs, weights = graph.outputs_and_weights(sizes)
            counts += torch.tensor([outputs / samples, weights], dtype=torch.float64, device=counts.device)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Both ratios."""
        if not self.built.all():
            raise ValueError("Compression ratios need a network but have seen none.")
        outputs, weights = self.left / self.built
        return {"R_n": outputs, "R_w": weights}
