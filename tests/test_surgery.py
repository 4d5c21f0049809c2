"""A cut is exact, changes nothing that it does not have to, and leaves everything alone where it cannot be made."""

import copy
import gc
import random

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lit_compress import Recipe, cut
from lit_compress.graph import trace
from lit_compress.models import VGGCIFAR, LeNet5, LeNet300100, ResNetCIFAR, SimpleCNN
from lit_compress.plan import plan_of
from lit_compress.surgery import make_plan
from tests.networks import (
    RandomNetwork,
    clone,
    conv,
    places,
    random_recipe,
    randomized,
    reading_layers,
    relative_error,
    removed_by,
    silenced,
    unsized,
    zeroed,
)

# float32 rounds at 6e-8, float64 at 1.1e-16; sums over a thousand terms and fifty layers stay within this of each other.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def vgg16(norm: bool):
    """torchvision's VGG-16 with its huge classifier narrowed."""
    model = torchvision.models.vgg16_bn(init_weights=False) if norm else torchvision.models.vgg16(init_weights=False)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(
        nn.Linear(4 * 512, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)
    )
    return model


# Network, shape of an image, random recipes in the quick run.
SMALL = {
    "LeNet-300-100": (lambda: LeNet300100(in_features=64), (1, 8, 8), 10),
    "LeNet-5": (lambda: LeNet5(image_size=20), (1, 20, 20), 10),
    "SimpleCNN": (lambda: SimpleCNN(in_channels=1, width=6), (1, 8, 8), 10),
    "VGG-16 for CIFAR": (lambda: VGGCIFAR(width=0.125, image_size=8), (3, 8, 8), 10),
    "ResNet-56": (lambda: ResNetCIFAR(width=4), (3, 8, 8), 10),
    "ResNet-18": (torchvision.models.resnet18, (3, 32, 32), 2),
    "ResNet-34": (torchvision.models.resnet34, (3, 32, 32), 1),
    "ResNet-50": (torchvision.models.resnet50, (3, 32, 32), 1),
    "VGG-16": (lambda: vgg16(norm=False), (3, 32, 32), 1),
    "VGG-16 with norms": (lambda: vgg16(norm=True), (3, 32, 32), 1),
}
FULL = {
    "LeNet-300-100": (LeNet300100, (1, 28, 28), 1),
    "LeNet-5": (LeNet5, (1, 28, 28), 1),
    "SimpleCNN": (SimpleCNN, (3, 32, 32), 1),
    "VGG-16 for CIFAR": (VGGCIFAR, (3, 32, 32), 1),
    "ResNet-56": (ResNetCIFAR, (3, 32, 32), 1),
    "ResNet-18": (torchvision.models.resnet18, (3, 64, 64), 10),
    "ResNet-34": (torchvision.models.resnet34, (3, 64, 64), 10),
    "ResNet-50": (torchvision.models.resnet50, (3, 64, 64), 10),
    "VGG-16": (lambda: vgg16(norm=False), (3, 32, 32), 10),
    "VGG-16 with norms": (lambda: vgg16(norm=True), (3, 32, 32), 10),
    "VGG-16 as it is": (torchvision.models.vgg16, (3, 32, 32), 1),
    "VGG-16 with norms as it is": (torchvision.models.vgg16_bn, (3, 32, 32), 1),
}


def assert_cuts_are_zeroing(build, shape, recipes):
    torch.manual_seed(0)
    model = randomized(build()).eval()
    images = torch.randn(1, *shape)
    graph = trace(model, lambda: model(images))
    for seed in range(recipes):
        recipe = random_recipe(graph.groups(), seed)
        precise = copy.deepcopy(model).double()
        removed = removed_by(make_plan(graph, recipe))
        assert removed
        reached = places(precise, removed, lambda network: network(images.double()), sizes=(30.0, -30.0))
        for dtype, uncut in ((torch.float32, model), (torch.float64, precise)):
            x = images.to(dtype)
            network = copy.deepcopy(uncut)
            plan = cut(network, recipe, x, graph=graph, verify=seed == 0)
            assert removed_by(plan) == removed
            with torch.no_grad():
                found = clone(network(x))
            expected = silenced(uncut, reached, lambda n, x=x: n(x))
            assert relative_error(found, expected) < TOLERANCE[dtype]
            assert relative_error(clone(uncut(x)), expected) > 1e-3  # what was removed had counted


@pytest.mark.parametrize("name", SMALL)
def test_a_cut_is_the_same_as_zeroing(name):
    assert_cuts_are_zeroing(*SMALL[name])


@pytest.mark.long
@pytest.mark.parametrize("name", FULL)
def test_a_cut_is_the_same_as_zeroing_at_full_size(name):
    assert_cuts_are_zeroing(*FULL[name])


def zeroed_by_hand(model, places, x):
    """Outputs with input channels set to zero, given as layer to channels; a hook each."""
    for name, channels in places.items():

        def silence(layer, args, channels=channels):
            (entering,) = args
            entering = entering.clone()
            entering[:, list(channels)] = 0
            return (entering,)

        model.get_submodule(name).register_forward_pre_hook(silence)
    with torch.no_grad():
        return clone(model(x))


def test_lenet5_by_hand():
    model = randomized(LeNet5(image_size=20)).double().eval()  # a map of 2×2 enters fc1
    uncut, x = copy.deepcopy(model), torch.randn(3, 1, 20, 20, dtype=torch.float64)
    gone = {"conv1": {0, 7}, "conv2": {1, 2, 49}, "fc1": set(range(100, 400))}
    widths = {"conv1": 20, "conv2": 50, "fc1": 500}
    recipe = Recipe(keep={name: sorted(set(range(widths[name])) - gone[name]) for name in gone})
    plan = cut(model, recipe, x)
    assert plan.recipe.keep == recipe.keep
    after_flatten = [4 * channel + position for channel in gone["conv2"] for position in range(4)]
    expected = zeroed_by_hand(uncut, {"conv2": gone["conv1"], "fc1": after_flatten, "fc2": gone["fc1"]}, x)
    assert relative_error(clone(model(x)), expected) < 1e-10
    assert [tuple(p.shape) for p in model.parameters()] == [
        (18, 1, 5, 5), (18,), (47, 18, 5, 5), (47,), (200, 188), (200,), (10, 200), (10,)
    ]  # fmt: skip


def test_option_a_by_hand():
    # Two blocks a stage, 4, 8 and 16 channels: stem channel i is channel i + 2 of the second stage and i + 6 of the third.
    model = randomized(ResNetCIFAR(depth=14, width=4)).double().eval()
    uncut, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gone = {1, 2}
    plan = cut(model, Recipe(keep={"conv1": (0, 3), "stage3.1.conv1": range(5)}), x)
    shift = {1: 0, 2: 2, 3: 6}
    moved = {stage: {channel + shift[stage] for channel in gone} for stage in shift}
    writers = {"conv1": gone, **{f"stage{stage}.{block}.conv2": moved[stage] for stage in shift for block in (0, 1)}}
    assert {name: set(channels) for name, channels in removed_by(plan).items()} == {
        **writers,
        "stage3.1.conv1": set(range(5, 16)),
    }
    readers = {f"stage{stage}.{block}.conv1": moved[stage if block else max(stage - 1, 1)] for stage in shift for block in (0, 1)}
    expected = zeroed_by_hand(uncut, {**readers, "stage3.1.conv2": range(5, 16), "fc": moved[3]}, x)
    assert relative_error(clone(model(x)), expected) < 1e-10


def test_the_cut_of_one_tied_layer_is_the_cut_of_all():
    recipes = [{"conv1": (0, 3)}, {"stage1.1.conv2": (0, 3)}, {"stage3.0.conv2": (*range(7), *range(9, 16))}]
    networks = []
    for keep in recipes:
        torch.manual_seed(0)
        networks.append(ResNetCIFAR(depth=14, width=4))
        cut(networks[-1], Recipe(keep=keep), torch.zeros(1, 3, 8, 8))
    for other in networks[1:]:
        assert all(torch.equal(a, b) for a, b in zip(networks[0].parameters(), other.parameters(), strict=True))


# ---------------------------------------------------------------- networks drawn at random


def any_layers(model, seed):
    """A recipe that knows nothing of the graph."""
    draw = random.Random(seed)
    layers = reading_layers(model)
    keep = {}
    for name in draw.sample(sorted(layers), min(draw.choice([1, 1, 2]), len(layers))):
        width = layers[name].weight.shape[1 if isinstance(layers[name], nn.ConvTranspose2d) else 0]
        keep[name] = sorted(draw.sample(range(width), draw.randint(1, width)))
    return Recipe(keep=keep)


def outcome(seed, knowing):
    """Whether a random recipe on a random network was cut exactly, or refused with the network unharmed."""
    model = RandomNetwork(seed).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    recipe = random_recipe(trace(model, lambda: model(x)).groups(), seed) if knowing else any_layers(model, seed)
    uncut = copy.deepcopy(model)
    try:
        plan = cut(model, recipe, x)
    except ValueError:
        assert all(torch.equal(a, b) for a, b in zip(uncut.parameters(), model.parameters(), strict=True))
        return "refused"
    if not plan.keep:
        return "nothing"
    with torch.no_grad():
        found = clone(model.eval()(x))
    error = relative_error(found, zeroed(uncut, removed_by(plan), lambda network: network(x)))
    assert error < 1e-10, f"seed {seed} of {model.kinds} is wrong by {error:.0e}: {recipe}"
    return "exact"


@pytest.mark.parametrize(("knowing", "least"), [(True, 170), (False, 50)], ids=["tied", "any"])
def test_random_networks_are_cut_exactly_or_not_at_all(knowing, least):
    outcomes = [outcome(seed, knowing) for seed in range(200)]
    assert outcomes.count("exact") >= least


@pytest.mark.long
@pytest.mark.parametrize(("knowing", "least"), [(True, 1700), (False, 500)], ids=["tied", "any"])
def test_many_random_networks_are_cut_exactly_or_not_at_all(knowing, least):
    outcomes = [outcome(seed, knowing) for seed in range(1000, 3000)]
    assert outcomes.count("exact") >= least


# ---------------------------------------------------------------- what a cut does not change


def small(seed=0):
    """Norms, a skip, a depthwise layer, a tied pair, buffers that are and are not saved."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.inner = conv(3, 6), nn.BatchNorm2d(6), conv(6, 6)
            self.depth, self.twin, self.drop = conv(6, 6, groups=6), conv(6, 6), nn.Dropout(0.1)
            self.twin.weight = self.inner.weight
            self.register_buffer("mask", torch.rand(6, 1, 1) + 0.5, persistent=False)
            self.register_buffer("gain", torch.rand(6, 1, 1) + 0.5)
            self.scale = nn.Parameter(torch.rand(6, 1, 1))
            self.fc = nn.Linear(6, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            y = F.relu(self.norm(self.stem(x)))
            y = y + self.drop(self.depth(F.relu(self.inner(y) * self.scale)) * self.mask * self.gain)
            return self.head(F.relu(self.fc((y + self.twin(y)).mean((2, 3)))))

    torch.manual_seed(seed)
    return randomized(Small(), seed)


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
RECIPE = Recipe(keep={"stem": (0, 2, 5), "fc": (1, 2)})


def test_the_small_network_is_cut_everywhere():
    model = small()
    plan = cut(model, RECIPE, IMAGES)
    assert set(plan.keep) == {name for name in (*model.state_dict(), "mask") if "num_batches" not in name and name != "head.bias"}
    assert plan.transient == ("mask",)
    assert dict(plan.recipe.keep) == {"stem": (0, 2, 5), "inner": (0, 2, 5), "depth": (0, 2, 5), "fc": (1, 2)}
    assert repr(model.depth) == "Conv2d(3, 3, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=3)"
    assert (model.norm.num_features, model.fc.in_features, model.fc.out_features, model.head.in_features) == (3, 3, 2, 2)
    assert model.twin.weight is model.inner.weight


def test_everything_but_the_sizes_is_as_it_was():
    model = small()
    model.train()
    model.norm.eval()
    model.fc.weight.requires_grad_(False)
    model.stem.weight.custom = object()
    model.to(memory_format=torch.channels_last)
    before = unsized(model)
    cut(model, RECIPE, IMAGES)
    assert unsized(model) == before
    for name in ("stem", "inner"):
        weight = model.get_submodule(name).weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()


def test_volumes_keep_their_memory_format():
    model = nn.Sequential(nn.Conv3d(2, 6, 2), nn.ReLU(), nn.Conv3d(6, 2, 2)).to(memory_format=torch.channels_last_3d)
    cut(model, Recipe(keep={"0": (1, 2)}), torch.zeros(1, 2, 3, 3, 3))
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not model[2].weight.is_contiguous()


def test_gradients_are_cut_with_their_parameters():
    model = small()
    model(IMAGES).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    plan = cut(model, RECIPE, IMAGES)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plan.take(name, grads[name]))
        assert parameter.grad.shape == parameter.shape


def test_hooks_fire_as_before():
    model = small()
    fired = []
    model.twin.register_forward_hook(lambda *_: fired.append("forward"))
    model.twin.register_full_backward_hook(lambda *_: fired.append("backward"))
    model.twin.weight.register_hook(lambda grad: fired.append(tuple(grad.shape)))
    model.twin.weight.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))
    model(IMAGES).sum().backward()
    before = list(fired)
    assert sorted(map(str, before)) == ["(6, 6, 3, 3)", "accumulated", "backward", "forward"]
    cut(model, RECIPE, IMAGES)
    fired.clear()
    model.zero_grad()
    model(IMAGES).sum().backward()
    assert fired == [(3, 3, 3, 3) if entry == (6, 6, 3, 3) else entry for entry in before]


@pytest.mark.parametrize("backward_first", [False, True])
def test_an_old_loss_that_is_still_alive_does_not_break_the_next_backward(backward_first):
    model = small().eval()
    stale = model(IMAGES).sum()
    if backward_first:
        stale.backward(retain_graph=True)
    cut(model, RECIPE, IMAGES)
    model.zero_grad()
    model(IMAGES).sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    fresh = copy.deepcopy(model)
    fresh.zero_grad()
    del stale
    gc.collect()
    fresh(IMAGES).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_a_cut_draws_no_random_number_and_counts_nothing():
    model = small()
    model.train()
    state, calls = torch.get_rng_state(), model.norm.num_batches_tracked.clone()
    cut(model, RECIPE, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.norm.num_batches_tracked, calls)


def test_a_frozen_network_stays_frozen_and_a_cut_one_trains_on():
    model = small().requires_grad_(False)
    model.head.requires_grad_(True)
    cut(model, RECIPE, IMAGES)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    model(IMAGES).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}


def test_copies_and_pickles_know_what_was_cut(tmp_path):
    model = small()
    plan = cut(model, RECIPE, IMAGES)
    torch.save(model.fc, tmp_path / "fc.pt")
    assert plan_of(copy.deepcopy(model)) == plan_of(model) == plan
    assert plan_of(small()) is None
    assert "lit_compress" not in "".join(model.state_dict())


def test_nothing_to_remove_is_no_cut():
    model = small()
    assert not cut(model, Recipe(keep={}), IMAGES).keep
    assert not cut(model, Recipe(keep={"stem": range(6)}), IMAGES).keep
    assert plan_of(model) is None


@pytest.mark.parametrize(
    ("layer", "keep", "sizes"),
    [
        (lambda: nn.GroupNorm(4, 8), (2, 3, 6, 7), {"num_groups": 2, "num_channels": 4}),
        (lambda: conv(8, 12, groups=2), (0, 1, 2, 4, 5, 6), {"in_channels": 6, "out_channels": 12, "groups": 2}),
        (lambda: conv(8, 8, groups=4), (0, 2, 4, 6), {"in_channels": 4, "out_channels": 8, "groups": 4}),
        (lambda: conv(8, 16, groups=8), (0, 2, 7), {"in_channels": 3, "out_channels": 6, "groups": 3}),
        (lambda: conv(8, 8, groups=8), (0, 2, 7), {"in_channels": 3, "out_channels": 3, "groups": 3}),
    ],
    ids=["group norm", "groups", "groups of one channel", "depthwise with a multiplier", "depthwise"],
)
def test_modules_know_their_sizes_after_a_cut(layer, keep, sizes):
    model = nn.Sequential(conv(3, 8), layer(), nn.ReLU(), nn.LazyConv2d(2, 1))
    model(IMAGES)
    randomized(model)
    fresh = copy.deepcopy(model)
    plan = cut(model, Recipe(keep={"0": keep}), IMAGES)
    assert {name: getattr(model[1], name) for name in sizes} == sizes
    plan.cut_module(fresh)  # as a checkpoint is loaded, without a trace
    assert torch.equal(model(IMAGES), fresh(IMAGES))


def test_a_grouped_convolution_may_become_a_depthwise_one_in_two_cuts_or_in_one():
    model = nn.Sequential(conv(3, 8), conv(8, 8, groups=4), nn.ReLU(), conv(8, 2))
    fresh = copy.deepcopy(model)
    cut(model, Recipe(keep={"0": (1, 3, 5, 7), "1": (0, 2, 4, 6)}), IMAGES)
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (4, 4, 4)
    cut(model, Recipe(keep={"0": (0, 2, 3)}), IMAGES)
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (3, 3, 3)
    plan_of(model).cut_module(fresh)
    assert torch.equal(model(IMAGES), fresh(IMAGES))


# ---------------------------------------------------------------- other ways of running a network


def test_inputs_may_be_positional_arguments_or_go_through_a_function():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.end = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x, y, *, sign=1):
            return {"out": self.end(self.a(x) + sign * self.b(y))}

    def run(model, batch):
        return model(batch["x"], batch["y"], sign=-1)

    torch.manual_seed(0)
    first = Two()
    second = copy.deepcopy(first)
    x, y = torch.rand(2, 3), torch.rand(2, 2)
    cut(first, Recipe(keep={"a": (1, 2)}), (x, y))
    cut(second, Recipe(keep={"b": (1, 2)}), {"x": x, "y": y}, forward_fn=run)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_cut_too(dtype):
    model = small().to(dtype)
    cut(model, RECIPE, IMAGES.to(dtype))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.stem.weight.shape == (3, 3, 3, 3)


def test_a_network_that_insists_on_its_precision_is_checked_in_it():
    class Insists(nn.Sequential):
        def forward(self, x):
            assert x.dtype == torch.float32
            return super().forward(x)

    model = Insists(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    cut(model, Recipe(keep={"0": (1, 5)}), torch.rand(3, 4))
    assert model[0].weight.shape == (2, 4)
    assert model[0].weight.dtype == torch.float32


def test_autocast_around_or_inside_changes_nothing():
    def run(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    inside, around, plain = small(), small(), small()
    cut(plain, RECIPE, IMAGES)
    cut(inside, RECIPE, IMAGES, forward_fn=run)
    with torch.autocast("cpu", torch.bfloat16):
        around(IMAGES)  # leaves casts of the weights in the cache
        cut(around, RECIPE, IMAGES)
        assert around(IMAGES).shape == (4, 3)
        around(IMAGES).float().sum().backward()
    assert all(p.grad is not None for p in around.parameters())
    for other in (inside, around):
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_a_cut_under_inference_mode_can_be_trained_later():
    model = small()
    with torch.inference_mode():
        cut(model, RECIPE, IMAGES)
    model(IMAGES).sum().backward()
    assert model.stem.weight.grad.shape == (3, 3, 3, 3)


@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
def test_a_compiled_network_is_cut_and_runs_on():
    model = small().eval()
    compiled = torch.compile(model, backend="eager")
    compiled(IMAGES)
    plan = cut(compiled, RECIPE, IMAGES)  # names need no `_orig_mod.`
    assert plan.recipe.keep["_orig_mod.stem"] == (0, 2, 5)
    assert torch.equal(compiled(IMAGES), model(IMAGES))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_are_seen(reentrant):
    class Recomputes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.end = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4)), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.end(checkpoint(self.body, x, use_reentrant=reentrant))

    model = Recomputes()
    cut(model, Recipe(keep={"body.0": (0, 5), "body.2": (1,)}), IMAGES)
    assert model.end.weight.shape == (2, 1, 1, 1)


def test_names_of_the_holder_or_of_the_held_network_do():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, x):
            return self.net(x)

    model, holder = small(), Holder()
    inner = cut(model, RECIPE.renamed(add="net."), IMAGES)
    outer = cut(holder, RECIPE, IMAGES)
    assert outer.recipe == inner.recipe.renamed(add="net.")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), holder.parameters(), strict=True))
    # The fingerprint goes along: what was cut once is not cut again by the same recipe.
    with pytest.raises(ValueError, match=r"made for another network: its layer 'net\.stem' has 6 channels, this network's has 3"):
        cut(holder, inner.recipe, IMAGES)


# ---------------------------------------------------------------- failures


def snapshot(model):
    """Everything that a failed cut must leave alone: all but sizes, and storage, values, gradients, sizes, plan, random state."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    held = [(name, t) for name, t in tensors if not (t.is_meta or nn.parameter.is_lazy(t))]
    plain = (int, float, bool, str, tuple, type(None))
    return {
        **unsized(model),
        "values": [(name, t.data_ptr(), tuple(t.shape), t.stride(), t._version, t.flatten().tolist()) for name, t in held],
        "grads": [(name, id(t.grad), None if t.grad is None else t.grad.flatten().tolist()) for name, t in held],
        "sizes": [{k: v for k, v in vars(module).items() if isinstance(v, plain)} for module in model.modules()],
        "plan": plan_of(model),
        "random": torch.get_rng_state().tolist(),
    }


class HardView(nn.Module):
    def forward(self, x):
        return x.view(-1, 6, 8, 8)


class HardSlice(nn.Module):
    def forward(self, x):
        return torch.cat([x[:, 3:], x[:, :3]], 1)


class HardScale(nn.Module):
    def forward(self, x):
        return x / x.shape[1]


def broken(module):
    model = small()
    model.depth = nn.Sequential(model.depth, module)
    return model


FAILURES = {
    "unknown layer": (small, {"nowhere": (0,)},
                      r"names 'nowhere', which the network does not have or does not run; .*'stem', 'inner'"),
    "not a layer": (small, {"norm": (0,)}, "names 'norm', which the network does not have"),
    "out of range": (small, {"stem": (0, 6)}, "Layer 'stem' has 6 channels but would keep channel 6"),
    "output": (small, {"head": (0,)}, "Channel 1 of layer 'head' cannot be removed: they are the output of the network"),
    "contradiction": (small, {"stem": (0, 1), "inner": (0, 2)},
                      r"keeps channel [12] of layer '\w+' but removes it from '\w+', which is tied to it; name only one"),
    "nothing left": (small, {"stem": (0, 1, 2), "inner": (3, 4, 5)}, "Layer 'stem' would keep no channel"),
    "view of a fixed size": (lambda: broken(HardView()), {"stem": (0, 3)},
                             r"does not run \(last layer that did: 'depth\.0'\): shape"),
    "slice of a fixed size": (lambda: broken(HardSlice()), {"stem": (0, 3)},
                              r"Channel 1 of layer 'stem' cannot be removed: 'depth\.1' picks channels by their position"),
    "scale by the size": (lambda: broken(HardScale()), {"stem": (0, 3)}, r"The cut is not exact: layer '(twin|fc)' differs by"),
}  # fmt: skip


@pytest.mark.parametrize(("build", "keep", "said"), FAILURES.values(), ids=FAILURES)
def test_a_cut_that_fails_says_why_and_leaves_everything_as_it_was(build, keep, said):
    model = build()
    model.train()
    model.norm.eval()
    model(IMAGES).sum().backward()
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        cut(model, Recipe(keep=keep), IMAGES)
    assert snapshot(model) == before


def test_a_cut_that_fails_after_one_that_did_not_leaves_the_first():
    model = small()
    cut(model, RECIPE, IMAGES)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'stem' has 3 channels but would keep channel 5"):
        cut(model, RECIPE, IMAGES)
    assert snapshot(model) == before
    assert before["plan"] is not None


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (torch.zeros(1, 4, 8, 8), r"Small does not run on the example inputs; it failed in 'stem': .*4 channels"),
        (torch.zeros(2, 8), "it failed in 'stem'"),
        ((IMAGES, IMAGES), "it failed in the forward: .*positional arguments"),
        (IMAGES.long(), "it failed in 'stem'"),
    ],
)
def test_wrong_inputs_are_told_where_they_fail(inputs, said):
    model = small()
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        cut(model, RECIPE, inputs)
    assert snapshot(model) == before


def on_meta(path):
    model = small()
    model.get_submodule(path).to("meta")
    return model


def with_buffer_on_meta():
    model = small()
    model.norm.running_mean = model.norm.running_mean.to("meta")
    return model


def with_lazy_layer():
    model = small()
    model.head = nn.LazyLinear(3)
    return model


WITHOUT_VALUES = {
    "wholly on meta": (lambda: on_meta(""), r"Parameter 'scale' is on the meta device .* `to_empty`"),
    "on two devices": (lambda: on_meta("fc"), r"Parameter 'fc\.weight' is on the meta device"),
    "a buffer on another device": (with_buffer_on_meta, r"Buffer 'norm\.running_mean' is on the meta device"),
    "lazy": (with_lazy_layer, r"Parameter 'head\.weight' has no shape yet; run the network once"),
}


@pytest.mark.parametrize(("build", "said"), WITHOUT_VALUES.values(), ids=WITHOUT_VALUES)
def test_a_network_without_values_is_refused_and_stays(build, said):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        cut(model, RECIPE, IMAGES)
    assert snapshot(model) == before


@pytest.mark.parametrize("traced", [False, True])
def test_inputs_on_another_device_are_refused_and_nothing_changes(traced):
    model = small()
    graph = trace(model, lambda: model(IMAGES)) if traced else None
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Small does not run on the example inputs.*: Tensor on device"):
        cut(model, RECIPE, IMAGES.to("meta"), graph=graph)
    assert snapshot(model) == before


def test_a_recipe_of_another_network_is_refused():
    model = small()
    before = snapshot(model)
    other = dict.fromkeys(trace(model, lambda: model(IMAGES)).layers, 6)
    with pytest.raises(ValueError, match=r"made for another network: its layer '(fc|head)' has 6 channels, this network's has"):
        cut(model, Recipe(keep={"stem": (0, 1)}, original=other), IMAGES)
    with pytest.raises(ValueError, match="names 'conv1'"):
        cut(model, Recipe(keep={"stem": (0, 1)}, original={"stem": 6, "conv1": 3}), IMAGES)
    assert snapshot(model) == before


def test_a_graph_of_another_network_is_refused():
    model = small()
    other, wider = nn.Sequential(conv(3, 6), conv(6, 2)), small()
    cut(wider, RECIPE, IMAGES)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Small lacks \['0\.bias', .*traced on another network"):
        cut(model, Recipe(keep={"0": (0,)}), IMAGES, graph=trace(other, lambda: other(IMAGES)))
    for verify in (True, False):
        with pytest.raises(ValueError, match=r"should have shape .* before the cut but has|does not run on the example inputs"):
            cut(model, Recipe(keep={"stem": (0,)}), IMAGES, graph=trace(wider, lambda: wider(IMAGES)), verify=verify)
    assert snapshot(model) == before


def test_a_cut_that_fails_does_not_detach_what_listens_to_gradients():
    # A DDP wrapper hangs its reduction on these nodes, which autograd drops when a parameter's data change their kind.
    model = broken(HardScale())
    nodes = {name: p.expand_as(p).grad_fn.next_functions[0][0] for name, p in model.named_parameters()}
    fired = []
    for name, node in nodes.items():
        node.register_hook(lambda *_, name=name: fired.append(name))
    with pytest.raises(ValueError, match="not exact"):
        cut(model, RECIPE, IMAGES)
    model(IMAGES).sum().backward()
    assert sorted(fired) == sorted(nodes)


def test_without_the_check_a_wrong_cut_goes_through():
    # So that the refusals above are the check's doing.
    model = broken(HardScale())
    uncut = copy.deepcopy(model).eval()
    plan = cut(model, RECIPE, IMAGES, verify=False)
    expected = zeroed(uncut, removed_by(plan), lambda network: network(IMAGES))
    assert relative_error(clone(model.eval()(IMAGES)), expected) > 1e-3


def test_the_check_sees_a_wrong_channel_behind_a_branch_that_counts_for_nothing():
    # A scale that starts at zero hides its branch from the output, not from the layers.
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.end = conv(3, 6), conv(6, 6), nn.Conv2d(6, 2, 1)
            self.scale = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            y = self.a(x)
            return self.end(y + self.scale * self.b(y / y.shape[1]))

    with pytest.raises(ValueError, match="not exact: layer 'b'"):
        cut(Hidden(), Recipe(keep={"a": (1, 4)}), IMAGES)


def test_a_check_in_bfloat16_does_not_mistake_rounding_for_an_error():
    class Coarse(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*[part for _ in range(8) for part in (conv(6, 6), nn.BatchNorm2d(6), nn.ReLU())])
            self.stem, self.end = conv(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = x.bfloat16()
            with torch.autocast("cpu", torch.bfloat16):
                return self.end.float()(self.body(self.stem(x)).mean((2, 3)).float())

    model = randomized(Coarse())
    cut(model, Recipe(keep={"stem": (0, 2, 5), "body.3": (1, 2, 3, 4)}), IMAGES)
    assert model.stem.weight.shape[0] == 3


def test_weights_computed_by_a_parametrization_are_refused_by_name():
    model = small()
    parametrizations.weight_norm(model.fc)
    before = snapshot(model)
    with pytest.raises(ValueError, match="Layer 'fc' cannot be cut: the weight of addmm in 'fc' is computed from other tensors"):
        cut(model, RECIPE, IMAGES)
    assert snapshot(model) == before
