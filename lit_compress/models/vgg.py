"""VGG networks with batch norm: for small images, with much dropout, and for ImageNet, fully convolutional."""

from collections import OrderedDict
from collections.abc import Sequence
from math import ceil

from torch import Tensor, nn

from lit_compress.models.convolution import ConvolutionalNetwork, conv_bn_relu, init_convolutions

# Convolutions of each of the five stages; a 2×2 max-pool ends a stage.
_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_FILTERS = (64, 128, 256, 512, 512)
_HEAD, _CONVOLUTIONAL_HEAD = 512, 4096  # units of the hidden layers


class VGGCIFAR(ConvolutionalNetwork):
    """VGG for CIFAR: 3×3 convolutions with batch norm, ReLU and dropout, and a head of one hidden layer.

    VGG-16 at the default sizes has 14,987,722 parameters. (Its source has 4,224 more: convolution biases, which the batch
    norms subtract again and which are left out here.) Layers are called ``features.conv<stage>_<place>`` and so on, and
    ``classifier.fc1``, ``classifier.fc2``. Every convolution that is not before a pool is followed by dropout. The pools round
    up, as in the source: any image of up to 32 × 32 pixels ends as a single position, 8×8 ones after three pools.

    Args:
        depth: Convolutions plus three, as in the VGG paper: 11, 13, 16 or 19. The head has one layer less than the paper's.
        num_classes: Width of the output.
        in_channels: Channels of an image.
        width: Factor on the number of filters of every convolution and on the hidden layer, e.g. 0.25 for a quick run.
        dropout: Probability that a number is zeroed after the first convolution, after every other convolution that is not
            before a pool, and twice in the head. At depth 11 the first convolution stands before a pool and has none. These
            rates suit the full width on 32×32 images; a narrow network, or 8×8 images, learns next to nothing under them.
        image_size: Height and width of an image in pixels.

    Shape:
        - input: images ``(N, in_channels, image_size, image_size)``.
        - output: logits ``(N, num_classes)``.

    Raises:
        ValueError: If the depth is not one of the four, the width leaves a layer without a filter, or the image size is below 1.

    Source: Zagoruyko, *92.45% on CIFAR-10 in Torch*, 2015 (depth 16), the VGG-16 of PFA's experiments on CIFAR; stages of the
    other depths from Simonyan and Zisserman, 2014, table 1.

    Example:
        >>> import torch
        >>> VGGCIFAR(depth=11, width=0.125)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 16,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        dropout: tuple[float, float, float] = (0.3, 0.4, 0.5),
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if image_size < 1:
            raise ValueError(f"Argument `image_size` must be at least 1 pixel but got {image_size}.")
        *in_features, in_head = dropout
        hidden = round(_HEAD * width)
        self.features = _features(depth, in_channels, width, in_features)
        channels, side = round(_FILTERS[-1] * width), ceil(image_size / 2 ** len(_FILTERS))
        self.classifier = nn.Sequential(
            OrderedDict[str, nn.Module](
                flatten=nn.Flatten(),
                dropout1=nn.Dropout(in_head),
                fc1=nn.Linear(channels * side * side, hidden),
                bn=nn.BatchNorm1d(hidden),
                relu=nn.ReLU(),
                dropout2=nn.Dropout(in_head),
                fc2=nn.Linear(hidden, num_classes),
            )
        )
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


class VGGImageNet(ConvolutionalNetwork):
    """VGG for ImageNet without fully connected layers: what they do is done by convolutions, at every place of a larger image.

    3×3 convolutions in five stages, each ended by a 2×2 max-pool, then ``conv6`` of 7×7 (the whole map of a 224×224 image) and
    ``conv7`` of 1×1 with 4096 filters each, and ``conv8`` of 1×1 with a filter a class, whose map is averaged. Batch norm and
    ReLU follow every convolution but the last, dropout ``conv6`` and ``conv7``. 138,369,960 parameters at the default sizes.

    Args:
        depth: Convolutions: 11, 13, 16 or 19.
        num_classes: Classes, which is also the number of filters of the last convolution.
        in_channels: Channels of an image.
        width: Factor on the number of filters of every convolution but the last.
        dropout: Probability that a number is zeroed after ``conv6`` and ``conv7``.
        image_size: Height and width, in pixels, of the images for which ``conv6`` sees one place; at least 32.

    Shape:
        - input: images ``(N, in_channels, H, W)``, H and W at least ``image_size``.
        - output: logits ``(N, num_classes)``.

    Raises:
        ValueError: If the depth is not one of the four, the width leaves a layer without a filter, or the images are too small.

    Source: the VGG-16 of PFA's experiments on ImageNet (section 4.1, appendix C.3), after Simonyan and Zisserman, 2014, section
    3.2, and Long et al., *Fully Convolutional Networks for Semantic Segmentation*, 2015. The batch norm is PFA's.

    Example:
        >>> import torch
        >>> VGGImageNet(depth=11, num_classes=5, width=0.125, image_size=32)(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        depth: int = 16,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        dropout: float = 0.5,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        side = image_size // 2 ** len(_FILTERS)
        if side < 1:
            raise ValueError(f"Argument `image_size` must be at least 32 pixels but got {image_size}.")
        self.features = _features(depth, in_channels, width)
        channels, hidden = round(_FILTERS[-1] * width), round(_CONVOLUTIONAL_HEAD * width)
        self.classifier = nn.Sequential(
            OrderedDict[str, nn.Module](
                **conv_bn_relu("6", channels, hidden, kernel_size=side, padded=False),
                dropout6=nn.Dropout(dropout),
                **conv_bn_relu("7", hidden, hidden, kernel_size=1),
                dropout7=nn.Dropout(dropout),
                conv8=nn.Conv2d(hidden, num_classes, kernel_size=1),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
            )
        )
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def _features(depth: int, in_channels: int, width: float, dropout: Sequence[float] = ()) -> nn.Sequential:
    """The five stages. Given rates, the first's and the others', dropout follows each convolution that is not before a pool."""
    if depth not in _STAGES:
        raise ValueError(f"Argument `depth` must be one of {list(_STAGES)} but got {depth}.")
    if round(_FILTERS[0] * width) < 1:
        raise ValueError(f"Argument `width` must leave the first convolution a filter of its {_FILTERS[0]} but got {width}.")
    features, channels = nn.Sequential(), in_channels
    for stage, (convolutions, filters) in enumerate(zip(_STAGES[depth], _FILTERS, strict=True), start=1):
        for place in range(1, convolutions + 1):
            name = f"{stage}_{place}"
            for layer, module in conv_bn_relu(name, channels, round(filters * width)).items():
                features.add_module(layer, module)
            channels = round(filters * width)
            if dropout and place < convolutions:
                features.add_module(f"dropout{name}", nn.Dropout(dropout[0 if name == "1_1" else 1]))
        features.add_module(f"pool{stage}", nn.MaxPool2d(2, ceil_mode=True))
    return features
