"""The documents' networks. A forward holds no channel count, so that channels can be cut out of any of them."""

from lit_compress.models.darts import DARTS, DARTSOutput, DropPath
from lit_compress.models.encoders import AlexNetEncoder, VGGEncoder
from lit_compress.models.erfnet import ERFNet
from lit_compress.models.hint import with_hint
from lit_compress.models.lenet import MLP, LeNet5, LeNet300100
from lit_compress.models.normed_mlp import NormedMLP
from lit_compress.models.preact_resnet import PreActResNet
from lit_compress.models.resnet import ResidualBlock, ResNetCIFAR, ZeroPadShortcut
from lit_compress.models.resnet_imagenet import ResNet18Half, resnet34
from lit_compress.models.simple_cnn import SimpleCNN
from lit_compress.models.vgg import VGGCIFAR, VGGImageNet
from lit_compress.models.wide_resnet import PreActBlock, WideResNet, wide_resnet50_2

__all__ = [
    "DARTS",
    "MLP",
    "VGGCIFAR",
    "AlexNetEncoder",
    "DARTSOutput",
    "DropPath",
    "ERFNet",
    "LeNet5",
    "LeNet300100",
    "NormedMLP",
    "PreActBlock",
    "PreActResNet",
    "ResNet18Half",
    "ResNetCIFAR",
    "ResidualBlock",
    "SimpleCNN",
    "VGGEncoder",
    "VGGImageNet",
    "WideResNet",
    "ZeroPadShortcut",
    "resnet34",
    "wide_resnet50_2",
    "with_hint",
]
