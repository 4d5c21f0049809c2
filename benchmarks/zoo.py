"""The networks that people have: torchvision's families, and one small network for every coupling and convention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from lit_compress.surgery import ForwardFn, call
from tests.networks import Net, conv

Kind = Literal["classification", "detection and segmentation", "couplings and conventions"]


@dataclass(frozen=True)
class Specimen:
    """A network of the zoo.

    Args:
        kind: The table it is in.
        build: Makes it.
        inputs: Makes inputs for it, given the height and width of images.
        size: Height and width, in pixels.
        run: How to run it on the inputs.
        bound: Seconds that tracing it may take on one core.
        trains: Whether it runs further layers in training mode.
    """

    kind: Kind
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    size: int
    run: ForwardFn = call
    bound: float = 2.0
    trains: bool = False


def image(size: int, batch: int = 1) -> Tensor:
    """Normal noise ``(N, 3, size, size)``."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def _classifier(name: str, size: int = 224, *, trains: bool = False, **options: Any) -> Specimen:
    build = partial(torchvision.models.get_model, name, weights=None, **options)
    return Specimen("classification", build, image, size, trains=trains)


def _segmenter(name: str) -> Specimen:
    build = partial(torchvision.models.get_model, name, weights=None, weights_backbone=None, aux_loss=True)
    return Specimen("detection and segmentation", build, image, 520, bound=10.0)


def _detector(norm: type[nn.Module], size: int = 800) -> Specimen:
    def build() -> nn.Module:
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm)
        # Few classes, since an untrained network gives none of many the score that it takes to be detected.
        return FasterRCNN(backbone, num_classes=3, min_size=size, max_size=size)

    def run(model: nn.Module, images: Tensor) -> Any:
        return model(list(images))

    return Specimen("detection and segmentation", build, image, size, run, bound=10.0)


def _small(build: Callable[[], nn.Module], inputs: Callable[[int], Any] | None = None, run: ForwardFn = call) -> Specimen:
    return Specimen("couplings and conventions", build, inputs or (lambda size: image(size, 2)), 16, run)


def _se_gate() -> nn.Module:
    return Net(
        lambda m, x: m.end((y := m.a(x)) * m.up(F.relu(m.down(y.mean((2, 3), keepdim=True)))).sigmoid()),
        a=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), end=conv(8, 2),
    )  # fmt: skip


def _chunk_glu() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        value, gate = m.a(x).chunk(2, 1)
        return m.end(value * gate.sigmoid())

    return Net(run, a=conv(3, 16), end=conv(8, 2))


def _unet() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        wide = F.relu(m.down1(x))
        deep = F.relu(m.down2(F.max_pool2d(wide, 2)))
        return m.end(F.relu(m.up1(torch.cat([m.up2(deep), wide], 1))))

    return Net(run, down1=conv(3, 8), down2=conv(8, 12), up2=nn.ConvTranspose2d(12, 6, 2, 2), up1=conv(14, 8), end=conv(8, 2))


def _tied() -> nn.Module:
    net = Net(
        lambda m, x: m.end(F.relu(m.b(F.relu(m.a(m.stem(x)))))), stem=conv(3, 8), a=conv(8, 8), b=conv(8, 8), end=conv(8, 2)
    )
    net.b.weight = net.a.weight
    return net


def _volume(size: int) -> Tensor:
    return image(size).view(1, 3, 4, size // 2, size // 2)


def _with_labels(size: int) -> tuple[Tensor, Tensor]:
    return image(size, 2), torch.tensor([0, 1])


def _around(layer: Callable[[], nn.Module], c: int = 8) -> Callable[[], nn.Module]:
    """A convolution to eight channels, the layer, and a convolution that reads the layer's ``c`` channels."""
    return lambda: nn.Sequential(conv(3, 8), nn.ReLU(), layer(), nn.ReLU(), conv(c, 2))


def _channels_last_norm() -> nn.Module:
    return Net(
        lambda m, x: m.end(m.c(m.n(m.b(F.relu(m.a(x))).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).relu()),
        a=conv(3, 6), b=conv(6, 8), n=nn.LayerNorm(8), c=conv(8, 6), end=conv(6, 2),
    )  # fmt: skip


def _cnn_lstm() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        states, _ = m.lstm(m.cnn(x).mean(2).transpose(1, 2))
        return m.end(F.relu(m.fc(states[:, -1])))

    cnn = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 8), nn.ReLU())
    return Net(run, cnn=cnn, lstm=nn.LSTM(8, 10, batch_first=True), fc=nn.Linear(10, 6), end=nn.Linear(6, 2))


class _Timm(nn.Module):
    """`forward_features` and `forward_head`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.stem(x)))

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@dataclass
class _Output:
    """As the outputs of Hugging Face's models."""

    loss: Tensor | None
    logits: Tensor


class _HuggingFace(_Timm):
    """Keyword arguments in, an object out."""

    def forward(self, *, pixel_values: Tensor, labels: Tensor | None = None) -> _Output:  # type: ignore[override]
        logits = super().forward(pixel_values)
        return _Output(None if labels is None else F.cross_entropy(logits, labels), logits)


class _TrainingOnly(_Timm):
    """A head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Sequential(conv(8, 6), nn.ReLU(), conv(6, 5))

    def forward(self, x: Tensor) -> Any:
        features = self.forward_features(x)
        return (self.forward_head(features), self.auxiliary(features)) if self.training else self.forward_head(features)


ZOO: Mapping[str, Specimen] = {
    **{
        name: _classifier(name)
        for name in (
            "resnet18",
            "resnet50",
            "resnext50_32x4d",
            "wide_resnet50_2",
            "vgg16_bn",
            "alexnet",
            "mobilenet_v2",
            "mobilenet_v3_small",
            "mobilenet_v3_large",
            "efficientnet_b0",
            "efficientnet_v2_s",
            "densenet121",
            "squeezenet1_1",
            "shufflenet_v2_x1_0",
            "mnasnet1_0",
            "regnet_x_400mf",
            "regnet_y_400mf",
            "convnext_tiny",
            "vit_b_16",
            "swin_t",
            "swin_v2_t",
            "maxvit_t",
        )
    },
    "googlenet": _classifier("googlenet", trains=True, init_weights=False),
    "inception_v3": _classifier("inception_v3", 299, trains=True, init_weights=False),
    "fcn_resnet50": _segmenter("fcn_resnet50"),
    "deeplabv3_resnet50": _segmenter("deeplabv3_resnet50"),
    "Faster R-CNN, ResNet-50 FPN, batch norm": _detector(nn.BatchNorm2d),
    "Faster R-CNN, ResNet-50 FPN, frozen batch norm": _detector(FrozenBatchNorm2d),
    "SE gate": _small(_se_gate),
    "chunk-GLU": _small(_chunk_glu),
    "channel concatenation": _small(
        lambda: Net(lambda m, x: m.end(torch.cat([m.a(x), F.relu(m.b(x))], 1)), a=conv(3, 4), b=conv(3, 6), end=conv(10, 2))
    ),
    "U-Net skips": _small(_unet),
    "a module shared": _small(
        lambda: Net(lambda m, x: m.end(m.b(m.b(m.a(x)).relu())), a=conv(3, 8), b=conv(8, 8), end=conv(8, 2))
    ),
    "tied weights": _small(_tied),
    "weight norm": _small(_around(lambda: parametrizations.weight_norm(conv(8, 8)))),
    "spectral norm": _small(_around(lambda: parametrizations.spectral_norm(conv(8, 8)))),
    "bare scales": _small(
        lambda: Net(
            lambda m, x: m.end(m.a(x) * m.scale + m.shift[:, None, None]),
            a=conv(3, 8),
            scale=nn.Parameter(torch.rand(1, 8, 1, 1)),
            shift=nn.Parameter(torch.rand(8)),
            end=conv(8, 2),
        )
    ),
    "grouped convolution": _small(_around(lambda: conv(8, 12, groups=2), 12)),
    "depthwise with a multiplier": _small(_around(lambda: conv(8, 16, groups=8), 16)),
    "transposed convolution": _small(_around(lambda: nn.ConvTranspose2d(8, 6, 2, 2), 6)),
    "transposed convolution in groups": _small(_around(lambda: nn.ConvTranspose2d(8, 8, 2, 2, groups=2))),
    "one dimension": _small(
        lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 2, 3)), lambda _: image(8)[:, :, 0]
    ),
    "three dimensions": _small(
        lambda: nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 2, 1)), _volume
    ),
    "group norm": _small(_around(lambda: nn.GroupNorm(4, 8))),
    "layer norm": _small(_channels_last_norm),
    "instance norm": _small(_around(lambda: nn.InstanceNorm2d(8, affine=True))),
    "channel shuffle": _small(_around(lambda: nn.ChannelShuffle(2))),
    "pixel shuffle": _small(_around(lambda: nn.PixelShuffle(2), 2)),
    "LSTM behind a CNN": _small(_cnn_lstm),
    "heads and outputs": _small(
        lambda: Net(
            lambda m, x: {"boxes": m.boxes(y := m.a(x)), "scores": [m.scores(F.relu(m.b(y)))]},
            a=conv(3, 8),
            b=conv(8, 6),
            boxes=conv(8, 4),
            scores=conv(6, 2),
        )
    ),
    "tuple batch, as timm's": _small(_Timm, _with_labels, lambda model, batch: model(batch[0])),
    "dict batch, as Hugging Face's": _small(
        _HuggingFace,
        lambda size: dict(zip(("pixel_values", "labels"), _with_labels(size), strict=True)),
        lambda model, batch: [(output := model(**batch)).loss, output.logits],
    ),
    "a head that only training runs": replace(_small(_TrainingOnly), trains=True),
}
QUICK = {
    "mobilenet_v3_small": 64,
    "shufflenet_v2_x1_0": 64,
    "regnet_y_400mf": 64,
    "googlenet": 64,
    "fcn_resnet50": 33,
    **{name: specimen.size for name, specimen in ZOO.items() if specimen.kind == "couplings and conventions"},
}
