"""Substitution in any network: what is replaced, what is left and why, budgets by brute force, and what comes after."""

import copy

import pytest
import torch
import torchvision
from pytorch_lightning import Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

from lit_compress import count_mult_adds, count_parameters, load_pruned, substitute_blocks, substitute_linear, substitutions_of
from lit_compress.callbacks import CRSWeightDecay, PFAPruning
from lit_compress.export import export
from lit_compress.layers import (
    GroupedPointwise,
    HashedLinear,
    RankFactorizedConv1x1,
    RankFactorizedLinear,
    SeparableConv2d,
    ShuffleConv2d,
    StructuredLinear,
    TensorTrainConv1x1,
)
from lit_compress.layers.linear_substitution import _KINDS
from lit_compress.losses import AttentionTransfer, CrossEntropy
from lit_compress.models import PreActBlock, WideResNet
from lit_compress.modules import LitDistiller
from tests.networks import Net, conv

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SETTINGS = {"rank_factorized": 0.2, "acdc": 3, "hashed": 0.2, "tensor_train": 0.3, "tucker": 0.3, "shuffle": 2}
every_kind = pytest.mark.parametrize("kind", _KINDS)


def small():
    """Stem, two convolutions of each kind, a hidden linear layer and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


# --- linear transforms -----------------------------------------------------------------------------------------------------


@every_kind
def test_all_but_the_first_and_last_layer_are_replaced(kind):
    network = small()
    layers = [network[0], network[9]]
    same = substitute_linear(network, kind, setting=SETTINGS[kind])
    assert same is network
    linear, pointwise = _KINDS[kind]
    assert [network[0], network[9]] == layers
    assert type(network[7]) is linear
    assert type(network[4]) is pointwise
    assert type(network[1]) is ShuffleConv2d if kind == "shuffle" else type(network[1].pointwise) is pointwise
    assert network(IMAGES).shape == (2, 10)
    done = substitutions_of(network)[-1]
    assert done.replaced == ("1", "4", "7")
    assert done.left == {"0": "it is the first layer", "9": "it is the last layer"}
    assert done.parameters == (count_parameters(small()), count_parameters(network))


@every_kind
def test_geometry_bias_dtype_and_mode_are_kept(kind):
    network = small().double().eval()
    substitute_linear(network, kind, setting=SETTINGS[kind], first=True, last=True)
    assert all(p.dtype == torch.float64 for p in network.parameters())
    assert not any(module.training for module in network.modules())
    assert network(IMAGES.double()).shape == (2, 10)
    assert network[:2](IMAGES.double()).shape == (2, 32, 8, 8)
    spatial = network[1] if kind == "shuffle" else network[1].pointwise
    assert spatial.bias is None
    assert network[7].bias is not None


def test_patterns_choose():
    network = substitute_linear(small(), "hashed", setting=0.1, include=["4", "7", "9"], exclude=["7"], last=True)
    done = substitutions_of(network)[-1]
    assert done.replaced == ("4", "9")
    assert done.left["7"] == "a pattern of `exclude` matches"
    assert done.left["1"] == "no pattern of `include` matches"


def test_what_cannot_be_replaced_is_listed_with_its_reason():
    shared = nn.Linear(8, 8)
    tied = nn.Linear(8, 8)
    tied.weight = shared.weight
    network = nn.ModuleDict(
        {
            "stem": nn.Linear(8, 8),
            "shared": shared,
            "tied": tied,
            "normed": weight_norm(nn.Linear(8, 8)),
            "attention": nn.MultiheadAttention(8, 2),
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "reflected": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            "sequence": nn.Conv1d(8, 8, 3),
            "narrow": nn.Linear(8, 3),
            "good": nn.Linear(8, 8),
            "last": nn.Linear(8, 8),
        }
    )
    substitute_linear(network, "shuffle", setting=1)
    done = substitutions_of(network)[-1]
    assert done.replaced == ("good",)
    reasons = {
        "shared": "shared with another module",
        "tied": "shared with another module",
        "normed": "parametrized",
        "attention.out_proj": "NonDynamicallyQuantizableLinear may use its weight",
        "grouped": "grouped already",
        "reflected": "padded by 'reflect'",
        "sequence": "Conv1d may use its weight",
        "narrow": "at least 4 but got 3",
    }
    for name, reason in reasons.items():
        assert reason in done.left[name]
    assert all(f"{name} " in str(done) for name in (*reasons, "good"))


def test_a_layer_that_stands_in_two_places_is_replaced_in_both():
    layer = nn.Linear(8, 8)
    network = nn.Sequential(nn.Linear(8, 8), layer, nn.ReLU(), layer, nn.Linear(8, 2))
    substitute_linear(network, "rank_factorized", setting=0.3)
    assert isinstance(network[1], RankFactorizedLinear)
    assert network[1] is network[3]


def test_code_that_reads_the_weight_of_a_layer_goes_on():
    """Evaluating, torch's transformer layer hands its weights to one fused operation."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    substitute_linear(layer, "tensor_train", setting=0.5, first=True, last=True, include=["linear*"])
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        fused = layer(x)
    torch.testing.assert_close(fused, layer(x), atol=1e-5, rtol=1e-5)


@every_kind
def test_a_trained_network_stays_nearer_when_its_weights_are_kept(kind):
    network = small().eval()
    expected = network(IMAGES)
    settings = SETTINGS | {"rank_factorized": 0.6, "tensor_train": 0.9, "tucker": 0.9, "hashed": 0.9, "shuffle": 1}
    kept, drawn = (
        substitute_linear(copy.deepcopy(network), kind, setting=settings[kind], trained=trained) for trained in (True, False)
    )
    assert (kept(IMAGES) - expected).square().mean() < (drawn(IMAGES) - expected).square().mean()


def test_a_convolution_of_separable_form_is_found_again():
    dense = nn.Conv2d(6, 8, 3, stride=2, padding=1)
    with torch.no_grad():
        dense.weight.copy_(torch.randn(8, 6, 1, 1) * torch.randn(1, 6, 3, 3))
    layer = SeparableConv2d.from_dense(dense, RankFactorizedConv1x1, rank=6)
    torch.testing.assert_close(layer(torch.ones(1, 6, 7, 7)), dense(torch.ones(1, 6, 7, 7)), atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        nn.init.normal_(dense.weight)
    free = SeparableConv2d.from_dense(dense)
    kernel = free.pointwise.weight * free.depthwise.weight[None, :, 0]
    # By hand, channel by channel: what a rank of 1 leaves of the (out, k²) matrix.
    rest = sum(torch.linalg.svdvals(dense.weight[:, i].flatten(1))[1:].square().sum() for i in range(6))
    torch.testing.assert_close((kernel - dense.weight).square().sum(), rest, rtol=1e-4, atol=1e-4)


# --- budgets ---------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("of", ["parameters", "mult_adds"])
def test_a_budget_is_met_and_the_next_setting_is_above(kind, of, capsys):
    def size(network):
        return count_parameters(network) if of == "parameters" else count_mult_adds(network, IMAGES[:1])

    def at(setting):
        return size(substitute_linear(small(), kind, setting=setting))

    whole = size(small())
    # ACDC's mult-adds are those of its dense path for all but the fewest factors: the least it can have is known by hand.
    budget = round(0.55 * whole) if (kind, of) != ("acdc", "mult_adds") else at(1)
    network = substitute_linear(small(), kind, budget=budget, of=of, example_inputs=IMAGES[:1])
    line = capsys.readouterr().out
    setting = float(line.split(" at ")[1].split()[0])
    assert size(network) <= budget
    assert f"for a budget of {budget:,} {of.replace('_', '-')}" in line
    if kind == "shuffle":
        assert setting == 1 or at(setting - 1) > budget
    elif kind == "acdc":
        assert at(setting + 1) > budget or of == "mult_adds"
    else:
        assert setting > 0.999 or at(min(1.0, setting + 2e-6)) > budget


def test_a_share_is_of_the_network_as_it_is():
    network = substitute_linear(small(), "hashed", budget=0.4)
    whole = count_parameters(small())
    assert 0.39 * whole < count_parameters(network) <= 0.4 * whole
    assert count_parameters(substitute_linear(small(), "tucker", budget=1.0)) <= whole


def test_a_budget_that_cannot_be_met_says_the_least():
    network = small()
    least = count_parameters(substitute_linear(small(), "rank_factorized", setting=1e-6))
    with pytest.raises(ValueError, match=rf"at least {least:,} parameters, more than 100\. Raise the budget"):
        substitute_linear(network, "rank_factorized", budget=100)
    assert not substitutions_of(network)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dense", "setting": 1}, "`kind` must be one of rank_factorized, acdc"),
        ({"kind": "hashed"}, "exactly one of `setting` and `budget`"),
        ({"kind": "hashed", "setting": 0.1, "budget": 0.1}, "exactly one of"),
        ({"kind": "hashed", "budget": 0.1, "of": "latency"}, "'parameters' or 'mult_adds' but got 'latency'"),
        ({"kind": "hashed", "budget": 0.1, "of": "mult_adds"}, "give `example_inputs`"),
        ({"kind": "hashed", "setting": 0.1, "include": "4"}, "lists of patterns"),
        ({"kind": "hashed", "setting": 0.1, "exclude": ["conv*"]}, r"Pattern 'conv\*' matches no module of Sequential"),
        ({"kind": "tucker", "setting": 2.0}, r"Nothing in Sequential can be replaced .*lie in \(0, 1\] but got 2.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        substitute_linear(small(), **arguments)


# --- blocks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["S-2x2", "G(4)", "G(N/8)", "B(2)", "BG(2,M/4)"])
def test_a_wide_resnet_becomes_what_it_would_have_been_built_as(block):
    network, built = substitute_blocks(WideResNet(10, 1), block), WideResNet(10, 1, block=block)
    assert [type(m) for m in network.modules()] == [type(m) for m in built.modules()]
    assert {n: p.shape for n, p in network.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
    assert network(IMAGES).shape == (2, 10)


@pytest.mark.parametrize("block", ["S-2x2", "G(4)", "G(N)", "B(2)", "BG(4,M)"])
def test_a_post_activated_network_is_replaced_block_by_block(block):
    network = substitute_blocks(torchvision.models.resnet18(), block).eval()
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    assert "conv1" not in substitutions_of(network)[-1].replaced
    first = network.layer2[0]
    assert [m.stride for m in (first.downsample[0],)] == [(2, 2)]
    if block.startswith("B"):
        # 1×1, norm, ReLU, 3×3, norm, ReLU, 1×1, norm, and the sum.
        x = torch.randn(1, 64, 9, 9)
        inner = first.conv2
        y = F.relu(first.bn1(first.conv1(x)))
        y = first.bn2(inner.pointwise(F.relu(inner.norm(inner.grouped(y)))))
        torch.testing.assert_close(first(x), F.relu(y + first.downsample(x)))
        assert (first.conv1.kernel_size, first.bn1.num_features) == ((1, 1), 128 // int(block[block.index("(") + 1]))


def test_any_convolution_larger_than_a_pixel_becomes_grouped():
    network = nn.Sequential(
        conv(3, 8), nn.Conv2d(8, 16, (5, 3), stride=2, padding=(2, 1)), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 4, 3)
    )
    substitute_blocks(network, "G(N/4)")
    assert isinstance(network[1], GroupedPointwise)
    assert (network[1].grouped.groups, network[1].grouped.kernel_size) == (2, (5, 3))
    assert network[1].pointwise.bias is not None
    assert isinstance(network[2], nn.Conv2d)
    assert isinstance(network[3], GroupedPointwise)


def test_blocks_that_do_not_fit_are_left():
    network = nn.Sequential(conv(3, 6), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3))
    substitute_blocks(network, "G(4)")
    assert substitutions_of(network)[-1].left == {
        "0": "it is the first layer",
        "1": "A convolution of 6 channels cannot have 4 groups.",
    }
    with pytest.raises(ValueError, match="what stands there"):
        substitute_blocks(network, "S")
    with pytest.raises(ValueError, match=r"Nothing in Linear can be replaced by B\(2\): it has no layer of the kind"):
        substitute_blocks(nn.Linear(2, 2), "B(2)")
    unpadded = Net(lambda m, x: m.b(m.n(m.a(x))), a=nn.Conv2d(8, 8, 3), n=nn.BatchNorm2d(8), b=nn.Conv2d(8, 8, 3))
    with pytest.raises(ValueError, match="not padded to keep the size"):
        substitute_blocks(nn.Sequential(conv(3, 8), unpadded), "B(2)")


def test_a_block_that_does_not_fit_leaves_a_pre_activated_block_as_it_was():
    block = PreActBlock(16, 16)
    before = block.branch
    with pytest.raises(ValueError, match="cannot have 5 groups"):
        block.use_block("G(5)")
    assert block.branch is before


# --- what comes after ------------------------------------------------------------------------------------------------------


@every_kind
def test_a_substituted_network_exports_and_computes_the_same(kind):
    network = substitute_linear(small(), kind, setting=SETTINGS[kind]).eval()
    program = torch.export.export(network, (IMAGES,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(IMAGES), network(IMAGES), atol=1e-5, rtol=1e-4)


@every_kind
def test_a_substituted_network_is_saved_and_loaded(kind, tmp_path):
    network, other = (substitute_linear(small(), kind, setting=SETTINGS[kind]).eval() for _ in range(2))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(IMAGES), network(IMAGES))
        assert torch.equal(copy.deepcopy(network)(IMAGES), network(IMAGES))
    assert substitutions_of(copy.deepcopy(network)) == substitutions_of(network)


@every_kind
def test_a_substituted_student_is_distilled_pruned_resumed_and_exported(kind, tmp_path):
    """All in one run, with weight decay scaled: a stopped run ends as one that never stopped, and its file builds the network."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 3, 8, 8, generator=generator), torch.randint(10, (64,), generator=generator)
    loader = DataLoader(TensorDataset(images, labels), batch_size=16)

    def student():
        seed_everything(1, verbose=False)
        return substitute_linear(small(), kind, setting=SETTINGS[kind], exclude=["7"])  # of which a unit can go

    def fit(epochs, **options):
        seed_everything(0, verbose=False)
        distiller = LitDistiller(
            small(),
            student(),
            losses=[CrossEntropy(), AttentionTransfer(["2", "4"], beta=10.0)],
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-3),
        )
        callbacks = [PFAPruning(energy=0.9, at_epoch=1, evaluate=False), CRSWeightDecay()]
        trainer = Trainer(
            max_epochs=epochs, callbacks=callbacks, default_root_dir=tmp_path, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(distiller, loader, **options)
        return trainer, distiller.student.eval()

    _, straight = fit(3)
    trainer, _ = fit(2)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    trainer, resumed = fit(3, ckpt_path=tmp_path / "stopped.ckpt")
    assert count_parameters(resumed) < count_parameters(student())
    assert all(torch.equal(value, straight.state_dict()[name]) for name, value in resumed.state_dict().items())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    loaded = load_pruned(student(), tmp_path / "whole.ckpt").eval()
    with torch.no_grad():
        assert torch.equal(loaded(images), resumed(images))
    export(loaded, images, tmp_path / "student.pt2", form="torch-export")  # runs what it wrote, and compares


def test_compressed_layers_are_found_by_type():
    network = substitute_linear(WideResNet(10, 1), "tensor_train", setting=0.3)
    found = [type(m) for m in network.modules() if isinstance(m, StructuredLinear)]
    assert found == [TensorTrainConv1x1] * 8
    assert not any(isinstance(m, HashedLinear) for m in network.modules())
