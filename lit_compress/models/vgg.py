"""VGG networks for small images, with batch norm and the dropout that goes with it."""

from collections import OrderedDict

from torch import Tensor, nn

from lit_compress.models.convolution import ConvolutionalNetwork, conv_bn_relu, init_convolutions

# Convolutions of each of the five stages; a 2×2 max-pool ends a stage.
_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_FILTERS = (64, 128, 256, 512, 512)
_HEAD = 512


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
        if depth not in _STAGES:
            raise ValueError(f"Argument `depth` must be one of {list(_STAGES)} but got {depth}.")
        if round(_FILTERS[0] * width) < 1:
            raise ValueError(f"Argument `width` must leave the first convolution a filter of its {_FILTERS[0]} but got {width}.")
        if image_size < 1:
            raise ValueError(f"Argument `image_size` must be at least 1 pixel but got {image_size}.")
        after_first, after_others, in_head = dropout
        hidden = round(_HEAD * width)

        self.features = nn.Sequential()
        channels, side = in_channels, image_size
        for stage, (convolutions, filters) in enumerate(zip(_STAGES[depth], _FILTERS, strict=True), start=1):
            for place in range(1, convolutions + 1):
                name = f"{stage}_{place}"
                for layer, module in conv_bn_relu(name, channels, round(filters * width)).items():
                    self.features.add_module(layer, module)
                channels = round(filters * width)
                if place < convolutions:
                    rate = after_first if name == "1_1" else after_others
                    self.features.add_module(f"dropout{name}", nn.Dropout(rate))
            self.features.add_module(f"pool{stage}", nn.MaxPool2d(2, ceil_mode=True))
            side = (side + 1) // 2

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
