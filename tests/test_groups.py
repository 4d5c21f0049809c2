"""A convolution in groups, cut again and again until it is depthwise or plain, is loaded, put back and timed as it was."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from lit_compress import Recipe, cut, load_pruned
from lit_compress.checkpoint import rebuild, write_plan
from lit_compress.graph import trace
from lit_compress.latency import Stopwatch
from lit_compress.plan import plan_of
from lit_compress.snapshot import Snapshot
from tests.networks import clone, conv, random_recipe, relative_error, removed_by, zeroed

IMAGES = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)).double()
LAYERS = {
    "groups of one size": lambda: conv(8, 8, groups=4),
    "groups with a multiplier": lambda: conv(8, 16, groups=4),
    "two groups": lambda: conv(8, 16, groups=2),
    "depthwise": lambda: conv(8, 8, groups=8),
    "depthwise with a multiplier": lambda: conv(8, 24, groups=8),
    "not in groups": lambda: conv(8, 12),
}


def build(layer):
    torch.manual_seed(0)
    middle = LAYERS[layer]()
    return nn.Sequential(conv(1, 8), nn.ReLU(), middle, nn.Tanh(), conv(middle.out_channels, 2)).double()


@pytest.fixture(params=[(layer, seed) for layer in LAYERS for seed in range(2)], ids=str)
def states(request):
    """A network before and after each of up to three cuts, all as copies; each cut is exact."""
    layer, seed = request.param
    network = build(layer)
    states = [copy.deepcopy(network)]
    for number in range(3):
        graph = trace(network, lambda: network(IMAGES))
        if groups := graph.groups():
            plan = cut(network, random_recipe(groups, 10 * seed + number, share=1.0), IMAGES, graph=graph)
            if plan.keep:
                expected = zeroed(states[-1], removed_by(plan), lambda network: network(IMAGES))
                assert relative_error(clone(network(IMAGES)), expected) < 1e-10  # float64
                states.append(copy.deepcopy(network))
    assert len(states) > 2
    return layer, states


def same(found, expected):
    """In sizes, by name, and in what they compute."""
    return repr(found) == repr(expected) and torch.equal(found(IMAGES), expected(IMAGES))


def test_each_state_loads_from_a_checkpoint_and_from_its_weights_and_recipe(states):
    layer, cuts = states
    for state in cuts[1:]:
        checkpoint = {"state_dict": state.state_dict()}
        write_plan(state, checkpoint)
        assert same(load_pruned(build(layer), checkpoint), state)
        assert same(load_pruned(build(layer), state.state_dict(), recipe=plan_of(state).recipe), state)


def test_a_network_cut_before_is_cut_further_to_a_checkpoint(states):
    _, cuts = states
    for before, after in pairwise(cuts[1:]):
        checkpoint, resumed = {}, copy.deepcopy(before)
        write_plan(after, checkpoint)
        rebuild(resumed, checkpoint)
        assert repr(resumed) == repr(after)


def test_each_state_is_put_back_also_where_the_network_never_was_in_it(states):
    layer, cuts = states
    loaded = load_pruned(build(layer), cuts[-1].state_dict(), recipe=plan_of(cuts[-1]).recipe)
    for network in (cuts[-1], loaded):
        for state in (*cuts[:-1], cuts[-1], cuts[1]):
            state = copy.deepcopy(state)
            Snapshot.of(state).restore(network)
            assert same(network, state)


def test_the_original_is_timed_at_the_sizes_that_it_had(states):
    _, cuts = states
    for before, after in pairwise(cuts):
        seen = []
        network = copy.deepcopy(before)
        run = lambda network, x, seen=seen: seen.append(repr(network)) or network(x)  # noqa: E731
        stopwatch = Stopwatch(network, IMAGES, forward_fn=run, seconds=1e-3)
        stopwatch.look_back(cut(network, between(before, after), IMAGES))
        assert set(seen) == {repr(before), repr(after)}


def between(before, after):
    """The recipe of the cut between two states, told by the biases."""
    biases = {name: (before.get_submodule(name).bias.tolist(), after.get_submodule(name).bias.tolist()) for name in ("0", "2")}
    return Recipe(keep={name: [old.index(value) for value in new] for name, (old, new) in biases.items()})
