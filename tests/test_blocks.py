"""Cheap blocks: their convolutions by the document's formulas, their order, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_compress.layers import conv_block
from lit_compress.layers.blocks import BlockSpec, Groups

N = 32
# Convolution and batch norm parameters of table 4.1 with k = 3, and k = 2 for S-2x2.
TABLE = {
    "S": (2 * N**2 * 9, 4 * N),
    "S-2x2": (2 * N**2 * 4, 4 * N),
    "G(4)": (2 * N**2 * (9 / 4 + 1), 8 * N),
    "G(N)": (2 * N**2 * (9 / N + 1), 8 * N),
    "G(N/8)": (2 * N**2 * (9 / (N / 8) + 1), 8 * N),
    "B(2)": (N**2 * (9 / 4 + 1), N * (2 + 4 / 2)),
    "B(4)": (N**2 * (9 / 16 + 2 / 4), N * (2 + 4 / 4)),
    "BG(2,4)": (N**2 * (9 / (4 * 4) + 1), N * (2 + 4 / 2)),
    "BG(2,M)": (N**2 * (9 / (N / 2 * 4) + 1), N * (2 + 4 / 2)),
    "BG(2,M/4)": (N**2 * (9 / (N / 2 / 4 * 4) + 1), N * (2 + 4 / 2)),
}


@pytest.mark.parametrize("activation", ["pre", "post"])
@pytest.mark.parametrize("block", TABLE)
def test_a_block_has_the_parameters_of_table_4_1(block, activation):
    layers = list(conv_block(block, N, N, activation=activation).modules())
    convolutions = sum(m.weight.numel() for m in layers if isinstance(m, nn.Conv2d))
    norms = sum(m.weight.numel() + m.bias.numel() for m in layers if isinstance(m, nn.BatchNorm2d))
    assert (convolutions, norms) == TABLE[block]
    assert all(m.bias is None for m in layers if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("activation", ["pre", "post"])
@pytest.mark.parametrize("block", TABLE)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_a_block_keeps_the_size_of_the_map_over_its_stride(block, activation, stride, dilation):
    layers = conv_block(block, 16, N, stride, dilation=dilation, activation=activation)
    assert layers(torch.randn(2, 16, 9, 9)).shape == (2, N, -(-9 // stride), -(-9 // stride))


def test_a_norm_and_a_relu_stand_before_every_convolution():
    x = torch.randn(4, 16, 6, 6)
    block = conv_block("BG(2,M/4)", 16, 32, stride=2).eval()
    _randomise(block)
    bottleneck = block.conv1
    steps = [
        (block.norm1, bottleneck.reduce),
        (bottleneck.norm, bottleneck.narrow.grouped),
        (bottleneck.narrow.norm, bottleneck.narrow.pointwise),
    ]
    expected = x
    for norm, convolution in steps:
        expected = convolution(F.relu(norm(expected)))
    torch.testing.assert_close(block(x), expected)
    assert (bottleneck.narrow.grouped.groups, bottleneck.narrow.grouped.stride) == (16 // 4, (2, 2))


def test_a_norm_stands_after_every_convolution_and_a_relu_after_all_but_the_last():
    x = torch.randn(4, 16, 6, 6)
    block = conv_block("G(N/4)", 16, 32, activation="post").eval()
    _randomise(block)
    first, second = block.conv1, block.conv2
    expected = F.relu(first.norm(first.grouped(x)))
    expected = F.relu(block.norm1(first.pointwise(expected)))
    expected = F.relu(second.norm(second.grouped(expected)))
    expected = block.norm2(second.pointwise(expected))
    torch.testing.assert_close(block(x), expected)
    assert (first.grouped.groups, second.grouped.groups) == (4, 8)  # N is what comes into each


def _randomise(block):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
            nn.init.normal_(module.bias)


def test_names_are_read():
    assert BlockSpec.parse("BG(2, M/16)") == BlockSpec(groups=Groups(16, relative=True), bottleneck=2)
    assert BlockSpec.parse("G(N)") == BlockSpec(groups=Groups(1, relative=True))
    assert BlockSpec.parse("S-2x2") == BlockSpec(kernel_size=2)


@pytest.mark.parametrize("text", ["", "s", "G", "G(M)", "B(0)", "B(N)", "BG(2)", "BG(2,N)", "G(N/)", "G(-1)", "S(3)"])
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match=r"written as S, S-2x2, G\(g\)"):
        conv_block(text, 16, 16)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("G(3)", "of 16 channels cannot have 3 groups"),
        ("G(0)", "cannot have 0 groups"),
        ("G(N/32)", "of 16 channels cannot have groups of 32 channels"),
        ("BG(4,8)", "of 4 channels cannot have 8 groups"),
        ("B(17)", "16 channels cannot shrink by a factor of 17"),
    ],
)
def test_groups_that_do_not_fit_are_refused(block, message):
    with pytest.raises(ValueError, match=message):
        conv_block(block, 16, 16)
    with pytest.raises(ValueError, match="'pre' or 'post'"):
        conv_block(block, 16, 16, activation="both")
