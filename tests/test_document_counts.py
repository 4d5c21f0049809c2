"""Every size that the document's tables print, as an exact integer where the released code gave one."""

import json
from pathlib import Path

import pytest
import torch

from lit_compress import count_mult_adds, count_parameters
from lit_compress.models import WideResNet

REFERENCE = Path(__file__).parent / "reference"
TABLE_4_3 = json.loads((REFERENCE / "moonshine_counts.json").read_text())["table_4_3_cifar10"]
IMAGE = torch.zeros(1, 3, 32, 32)


def row_name(row):
    return f"{row['depth']}-{row['width']} {row['label']}"


@pytest.mark.parametrize("row", TABLE_4_3, ids=row_name)
def test_table_4_3(row):
    network = WideResNet(row["depth"], row["width"], num_classes=10, block=row["label"].removesuffix(" (teacher)"))
    parameters, with_relu = count_parameters(network), count_mult_adds(network, IMAGE, count_relu=True)
    assert parameters == row["params"]
    assert count_mult_adds(network, IMAGE) == row["true_conv_linear_macs_hook"]
    # The released counter leaves the dilation of S-2x2 out of the size of its output; the document's figure has the true size.
    printed = 146_720_000 + 704_522 if row["label"] == "S-2x2" else row["moonshine_count_ops"]
    assert with_relu == printed
    # 814,650 is printed as 814.7 K: a half goes up.
    assert parameters / 1e3 == pytest.approx(row["thesis_params_K"], abs=0.0500001)
    assert with_relu / 1e6 == pytest.approx(row["thesis_madds_M"], abs=0.0500001)


@pytest.mark.parametrize("row", TABLE_4_3, ids=row_name)
def test_table_4_3_with_100_classes(row):
    """The classifier has 90 rows more of 64 k weights and a bias."""
    network = WideResNet(row["depth"], row["width"], num_classes=100, block=row["label"].removesuffix(" (teacher)"))
    features = 64 * row["width"]
    assert count_parameters(network) == row["params"] + 90 * (features + 1)
    assert count_mult_adds(network, IMAGE) == row["true_conv_linear_macs_hook"] + 90 * features


def test_there_are_26_rows():
    assert len(TABLE_4_3) == 26


def test_the_teachers_of_chapter_5():
    with torch.device("meta"):
        assert count_parameters(WideResNet(28, 10)) == 36_479_194
