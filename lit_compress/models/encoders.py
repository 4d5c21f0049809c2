"""What detectors look through: VGG-16 and AlexNet up to their last feature map, in macro-layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lit_compress.models.convolution import ConvolutionalNetwork, init_convolutions

_VGG = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # filters and convolutions of a macro-layer


class Encoder(ConvolutionalNetwork):
    """Macro-layers ``macro1``, ``macro2``, …, each a few convolutions called ``conv…``, with pools ``pool1``, … between them.

    Attributes:
        fixed: Macro-layers that a detector leaves as they are, if they come with weights.
    """

    fixed: tuple[str, ...] = ()

    def forward(self, images: Tensor) -> Tensor:
        """The last feature map."""
        maps = images
        for layer in self.children():
            maps = layer(maps)
        return maps

    def load_classifier(self, weights: Mapping[str, Tensor]) -> None:
        """Take the convolutions of a classification network, in order; batch norms stay as they are.

        Args:
            weights: State dict of torchvision's network of this kind without batch norms, such as the published ``vgg16``: its
                convolutions lie under ``features.``.

        Raises:
            ValueError: If they are not as many, or of other sizes.
        """
        ours = [name for name, module in self.named_modules() if isinstance(module, nn.Conv2d)]
        theirs = sorted({int(name.split(".")[1]) for name in weights if name.startswith("features.")})
        if len(ours) != len(theirs):
            raise ValueError(
                f"The weights have {len(theirs)} layers under `features.` and the encoder has {len(ours)} convolutions; of "
                "torchvision's networks, those without batch norms fit."
            )
        state = self.state_dict()
        for name, number in zip(ours, theirs, strict=True):
            for part in ("weight", "bias"):
                given = weights[f"features.{number}.{part}"]
                if given.shape != state[f"{name}.{part}"].shape:
                    raise ValueError(
                        f"{part.capitalize()} of `features.{number}` is {tuple(given.shape)} but that of `{name}` "
                        f"{tuple(state[f'{name}.{part}'].shape)}."
                    )
                state[f"{name}.{part}"].copy_(given)


class VGGEncoder(Encoder):
    """VGG-16 up to ``conv5_3``, with a batch norm after every macro-layer: stride 16, 512 channels.

    Layers are called ``macro1.conv1_1``, ``macro1.relu1_1``, …, ``macro1.bn1``, ``pool1``, …, ``macro5.bn5``. A detector that is
    given weights leaves the first two macro-layers as they are.

    Args:
        width: Factor on the number of filters, e.g. 0.25 for a quick run.
        macro_layers: Of the five, how many. With 4 the stride is 8, for small images.
        in_channels: Channels of an image.

    Shape:
        - input: images ``(N, in_channels, H, W)``.
        - output: maps ``(N, 512 · width, H // 16, W // 16)``.

    Raises:
        ValueError: If the width leaves a layer without a filter, or there is no such number of macro-layers.

    Source: Zhang et al., *Is Faster R-CNN Doing Well for Pedestrian Detection?*, 2016; the batch norms are those of T1, section
    3.4.

    Example:
        >>> import torch
        >>> VGGEncoder(width=0.125)(torch.zeros(1, 3, 64, 96)).shape
        torch.Size([1, 64, 4, 6])
    """

    fixed = ("macro1", "macro2")

    def __init__(self, width: float = 1.0, macro_layers: int = 5, in_channels: int = 3) -> None:
        super().__init__()
        if not 1 <= macro_layers <= len(_VGG):
            raise ValueError(f"Argument `macro_layers` must lie in 1 to {len(_VGG)} but got {macro_layers}.")
        if round(_VGG[0][0] * width) < 1:
            raise ValueError(f"Argument `width` must leave the first convolution a filter of its {_VGG[0][0]} but got {width}.")
        channels = in_channels
        for number, (filters, convolutions) in enumerate(_VGG[:macro_layers], start=1):
            macro = nn.Sequential()
            for place in range(1, convolutions + 1):
                macro.add_module(f"conv{number}_{place}", nn.Conv2d(channels, round(filters * width), 3, padding=1))
                macro.add_module(f"relu{number}_{place}", nn.ReLU())
                channels = round(filters * width)
            macro.add_module(f"bn{number}", nn.BatchNorm2d(channels))
            self.add_module(f"macro{number}", macro)
            if number < macro_layers:
                self.add_module(f"pool{number}", nn.MaxPool2d(2))
        init_convolutions(self)


class AlexNetEncoder(Encoder):
    """AlexNet up to its fifth convolution, with a batch norm after each of them: stride 16, 256 channels.

    Layers are called ``macro1.conv1``, ``macro1.bn1``, ``macro1.relu1``, ``pool1``, …, ``macro5.relu5``. Sizes are those of
    torchvision's AlexNet, whose published weights fit.

    Args:
        width: Factor on the number of filters, e.g. 0.25 for a quick run.
        in_channels: Channels of an image.

    Shape:
        - input: images ``(N, in_channels, H, W)`` of at least 63 pixels each way.
        - output: maps ``(N, 256 · width, about H / 16, about W / 16)``.

    Raises:
        ValueError: If the width leaves a layer without a filter.

    Source: Krizhevsky, *One Weird Trick for Parallelizing Convolutional Neural Networks*, 2014; the batch norms are those of T1,
    section 3.4.

    Example:
        >>> import torch
        >>> AlexNetEncoder(width=0.125)(torch.zeros(1, 3, 127, 191)).shape
        torch.Size([1, 32, 7, 11])
    """

    def __init__(self, width: float = 1.0, in_channels: int = 3) -> None:
        super().__init__()
        if round(64 * width) < 1:
            raise ValueError(f"Argument `width` must leave the first convolution a filter of its 64 but got {width}.")
        channels = in_channels
        for number, (filters, side, stride, padding) in enumerate(
            [(64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)], start=1
        ):
            macro = nn.Sequential()
            macro.add_module(f"conv{number}", nn.Conv2d(channels, round(filters * width), side, stride, padding))
            channels = round(filters * width)
            macro.add_module(f"bn{number}", nn.BatchNorm2d(channels))
            macro.add_module(f"relu{number}", nn.ReLU())
            self.add_module(f"macro{number}", macro)
            if number <= 2:
                self.add_module(f"pool{number}", nn.MaxPool2d(3, stride=2))
        init_convolutions(self)
