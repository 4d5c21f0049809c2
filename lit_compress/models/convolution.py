"""What the convolutional networks here have in common: conv, batch norm, ReLU under readable names, and how they begin."""

from torch import nn

from lit_compress.initialisation import reinitialize


class ConvolutionalNetwork(nn.Module):
    """A network whose convolutions begin as :func:`init_convolutions` has it, and all else as torch does."""

    def reset_parameters(self) -> None:
        """Draw all weights anew, in place, as the constructor does, at the widths that the layers have now."""
        for child in self.children():
            reinitialize(child)
        init_convolutions(self)


def conv_bn_relu(
    name: str, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padded: bool = True
) -> dict[str, nn.Module]:
    """A convolution, its batch norm and its ReLU, as named layers.

    The convolution has no bias: the batch norm that follows subtracts any.

    Args:
        name: What tells this block from the others, e.g. ``"1_2"``.
        in_channels: Channels that come in.
        out_channels: Filters.
        kernel_size: Side of the filters in pixels, odd.
        stride: Step in pixels.
        padded: Whether the map keeps its size at stride 1; otherwise it loses ``kernel_size - 1`` pixels.

    Returns:
        The three layers in order, called ``conv<name>``, ``bn<name>`` and ``relu<name>``.

    Example:
        >>> list(conv_bn_relu("1_2", 3, 8))
        ['conv1_2', 'bn1_2', 'relu1_2']
    """
    padding = kernel_size // 2 if padded else 0
    return {
        f"conv{name}": nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=padding, bias=False),
        f"bn{name}": nn.BatchNorm2d(out_channels),
        f"relu{name}": nn.ReLU(),
    }


def init_convolutions(network: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / (filters · kernel area)), in place.

    Source: He et al., *Delving Deep into Rectifiers*, 2015, section 2.2, backward form.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
