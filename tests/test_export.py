"""What is written for deployment computes what the network does, for any batch size, and runs without this package's classes."""

import sys

import numpy as np
import onnxruntime
import pytest
import torch
from packaging.version import Version
from pytorch_lightning import LightningModule
from torch import nn
from torchvision.models import mobilenet_v2, resnet18

from lit_compress import analyze, cut
from lit_compress.export import export
from lit_compress.models import LeNet5, ResNetCIFAR, SimpleCNN
from tests.networks import randomized

NETWORKS = {
    "ResNet-20, padded back": (lambda: ResNetCIFAR(depth=20), (3, 32, 32), {"skips": "pad"}),
    "ResNet-20, shared": (lambda: ResNetCIFAR(depth=20), (3, 32, 32), {}),
    "LeNet-5": (LeNet5, (1, 28, 28), {}),
    "SimpleCNN": (lambda: SimpleCNN(width=12), (3, 32, 32), {}),
    "torchvision ResNet-18": (lambda: resnet18(num_classes=10), (3, 64, 64), {}),
    "torchvision MobileNet v2": (lambda: mobilenet_v2(num_classes=10), (3, 64, 64), {}),
}


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_cut_network_is_written_for_any_batch_size(name, form, tmp_path):
    build, shape, options = NETWORKS[name]
    if form == "onnx" and options and Version(torch.__version__) < Version("2.7"):
        pytest.skip("torch 2.6 writes no scatter to ONNX")
    torch.manual_seed(0)
    network = randomized(build()).eval()
    analysis = analyze(network, [torch.randn(96, *shape)], **options)
    cut(network, analysis.recipe(energy=0.8), torch.randn(2, *shape))
    path = tmp_path / "network"
    export(network, torch.randn(1, *shape), path, form=form)
    for size in (1, 2, 5):
        images = torch.randn(size, *shape)
        with torch.no_grad():
            expected = network(images)
        if form == "onnx":
            session = onnxruntime.InferenceSession(str(path))
            found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
        else:
            found = torch.export.load(path).module()(images)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 6), nn.Linear(3, 6)

    def forward(self, a, b):
        hidden = self.one(a) + self.other(b)
        return {"sum": hidden.sum(1), "maps": (hidden, hidden.relu())}


def test_several_inputs_and_outputs(tmp_path):
    network = Several().eval()
    a, b = torch.rand(3, 4), torch.rand(3, 3)
    for number, form in enumerate(("onnx", "torch-export")):
        run = export(network, (a, b), tmp_path / str(number), form=form)
        expected = network(a, b)
        for found, right in zip(run(a, b), [expected["sum"], *expected["maps"]], strict=True):
            torch.testing.assert_close(found, right)


def test_a_lightning_module_in_training_mode_stays_as_it_was(tmp_path):
    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))

        def forward(self, x):
            return self.net(x)

    module = Module().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run = export(module, torch.rand(2, 4), tmp_path / "m.onnx")
    x = torch.rand(3, 4)
    assert np.array_equal(run(x)[0], run(x)[0])  # no dropout
    assert all(part.training for part in module.modules())
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


@pytest.mark.parametrize(
    ("network", "inputs", "says"),
    [
        (Branching(), torch.ones(2, 3), "cannot trace Branching"),
        (Fixed(), torch.ones(2, 3), "cannot trace Fixed"),
        (nn.Linear(3, 2), {"x": torch.ones(2, 3)}, "batch of input tensors"),
        (nn.Linear(3, 2), torch.ones(0, 3), "batch of input tensors"),
        (nn.Linear(3, 2), (torch.ones(2, 3), torch.ones(1, 3)), "same number of samples"),
    ],
)
def test_what_cannot_be_written_says_why(network, inputs, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        export(network, inputs, tmp_path / "x")


def test_a_file_that_differs_is_not_passed_off_as_right(tmp_path):
    class Drifting(nn.Module):
        """Another function each time it is called."""

        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    with pytest.raises(ValueError, match="differs by"):
        export(Drifting(), torch.ones(2, 3), tmp_path / "x", form="torch-export")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it now fails
    with pytest.raises(ImportError, match=r"onnxruntime.*lit-compress\[export\]"):
        export(nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "x")
