"""Fully connected networks and the two LeNets: small, and with sigmoid units where a method reads units as probabilities."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from lit_compress.initialisation import Weights, initialize

Activation = Literal["relu", "sigmoid"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}

# A sigmoid's slope at 0 is 1/4, so each hidden layer would shrink its signal to a quarter. At gain 1 the sigmoid LeNet-5 is still
# at chance after three epochs on 6,000 digits (SGD .1, momentum .9); at gain 4 it reaches 89 %.
_GAINS: dict[str, float] = {"relu": 1.0, "sigmoid": 4.0}


class MLP(nn.Module):
    """Fully connected network with one activation after every layer but the last.

    Layers are called ``fc1``, ``activation1``, ``fc2``, … in ``layers``. Weights begin four times as wide before a sigmoid, and
    biases at zero.

    Args:
        in_features: Numbers in one sample, after flattening.
        hidden: Width of each hidden layer, e.g. ``(120, 100)``.
        num_classes: Width of the output.
        activation: What follows every hidden layer.
        weights: How they begin, as for :func:`~lit_compress.initialisation.initialize`.

    Shape:
        - input: ``(N, *)`` with ``in_features`` numbers a sample.
        - output: logits ``(N, num_classes)``.

    Raises:
        ValueError: If a width is below 1, or the activation or the rule for the weights is unknown.

    Source: *Parametric Information Bottleneck* pruning (PIBprune), table 4.1, sigmoid 120-100-10, 1000-200-10, 1000-500-10.

    Example:
        >>> import torch
        >>> MLP(in_features=784, hidden=(120, 100), num_classes=10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        num_classes: int,
        activation: Activation = "relu",
        weights: Weights = "xavier",
    ) -> None:
        super().__init__()
        widths = (in_features, *hidden, num_classes)
        if min(widths) < 1:
            raise ValueError(f"Every layer needs a width of at least 1 but got {widths} from input to output.")
        unit = _activation(activation)
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential()
        for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            self.layers.add_module(f"fc{number}", nn.Linear(inputs, outputs))
            if number <= len(hidden):
                self.layers.add_module(f"activation{number}", unit())
        self.activation: Activation = activation
        self.weights: Weights = weights
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, in place, at the widths that the layers have now."""
        initialize(self, self.weights, gain=_GAINS[self.activation], output=self.layers[-1])

    def forward(self, samples: Tensor) -> Tensor:
        """Logits of a batch."""
        logits: Tensor = self.layers(self.flatten(samples))
        return logits


class LeNet300100(MLP):
    """LeNet-300-100: hidden layers of 300 and 100 units, 266,610 parameters at the default sizes.

    Args:
        in_features: Numbers in one image: 784 for MNIST, 64 for the 8×8 digits.
        num_classes: Width of the output.
        activation: What follows both hidden layers: ``"relu"``, or ``"sigmoid"`` as PIBprune needs it.
        weights: How they begin: ``"xavier"``, or ``"orthonormal"`` as PIBprune has it.

    Shape:
        - input: images ``(N, *)`` with ``in_features`` numbers each; they are flattened.
        - output: logits ``(N, num_classes)``.

    Raises:
        ValueError: If a width is below 1, or the activation or the rule for the weights is unknown.

    Source: LeCun et al., *Gradient-Based Learning Applied to Document Recognition*, 1998; pruned in PIBprune, table 4.2.

    Example:
        >>> import torch
        >>> LeNet300100(in_features=64)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, in_features: int = 784, num_classes: int = 10, activation: Activation = "relu", weights: Weights = "xavier"
    ) -> None:
        super().__init__(in_features, hidden=(300, 100), num_classes=num_classes, activation=activation, weights=weights)


class LeNet5(nn.Module):
    """LeNet-5 in its Caffe form, 20-50-500-10: 431,080 parameters on 28×28 grey images.

    Two unpadded 5×5 convolutions, each followed by the activation and then by a 2×2 max-pool, and two fully connected layers
    with the activation between. Caffe's own net has no activation after the convolutions; here it stands there too, because
    a method that reads units as probabilities needs a sigmoid on *every* hidden layer. (Max-pooling before or after a
    rising activation gives the same numbers.) Weights begin Xavier-uniform as in Caffe, four times as wide before a sigmoid, and
    biases at zero.

    Args:
        in_channels: Channels of an image.
        num_classes: Width of the output.
        activation: What follows ``conv1``, ``conv2`` and ``fc1``.
        image_size: Height and width of an image in pixels, at least 16.
        weights: How they begin, as for :func:`~lit_compress.initialisation.initialize`.

    Shape:
        - input: images ``(N, in_channels, image_size, image_size)``.
        - output: logits ``(N, num_classes)``.

    Raises:
        ValueError: If the images are too small for the two convolutions and pools, or the activation or the rule for the weights
            is unknown.

    Source: the LeNet that Caffe ships for MNIST, after LeCun et al., 1998; pruned in PIBprune, table 4.3.

    Example:
        >>> import torch
        >>> LeNet5(activation="sigmoid")(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        activation: Activation = "relu",
        image_size: int = 28,
        weights: Weights = "xavier",
    ) -> None:
        super().__init__()
        if image_size < 16:
            raise ValueError(
                f"LeNet-5 needs images of at least 16 by 16 pixels but got `image_size={image_size}`; enlarge them, "
                "or take LeNet300100, which has no convolutions."
            )
        unit = _activation(activation)
        side = ((image_size - 4) // 2 - 4) // 2  # each 5×5 convolution takes 4 pixels off, each pool halves: 28 → 12 → 4
        self.conv1 = nn.Conv2d(in_channels, 20, kernel_size=5)
        self.activation1 = unit()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        self.activation2 = unit()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(50 * side * side, 500)
        self.activation3 = unit()
        self.fc2 = nn.Linear(500, num_classes)
        self.activation: Activation = activation
        self.weights: Weights = weights
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, in place, at the widths that the layers have now."""
        initialize(self, self.weights, gain=_GAINS[self.activation], output=self.fc2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        maps = self.pool1(self.activation1(self.conv1(images)))
        maps = self.pool2(self.activation2(self.conv2(maps)))
        logits: Tensor = self.fc2(self.activation3(self.fc1(self.flatten(maps))))
        return logits


def _activation(name: str) -> type[nn.Module]:
    if name not in _ACTIVATIONS:
        raise ValueError(f"Argument `activation` must be one of {sorted(_ACTIVATIONS)} but got {name!r}.")
    return _ACTIVATIONS[name]
