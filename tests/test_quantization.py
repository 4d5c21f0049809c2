"""Int8 files: within the rounding error of the network, smaller, and compared on data by what the module itself logs."""

import numpy as np
import onnx
import pytest
import torch
from pytorch_lightning import LightningDataModule
from torch import nn

from lit_compress.commands.export import _validated
from lit_compress.export import export
from lit_compress.models import SimpleCNN
from lit_compress.quantization import quantize_onnx
from tests.modules import Small, small_loaders
from tests.networks import randomized


def test_a_layer_is_off_by_no_more_than_rounding(tmp_path):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(20, 6), torch.randn(200, 20)
    export(layer, inputs[:2], tmp_path / "whole.onnx")
    found = quantize_onnx(tmp_path / "whole.onnx", tmp_path / "small.onnx", inputs.split(50))(inputs)[0]
    with torch.no_grad():
        expected = layer(inputs)
    # Each number moves by half a step at most: 255 steps over the range of inputs and outputs, with 0 among the values, and
    # 254 over twice the largest weight of a row. One step more, for a zero that is put on the grid.
    steps = [(max(values.max().item(), 0) - min(values.min().item(), 0)) / 255 for values in (inputs, expected)]
    rows = layer.weight.detach().abs().amax(1) / 127
    bound = steps[0] * layer.weight.detach().abs().sum(1) + rows / 2 * inputs.abs().sum(1, keepdim=True) + steps[1]
    error = (found - expected).abs()
    assert (error <= bound).all()
    assert error.max() > 1e-5, "nothing was rounded"


def test_weights_are_int8_and_classes_stay(tmp_path):
    torch.manual_seed(0)
    network, images = randomized(SimpleCNN(width=12)).eval(), torch.randn(128, 3, 32, 32)
    export(network, images[:2], tmp_path / "whole.onnx")
    run_small = quantize_onnx(tmp_path / "whole.onnx", tmp_path / "small.onnx", images.split(32))
    weights = [one for one in onnx.load(tmp_path / "small.onnx").graph.initializer if len(one.dims) == 4]
    assert {one.data_type for one in weights} == {onnx.TensorProto.INT8}
    assert (tmp_path / "small.onnx").stat().st_size < 0.75 * (tmp_path / "whole.onnx").stat().st_size
    with torch.no_grad():
        expected = network(images)
    assert (run_small(images)[0].argmax(1) == expected.argmax(1)).double().mean() > 0.9
    assert run_small(images[:5])[0].shape == (5, 10)


class Sum(nn.Module):
    def forward(self, one, other):
        return one + other


def test_what_cannot_be_quantised_is_refused(tmp_path):
    export(nn.Linear(4, 2), torch.rand(2, 4), tmp_path / "one.onnx")
    with pytest.raises(ValueError, match="no batches to measure"):
        quantize_onnx(tmp_path / "one.onnx", tmp_path / "small.onnx", [])
    export(Sum(), (torch.rand(2, 4), torch.rand(2, 4)), tmp_path / "two.onnx")
    with pytest.raises(ValueError, match=r"one input but .* has 2"):
        quantize_onnx(tmp_path / "two.onnx", tmp_path / "small.onnx", [torch.rand(2, 4)])
    assert not (tmp_path / "small.onnx").exists()


class Vectors(LightningDataModule):
    def val_dataloader(self):
        return small_loaders()[1]


class Called(Small):
    """It uses itself as a function, as a module should."""

    def forward(self, inputs):
        return self.net(inputs)

    def validation_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("val/loss", nn.functional.cross_entropy(logits, batch[1]))
        if logits.shape[1] != 3:
            raise RuntimeError("three classes")


def test_the_module_scores_the_file_and_not_its_own_weights():
    module, other = Called(), Called()
    expected = np.average(
        [nn.functional.cross_entropy(other(inputs), labels).item() for inputs, labels in small_loaders()[1]], weights=[32, 18]
    )
    metrics = _validated(module, Vectors(), lambda inputs: [other(inputs)])
    assert metrics == {"val/loss": pytest.approx(expected, rel=1e-5)}
    assert "forward" not in vars(module)
    with pytest.raises(ValueError, match="`validation_step` of Small never calls the module itself"):
        _validated(Small(), Vectors(), lambda inputs: [other(inputs)])
    with pytest.raises(ValueError, match="fails with the file in place of its `forward`: three classes"):
        _validated(module, Vectors(), lambda inputs: [inputs])
