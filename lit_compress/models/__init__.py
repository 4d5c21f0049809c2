"""The documents' networks. A forward holds no channel count, so that channels can be cut out of any of them."""

from lit_compress.models.lenet import MLP, LeNet5, LeNet300100
from lit_compress.models.normed_mlp import NormedMLP
from lit_compress.models.resnet import ResidualBlock, ResNetCIFAR, ZeroPadShortcut
from lit_compress.models.simple_cnn import SimpleCNN
from lit_compress.models.vgg import VGGCIFAR

__all__ = [
    "MLP",
    "VGGCIFAR",
    "LeNet5",
    "LeNet300100",
    "NormedMLP",
    "ResNetCIFAR",
    "ResidualBlock",
    "SimpleCNN",
    "ZeroPadShortcut",
]
