"""Recipes are plain data: they compose like index arrays, survive every way of storing them, and refuse nonsense by name."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress import Recipe
from lit_compress.naming import relocation

LAYERS = ("conv1", "layer1.0.conv", "fc", "", 'größe ≤ "x"\n')  # any text is a name


@st.composite
def cuts_in_a_row(draw, number=3):
    """Recipes each made on the network that the ones before have cut, with or without fingerprints."""
    widths = draw(st.dictionaries(st.sampled_from(LAYERS), st.integers(1, 9), min_size=1))
    with_original = draw(st.booleans())
    recipes = []
    for _ in range(number):
        keep = {}
        for layer in draw(st.sets(st.sampled_from(sorted(widths)))):
            keep[layer] = tuple(sorted(draw(st.sets(st.integers(0, widths[layer] - 1), min_size=1))))
        method = draw(st.sampled_from(["a", "b", "c"]))
        recipes.append(Recipe(keep=keep, method=method, original=widths if with_original else {}))
        widths = {**widths, **recipes[-1].widths}
    return recipes


@given(cuts_in_a_row())
def test_which_cuts_are_joined_first_makes_no_difference(recipes):
    a, b, c = recipes
    assert a.then(b).then(c) == a.then(b.then(c))


@given(cuts_in_a_row(number=2))
def test_two_cuts_keep_what_indexing_twice_keeps(recipes):
    first, second = recipes
    both = first.then(second)
    assert set(both.keep) == {*first.keep, *second.keep}
    for layer in both.keep:
        channels = np.arange(9)
        for recipe in recipes:
            channels = channels[list(recipe.keep[layer])] if layer in recipe.keep else channels
        assert both.keep.get(layer) == tuple(channels)
    assert both.original == first.original


@given(cuts_in_a_row(number=1))
@settings(max_examples=50)
def test_every_way_of_storing_a_recipe_gives_it_back(tmp_path_factory, recipes):
    (recipe,) = recipes
    path = tmp_path_factory.getbasetemp() / "recipe.json"
    recipe.save(path)
    assert Recipe.load(path) == recipe
    assert Recipe.load(str(path)).method == recipe.method
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert copy.deepcopy(recipe) == recipe


def test_a_checkpoint_may_hold_a_recipe_and_still_be_loaded_safely(tmp_path):
    recipe = Recipe(keep={"conv1": torch.tensor([0, 3])}, original={"conv1": np.int64(4)})
    torch.save(recipe.to_dict(), tmp_path / "recipe.pt")
    assert Recipe.from_dict(torch.load(tmp_path / "recipe.pt", weights_only=True)) == recipe


def test_the_file_has_one_layer_a_line(tmp_path):
    Recipe(keep={"conv1": (0, 3), "conv2": (1,)}, method="by hand").save(tmp_path / "recipe.json")
    lines = (tmp_path / "recipe.json").read_text().splitlines()
    assert '    "conv1": [0, 3],' in lines
    assert '    "conv2": [1]' in lines


def test_a_recipe_cannot_be_edited():
    keep = {"conv1": [0, 3]}
    recipe = Recipe(keep=keep)
    keep["conv1"].append(4)
    keep["conv2"] = [0]
    assert dict(recipe.keep) == {"conv1": (0, 3)}
    with pytest.raises(TypeError):
        recipe.keep["conv1"] = (0,)


def test_a_method_is_written_down_once_for_each_cut_that_removed_something():
    nothing, first, second = (
        Recipe(keep={}, method="-"),
        Recipe(keep={"a": (0, 1)}, method="1"),
        Recipe(keep={"a": (0,)}, method="2"),
    )
    assert first.then(second).method == "1 then 2"
    assert nothing.then(first).then(nothing).method == "1"


def test_the_same_method_many_times_is_said_once():
    first, second = Recipe(keep={"a": (0, 1)}, method="pib(C), and so on"), Recipe(keep={"a": (0, 1)}, method="2 times")
    assert first.then(first).then(first).then(second).method == "pib(C), and so on, 3 times then 2 times"
    pair = first.then(second)
    left, right = first.then(pair).then(pair).method, first.then(pair.then(pair)).method
    assert left == right == "pib(C), and so on, 2 times then 2 times then pib(C), and so on then 2 times"


def test_a_layer_that_only_the_second_forward_ran_joins_the_fingerprint():
    first = Recipe(keep={"a": (0, 2)}, original={"a": 4, "b": 5})
    both = first.then(Recipe(keep={"head": (1,)}, original={"a": 2, "head": 3}))
    assert dict(both.original) == {"a": 4, "b": 5, "head": 3}


@pytest.mark.parametrize(
    ("following", "said"),
    [
        (Recipe(keep={"a": (2,)}), r"Layer 'a' was cut to 2 channels but would keep channel 2"),
        (Recipe(keep={"a": (0,)}, original={"a": 4}), r"made on 4 channels of layer 'a', but this one leaves 2"),
        (Recipe(keep={}, original={"b": 4}), r"made on 4 channels of layer 'b', but this one leaves 5"),
    ],
)
def test_a_recipe_that_cannot_follow_is_refused(following, said):
    with pytest.raises(ValueError, match=said):
        Recipe(keep={"a": (0, 3)}, original={"a": 4, "b": 5}).then(following)


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        ((), "'conv1' would keep no channel"),
        ((0, 0), r"'conv1' must be non-negative and ascend without repeats but got \(0, 0\)"),
        ((2, 1), "ascend without repeats"),
        ((-1, 1), "non-negative"),
        ((0, 1.0), r"'conv1' must be integers but got 1\.0"),
        ((True, False), "integers but got True"),
        (np.array([True, False]), "integers but got"),
        (torch.tensor([True, False]), "integers but got"),
        (torch.tensor([0.0, 1.0]), "integers but got"),
        (("0", "1"), "integers but got '0'"),
        (None, "'conv1' must keep a list of channel indices but got None"),
        (3, "'conv1' must keep a list of channel indices but got 3"),
        ((0, 4), "'conv1' has 4 channels but would keep channel 4"),
    ],
    ids=str,
)
def test_nonsense_channels_are_refused_by_layer(channels, said):
    with pytest.raises(ValueError, match=said):
        Recipe(keep={"conv1": channels}, original={"conv1": 4})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keep": ["conv1"]}, r"`keep` must map layer names but got \['conv1'\]"),
        ({"keep": {3: (0,)}}, r"`keep` must map layer names but got \{3: \(0,\)\}"),
        ({"keep": {}, "original": [4]}, r"`original` must map layer names but got \[4\]"),
        ({"keep": {}, "original": {"conv1": 4.5}}, r"'conv1' must be integers but got 4\.5"),
        ({"keep": {"conv2": (0,)}, "original": {"conv1": 4}}, r"'conv2' is in `keep` but not in `original`"),
    ],
    ids=str,
)
def test_nonsense_fields_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Recipe(**fields)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "recipe.json is not a recipe"),
        ("{", "recipe.json is not a recipe"),
        ("[1, 2]", "Expected a recipe with a field `keep`"),
        ('{"method": "x"}', "Expected a recipe with a field `keep`"),
        ('{"keep": [0]}', "Expected a recipe with a field `keep`"),
        ('{"format": 2, "keep": {}}', "has format 2 but this version of lit-compress reads formats up to 1; upgrade"),
        ('{"keep": {"a": [0, 1]}, "original": {"a": 1}}', "'a' has 1 channels but would keep channel 1"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, said):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        Recipe.load(tmp_path / "recipe.json")


def test_a_recipe_moves_between_a_network_and_the_module_that_holds_it():
    recipe = Recipe(keep={"net.a": (0,), "head": (1,)}, original={"net.a": 2, "head": 2})
    inner = recipe.renamed(drop="net.")
    assert (dict(inner.keep), dict(inner.original)) == ({"a": (0,)}, {"a": 2})
    assert dict(inner.renamed(add="model.net.").keep) == {"model.net.a": (0,)}


@pytest.mark.parametrize(
    ("names", "present", "expected"),
    [
        (["a", "b.c"], ["a", "b.c", "d"], ("", "")),
        (["a", "b.c"], ["net.a", "net.b.c", "loss"], ("net.", "")),
        (["net.a", "net.b"], ["a", "b"], ("", "net.")),
        (["x.y.a"], ["a"], ("", "x.y.")),
        ([], ["a"], ("", "")),
        (["a"], ["net.a", "ema.a"], None),  # of two copies, neither is guessed
        (["a", "b"], ["net.a", "ema.b"], None),
        (["a"], ["nota"], None),
        (["net.a", "b"], ["a", "b"], None),
    ],
    ids=str,
)
def test_names_are_found_again_only_where_there_is_one_way(names, present, expected):
    assert relocation(names, present) == expected
