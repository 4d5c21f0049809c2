"""What is left of a network, against the documents' counts and sums written out."""

import pytest
import torch

from lit_compress import Recipe, analyze, cut
from lit_compress.metrics import CompressionRatios
from lit_compress.models import MLP, LeNet5, ResNetCIFAR


def ratios(network, inputs):
    metric = CompressionRatios()
    metric.update(network, inputs)
    return {name: float(value) for name, value in metric.compute().items()}


def cut_to(network, widths, inputs):
    cut(network, Recipe(keep={name: tuple(range(width)) for name, width in widths.items()}), inputs)
    return network


@pytest.mark.parametrize(
    ("built", "left"), [((120, 100), (49, 8)), ((1000, 200), (66, 5)), ((1000, 500), (69, 6)), ((300, 100), (71, 33))], ids=str
)
def test_fully_connected_networks_are_counted_as_the_document_counts(built, left):
    """PIBprune, table 4.1 (in whose first row the two are swapped in print), and VIBNet's LeNet-300-100."""
    network, inputs = MLP(784, built, 10, activation="sigmoid"), torch.rand(2, 1, 28, 28)
    assert ratios(network, inputs) == {"R_n": 1.0, "R_w": 1.0}
    found = ratios(cut_to(network, {"layers.fc1": left[0], "layers.fc2": left[1]}, inputs), inputs)
    weights = [784 * a + a * b + b * 10 for a, b in (left, built)]
    assert found == pytest.approx({"R_n": (sum(left) + 10) / (sum(built) + 10), "R_w": weights[0] / weights[1]})
    if built == (120, 100):
        assert found == pytest.approx({"R_n": 0.291, "R_w": 0.363}, abs=5e-4)


def test_a_convolution_counts_at_all_of_its_positions():
    network, inputs = LeNet5(), torch.rand(3, 1, 28, 28)
    found = ratios(cut_to(network, {"conv1": 5, "conv2": 10, "fc1": 40}, inputs), inputs)
    outputs = [a * 24 * 24 + b * 8 * 8 + c + 10 for a, b, c in ((5, 10, 40), (20, 50, 500))]
    weights = [a * 25 + a * b * 25 + b * 16 * c + c * 10 for a, b, c in ((5, 10, 40), (20, 50, 500))]
    assert found == pytest.approx({"R_n": outputs[0] / outputs[1], "R_w": weights[0] / weights[1]})


def test_two_cuts_are_relative_to_the_network_as_it_was_built():
    inputs = torch.rand(1, 3, 32, 32)
    once, twice = (ResNetCIFAR(depth=8) for _ in range(2))
    names = [name for name, _ in once.named_modules() if name.endswith("conv1") and "." in name]
    cut_to(twice, dict.fromkeys(names, 10), inputs)
    assert ratios(cut_to(twice, dict.fromkeys(names, 6), inputs), inputs) == ratios(
        cut_to(once, dict.fromkeys(names, 6), inputs), inputs
    )


def test_an_analysis_foresees_them_and_remembers_earlier_cuts():
    network, inputs = LeNet5(), torch.rand(3, 1, 28, 28)
    cut_to(network, {"conv2": 30}, inputs)
    analysis = analyze(network, [inputs], method="magnitude")
    assert analysis.ratios() == pytest.approx(ratios(network, inputs))
    recipe = analysis.recipe(keep_channels=0.5)
    foreseen = analysis.ratios(recipe)
    cut(network, recipe, inputs)
    assert foreseen == pytest.approx(ratios(network, inputs))
    assert max(foreseen.values()) < 0.6


def test_needs_a_network():
    with pytest.raises(ValueError, match="have seen none"):
        CompressionRatios().compute()
