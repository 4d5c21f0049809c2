"""Layers to put into a network: compressed linear transforms, their pointwise convolutions, cheap blocks, and gates."""

from lit_compress.layers.acdc import ACDCConv1x1, ACDCLinear
from lit_compress.layers.blocks import Bottleneck, GroupedPointwise, conv_block
from lit_compress.layers.hashed import HashedConv1x1, HashedLinear
from lit_compress.layers.rank_factorized import RankFactorizedConv1x1, RankFactorizedLinear
from lit_compress.layers.separable import SeparableConv2d
from lit_compress.layers.shuffle import ShuffleConv1x1, ShuffleConv2d, ShuffleLinear
from lit_compress.layers.structured import StructuredLinear
from lit_compress.layers.tensor_train import TensorTrainConv1x1, TensorTrainLinear
from lit_compress.layers.tucker import TuckerConv1x1, TuckerLinear
from lit_compress.layers.vib_gate import VIBGate

__all__ = [
    "ACDCConv1x1",
    "ACDCLinear",
    "Bottleneck",
    "GroupedPointwise",
    "HashedConv1x1",
    "HashedLinear",
    "RankFactorizedConv1x1",
    "RankFactorizedLinear",
    "SeparableConv2d",
    "ShuffleConv1x1",
    "ShuffleConv2d",
    "ShuffleLinear",
    "StructuredLinear",
    "TensorTrainConv1x1",
    "TensorTrainLinear",
    "TuckerConv1x1",
    "TuckerLinear",
    "VIBGate",
    "conv_block",
]
