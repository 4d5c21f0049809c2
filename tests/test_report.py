"""Sizes are held against closed forms worked out by hand, times against a clock of the test's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lit_compress import Recipe, cost_table, count_mult_adds, count_parameters, cut
from lit_compress.graph import trace
from lit_compress.layers import ACDCLinear, HashedLinear, RankFactorizedLinear, TensorTrainLinear
from lit_compress.models import VGGCIFAR, LeNet5, LeNet300100, ResNetCIFAR, SimpleCNN
from lit_compress.report import Latency, LayerRow, LayerTable, measure_latency
from tests.networks import Net, conv

CASES = {
    "linear": (lambda: nn.Linear(3, 2), (1, 3), 3 * 2),
    "linear on tokens": (lambda: nn.Linear(3, 2), (4, 5, 3), 4 * 5 * 3 * 2),
    "convolution with stride": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 8, 6), 2 * (4 * 3) * 8 * 3 * 9),
    "groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), (1, 6, 5, 5), 3 * 3 * 8 * (6 // 2) * 9),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (1, 6, 5, 5), 3 * 3 * 6 * 9),
    "dilated in one dimension": (lambda: nn.Conv1d(2, 4, 3, dilation=2), (1, 2, 9), 5 * 4 * 2 * 3),
    "volume": (lambda: nn.Conv3d(2, 4, 2), (1, 2, 3, 4, 5), (2 * 3 * 4) * 4 * 2 * 8),
    # Each input pixel is multiplied with the whole kernel.
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 4, stride=2), (1, 3, 6, 6), 6 * 6 * 3 * 5 * 16),
    "product of activations": (lambda: Net(lambda m, x: x @ x.transpose(1, 2)), (2, 3, 4), 2 * 3 * 4 * 3),
    "norms, biases and activations": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)), (1, 3, 4, 4), 0),
    "a layer used twice": (lambda: Net(lambda m, x: m.a(m.a(x)), a=nn.Linear(3, 3)), (1, 3), 2 * 9),
    "LeNet-300-100": (LeNet300100, (1, 1, 28, 28), 784 * 300 + 300 * 100 + 100 * 10),
    # 28 -> 24 -> 12 -> 8 -> 4 pixels a side
    "LeNet-5": (LeNet5, (1, 1, 28, 28), 24**2 * 20 * 25 + 8**2 * 50 * 20 * 25 + 800 * 500 + 500 * 10),
    # Stages of 18 convolutions; the first of the second and third reads half the channels. 32, 16 and 8 pixels a side.
    "ResNet-56": (
        ResNetCIFAR, (1, 3, 32, 32),
        32**2 * 16 * 3 * 9 + 64 * 10
        + sum(side**2 * 9 * c * (17 * c + before) for side, c, before in ((32, 16, 16), (16, 32, 16), (8, 64, 32))),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "shape", "expected"), CASES.values(), ids=CASES)
def test_mult_adds_by_hand(build, shape, expected):
    assert count_mult_adds(build(), torch.zeros(shape)) == expected


def test_resnet56_has_the_mult_adds_that_are_published():
    assert round(count_mult_adds(ResNetCIFAR(), torch.zeros(1, 3, 32, 32)) / 1e6, 1) == 125.5


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: LeNet5(image_size=20), (2, 1, 20, 20)),
        (lambda: SimpleCNN(width=4), (1, 3, 8, 8)),
        (lambda: VGGCIFAR(depth=11, width=0.125), (1, 3, 8, 8)),
        (lambda: ResNetCIFAR(depth=8, width=4), (2, 3, 8, 8)),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)), (1, 3, 6, 6)),
    ],
)
def test_the_uses_that_a_trace_finds_give_the_same_mult_adds(build, shape):
    model = build()
    graph = trace(model, lambda: model(torch.zeros(shape)))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(use.positions * sizes[use.weight] for use in graph.uses) == count_mult_adds(model, torch.zeros(shape))


def test_a_cut_network_costs_what_its_widths_say():
    model = LeNet5()
    cut(model, Recipe(keep={"conv1": range(5), "conv2": range(10), "fc1": range(100)}), torch.zeros(1, 1, 28, 28))
    assert count_mult_adds(model, torch.zeros(1, 1, 28, 28)) == 24**2 * 5 * 25 + 8**2 * 10 * 5 * 25 + 160 * 100 + 100 * 10
    assert count_parameters(model) == (5 * 25 + 5) + (10 * 5 * 25 + 10) + (160 * 100 + 100) + (100 * 10 + 10)


def test_inputs_go_in_as_a_cut_takes_them():
    model = Net(lambda m, x, y: m.a(x) + m.b(y), a=nn.Linear(3, 2), b=nn.Linear(4, 2))
    x, y = torch.zeros(1, 3), torch.zeros(1, 4)
    assert count_mult_adds(model, (x, y)) == 14
    assert count_mult_adds(model, {"x": x, "y": y}, forward_fn=lambda network, batch: network(batch["x"], batch["y"])) == 14


def test_counting_leaves_the_network_as_it_was():
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    count_mult_adds(model, torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model[1].num_batches_tracked == 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_parameters_are_counted_once_and_those_that_train_alone_if_asked():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    model = nn.Sequential(a, b, nn.BatchNorm1d(3))
    assert count_parameters(model) == 9 + 3 + 3 + 6
    a.requires_grad_(False)
    assert count_parameters(model) == 3 + 6
    assert count_parameters(model, trainable=False) == 9 + 3 + 3 + 6


class Clock:
    """Time passes only when the network runs: 10 ms in each of five runs, then 1, 2, 3, ... ms."""

    def __init__(self):
        self.now, self.runs = 0.0, 0

    def perf_counter(self):
        return self.now

    def run(self):
        self.runs += 1
        self.now += 0.010 if self.runs <= 5 else 0.001 * (self.runs - 5)
        assert not torch.is_grad_enabled()


def test_latency_is_median_and_quartiles_after_warm_up(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lit_compress.report.time", clock)
    latency = measure_latency(clock.run, seconds=100.0, runs=7)
    assert clock.runs == 5 + 7
    # Of 1, 2, ..., 7 ms: median 4; quartiles 2 and 6 (the middles of the halves beside it).
    assert (latency.lower, latency.median, latency.upper) == pytest.approx((2, 4, 6))
    assert str(latency) == "4.00 ms (2.00-6.00)"


def test_a_slow_network_is_timed_five_times_whatever_it_takes(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("lit_compress.report.time", clock)
    measure_latency(clock.run, seconds=0.0)
    assert clock.runs == 2 + 5


def test_a_table_says_every_number_and_reads_no_markup():
    table = LayerTable(
        method="pfa(energy=0.9) [red]",
        rows=(LayerRow("conv1", 20, 5, 500, 125), LayerRow("fc", 10, 10, 5000, 1250, note="[bold]whole[/bold]")),
        sizes={"parameters": (5500, 1375)},
    )
    text = str(table)
    rows = [line.split() for line in text.splitlines()]
    for line in ("conv1 20 5 500 125", "fc 10 10 5,000 1,250", "parameters 5,500 1,375 25.0% kept"):
        cells = line.split()
        assert any([cell for cell in row if cell not in "│┃|"][: len(cells)] == cells for row in rows), text
    assert "[red]" in text
    assert "[bold]whole[/bold]" in text
    assert str(Latency(1.0, 0.5, 2.0)) == "1.00 ms (0.50-2.00)"


def test_costs_belong_to_the_innermost_module_and_add_up():
    inner = Net(lambda m, x: F.linear(m.a(x), m.a.weight.T), a=nn.Linear(3, 2))
    model = Net(lambda m, x: m.inner(m.inner(x)) @ x.T, inner=inner)
    table = cost_table(model, torch.zeros(4, 3))
    # The outer product is 4 × 3 × 4; inside, the layer and its transpose run twice on 4 samples of 3 · 2.
    assert [(row.name, row.mult_adds) for row in table.rows] == [("", 48), ("inner", 48), ("inner.a", 48)]
    assert table.mult_adds == count_mult_adds(model, torch.zeros(4, 3)) == 144
    assert table.parameters == count_parameters(model) == 8


def test_what_runs_outside_of_the_networks_forward_counts():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    table = cost_table(model, torch.zeros(1, 3), forward_fn=lambda net, x: net[0](x) @ net[1].weight.T)
    assert [(row.name, row.mult_adds) for row in table.rows] == [("", 10), ("0", 6), ("1", 0)]


def test_a_compressed_layer_counts_as_it_runs_or_as_printed():
    x = torch.zeros(2, 64)
    for layer, runs, printed in (
        (RankFactorizedLinear(64, 32, rank=4), 4 * 96, 4 * 96),
        (RankFactorizedLinear(64, 32, rank=32), 64 * 32, 32 * 96),
        (HashedLinear(64, 32, weights=9), 64 * 32, 64 * 32),
        (ACDCLinear(64, 64, layers=2), 64 * 64, 2 * (4 * 64 + 5 * 64 * 6)),
    ):
        assert count_mult_adds(nn.Sequential(layer), x) == 2 * runs
        # Both samples add a bias to each output.
        assert count_mult_adds(nn.Sequential(layer), x, count_relu=True) == 2 * printed + 2 * layer.out_features
        assert cost_table(nn.Sequential(layer), x).parameters == count_parameters(layer)


def test_a_tensor_train_counts_what_its_factors_multiply():
    layer = TensorTrainLinear(64, 64, rank_scale=0.25)
    layer.path = "factorized"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.zeros(5, 64))
    # Of three cores, one stands before and one after: none are multiplied together first.
    assert counter.get_total_flops() == 2 * layer.count_mult_adds(torch.zeros(5, 64), torch.zeros(5, 64))


def test_a_cost_table_says_every_number():
    text = str(cost_table(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 5, 5)))
    assert "Conv2d" in text
    assert "1, 4, 3, 3" in text
    assert "972" in text
    assert "112" in text
