"""Random recipes, which methods are compared with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress import analyze, count_parameters, cut


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(160, 4)
    )


IMAGES = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
ANALYSIS = analyze(network(), [IMAGES])


@settings(max_examples=30)
@given(share=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_a_random_recipe_is_at_or_below_its_size_on_the_real_network(share, seed):
    net = network()
    whole = count_parameters(net)
    cut(net, ANALYSIS.random_recipe(keep_params=share, seed=seed), IMAGES[:1], graph=ANALYSIS.graph)
    assert count_parameters(net) <= share * whole


def test_it_comes_close_to_its_size_and_differs_from_seed_to_seed():
    recipes = [ANALYSIS.random_recipe(keep_params=0.5, seed=seed) for seed in range(20)]
    whole = ANALYSIS.parameters()
    # One channel of the second convolution, 9 * 12 + 1 of its own and 4 * 16 of the classifier's weights, is the coarsest step.
    assert all(0.5 * whole - 173 < ANALYSIS.parameters(recipe) <= 0.5 * whole for recipe in recipes)
    assert len({tuple(recipe.widths.items()) for recipe in recipes}) > 5
    assert recipes[3] == ANALYSIS.random_recipe(keep_params=0.5, seed=3)
    kept = {channel for recipe in recipes for channel in recipe.keep.get("0", ())}
    assert kept == set(range(12)), "some channel is never kept"


@pytest.mark.parametrize(("share", "said"), [(0, "must lie in"), (1.0, "must lie in"), (0.001, "cannot be reached")])
def test_a_size_that_cannot_be_is_refused(share, said):
    with pytest.raises(ValueError, match=said):
        ANALYSIS.random_recipe(keep_params=share, seed=0)
