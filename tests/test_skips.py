"""Residual networks cut both ways: the same channels along a stream, and each block on its own, padded back."""

import copy
import pickle

import numpy as np
import pytest
import pytorch_lightning
import torch
import torchvision
from pytorch_lightning import LightningModule, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

from lit_compress import Plan, Recipe, analyze, cut, load_pruned
from lit_compress.callbacks import PFAPruning
from lit_compress.checkpoint import write_plan
from lit_compress.graph import trace
from lit_compress.models import ResNetCIFAR
from lit_compress.padding import Pad, PaddedBack, pad_modules
from lit_compress.plan import plan_of
from lit_compress.selection import pfa
from lit_compress.spectra import observed
from lit_compress.surgery import make_plan
from tests.modules import every_epoch, leaving_no_trace, needs_averaging, new_trainer, same
from tests.networks import Net, clone, conv, random_recipe, randomized, relative_error

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class PreActivation(nn.Module):
    """Norm and activation before each convolution; the block ends in a convolution, the stream is never activated."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), conv(width, inner)
        self.bn2, self.conv2 = nn.BatchNorm2d(inner), conv(inner, width)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


def pre_activation() -> nn.Sequential:
    body = [conv(3, 8), *(PreActivation(8, 6) for _ in range(3)), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def images(count: int = 2, size: int = 8, seed: int = 0, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def drawn(build, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomized(build(), seed).eval()


def padding_graph(model, x):
    return trace(model, lambda: model(x), pad_back="identity")


def random_cut(graph, seed: int) -> Recipe:
    """A random recipe that never keeps a channel of a padded block whose slot goes."""
    recipe = random_recipe(graph.groups(), seed)
    gone = set()
    for name, kept in recipe.keep.items():
        gone |= set(np.delete(graph.layers[name].classes, kept).tolist())
    gone = set(np.flatnonzero(graph.mark(sorted(gone))).tolist())
    keep = {}
    for name in recipe.keep:
        left = [index for index, number in enumerate(graph.layers[name].classes.tolist()) if number not in gone]
        if not left:
            return random_cut(graph, seed + 1000)
        keep[name] = left
    for layer in graph.layers.values():  # a block that none of its slots is left to
        if set(layer.classes.tolist()) <= gone:
            return random_cut(graph, seed + 1000)
    return Recipe(keep=keep, method=recipe.method, padded={pad.module: len(pad.slots) for pad in graph.pads})


# ---------------------------------------------------------------- what a cut is held against: zeroing, read off the forward


class Zeroed:
    """An uncut network whose removed channels are set to zero by hooks, placed by hand for the networks at hand.

    ``gone`` maps a convolution to its removed channels. What the block's own convolutions remove is zeroed where the next one
    reads it; what a block's last module adds is zeroed before the sum (``ends``: that module to its convolution); what the
    stream loses is zeroed after each sum, where all its readers see it (``streams``: the module whose output is the stream
    after the sum, to the layer that says which channels the stream has lost).
    """

    def __init__(self, model, gone, *, inner, ends, streams):
        self.model = copy.deepcopy(model)
        for reader, writer in inner.items():
            self._before(reader, gone.get(writer, ()))
        for end, writer in ends.items():
            self._after(end, gone.get(writer, ()))
        for stream, lost in streams.items():
            self._after(stream, lost)

    def _before(self, name, channels):
        self.model.get_submodule(name).register_forward_pre_hook(lambda module, args: (_without(args[0], channels),))

    def _after(self, name, channels):
        self.model.get_submodule(name).register_forward_hook(lambda module, args, output: _without(output, channels))

    def __call__(self, x):
        with torch.no_grad():
            return clone(self.model(x))


def _without(tensor, channels):
    tensor = tensor.clone()
    tensor[:, sorted(channels)] = 0
    return tensor


def option_a_zeroed(model, gone) -> Zeroed:
    """The hooks for :class:`ResNetCIFAR`, whose stage s channel c is channel ``c - front`` of the stage before."""
    inner, ends, lost = {}, {}, set(gone.get("conv1", ()))
    streams = {"relu1": lost}
    for stage in ("stage1", "stage2", "stage3"):
        for index, block in enumerate(model.get_submodule(stage)):
            name = f"{stage}.{index}"
            lost = {channel + getattr(block.shortcut, "front", 0) for channel in lost}
            inner[f"{name}.conv2"], ends[f"{name}.bn2"], streams[name] = f"{name}.conv1", f"{name}.conv2", lost
    return Zeroed(model, gone, inner=inner, ends=ends, streams=streams)


def torchvision_zeroed(model, gone) -> Zeroed:
    """The hooks for torchvision's residual networks, whose stages begin with a projection."""
    inner, ends, lost = {}, {}, set(gone.get("conv1", ()))
    streams = {"maxpool": lost}
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for index, block in enumerate(model.get_submodule(stage)):
            name, last = f"{stage}.{index}", 2 if isinstance(block, BasicBlock) else 3
            if block.downsample is not None:
                lost = set(gone.get(f"{name}.downsample.0", ()))
            inner |= {f"{name}.conv{number}": f"{name}.conv{number - 1}" for number in range(2, last + 1)}
            ends[f"{name}.bn{last}"], streams[name] = f"{name}.conv{last}", lost
    return Zeroed(model, gone, inner=inner, ends=ends, streams=streams)


def pre_activation_zeroed(model, gone) -> Zeroed:
    lost = set(gone.get("0", ()))
    blocks = [str(index) for index in range(1, 4)]
    # The stream's channels are read behind each block's first norm, which gives something for a zero as well.
    inner = {f"{name}.conv2": f"{name}.conv1" for name in blocks}
    zeroed = Zeroed(model, gone, inner=inner, ends={f"{name}.conv2": f"{name}.conv2" for name in blocks}, streams={})
    for name in (*(f"{name}.conv1" for name in blocks), "8"):
        zeroed._before(name, lost)
    return zeroed


ZEROED = {"option A": option_a_zeroed, "projections": torchvision_zeroed, "pre-activation": pre_activation_zeroed}


def removed_in(plan) -> dict[str, set[int]]:
    return {name: set(range(plan.recipe.original[name])) - set(kept) for name, kept in plan.recipe.keep.items()}


def assert_zeroing(model, x, kind, skips, seeds, dtypes=(torch.float64, torch.float32)):
    graph = trace(model, lambda: model(x[:1]), pad_back="identity" if skips == "pad" else ())
    assert bool(graph.pads) == (skips == "pad")
    padded = 0
    for seed in seeds:
        recipe = random_cut(graph, seed)
        for dtype in dtypes:
            network, inputs = copy.deepcopy(model).to(dtype), x.to(dtype)
            uncut, parameters = copy.deepcopy(network), dict(network.named_parameters())
            modules, keys = dict(network.named_modules()), set(network.state_dict())
            plan = cut(network, recipe, inputs, graph=graph, verify=False)  # the core's own check is not asked
            zeroed = ZEROED[kind](uncut, removed_in(plan))
            with torch.no_grad():
                found = clone(network(inputs))
            expected = zeroed(inputs)
            assert relative_error(found, expected) < TOLERANCE[dtype]
            assert relative_error(clone(uncut(inputs)), expected) > 1e-4  # what was removed had counted
            assert_nothing_added(network, plan, parameters, modules, keys)
        padded += len(plan.pads)
    assert bool(padded) == (skips == "pad")


def assert_nothing_added(network, plan, parameters, modules, keys):
    assert all(parameter is parameters[name] for name, parameter in network.named_parameters())
    assert len(parameters) == len(list(network.parameters()))
    assert dict(network.named_modules()) == modules  # no wrapper: the same objects under the same names
    assert set(network.state_dict()) - keys == {f"{path}.slots" for path in plan.pads}
    assert keys <= set(network.state_dict())
    assert {name for name, module in modules.items() if isinstance(module, PaddedBack)} == set(plan.pads)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
    for path, pad in plan.pads.items():
        slots = modules[path].slots
        assert slots.dtype == torch.int64  # places, no mask
        assert (modules[path].padded_width, tuple(slots.tolist())) == (pad.width, pad.slots)
        assert slots.numel() < pad.width


@pytest.mark.parametrize("skips", ["share", "pad"])
def test_resnet20_both_ways_is_zeroing(skips):
    assert_zeroing(drawn(lambda: ResNetCIFAR(20, width=4)), images(), "option A", skips, range(6))


@pytest.mark.parametrize("skips", ["share", "pad"])
@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_projection_networks_both_ways_are_zeroing(name, skips):
    model = drawn(lambda: getattr(torchvision.models, name)())
    assert_zeroing(model, images(size=32), "projections", skips, range(1), dtypes=(torch.float64,))


@pytest.mark.parametrize("skips", ["share", "pad"])
def test_blocks_that_end_in_a_convolution_are_zeroing(skips):
    assert_zeroing(drawn(pre_activation), images(), "pre-activation", skips, range(6))


@pytest.mark.long
@pytest.mark.parametrize("skips", ["share", "pad"])
def test_resnet56_both_ways_is_zeroing_for_100_recipes(skips):
    assert_zeroing(drawn(ResNetCIFAR), images(), "option A", skips, range(100))


@pytest.mark.long
@pytest.mark.parametrize("skips", ["share", "pad"])
@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_projection_networks_both_ways_are_zeroing_for_100_recipes(name, skips):
    assert_zeroing(drawn(lambda: getattr(torchvision.models, name)()), images(size=32), "projections", skips, range(100))


def test_a_padded_cut_checks_itself_and_refuses_a_wrong_one():
    model, x = drawn(pre_activation), images()
    graph = padding_graph(model, x)
    for seed in range(6):
        cut(copy.deepcopy(model), random_cut(graph, seed), x, graph=graph)
    wrong = copy.deepcopy(model)
    wrong[1].register_forward_hook(lambda block, inputs, output: output.roll(1, 1))  # after the trace
    with pytest.raises(ValueError, match="The cut is not exact"):
        cut(wrong, random_cut(graph, 1), x, graph=graph)
    assert not any(isinstance(module, PaddedBack) for module in wrong.modules())


# ---------------------------------------------------------------- the lives of a padded network


def cut_twice(model, x):
    """Two cuts of the stream and of blocks, the second on a network that is padded back already."""
    first = padding_graph(model, x)
    plan = cut(model, random_cut(first, 3), x, graph=first)
    present = set(plan.pads)
    assert present
    second = padding_graph(model, x)
    assert {pad.module for pad in second.pads if pad.present} == present
    following = cut(model, random_cut(second, 5), x, graph=second)
    assert present <= set(following.pads)
    return plan, following


@pytest.mark.parametrize("kind", ["option A", "pre-activation"])
def test_a_second_cut_of_stream_and_blocks_is_zeroing(kind):
    build = pre_activation if kind == "pre-activation" else lambda: ResNetCIFAR(14, width=6)
    model, x = drawn(build).double(), images().double()
    uncut = copy.deepcopy(model)
    first, second = cut_twice(model, x)
    stem = "0" if kind == "pre-activation" else "conv1"
    assert stem in second.recipe.keep  # the skip itself
    assert any(name.endswith(".conv2") and len(kept) < second.recipe.original[name] for name, kept in second.recipe.keep.items())
    composed = plan_of(model)
    assert composed.recipe == first.recipe.then(second.recipe)
    with torch.no_grad():
        assert relative_error(clone(model(x)), ZEROED[kind](uncut, removed_in(composed))(x)) < 1e-10


@pytest.fixture(scope="module")
def twice():
    """A network cut twice, what it was before, and an input."""
    torch.manual_seed(0)
    model, x = drawn(lambda: ResNetCIFAR(14, width=6)), images()
    uncut = copy.deepcopy(model)
    cut_twice(model, x)
    return model, uncut, x


def alike(one, other, x):
    with torch.no_grad():
        return torch.equal(one(x), other(x)) and bool(one(x).abs().max() > 0)


def test_copies_and_pickles_are_padded_back_as_well(twice):
    model, _, x = twice
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert alike(copied, model, x)
        assert plan_of(copied) == plan_of(model)
        for name, module in copied.named_modules():
            assert type(module) is type(model.get_submodule(name))  # made once a class
        copied.get_submodule("stage1.0.bn2").slots += 1
    assert copied.get_submodule("stage1.0.bn2").slots is not model.get_submodule("stage1.0.bn2").slots


def test_a_padded_state_dict_loads_strictly_and_says_what_is_wrong(twice):
    model, _, x = twice
    other = copy.deepcopy(model)
    path = next(iter(plan_of(model).pads))
    other.get_submodule(path).slots.zero_()
    other.load_state_dict(model.state_dict())
    assert alike(other, model, x)
    weights = dict(model.state_dict())
    with pytest.raises(RuntimeError, match=rf"Missing key.*{path}.slots"):
        other.load_state_dict({name: value for name, value in weights.items() if name != f"{path}.slots"})
    with pytest.raises(RuntimeError, match=rf"{path}.slots has shape \(99,\)"):
        other.load_state_dict(weights | {f"{path}.slots": torch.zeros(99, dtype=torch.int64)})
    assert copy.deepcopy(model).half().get_submodule(path).slots.dtype == torch.int64


@pytest.mark.parametrize("source", ["checkpoint", "state dict and recipe"])
def test_load_pruned_pads_back(twice, source, tmp_path):
    model, uncut, x = twice
    if source == "checkpoint":
        content = {"state_dict": model.state_dict()}
        write_plan(model, content)
        torch.save(content, tmp_path / "it.ckpt")
        again = load_pruned(copy.deepcopy(uncut), tmp_path / "it.ckpt")
    else:
        torch.save(model.state_dict(), tmp_path / "it.pt")
        plan_of(model).recipe.save(tmp_path / "recipe.json")
        again = load_pruned(copy.deepcopy(uncut), tmp_path / "it.pt", recipe=tmp_path / "recipe.json")
    assert alike(again, model, x)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert plan_of(again).pads == plan_of(model).pads


def test_the_recipe_of_both_cuts_cuts_a_fresh_network_alike(twice):
    model, uncut, x = twice
    fresh = copy.deepcopy(uncut)
    plan = cut(fresh, Recipe.from_dict(plan_of(model).recipe.to_dict()), x)
    assert plan.pads == plan_of(model).pads
    assert alike(fresh, model, x)


def test_a_plan_with_pads_makes_its_round_trips(twice):
    model, _, _ = twice
    plan = plan_of(model)
    assert plan.pads
    assert Plan.from_dict(plan.to_dict()) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    held = plan.renamed(add="net.")
    assert set(held.pads) == {f"net.{path}" for path in plan.pads}
    assert set(held.recipe.padded) == set(held.pads)
    assert held.renamed(drop="net.") == plan
    assert Recipe.from_dict(plan.recipe.to_dict()) == plan.recipe


def test_state_dicts_and_averages_follow(twice):
    model, uncut, x = twice
    plan = plan_of(model)
    weights = dict(uncut.state_dict())
    plan.apply_to(weights)
    assert same(weights, dict(model.state_dict()))
    average = AveragedModel(uncut)
    plan.apply_to(average)
    assert alike(average, model, x)


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.9999])
def test_averaging_buffers_leaves_the_slots_alone(twice, decay):
    model, _, _ = twice
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(20):  # what averages integers truncates them, a little each time
        average.update_parameters(model)
    for path, pad in plan_of(model).pads.items():
        assert tuple(average.module.get_submodule(path).slots.tolist()) == pad.slots


def test_a_recipe_goes_to_the_network_that_is_held_and_back():
    net, x = drawn(lambda: ResNetCIFAR(8, width=4)), images()
    holder = Net(lambda m, x: m.net(x), net=copy.deepcopy(net)).eval()
    graph = padding_graph(holder, x)
    recipe = make_plan(graph, random_cut(graph, 0)).recipe
    assert all(path.startswith("net.") for path in recipe.padded)
    cut(holder, recipe, x)
    plan = cut(net, recipe, x)
    assert plan.pads
    assert alike(holder, net, x)
    again = Net(lambda m, x: m.net(x), net=drawn(lambda: ResNetCIFAR(8, width=4))).eval()
    cut(again, plan.recipe, x)
    assert alike(again, net, x)


def training_state(model):
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "vars": {name: {"slots", "padded_width"} & set(vars(module)) for name, module in model.named_modules()},
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }


@pytest.mark.parametrize("padded_before", [False, True])
def test_a_cut_that_fails_leaves_classes_and_slots_as_before(padded_before):
    model, x = drawn(lambda: ResNetCIFAR(8, width=6)), images()
    if padded_before:
        graph = padding_graph(model, x)
        cut(model, random_cut(graph, 1), x, graph=graph)
    graph = padding_graph(model, x)
    plan = make_plan(graph, random_cut(graph, 2))
    assert plan.pads
    before = training_state(model)
    broken = Plan(recipe=plan.recipe, keep=plan.keep, shapes={n: (1, *s[1:]) for n, s in plan.shapes.items()}, pads=plan.pads)
    with pytest.raises(ValueError, match="should have shape"):
        broken.cut_module(model)
    unknown = Plan(recipe=plan.recipe, keep=plan.keep, shapes=plan.shapes, pads={**plan.pads, "nothing": Pad(2, (0,))})
    with pytest.raises(AttributeError):
        unknown.cut_module(model)
    after = training_state(model)
    assert same(before["state"], after["state"])
    assert (before["classes"], before["vars"]) == (after["classes"], after["vars"])


def test_training_goes_on_and_the_optimizer_follows():
    model, x = drawn(lambda: ResNetCIFAR(8, width=6)).train(), images(8)
    labels = torch.arange(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    momentum = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}
    graph = padding_graph(model, x)
    plan = cut(model, random_cut(graph, 1), x, graph=graph)
    plan.apply_to(optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], plan.take(name, momentum[name]))
    losses = [step() for _ in range(15)]
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.abs().max() > 0, name


# ---------------------------------------------------------------- which blocks, which sums


def padded_in(model, x):
    return {pad.module for pad in padding_graph(model, x).pads}


def small(body, **parts):
    """A stem of 8 channels, what ``body`` does to them, and a head."""
    head = {"s": conv(3, 8), "n": nn.BatchNorm2d(8), "f": nn.Linear(8, 2)}
    return drawn(lambda: Net(lambda m, x: m.f(body(m, F.relu(m.n(m.s(x)))).mean((2, 3))), **head, **parts))


def test_identity_and_zero_padded_skips_are_padded_back():
    blocks = {f"stage{stage}.{block}.bn2" for stage in (1, 2, 3) for block in range(2)}
    assert padded_in(drawn(lambda: ResNetCIFAR(14, width=4)), images()) == blocks
    assert padded_in(drawn(pre_activation), images()) == {"1.conv2", "2.conv2", "3.conv2"}


def test_projection_skips_stay_tied():
    model, x = torchvision.models.resnet34().eval(), images(1, 32)
    graph = padding_graph(model, x)
    depth = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}
    projected = {f"layer{stage}.0.bn2" for stage in (2, 3, 4)}
    every = {f"{stage}.{block}.bn2" for stage, blocks in depth.items() for block in range(blocks)}
    assert {pad.module for pad in graph.pads} == every - projected
    for stage in (2, 3, 4):
        tied = [group.members for group in graph.groups() if f"layer{stage}.0.conv2" in group.members]
        assert [set(members) for members in tied] == [{f"layer{stage}.0.conv2", f"layer{stage}.0.downsample.0"}]


def test_a_block_that_runs_twice_is_not_padded_back():
    block = Net(lambda m, x: x + m.b(F.relu(m.a(x))), a=conv(8, 6), b=conv(6, 8))
    model = small(lambda m, x: m.d(m.c(m.c(x))), c=block, d=PreActivation(8, 4))
    assert padded_in(model, images()) == {"d.conv2"}
    with pytest.raises(ValueError, match=r"'c\.b' cannot be padded back: it runs more than once"):
        trace(model, lambda: model(images()), pad_back=["c.b"])


def test_what_is_no_module_of_the_network_is_not_padded_back():
    model = drawn(lambda: ResNetCIFAR(8, width=4))
    with pytest.raises(ValueError, match="'nothing' cannot be padded back: ResNetCIFAR has no such module"):
        trace(model, lambda: model(images()), pad_back=["nothing"])


def test_modules_made_in_the_forward_are_passed_over():
    def body(m, x):
        return nn.ReLU()(x + nn.Identity()(m.b(nn.ReLU()(m.a(x)))))

    model = small(body, a=conv(8, 6), b=conv(6, 8))
    graph = padding_graph(model, images())
    assert [pad.module for pad in graph.pads] == ["b"]
    assert [point.tap for point in graph.sums] == [None]  # only a module that is gone took the sum


def test_gated_branches_and_sums_of_three_are_left_tied():
    def gated(m, x):
        return x + m.b(m.a(x)) * torch.sigmoid(m.g(x))

    parts = {"a": conv(8, 6), "b": conv(6, 8), "g": conv(8, 8)}
    assert padded_in(small(gated, **parts), images()) == set()
    assert padded_in(small(lambda m, x: m.a(x) + m.b(x) + x, a=conv(8, 8), b=conv(8, 8)), images()) == set()
    assert padded_in(small(lambda m, x: x + m.a(x) + m.b(x), a=conv(8, 8), b=conv(8, 8)), images()) == {"a", "b"}


def test_keeping_a_channel_whose_slot_goes_is_refused():
    model, x = drawn(lambda: ResNetCIFAR(8, width=4)), images()
    with pytest.raises(ValueError, match=r"keeps channel 2 of layer 'stage1.0.conv2' but removes the channel of the skip"):
        cut(model, Recipe(keep={"conv1": (0, 1), "stage1.0.conv2": (1, 2)}, padded={"stage1.0.bn2": 4}), x)


def test_a_dropout_at_the_end_of_a_block_is_padded_back_on_its_device():
    model = small(lambda m, x: x + m.d(m.a(x)), a=conv(8, 8), d=nn.Dropout(0.5))
    assert padded_in(model, images()) == {"d"}
    pad_modules(model.to("meta"), {"d": Pad(8, (0, 3))})
    assert model.d.slots.device.type == "meta"  # where the network is


def test_taps_are_found_where_a_module_sees_the_sum():
    x = images()
    inside = {"a": conv(8, 8), "r": nn.ReLU(inplace=True)}

    def in_place(m, x):
        out = m.a(x)
        out += x
        return m.r(out)

    (point,) = trace(model := small(in_place, **inside), lambda: model(x)).sums
    assert (point.tap.module, point.tap.side, point.tap.call) == ("r", "input", 0)
    assert point.block == "a"
    assert not point.projection

    def shared(m, x):
        return m.r(m.r(m.b(m.r(x))) + m.r(m.a(x) + x))

    points = trace(model := small(shared, b=conv(8, 8), **inside), lambda: model(x)).sums
    assert [(point.tap.module, point.tap.call) for point in points] == [("r", 2), ("r", 3)]

    (point,) = trace(model := small(lambda m, x: F.relu(m.a(x) + x), **inside), lambda: model(x)).sums
    assert point.tap is None


def test_a_sum_without_a_tap_pools_its_layers():
    model = small(lambda m, x: F.relu(m.a(x) + x), a=conv(8, 8))
    graph = trace(model, lambda: model(images()))
    (group,) = (group for group in graph.groups() if "s" in group.members)
    assert observed(graph, group) is group
    assert set(group.members) == {"s", "a"}


# ---------------------------------------------------------------- the analysis on the sum


def sum_responses(model, batches, stage):
    """Spatial maxima of conv branch plus projection in a stage's first block, before its ReLU, collected by hand."""
    parts, rows = {}, []
    block = model.get_submodule(stage)[0]
    handles = [
        block.bn2.register_forward_hook(lambda module, inputs, output: parts.__setitem__("branch", output.detach().clone())),
        block.downsample.register_forward_hook(lambda m, inputs, output: parts.__setitem__("skip", output.detach().clone())),
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
            for sample in (parts["branch"] + parts["skip"]).numpy():
                rows.append([channel.max() for channel in sample])
    for handle in handles:
        handle.remove()
    return np.array(rows, dtype=np.float64)


def test_the_stream_of_a_projection_is_analysed_on_the_sum():
    model = drawn(torchvision.models.resnet34)
    batches = [images(70, 32, seed=seed) for seed in range(2)]
    analysis = analyze(model, batches)
    by_hand = np.cov(sum_responses(model, batches, "layer2"), rowvar=False)
    spectrum = np.clip(np.sort(np.linalg.eigvalsh(by_hand))[::-1], 0, None)
    spectrum /= spectrum.sum()
    (found,) = (found for found in analysis.spectra.values() if "layer2.0.conv2" in found.group.members)
    assert set(found.group.members) == {"layer2.0.downsample.0", *(f"layer2.{block}.conv2" for block in range(4))}
    np.testing.assert_allclose(found.spectrum.numpy(), spectrum, atol=1e-8)
    width = int(np.searchsorted(np.cumsum(spectrum), 0.9) + 1)
    assert 1 < width < 128
    kept = tuple(sorted(pfa.select_filters(torch.tensor(by_hand), width)))
    recipe = analysis.recipe(energy=0.9)
    # The selection is on positions in the group, which are those of the channels: one group of 128.
    assert all(recipe.keep[name] == kept for name in found.group.members)


def test_a_layer_that_is_padded_back_is_analysed_on_its_own_channels():
    model, x = drawn(pre_activation), images(40)
    cut(model, Recipe(keep={"2.conv2": (0, 2, 3, 5, 6)}, padded={"2.conv2": 8}), x[:2])
    padded = model[2].conv2
    assert isinstance(padded, PaddedBack)
    second = analyze(model, [x], skips="pad")
    with torch.no_grad():
        stream = model[1](model[0](x))
        inner = F.relu(model[2].bn2(model[2].conv1(F.relu(model[2].bn1(stream)))))
        own = F.conv2d(inner, padded.weight, padded.bias, padding=1).amax((2, 3))
    assert own.shape[1] < padded.padded_width
    expected = pfa.spectrum(torch.cov(own.double().T))
    torch.testing.assert_close(second.spectra["2.conv2"].spectrum, expected, rtol=0, atol=1e-6)
    recipe = second.recipe(energy=0.5)
    plan = cut(model, recipe, x[:2], graph=second.graph)
    assert plan.pads["2.conv2"].slots == tuple(model[2].conv2.slots.tolist())
    assert len(plan.pads["2.conv2"].slots) < own.shape[1]


def test_every_padded_block_keeps_a_slot_and_the_skip_its_width(wide):
    model, x = copy.deepcopy(wide[1]), images(100)
    # The two blocks of the first stage add to disjoint halves of the skip, one of them to what matters least.
    graph = padding_graph(model, x)
    order = analyze(model, [x], skips="pad").spectra["conv1"].order.tolist()
    keep = {"stage1.0.conv2": sorted(order[:3])}
    cut(model, Recipe(keep=keep, padded={"stage1.0.bn2": 16}), x[:2])
    analysis = analyze(model, [x], skips="pad")
    order = analysis.spectra["conv1"].order.tolist()
    assert not set(keep["stage1.0.conv2"]) & set(order[-8:])
    recipe = analysis.recipe(energy=1e-9, min_width=8, round_to=8)
    assert len(recipe.keep["conv1"]) == 8
    assert set(order[-7:]) < set(recipe.keep["conv1"])
    assert set(recipe.keep["conv1"]) & set(keep["stage1.0.conv2"])
    plan = cut(model, recipe, x[:2], graph=analysis.graph)
    assert len(plan.pads["stage1.0.bn2"].slots) == 1
    assert graph.pads


def test_an_identity_stream_is_analysed_on_its_last_sum():
    model, x = small(lambda m, x: m.r(m.r(x + m.a(x)) + m.b(x)), a=conv(8, 8), b=conv(8, 8), r=nn.ReLU()), images(64)
    analysis = analyze(model, [x])
    (found,) = analysis.spectra.values()
    with torch.no_grad():
        start = F.relu(model.n(model.s(x)))
        last = F.relu(start + model.a(start)) + model.b(start)
    expected = pfa.spectrum(torch.cov(last.amax((2, 3)).double().T))
    torch.testing.assert_close(found.spectrum, expected, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- round_to


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    model = drawn(lambda: ResNetCIFAR(8, width=16))
    batches = [images(100, 8)]
    return {skips: analyze(model, batches, skips=skips) for skips in ("share", "pad")}, model


@pytest.mark.parametrize("skips", ["share", "pad"])
@pytest.mark.parametrize("target", [{}, {"energy": 0.8}, {"keep_params": 0.5}, {"keep_mult_adds": 0.4}], ids=str)
def test_round_to_gives_multiples_and_stays_below_the_target(wide, skips, target):
    analysis = wide[0][skips]
    recipe = analysis.recipe(round_to=8, **target)
    assert recipe.keep
    for name, kept in recipe.keep.items():
        assert len(kept) % 8 == 0 or len(kept) == recipe.original[name], name
    network = copy.deepcopy(wide[1])
    cut(network, recipe, images(), graph=analysis.graph)
    if "keep_params" in target:
        assert sum(p.numel() for p in network.parameters()) <= 0.5 * sum(p.numel() for p in wide[1].parameters())
    if "keep_mult_adds" in target:
        assert analysis.mult_adds(recipe) <= 0.4 * analysis.mult_adds()


def test_round_to_never_goes_below_what_was_asked(wide):
    for analysis in wide[0].values():
        plain, rounded = analysis.recipe(energy=0.8), analysis.recipe(energy=0.8, round_to=8)
        for name, layer in analysis.graph.layers.items():
            full = len(layer.classes)
            assert rounded.widths.get(name, full) >= plain.widths.get(name, full)


def test_round_to_says_what_cannot_be_reached(wide):
    with pytest.raises(
        ValueError, match=r"cannot be reached: with `min_width=1` and `round_to=8` the smallest network has 0\.\d+"
    ):
        wide[0]["share"].recipe(keep_params=0.01, round_to=8)


# ---------------------------------------------------------------- in a running Trainer


class Residual(LightningModule):
    """A residual network on random images of three classes; knows nothing of the package."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.save_hyperparameters()
        self.net = ResNetCIFAR(8, num_classes=3, width=width)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit_residual(folder, *callbacks, ckpt_path=None, **options):
    seed_everything(1, verbose=False)
    data = TensorDataset(x := images(96, 8, seed=5), x.mean((2, 3)).argmax(1))
    module = Residual()
    pruning = PFAPruning(energy=0.7, every_n_epochs=1, max_cuts=2, **options)
    trainer = new_trainer(folder, pruning, *callbacks, max_epochs=4, enable_checkpointing=True)
    trainer.fit(module, DataLoader(data, 32, shuffle=True), DataLoader(data, 32), ckpt_path=ckpt_path)
    return module, trainer, pruning


@pytest.mark.parametrize("options", [{"skips": "pad"}, {"skips": "pad", "compensate": True, "round_to": 2}], ids=str)
def test_a_padded_run_resumed_between_its_cuts_is_the_same_run(tmp_path, options):
    module, trainer, pruning = fit_residual(tmp_path / "whole", every_epoch(tmp_path / "whole"), **options)
    assert len(pruning.reports) == 2
    assert plan_of(module).pads
    start = tmp_path / "whole" / "epoch=1.ckpt"
    assert torch.load(start, weights_only=True)["lit_compress"]["plan"]["pads"]  # after the first cut, before the second
    resumed, other, again = fit_residual(tmp_path / "resumed", ckpt_path=start, **options)
    assert len(again.reports) == 2
    assert same(dict(module.state_dict()), dict(resumed.state_dict()))
    assert same(trainer.optimizers[0].state_dict(), other.optimizers[0].state_dict())
    assert plan_of(module) == plan_of(resumed)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_pruned(Residual, tmp_path / "last.ckpt").eval()
    assert alike(loaded, module.eval(), images())


def test_a_padded_cut_that_fails_in_the_trainer_leaves_no_trace(tmp_path):
    class FailsAfterTheSecond(PFAPruning):
        measured = failed = 0

        def cut_now(self, trainer, pl_module):
            if not self.reports:
                return super().cut_now(trainer, pl_module)
            classes = [type(module) for module in pl_module.modules()]
            assert PaddedBack in {kind.__mro__[1] for kind in classes}
            with leaving_no_trace(trainer, pl_module), pytest.raises(RuntimeError, match="after the cut"):
                super().cut_now(trainer, pl_module)
            self.failed += 1
            assert classes == [type(module) for module in pl_module.modules()]
            return None

        def _validate(self, *args):
            self.measured += 1
            if self.measured == 4:
                raise RuntimeError("after the cut")
            return super()._validate(*args)

    seed_everything(1, verbose=False)
    data = TensorDataset(x := images(96, 8, seed=5), x.mean((2, 3)).argmax(1))
    pruning = FailsAfterTheSecond(energy=0.7, every_n_epochs=1, max_cuts=2, skips="pad", compensate=True)
    new_trainer(tmp_path, pruning, max_epochs=3).fit(Residual(), DataLoader(data, 32), DataLoader(data, 32))
    assert pruning.failed == 1


@needs_averaging
def test_a_weight_average_follows_a_padded_cut(tmp_path):
    average = pytorch_lightning.callbacks.WeightAveraging(use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    module, _, _ = fit_residual(tmp_path, average, skips="pad")
    pads = plan_of(module).pads
    assert pads
    for path, pad in pads.items():
        assert tuple(average._average_model.module.get_submodule(path).slots.tolist()) == pad.slots
