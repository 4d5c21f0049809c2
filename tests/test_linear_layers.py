"""Compressed linear layers against the released code's vectors, against their own dense matrix, and against scipy."""

import copy
import json
import math
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lit_compress.layers import (
    ACDCConv1x1,
    ACDCLinear,
    HashedConv1x1,
    HashedLinear,
    RankFactorizedConv1x1,
    RankFactorizedLinear,
    SeparableConv2d,
    ShuffleConv1x1,
    ShuffleConv2d,
    ShuffleLinear,
    TensorTrainConv1x1,
    TensorTrainLinear,
    TuckerConv1x1,
    TuckerLinear,
)
from lit_compress.layers.dct import dct, idct
from lit_compress.layers.tensor_cores import dimensions

REFERENCE = Path(__file__).parent / "reference"
RECORDED = json.loads((REFERENCE / "linear_transforms.json").read_text())
LINEAR = {
    "rank_factorized": partial(RankFactorizedLinear, rank=3),
    "acdc": partial(ACDCLinear, layers=5),
    "acdc legacy": partial(ACDCLinear, layers=4, legacy=True),
    "hashed": partial(HashedLinear, weights=40, seed=0),
    "tensor_train": partial(TensorTrainLinear, rank_scale=0.5),
    "tensor_train of 4": partial(TensorTrainLinear, rank_scale=0.5, dims=4),
    "tucker": partial(TuckerLinear, rank_scale=0.5),
    "tucker tt": partial(TuckerLinear, rank_scale=0.5, core="tt"),
    "shuffle": partial(ShuffleLinear, groups=2),
}
CONVOLUTIONS = {
    "rank_factorized": partial(RankFactorizedConv1x1, rank=3),
    "acdc": partial(ACDCConv1x1, layers=3),
    "hashed": partial(HashedConv1x1, weights=40, seed=0),
    "tensor_train": partial(TensorTrainConv1x1, rank_scale=0.5),
    "tucker": partial(TuckerConv1x1, rank_scale=0.5),
    "shuffle": partial(ShuffleConv1x1, groups=2),
    "shuffle 3x3": partial(ShuffleConv2d, groups=2, kernel_size=3, padding=2, dilation=2),
}
WIDTHS = st.integers(4, 40)
every_linear = pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
every_convolution = pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def recorded(name):
    with np.load(REFERENCE / "linear_transforms.npz") as arrays:
        return torch.from_numpy(arrays[name])


def gradients(out, layer, *more):
    """Gradients of a fixed random functional of the output."""
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((out * weights).sum(), [*layer.parameters(), *more])


def has_factors(layer):
    return layer.factor_mult_adds is not None


# --- vectors of the released code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 8, 16])
def test_cosine_transform_is_the_released_one(n):
    eye = torch.eye(n)
    torch.testing.assert_close(dct(eye), recorded(f"dct_ortho_eye_{n}"))
    # Without norm: rows of the unnormalised transform are 2 √(N / 2) longer, the constant one 2 √N; its inverse the other way.
    lengths = torch.full((n,), math.sqrt(2 * n))
    lengths[0] = 2 * math.sqrt(n)
    torch.testing.assert_close(dct(eye) * lengths, recorded(f"dct_eye_{n}"))
    torch.testing.assert_close(idct(eye / lengths), recorded(f"idct_eye_{n}"))


def test_acdc_is_the_released_stack():
    layer = ACDCConv1x1(8, 8, layers=RECORDED["fsc_sq_k1"]["n_layers_requested"], bias=False, legacy=True)
    assert layer.layers == RECORDED["fsc_sq_k1"]["n_acdc_layers_actually_built"]
    with torch.no_grad():
        layer.a.copy_(torch.stack([recorded(f"fsc_sq_k1_p_layers.{i}.A") for i in range(3)])[..., 0])
        layer.d.copy_(torch.stack([recorded(f"fsc_sq_k1_p_layers.{i}.D") for i in range(3)])[..., 0])
    torch.testing.assert_close(layer.to_dense(), recorded("fsc_sq_k1_W"))
    torch.testing.assert_close(layer(recorded("fsc_sq_k1_x")), recorded("fsc_sq_k1_y"))
    assert sum(p.numel() for p in layer.parameters()) == RECORDED["fsc_sq_k1"]["params"]


def test_rank_factorised_is_the_released_one():
    name = "generic_8_16_k3_s2"
    layer = SeparableConv2d(8, 16, 3, stride=2, padding=1, bias=False, transform=partial(RankFactorizedConv1x1, rank=4))
    with torch.no_grad():
        layer.depthwise.weight.copy_(recorded(f"{name}_p_grouped.weight"))
        layer.pointwise.first.copy_(recorded(f"{name}_p_lowrank_contract.weight")[:, :, 0, 0])
        layer.pointwise.second.copy_(recorded(f"{name}_p_lowrank_expand.weight")[:, :, 0, 0])
    torch.testing.assert_close(layer(recorded(f"{name}_x")), recorded(f"{name}_y"))
    assert sum(p.numel() for p in layer.parameters()) == RECORDED[name]["params"]


def test_tensor_train_is_the_released_one():
    name = "tt_16_32_k3_r0.5"
    layer = SeparableConv2d(16, 32, 3, padding=1, bias=False, transform=partial(TensorTrainConv1x1, rank_scale=0.5))
    with torch.no_grad():
        layer.depthwise.weight.copy_(recorded(f"{name}_p_grouped.weight"))
        for k, core in enumerate(layer.pointwise.cores):
            core.copy_(recorded(f"{name}_p_weight_core_{k}"))
    torch.testing.assert_close(layer(recorded(f"{name}_x")), recorded(f"{name}_y"))
    assert sum(p.numel() for p in layer.parameters()) == RECORDED[name]["params"]


@pytest.mark.parametrize("case", RECORDED["dimensionize"], ids=lambda c: f"{c['c_in']}-{c['c_out']}-{c['rank_scale']}")
def test_shapes_follow_the_released_rules(case):
    widths, scale = (case["c_in"], case["c_out"]), case["rank_scale"]
    assert list(dimensions(widths[0] * widths[1])) == case["dims"]
    with torch.device("meta"):
        train = TensorTrainLinear(*widths, rank_scale=scale)
        tucker = TuckerLinear(*widths, rank_scale=scale, core="tt")
    assert list(train.ranks) == case["ranks_tt"]
    assert list(tucker.ranks) == case["ranks_tucker"]
    if "tt_params" in case:
        assert train.matrix_parameters == case["tt_params"]
        assert tucker.matrix_parameters == case["tucker_params"]


def test_most_of_the_shapes_are_recorded_with_their_parameters():
    assert sum("tt_params" in case for case in RECORDED["dimensionize"]) > 20


# --- forms, by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33, 300])
def test_cosine_transform_is_scipys(n):
    x = torch.randn(3, n, dtype=torch.float64)
    np.testing.assert_allclose(dct(x), scipy.fft.dct(x.numpy(), norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(idct(x), scipy.fft.idct(x.numpy(), norm="ortho"), atol=1e-12)


@pytest.mark.parametrize("width", [6, 7, 300])
def test_acdc_is_equation_5_4_written_out(width):
    layer = ACDCLinear(width, width, layers=3).double()
    c = torch.from_numpy(scipy.fft.dct(np.eye(width), norm="ortho"))
    middle = (width + 1) // 2
    deck = [place for pair in zip(range(middle), [*range(middle, width), None], strict=False) for place in pair]
    p = torch.eye(width, dtype=torch.float64)[[place for place in deck if place is not None]]
    w = torch.eye(width, dtype=torch.float64)
    for a, d in zip(layer.a, layer.d, strict=True):
        w = w @ a.diag() @ c @ d.diag() @ c.inverse() @ p
    # Cosines are float32 up to width 256, where a double layer is as exact as they are.
    torch.testing.assert_close(layer.to_dense(), w, atol=1e-6, rtol=0)


def test_acdc_repeats_a_narrow_input_and_sums_groups_of_a_wide_one():
    square = ACDCLinear(12, 12, layers=2, bias=False).double()
    wider, narrower, uneven = (ACDCLinear(*w, layers=2, bias=False).double() for w in ((5, 12), (12, 4), (11, 4)))
    for layer in (wider, narrower, uneven):
        layer.load_state_dict(square.state_dict())
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(wider(x[:, :5]), square(torch.cat((x[:, :5], x[:, :5], x[:, :2]), 1)))
    torch.testing.assert_close(narrower(x), square(x).view(3, 4, 3).sum(2))
    torch.testing.assert_close(uneven(x[:, :11]), square(F.pad(x[:, :11], (0, 1))).view(3, 4, 3).sum(2))


def test_hashed_entries_are_the_shared_numbers_and_all_are_drawn():
    layer = HashedLinear(30, 20, weights=10, seed=3)
    assert torch.equal(layer.to_dense(), layer.shared[layer.index.long()])
    assert set(layer.index.flatten().tolist()) == set(range(10))
    assert torch.equal(layer.index, HashedLinear(30, 20, weights=10, seed=3).index)
    assert not torch.equal(layer.index, HashedLinear(30, 20, weights=10, seed=4).index)
    legacy = HashedLinear(30, 20, weights=10, bias=False, seed=3, legacy=True)
    assert set(legacy.index.flatten().tolist()) == set(range(9))
    assert legacy.bias is not None


def test_hashed_share_left_out_is_what_the_limit_says():
    layer = HashedLinear(200, 200, weights=20_000, seed=0)
    unused = 1 - len(layer.index.unique()) / 20_000
    # exp(-1 / .5) = .1353; the standard deviation over draws is below .003
    assert abs(unused - math.exp(-2)) < 0.01


def test_hashed_index_comes_back_with_the_state():
    layer, other = HashedLinear(9, 8, weights=7, seed=1), HashedLinear(9, 8, weights=7, seed=2)
    assert "index" not in layer.state_dict()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.to_dense(), layer.to_dense())


def test_tensor_train_entry_by_entry():
    layer = TensorTrainLinear(6, 4, rank_scale=1.0, dims=(2, 3, 4))
    first, second, third = layer.cores
    for flat in range(24):
        i, j, k = np.unravel_index(flat, (2, 3, 4))
        entry = (first[0, i] @ second[:, j] @ third[:, k, 0]).item()
        assert layer.to_dense().flatten()[flat].item() == pytest.approx(entry, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("core", ["dense", "tt"])
def test_tucker_is_equation_5_11(core):
    layer = TuckerLinear(16, 32, rank_scale=0.5, core=core)
    g = layer.core[0] if core == "dense" else torch.einsum("xar,rbs,scy->abc", *layer.core)
    tensor = torch.einsum("abc,ia,jb,kc->ijk", g, *layer.factors)
    torch.testing.assert_close(layer.to_dense(), tensor.reshape(32, 16), atol=1e-5, rtol=1e-5)


def test_shuffle_is_a_stack_of_torchs_own_layers():
    layer = ShuffleConv2d(12, 24, groups=3, kernel_size=3, stride=2, padding=1)
    assert (layer.groups, layer.bottleneck) == (3, 6)
    stack = nn.Sequential(
        nn.Conv2d(12, 6, 1, groups=3, bias=False),
        nn.ChannelShuffle(3),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 24, 1, groups=3),
    )
    with torch.no_grad():
        stack[0].weight.copy_(layer.contract[:, :, None, None])
        stack[2].weight.copy_(layer.scale)
        stack[3].weight.copy_(layer.expand[:, :, None, None])
        stack[3].bias.copy_(layer.bias)
    x = torch.randn(2, 12, 9, 9)
    torch.testing.assert_close(layer(x), stack(x))


def test_shuffle_groups_come_down_until_they_divide():
    assert ShuffleLinear(2048, 1000, groups=7).groups == 2
    assert ShuffleLinear(7, 5, groups=7).groups == 1


# --- both paths, forward and gradients -------------------------------------------------------------------------------------


@every_linear
@settings(max_examples=15)
@given(in_features=WIDTHS, out_features=WIDTHS, bias=st.booleans())
def test_both_paths_are_the_dense_matrix_applied(make, in_features, out_features, bias):
    layer = make(in_features, out_features, bias=bias).double()
    x = torch.randn(2, 3, in_features, dtype=torch.float64, requires_grad=True)
    expected = F.linear(x, layer.to_dense(), layer.bias)
    wanted = gradients(expected, layer, x)
    # float64, but the cosines are those of float32: both paths use the same ones, and C⁻¹ is Cᵀ to 1e-7 alone.
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if isinstance(layer, ACDCLinear) else {}
    for path in ("auto", "dense", *(["factorized"] if has_factors(layer) else [])):
        layer.path = path
        out = layer(x)
        torch.testing.assert_close(out, expected, **tolerance)
        torch.testing.assert_close(gradients(out, layer, x), wanted, **tolerance)
        with torch.no_grad():
            for _ in range(2):  # the second time with the matrix that was kept
                torch.testing.assert_close(layer(x), expected, **tolerance)


@every_convolution
@settings(max_examples=10)
@given(in_channels=WIDTHS, out_channels=WIDTHS, bias=st.booleans(), stride=st.integers(1, 2))
def test_both_paths_of_a_convolution_are_the_dense_kernel_applied(make, in_channels, out_channels, bias, stride):
    layer = make(in_channels, out_channels, bias=bias, stride=stride).double()
    x = torch.randn(2, in_channels, 5, 6, dtype=torch.float64, requires_grad=True)
    padding, dilation = getattr(layer, "padding", 0), getattr(layer, "dilation", 1)
    expected = F.conv2d(x, layer.to_dense(), layer.bias, stride, padding, dilation)
    wanted = gradients(expected, layer, x)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if isinstance(layer, ACDCLinear) else {}
    for path in ("auto", "dense", *(["factorized"] if has_factors(layer) else [])):
        layer.path = path
        out = layer(x)
        torch.testing.assert_close(out, expected, **tolerance)
        torch.testing.assert_close(gradients(out, layer, x), wanted, **tolerance)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, **tolerance)


@every_linear
@pytest.mark.parametrize("widths", [(8, 8), (4, 8), (8, 4), (9, 4)], ids=str)
def test_gradients_are_right(make, widths):
    layer = make(*widths).double()
    parameters = list(layer.parameters())

    def run(x, *values):
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(3, widths[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *(p.detach().clone().requires_grad_() for p in parameters)))


def test_acdc_gradients_hold_over_several_pieces():
    """Eleven factors are recomputed in pieces of four, the last of three; the width takes the Fourier transform."""
    layer = ACDCLinear(258, 258, layers=11, bias=False).double()
    x = torch.randn(2, 258, dtype=torch.float64)
    layer.path = "factorized"
    wanted = gradients(layer(x), layer)  # by autograd, one operation after the other
    layer.path = "dense"
    torch.testing.assert_close(gradients(layer(x), layer), wanted)


def test_the_backward_pass_keeps_no_matrix_a_factor():
    """Bytes that autograd keeps between forward and backward: diagonals, input and one matrix, whatever the number of factors."""
    kept = {}
    for layers in (2, 16):
        layer = ACDCLinear(64, 64, layers=layers, bias=False)

        def pack(tensor, layers=layers):
            kept[layers][tensor.data_ptr()] = tensor.numel()
            return tensor

        kept[layers] = {}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(torch.randn(8, 64))
        kept[layers] = sum(kept[layers].values())
    assert kept[16] - kept[2] == 2 * 14 * 64


# --- what evaluation keeps -------------------------------------------------------------------------------------------------


@every_linear
def test_evaluation_computes_the_matrix_once_and_follows_the_parameters(make, monkeypatch):
    layer = make(16, 32, path="dense").eval()
    counted, matrix = [], type(layer).matrix
    monkeypatch.setattr(type(layer), "matrix", lambda self: counted.append(1) or matrix(self))
    x = torch.randn(4, 16)

    @torch.no_grad()
    def run():
        out = layer(x)
        torch.testing.assert_close(out, F.linear(x, matrix(layer), layer.bias))
        return len(counted)

    assert [run(), run()] == [1, 1]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    assert [run(), run()] == [2, 2]
    layer.load_state_dict(make(16, 32).state_dict())
    assert [run(), run()] == [3, 3]
    parameter = next(layer.parameters())
    parameter.data = parameter.data + 1
    assert run() == 4
    parameter.data.add_(1)  # hidden from autograd: seen after a change of mode, which frameworks make around validation
    layer.train()
    layer.eval()
    assert run() == 5
    assert layer.double()(x.double()).dtype == torch.float64


def test_a_layer_copies_and_pickles_without_the_kept_matrix():
    layer = TensorTrainLinear(64, 64, rank_scale=0.3).eval()
    with torch.no_grad():
        x = torch.randn(2, 64)
        expected = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin._kept is None
            assert torch.equal(twin(x), expected)


def test_evaluation_takes_the_cheaper_path():
    thin, wide = RankFactorizedLinear(64, 64, rank=4), RankFactorizedLinear(64, 64, rank=40)
    assert thin.count_mult_adds(torch.zeros(2, 64), torch.zeros(2, 64)) == 2 * 4 * 128
    assert wide.count_mult_adds(torch.zeros(2, 64), torch.zeros(2, 64)) == 2 * 64 * 64
    with torch.no_grad():
        thin(torch.zeros(1, 64))
        wide(torch.zeros(1, 64))
    assert (thin._kept is None, wide._kept is None) == (True, False)


@every_linear
def test_layers_train_under_autocast(make):
    layer = make(16, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.randn(4, 16))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


# --- initialisation --------------------------------------------------------------------------------------------------------


def relative_variance(make, in_features, out_features, seeds=20):
    """Variance of outputs on white inputs over that of ``nn.Linear``, 1/3 plus its bias's, mean over seeds."""
    ratios = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        layer = make(in_features, out_features, bias=False)
        # The mean of squares over all outputs is an estimate from many numbers; 64 inputs keep its error at a few percent.
        with torch.no_grad():
            ratios.append(layer(torch.randn(64, in_features)).square().mean().item() * 3)
    return sum(ratios) / seeds


@every_linear
@pytest.mark.parametrize("widths", [(16, 16), (16, 64), (64, 16), (30, 256), (256, 30)], ids=str)
def test_outputs_begin_with_the_variance_of_the_dense_layers(make, widths):
    assert relative_variance(make, *widths) == pytest.approx(1, abs=0.1)


@pytest.mark.long
@pytest.mark.parametrize("make", [m for name, m in LINEAR.items() if "legacy" not in name])
@pytest.mark.parametrize("widths", [(1024, 1024), (1024, 4096), (4096, 1000)], ids=str)
def test_wide_outputs_begin_with_the_variance_of_the_dense_layers(make, widths):
    assert relative_variance(make, *widths) == pytest.approx(1, abs=0.1)


def test_the_reference_variance_is_a_third():
    torch.manual_seed(0)
    assert relative_variance(nn.Linear, 256, 256) == pytest.approx(1, abs=0.02)


@every_convolution
def test_separable_outputs_begin_with_the_variance_of_a_dense_convolution(make):
    if make is CONVOLUTIONS["shuffle 3x3"]:
        pytest.skip("is no pointwise transform")
    ratios = []
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            x = torch.randn(4, 32, 12, 12)
            mine = SeparableConv2d(32, 48, 3, bias=False, transform=make)(x).var()
            ratios.append(float(mine / nn.Conv2d(32, 48, 3, bias=False)(x).var()))
    assert sum(ratios) / 20 == pytest.approx(1, abs=0.1)


# --- from a trained layer --------------------------------------------------------------------------------------------------


def error(layer, dense):
    return (layer.to_dense().double() - dense.weight.double()).square().sum().item()


@every_linear
@settings(max_examples=5)
@given(widths=st.tuples(WIDTHS, WIDTHS), seed=st.integers(0, 1000))
def test_a_converted_layer_is_nearer_than_a_random_one_and_than_zero(make, widths, seed):
    torch.manual_seed(seed)
    dense = nn.Linear(*widths)
    layer = type(make(*widths)).from_dense(dense, **make.keywords)
    fresh = make(*widths)
    if isinstance(layer, HashedLinear):
        fresh.load_state_dict(fresh.state_dict() | {"seed": layer.seed})
    assert error(layer, dense) <= error(fresh, dense)
    assert error(layer, dense) <= dense.weight.square().sum().item() * (1 + 1e-6)
    assert torch.equal(layer.bias, dense.bias)


def test_rank_factorised_finds_the_best_of_its_rank():
    dense = nn.Linear(20, 30)
    values = torch.linalg.svdvals(dense.weight.double())
    for rank in (1, 5, 20, 25):
        layer = RankFactorizedLinear.from_dense(dense, rank=rank)
        assert error(layer, dense) == pytest.approx(values[rank:].square().sum().item(), rel=1e-4, abs=1e-8)


def test_hashed_finds_the_best_of_its_draw():
    dense = nn.Linear(12, 10)
    layer = HashedLinear.from_dense(dense, weights=6, seed=0)
    buckets = layer.index.numpy()
    slow = sum(dense.weight.detach().numpy()[buckets == b].var() * (buckets == b).sum() for b in range(6))
    assert error(layer, dense) == pytest.approx(float(slow), rel=1e-4)


@pytest.mark.parametrize("make", [LINEAR["tensor_train"], LINEAR["tucker"], LINEAR["tucker tt"], LINEAR["tensor_train of 4"]])
def test_a_matrix_of_the_form_is_found_again(make):
    layer = make(16, 32)
    dense = nn.Linear(16, 32)
    with torch.no_grad():
        dense.weight.copy_(layer.to_dense())
    assert error(type(layer).from_dense(dense, **make.keywords), dense) < 1e-8


@pytest.mark.parametrize("make", [TensorTrainLinear, TuckerLinear, partial(TuckerLinear, core="tt")])
def test_full_ranks_lose_nothing(make):
    dense = nn.Linear(9, 10)
    options = getattr(make, "keywords", {})
    made = getattr(make, "func", make).from_dense(dense, rank_scale=1.0, dims=(5, 6, 3), **options)
    if isinstance(made, TuckerLinear):
        assert error(made, dense) < 1e-8
    else:  # ranks 5 and 3 are full: a train cannot need more than its ends
        assert error(made, dense) < 1e-8


def test_acdc_finds_a_matrix_of_its_form_again():
    torch.manual_seed(1)
    layer = ACDCLinear(8, 8, layers=2)
    with torch.no_grad():
        for diagonal in (layer.a, layer.d):
            diagonal.add_(0.1 * torch.randn_like(diagonal))
    dense = nn.Linear(8, 8)
    with torch.no_grad():
        dense.weight.copy_(layer.to_dense())
    near = error(ACDCLinear.from_dense(dense, layers=2), dense)
    assert near < 1e-3 * dense.weight.square().sum().item()


def test_a_convolution_is_converted_with_stride_dtype_and_bias():
    dense = nn.Conv2d(6, 8, 1, stride=2, bias=False).double()
    layer = RankFactorizedConv1x1.from_dense(dense, rank=6)
    x = torch.randn(1, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))
    kernel = nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2)
    assert ShuffleConv2d.from_dense(kernel, groups=2)(x.float()).shape == kernel(x.float()).shape


# --- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankFactorizedLinear(4, 4, rank=0), "`rank` must be at least 1 but got 0"),
        (lambda: RankFactorizedLinear(0, 4, rank=1), "at least 1 but got 0 in and 4 out"),
        (lambda: RankFactorizedLinear(4, 4, rank=1, path="fast"), "one of .* but got 'fast'"),
        (lambda: ACDCLinear(4, 4, layers=1, legacy=True), "`layers` must be at least 2 but got 1"),
        (lambda: HashedLinear(4, 4, weights=0), "`weights` must be at least 1"),
        (lambda: HashedLinear(4, 4, weights=4, path="factorized"), "no factorized path"),
        (lambda: TensorTrainLinear(10, 9, rank_scale=0.5, path="factorized"), "no factorized path"),
        (lambda: TensorTrainLinear(4, 4, rank_scale=1.5), r"`rank_scale` must lie in \(0, 1\] but got 1.5"),
        (lambda: TensorTrainLinear(4, 4, rank_scale=0.5, dims=(2, 4)), r"\(2, 4\) must multiply to 4 by 4 = 16"),
        (lambda: TuckerLinear(4, 4, rank_scale=0.5, dims=2, core="tt"), "with three dimensions, but got 'tt'"),
        (lambda: ShuffleLinear(4, 3, groups=1), "at least 4 but got 3"),
        (lambda: ShuffleLinear(4, 4, groups=0), "`groups` must be at least 1"),
        (lambda: HashedLinear.from_dense(nn.Conv2d(4, 4, 1), weights=3), "stands for an nn.Linear"),
        (lambda: HashedConv1x1.from_dense(nn.Conv2d(4, 4, 3), weights=3), "of one pixel"),
        (lambda: ShuffleConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=2), groups=1), "of one group"),
    ],
)
def test_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
