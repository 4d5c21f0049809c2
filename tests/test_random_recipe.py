"""Random recipes, which methods are compared with, and the callback that prunes by them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lit_compress import analyze, count_parameters, cut
from lit_compress.callbacks import RandomPruning
from tests.modules import Small, new_trainer, small_loaders


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


def test_layers_left_out_stay_whole_and_widths_are_multiples():
    for seed in range(10):
        recipe = ANALYSIS.random_recipe(keep_params=0.8, seed=seed, round_to=4, exclude=["3"])
        assert recipe.keep.keys() <= {"0"}
        assert recipe.widths.get("0", 12) in (4, 8, 12)
        assert len(ANALYSIS.random_recipe(keep_params=0.5, seed=seed, min_width=5).keep["3"]) >= 5


@pytest.mark.parametrize(("share", "said"), [(0, "must lie in"), (1.0, "must lie in"), (0.001, "cannot be reached")])
def test_a_size_that_cannot_be_is_refused(share, said):
    with pytest.raises(ValueError, match=said):
        ANALYSIS.random_recipe(keep_params=share, seed=0)


def pruned(folder, **options):
    """A small network after a run with `RandomPruning`, and the callback."""
    module, pruning = Small(), RandomPruning(**options)
    new_trainer(folder, pruning, max_epochs=4).fit(module, *small_loaders())
    return module, pruning


def test_a_trainer_prunes_at_random_to_the_size(tmp_path):
    whole = count_parameters(Small())
    module, pruning = pruned(tmp_path, keep_params=0.4, seed=3, at_epoch=1)
    assert count_parameters(module) == pruning.reports[0].after.parameters <= 0.4 * whole
    assert pruning.reports[0].recipe.method == "random(keep_params=0.4, seed=3)"
    recipes = {str(pruned(tmp_path, keep_params=0.4, seed=seed, at_epoch=1)[1].reports[0].recipe.keep) for seed in (3, 3, 4)}
    assert len(recipes) == 2


def test_several_random_cuts_reach_the_size_in_equal_ratios(tmp_path):
    whole = count_parameters(Small())
    _, pruning = pruned(tmp_path, keep_params=0.4, every_n_epochs=1, max_cuts=2, exclude=["net.0"])
    sizes = [report.after.parameters / whole for report in pruning.reports]
    assert 0.4 < sizes[0] <= 0.4**0.5
    assert sizes[1] <= 0.4
    assert all(report.recipe.keep.keys() == {"net.2"} for report in pruning.reports)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep_params": 1.0}, r"`keep_params` must lie in \(0, 1\) but got 1.0"),
        ({"keep_params": 0.5, "seed": -1}, "`seed` must"),
    ],
)
def test_what_cannot_be_pruned_is_refused(options, said):
    with pytest.raises(MisconfigurationException, match=said):
        RandomPruning(**options)
