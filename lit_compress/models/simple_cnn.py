"""SimpleCNN, the small all-convolutional network on which PFA is compared with the upper bound of random recipes."""

from collections import OrderedDict

from torch import Tensor, nn

from lit_compress.models.convolution import ConvolutionalNetwork, conv_bn_relu, init_convolutions


class SimpleCNN(ConvolutionalNetwork):
    """Nine convolutions and an average pool: 1,370,996 parameters for 10 classes of colour images.

    3 × conv 96 of 3×3, dropout, 3 × conv 192 of 3×3, dropout, conv 192 of 3×3, conv 192 of 1×1, conv ``num_classes`` of 1×1,
    average pool over the map. Batch norm and ReLU follow *every* convolution, the last one too, so logits are never negative.

    The document does not give strides or padding. As in the All-CNN-C that it is modelled on, the third and the sixth
    convolution have stride 2 (32 → 16 → 8 pixels) and nothing is max-pooled. All 3×3 convolutions are padded by 1, also the
    seventh, which All-CNN-C leaves unpadded: so 8×8 images (8 → 4 → 2) pass as well as 28×28 and 32×32.

    Args:
        num_classes: Classes, which is also the number of filters of the last convolution.
        in_channels: Channels of an image.
        width: Filters of the first three convolutions; the next five have twice as many.
        dropout: Probability that a number is zeroed by either dropout layer.

    Shape:
        - input: images ``(N, in_channels, H, W)``, any H and W.
        - output: logits ``(N, num_classes)``.

    Raises:
        ValueError: If the width is below 1.

    Source: *Filter Distillation for Network Compression* (PFA), appendix C.1; strides after Springenberg et al., *Striving for
    Simplicity: The All Convolutional Net*, 2014, table 2.

    Example:
        >>> import torch
        >>> SimpleCNN(num_classes=10, in_channels=1, width=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 96, dropout: float = 0.5) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"Argument `width` must be at least 1 but got {width}.")
        self.features = nn.Sequential(
            OrderedDict[str, nn.Module](
                **conv_bn_relu("1", in_channels, width),
                **conv_bn_relu("2", width, width),
                **conv_bn_relu("3", width, width, stride=2),
                dropout1=nn.Dropout(dropout),
                **conv_bn_relu("4", width, 2 * width),
                **conv_bn_relu("5", 2 * width, 2 * width),
                **conv_bn_relu("6", 2 * width, 2 * width, stride=2),
                dropout2=nn.Dropout(dropout),
                **conv_bn_relu("7", 2 * width, 2 * width),
                **conv_bn_relu("8", 2 * width, 2 * width, kernel_size=1),
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict[str, nn.Module](
                **conv_bn_relu("9", 2 * width, num_classes, kernel_size=1), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()
            )
        )
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
