"""The fully connected networks that read budgeted features: batch norm after every hidden layer."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class NormedMLP(nn.Module):
    """Linear, batch norm, ReLU and dropout for each hidden layer, and a linear output.

    Args:
        in_features: Numbers in one sample, after flattening.
        hidden: Width of each hidden layer, e.g. ``(800, 800)``.
        out_features: Width of the output.
        dropout: Share of hidden units that training silences, in [0, 1).

    Shape:
        - input: ``(N, *)`` with ``in_features`` numbers a sample.
        - output: ``(N, out_features)``.

    Raises:
        ValueError: If a width is below 1 or the dropout is out of range.

    Source: *Resource-Efficient Feature Gathering at Test Time*, implementation details of sections 3.3.1 and 3.3.2.

    Example:
        >>> import torch
        >>> NormedMLP(784, hidden=(800, 800), out_features=32, dropout=0.5)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 32])
    """

    def __init__(self, in_features: int, hidden: Sequence[int], out_features: int, dropout: float = 0.0) -> None:
        super().__init__()
        widths = (in_features, *hidden, out_features)
        if min(widths) < 1:
            raise ValueError(f"Every layer needs a width of at least 1 but got {widths} from input to output.")
        if not 0 <= dropout < 1:
            raise ValueError(f"Argument `dropout` must lie in [0, 1) but got {dropout}.")
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential()
        for number, (inputs, outputs) in enumerate(pairwise(widths[:-1]), start=1):
            self.layers.add_module(f"fc{number}", nn.Linear(inputs, outputs, bias=False))  # batch norm brings a bias
            self.layers.add_module(f"norm{number}", nn.BatchNorm1d(outputs))
            self.layers.add_module(f"relu{number}", nn.ReLU())
            if dropout:
                self.layers.add_module(f"dropout{number}", nn.Dropout(dropout))
        self.layers.add_module("output", nn.Linear(widths[-2], out_features))

    def forward(self, samples: Tensor) -> Tensor:
        """Outputs of a batch."""
        outputs: Tensor = self.layers(self.flatten(samples))
        return outputs
