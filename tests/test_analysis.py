"""`analyze` and what can be asked of it: targets on the really cut network, patterns, odd data, and nothing left behind."""

import copy
import re

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lit_compress import Recipe, analyze, count_mult_adds, count_parameters, cut
from lit_compress.graph import ChannelGroup
from lit_compress.models import ResNetCIFAR
from lit_compress.selection import pfa
from lit_compress.spectra import pooled_covariance
from tests.modules import digits, rng_states, same
from tests.networks import Net, randomized


def chain():
    """Convolutions, a flatten that spreads each channel over 4 inputs, and linear layers."""
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 10))


def projection():
    """A residual sum of a block and a projection, whose channels are cut together."""
    parts = {"stem": nn.Conv2d(1, 6, 3), "one": nn.Conv2d(6, 10, 3, padding=1), "two": nn.Conv2d(10, 8, 3, padding=1)}
    parts |= {"skip": nn.Conv2d(6, 8, 1), "head": nn.Linear(8, 10)}

    def forward(m, x):
        x = m.stem(x).relu()
        x = (m.two(m.one(x).relu()) + m.skip(x)).relu()
        return m.head(x.mean((2, 3)))

    return Net(forward, **parts)


NETWORKS = {"chain": chain, "projection": projection, "option A": lambda: ResNetCIFAR(8, in_channels=1, width=4)}
IMAGES = digits(0, 120).tensors[0]
made = {}


def analysed(name, skips="share"):
    """Network and analysis, made once."""
    if (name, skips) not in made:
        torch.manual_seed(0)
        network = randomized(NETWORKS[name](), seed=1)
        made[name, skips] = network, analyze(network, [IMAGES], skips=skips)
    return made[name, skips]


def really_cut(network, recipe, example=IMAGES[:1]):
    network = copy.deepcopy(network)
    cut(network, recipe, example, verify=False)
    return network


SIZES = {
    "keep_params": count_parameters,
    "keep_mult_adds": lambda network: count_mult_adds(network, IMAGES[:1]),
}


def ladder(name, target, skips="share", **limits):
    """Every size that the energy path has, counted on networks that were really cut, ascending."""
    key = (name, target, skips, *limits.items())
    if key not in made:
        network, analysis = analysed(name, skips)
        energies = {1.0}.union(*(found.spectrum.cumsum(0).clamp(max=1).tolist() for found in analysis.spectra.values()))
        recipes = {str(sorted(recipe.keep.items())): recipe for e in energies for recipe in [analysis.recipe(energy=e, **limits)]}
        made[key] = sorted(SIZES[target](really_cut(network, recipe)) for recipe in recipes.values())
    return made[key]


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("target", SIZES)
@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=25)
@given(share=st.floats(0.02, 0.98))
def test_a_target_is_the_widest_step_of_the_energy_path_at_or_below_it(name, target, share):
    network, analysis = analysed(name)
    sizes, whole = ladder(name, target), SIZES[target](network)
    assert len(sizes) > 10, "too few steps to tell one from the next"
    allowed = [size for size in sizes if size <= share * whole]
    if not allowed:
        with pytest.raises(ValueError, match=re.escape(f"smallest network has {sizes[0] / whole:.4f} of the original's {whole}")):
            analysis.recipe(**{target: share})
        return
    recipe = analysis.recipe(**{target: share})
    assert SIZES[target](really_cut(network, recipe)) == allowed[-1]
    assert recipe.method == f"pfa({target}={share:g})"


@pytest.mark.parametrize("target", SIZES)
@pytest.mark.parametrize(("name", "skips"), [*((name, "share") for name in NETWORKS), ("option A", "pad")])
@settings(max_examples=15)
@given(share=st.floats(0.02, 0.98), multiple=st.sampled_from([2, 3, 8]), least=st.sampled_from([1, 3]))
def test_rounded_to_any_multiple_a_target_is_met_as_closely_as_the_path_allows(name, skips, target, share, multiple, least):
    network, analysis = analysed(name, skips)
    limits = {"round_to": multiple, "min_width": least}
    sizes, whole = ladder(name, target, skips, **limits), SIZES[target](network)
    allowed = [size for size in sizes if size <= share * whole]
    if not allowed:
        with pytest.raises(ValueError, match=re.escape(f"smallest network has {sizes[0] / whole:.4f} of the original's {whole}")):
            analysis.recipe(**{target: share}, **limits)
        return
    recipe = analysis.recipe(**{target: share}, **limits)
    assert SIZES[target](really_cut(network, recipe)) == allowed[-1] <= share * whole
    if skips == "share":  # a padded block keeps no more than its skip has left it
        for layer, found in analysis.spectra.items():  # a layer that a zero-padded skip ties in parts has each part rounded
            position = found.group.members[found.group.name]
            kept = sum(position[list(recipe.keep.get(found.group.name, range(len(position))))] >= 0)
            assert kept % multiple == 0 or kept == len(found.order), layer


@pytest.mark.parametrize("name", NETWORKS)
def test_sizes_told_beforehand_are_those_of_the_cut_network(name):
    network, analysis = analysed(name)
    assert analysis.parameters() == count_parameters(network)
    assert analysis.mult_adds() == count_mult_adds(network, IMAGES[:1])
    for recipe in (analysis.recipe(), analysis.recipe(energy=0.8), analysis.recipe(energy=0.3, min_width=3)):
        small = really_cut(network, recipe)
        assert analysis.parameters(recipe) == count_parameters(small) < analysis.parameters()
        assert analysis.mult_adds(recipe) == count_mult_adds(small, IMAGES[:1]) < analysis.mult_adds()
        table = analysis.preview(recipe)
        assert table.sizes["parameters"] == (analysis.parameters(), count_parameters(small))
        assert [row.name for row in table.rows] == [
            name for name, layer in network.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))
        ]
        for row in table.rows:
            layer = small.get_submodule(row.name)
            assert row.kept == len(layer.weight)
            assert row.parameters_kept == layer.weight.numel()
        assert "output of the network" in str(table)


def test_sizes_are_for_one_sample_whatever_the_example():
    network, _ = analysed("chain")
    one, five = (analyze(network, [IMAGES], example_inputs=IMAGES[:n]) for n in (1, 5))
    assert one.mult_adds() == five.mult_adds() == count_mult_adds(network, IMAGES[:1])
    # 8 filters of 3x3 over 6x6, 12 of 8x3x3 over 4x4, and two matrices
    assert one.mult_adds() == 8 * 9 * 36 + 12 * 72 * 16 + 48 * 16 + 16 * 10


def test_a_torchvision_network_meets_a_target():
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=7)
    images = torch.randn(512, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    analysis = analyze(network, DataLoader(TensorDataset(images), 64))
    assert set(analysis.whole) == {"fc"}
    recipe = analysis.recipe(keep_mult_adds=0.4)
    small = really_cut(network, recipe, images[:1])
    whole = count_mult_adds(network, images[:1])
    assert count_mult_adds(small, images[:1]) == analysis.mult_adds(recipe) <= 0.4 * whole
    assert count_parameters(small) == analysis.parameters(recipe)

    steps = np.unique(np.concatenate([found.spectrum.cumsum(0).clamp(max=1) for found in analysis.spectra.values()]))
    kept = sum(recipe.widths.values())
    low, high = 0, len(steps) - 1  # to the first step that keeps more
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if sum(analysis.recipe(energy=steps[middle]).widths.values()) > kept else (middle + 1, high)
    wider = analysis.recipe(energy=steps[low])
    assert count_mult_adds(really_cut(network, wider, images[:1]), images[:1]) > 0.4 * whole


@given(one=st.floats(0.01, 1), other=st.floats(0.01, 1))
@settings(max_examples=25)
def test_more_energy_keeps_all_that_less_energy_keeps(one, other):
    _, analysis = analysed("option A")
    less, more = (analysis.recipe(energy=energy) for energy in sorted((one, other)))
    for layer, width in more.original.items():
        assert set(less.keep.get(layer, range(width))) <= set(more.keep.get(layer, range(width)))


def test_fractions_are_of_the_network_that_was_never_cut():
    network, analysis = copy.deepcopy(analysed("option A"))
    parameters, mult_adds = count_parameters(network), count_mult_adds(network, IMAGES[:1])
    cut(network, analysis.recipe(keep_params=0.6), IMAGES[:1])
    again = analyze(network, [IMAGES])
    assert again.parameters() == count_parameters(network) < parameters
    assert again.original("parameters") == parameters
    assert again.original("mult_adds") == mult_adds
    for target, whole in (("keep_params", parameters), ("keep_mult_adds", mult_adds)):
        recipe = again.recipe(**{target: 0.3})
        assert 0.2 * whole < SIZES[target](really_cut(network, recipe)) <= 0.3 * whole


def test_frozen_parameters_do_not_count():
    network = copy.deepcopy(analysed("chain")[0])
    network[0].requires_grad_(False)
    analysis = analyze(network, [IMAGES])
    assert analysis.parameters() == count_parameters(network) == count_parameters(network, trainable=False) - 80
    recipe = analysis.recipe(keep_params=0.5)
    assert count_parameters(really_cut(network, recipe)) == analysis.parameters(recipe) <= 0.5 * analysis.parameters()


# ---------------------------------------------------------------- what may be cut


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("width", [2, 5])
def test_no_layer_gets_narrower_than_the_least(name, width):
    network, analysis = analysed(name)
    small = really_cut(network, analysis.recipe(energy=0.01, min_width=width))
    before, after = ({n: len(m.weight) for n, m in net.named_modules() if hasattr(m, "weight")} for net in (network, small))
    assert all(after[layer] >= min(width, before[layer]) for layer in before)
    assert any(after[layer] == width for layer in before)


def test_patterns_choose_layers_and_tied_ones_need_all():
    _, analysis = analysed("projection")

    def layers(**patterns):
        return set(analysis.recipe(energy=0.3, **patterns).keep)

    assert layers() == {"stem", "one", "two", "skip"}
    assert layers(include=["stem"]) == {"stem"}
    assert layers(include=["s*"]) == {"stem"}, "`skip` is tied to `two`, which was not included"
    assert layers(include=["t*", "skip"]) == {"two", "skip"}
    assert layers(exclude=["skip"]) == {"stem", "one"}
    assert layers(include=["*"], exclude=["*e*"]) == {"two", "skip"}


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(where):
    _, analysis = analysed("projection")
    with pytest.raises(ValueError, match=r"Pattern 'layer1.*' matches no layer; the layers are stem, skip|stem, one"):
        analysis.recipe(energy=0.5, **{where: ["one", "layer1.*"]})


def test_leaving_everything_out_makes_a_target_unreachable():
    _, analysis = analysed("chain")
    with pytest.raises(ValueError, match=r"cannot be reached: .* the smallest network has 1\.0000 of the original's"):
        analysis.recipe(keep_params=0.9, exclude=["*"])
    assert analysis.recipe(energy=0.5, exclude=["*"]).keep == {}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"energy": 0.0}, r"`energy` must lie in \(0, 1\] but got 0.0"),
        ({"energy": 1.5}, r"`energy` must lie in \(0, 1\] but got 1.5"),
        ({"keep_params": 1.0}, r"`keep_params` must lie in \(0, 1\) but got 1.0"),
        ({"keep_mult_adds": -0.1}, r"`keep_mult_adds` must lie in \(0, 1\) but got -0.1"),
        ({"energy": 0.5, "keep_params": 0.5}, r"at most one of .* but got \['energy', 'keep_params'\]"),
        ({"min_width": 0}, "`min_width` must be at least 1 but got 0"),
    ],
)
def test_refuses_senseless_requests(options, text):
    with pytest.raises(ValueError, match=text):
        analysed("chain")[1].recipe(**options)


def test_refuses_an_unknown_method_and_the_targets_of_others():
    with pytest.raises(ValueError, match=r"one of \['magnitude', 'pfa', 'pib', 'slimming'\] or a Method but got 'none'"):
        analyze(chain(), [IMAGES], method="none")
    with pytest.raises(
        ValueError, match="`keep_channels` is no target of pfa: give `energy`, `keep_params`, `keep_mult_adds` or"
    ):
        analyze(chain(), [IMAGES]).recipe(keep_channels=0.5)
    with pytest.raises(ValueError, match="`energy` is no target of magnitude: give `keep_channels`"):
        analyze(chain(), [IMAGES], method="magnitude").recipe(energy=0.5)


# ---------------------------------------------------------------- responses


def linear(inputs, width, outputs=3):
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def inputs_of(count, size=6, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


class Spectral(nn.Module):
    """Two complex layers between real ones."""

    def __init__(self):
        super().__init__()
        self.inside, self.outside = nn.Linear(6, 8), nn.Linear(5, 3)
        self.one, self.two = nn.Linear(8, 7, dtype=torch.cfloat), nn.Linear(7, 5, dtype=torch.cfloat)

    def forward(self, x):
        return self.outside(self.two(self.one(self.inside(x).relu().to(torch.cfloat))).abs())


def test_layers_of_complex_numbers_stay_whole_and_say_so():
    torch.manual_seed(0)
    network, inputs = Spectral(), inputs_of(64)
    analysis = analyze(network, [inputs])
    assert analysis.whole["one"] == analysis.whole["two"] == "its responses are complex numbers"
    recipe = analysis.recipe(energy=0.8)
    assert set(recipe.keep) == {"inside"}
    cut(network, recipe, inputs)
    assert network.one.weight.shape == (7, recipe.widths["inside"])


def test_too_few_samples_leave_a_layer_whole_and_say_so():
    network = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))
    analysis = analyze(network, [inputs_of(8)])
    assert analysis.samples == 8
    assert analysis.whole["2"] == "its 9 channels need at least as many samples to have a spectrum, but it saw 8"
    assert set(analysis.recipe(energy=0.5).keep) == {"0"}
    assert set(analyze(network, [inputs_of(9)]).recipe(energy=0.5).keep) == {"0", "2"}
    said = "cannot be reached: .* 3 of 3 layers are left whole; the largest of them is '2': its 9 channels need .* but it saw 3"
    with pytest.raises(ValueError, match=said):
        analyze(network, [inputs_of(3)]).recipe(keep_params=0.5)


def test_constant_responses_leave_a_layer_whole():
    network = linear(6, 8)
    nn.init.zeros_(network[0].weight)
    analysis = analyze(network, [inputs_of(50)])
    assert analysis.whole["0"] == "its responses are constant on these data"
    assert analysis.recipe().keep == {}


def test_channels_that_never_vary_all_go_even_below_the_width():
    torch.manual_seed(0)
    network = linear(6, 8)
    with torch.no_grad():
        network[0].weight[[1, 4, 6]] = 0
        network[0].bias[4] = 100  # constant, but not zero
    analysis = analyze(network, [inputs_of(200)])
    assert analysis.recipe(energy=1.0).keep["0"] == (0, 2, 3, 5, 7)
    assert set(analysis.recipe(energy=0.3).keep["0"]) < {0, 2, 3, 5, 7}
    assert len(analysis.recipe(energy=1.0, min_width=7).keep["0"]) == 7


def test_a_layer_of_one_channel_stays():
    analysis = analyze(linear(6, 1), [inputs_of(50)])
    assert analysis.recipe(energy=0.1).keep == {}
    with pytest.raises(ValueError, match="cannot be reached"):
        analysis.recipe(keep_params=0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_response_that_is_not_finite_names_its_layer(bad):
    network = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        network[2].bias[3] = bad
    with pytest.raises(ValueError, match=r"Layer '2' cannot be analysed: Responses must be finite but channels \[3\]"):
        analyze(network, [inputs_of(50)])
    assert not network[2]._forward_hooks


@pytest.mark.parametrize("split", [(120,), (1, 119), (50, 50, 20), (7,) * 17 + (1,)], ids=str)
def test_the_split_into_batches_does_not_change_a_recipe(split):
    # In float64: a convolution in float32 rounds in other ways for another batch size.
    network = copy.deepcopy(analysed("option A")[0]).double()
    analysis, other = (analyze(network, IMAGES.double().split(sizes)) for sizes in (120, split))
    assert other.samples == 120
    for options in ({}, {"energy": 0.7}, {"keep_params": 0.4}):
        assert other.recipe(**options) == analysis.recipe(**options)
    for name, found in analysis.spectra.items():
        torch.testing.assert_close(other.spectra[name].spectrum, found.spectrum, rtol=1e-9, atol=1e-12)


def test_tied_layers_pool_their_covariances_as_a_slow_version_does():
    """Of the projection net: those of `two` and `skip`, each scaled to a total variance of 1, and summed."""
    network, analysis = analysed("projection")
    responses = {}
    handles = [
        network.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: responses.__setitem__(name, out))
        for name in ("stem", "one", "two", "skip")
    ]
    with torch.no_grad():
        network.eval()(IMAGES)
    for handle in handles:
        handle.remove()
    covariance = {name: np.cov(out.double().numpy().max((2, 3)).T) for name, out in responses.items()}
    pooled = sum(covariance[name] / np.trace(covariance[name]) for name in ("two", "skip"))
    for layers, expected in ((["stem"], covariance["stem"]), (["one"], covariance["one"]), (["two", "skip"], pooled)):
        shares = np.sort(np.linalg.eigvalsh(expected))[::-1] / np.trace(expected)
        found = next(found for found in analysis.spectra.values() if set(found.group.members) == set(layers))
        np.testing.assert_allclose(found.spectrum.numpy(), shares, atol=1e-9)
        width = int((np.cumsum(shares) < 0.8).sum()) + 1
        keep = tuple(pfa.select_filters(torch.from_numpy(expected), width).tolist())
        for layer in layers:
            assert analysis.recipe(energy=0.8).keep[layer] == keep


def test_a_layer_tied_in_parts_is_pooled_in_parts():
    """To the halves of `wide`, `left` and `right` are added. Two groups of channels start with `wide`, and both are cut."""
    parts = {"wide": nn.Conv2d(1, 8, 3), "left": nn.Conv2d(1, 4, 3), "right": nn.Conv2d(1, 4, 3), "head": nn.Linear(8, 2)}
    torch.manual_seed(0)
    network = Net(lambda m, x: m.head((m.wide(x) + torch.cat([m.left(x), m.right(x)], 1)).relu().mean((2, 3))), **parts)
    analysis = analyze(network, [IMAGES])
    with torch.no_grad():
        covariance = {
            name: np.cov(network.get_submodule(name)(IMAGES).amax((2, 3)).double().numpy().T) for name in parts if name != "head"
        }
    assert analysis.spectra.keys() == {"wide", "wide#2"}
    halves = {"left": covariance["wide"][:4, :4], "right": covariance["wide"][4:, 4:]}
    for found, (name, half) in zip(analysis.spectra.values(), halves.items(), strict=True):
        assert list(found.group.members) == ["wide", name]
        pooled = half / np.trace(half) + covariance[name] / np.trace(covariance[name])
        shares = np.sort(np.linalg.eigvalsh(pooled))[::-1] / np.trace(pooled)
        np.testing.assert_allclose(found.spectrum, shares, atol=1e-9)
    recipe = analysis.recipe(energy=0.3)
    assert len(recipe.keep["left"]) < 4
    assert len(recipe.keep["right"]) < 4
    assert recipe.keep["wide"] == (*recipe.keep["left"], *(4 + channel for channel in recipe.keep["right"]))
    notes = {row.name: row.note for row in analysis.preview(recipe).rows}
    assert notes["left"] == notes["right"] == "follows wide"
    cut(network, recipe, IMAGES[:2])


def test_what_no_layer_reads_is_never_cut():
    """A forward that keeps the logits for itself returns nothing that could be seen; they are an output all the same."""
    network = Net(lambda m, x: m.kept.append(m.net(x).numpy()), net=linear(6, 8, outputs=10))
    network.kept = []
    analysis = analyze(network, [inputs_of(50)])
    assert analysis.whole["net.2"] == "no layer reads its channels"
    assert set(analysis.recipe(energy=0.5).keep) == {"net.0"}


def test_tokens_are_positions_of_a_pointwise_convolution():
    torch.manual_seed(0)
    network = linear(6, 8)
    tokens = torch.randn(40, 5, 6, generator=torch.Generator().manual_seed(2))
    analysis = analyze(network, [tokens])
    assert analysis.samples == 40
    assert analysis.mult_adds() == 5 * (6 * 8 + 8 * 3) == count_mult_adds(network, tokens[:1])
    with torch.no_grad():
        expected = np.cov(network[0](tokens).double().numpy().max(1).T)
    shares = np.sort(np.linalg.eigvalsh(expected))[::-1] / np.trace(expected)
    np.testing.assert_allclose(analysis.spectra["0"].spectrum.numpy(), shares, atol=1e-9)
    small = really_cut(network, analysis.recipe(keep_params=0.5), tokens[:1])
    assert small(tokens).shape == (40, 5, 3)


def test_an_embedding_or_a_written_linear_layer_has_its_channels_last():
    class Written(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, inputs))

        def forward(self, x):
            return x @ self.weight.T

    torch.manual_seed(0)
    network = nn.Sequential(Written(6, 8), nn.ReLU(), Written(8, 3))
    analysis = analyze(network, [torch.randn(40, 5, 6)])
    assert analysis.samples == 40
    assert len(analysis.recipe(energy=0.7).keep["0"]) < 8


# ---------------------------------------------------------------- data


class Stream(IterableDataset):
    def __iter__(self):
        yield from IMAGES


def batches_of_pairs():
    yield from DataLoader(TensorDataset(IMAGES, torch.zeros(120)), 32)


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(lambda: DataLoader(Stream(), batch_size=32), id="stream"),
        pytest.param(batches_of_pairs, id="generator"),
        pytest.param(lambda: iter([IMAGES]), id="iterator of one batch"),
        pytest.param(lambda: DataLoader(TensorDataset(IMAGES), 50, shuffle=True, drop_last=True), id="shuffled, drops the last"),
        pytest.param(lambda: [[image, 0] for image in IMAGES.split(30)], id="lists"),
        pytest.param(lambda: [(image, {"label": 0}) for image in IMAGES.split(30)], id="tuples"),
    ],
)
def test_every_kind_of_loader_gives_all_its_samples_once(loader):
    network, analysis = analysed("chain")
    other = analyze(network, loader())
    assert other.samples == 120
    assert other.recipe(energy=0.7) == analysis.recipe(energy=0.7)


def test_dict_batches_need_a_way_to_run_the_network():
    network, analysis = analysed("chain")
    batches = [{"image": images} for images in IMAGES.split(40)]
    for options in ({}, {"example_inputs": IMAGES[:1]}):
        with pytest.raises(ValueError, match=r"Batches are dicts: give `forward_fn=lambda model, batch: \.\.\.`"):
            analyze(network, batches, **options)
    other = analyze(network, batches, forward_fn=lambda model, batch: model(batch["image"]))
    assert other.recipe(energy=0.7) == analysis.recipe(energy=0.7)


@pytest.mark.parametrize("loader", [[], iter([]), DataLoader(TensorDataset(IMAGES[:0]))], ids=["list", "iterator", "loader"])
@pytest.mark.parametrize("options", [{}, {"example_inputs": IMAGES[:1]}], ids=["", "example"])
def test_no_batch_is_an_error(loader, options):
    with pytest.raises(ValueError, match="The analysis needs data, but the loader gave no batch"):
        analyze(chain(), loader, **options)


def test_max_samples_draws_the_same_ones_each_time():
    network, whole = analysed("chain")
    loader = DataLoader(TensorDataset(IMAGES), 32, shuffle=True)
    one, other = (analyze(network, loader, max_samples=70) for _ in range(2))
    assert one.samples == other.samples == 70
    assert one.recipe(energy=0.7) == other.recipe(energy=0.7)
    assert analyze(network, loader, max_samples=10_000).recipe(energy=0.7) == whole.recipe(energy=0.7)
    # Not the first 70, which may be of one class.
    first = analyze(network, [IMAGES[:70]])
    assert not torch.allclose(first.spectra["0"].spectrum, one.spectra["0"].spectrum, rtol=1e-3)


def test_max_samples_stops_other_loaders_after_the_batch_that_reaches_it():
    network, _ = analysed("chain")
    seen = []

    def batches():
        for images in IMAGES.split(30):
            seen.append(len(images))
            yield images

    assert analyze(network, batches(), max_samples=31).samples == 60
    assert seen == [30, 30]


def test_progress_gets_the_number_of_batches_where_there_is_one():
    told = []

    def progress(batches, total):
        told.append(total)
        return batches

    network, _ = analysed("chain")
    for loader in (DataLoader(TensorDataset(IMAGES), 50), [IMAGES, IMAGES], batches_of_pairs()):
        analyze(network, loader, progress=progress)
    assert told == [3, 2, None]


# ---------------------------------------------------------------- nothing left behind


class Noisy(nn.Module):
    """Draws random numbers even in evaluation mode, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x + 0.01 * torch.randn_like(x) * np.random.rand()


@pytest.mark.parametrize("fails", [False, True])
def test_an_analysis_changes_nothing(fails):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Noisy(), nn.Dropout(), nn.Linear(8, 3))
    network[1].eval()  # frozen by its user
    network[0].bias.requires_grad_(False)
    network(inputs_of(4)).sum().backward()
    network[0].register_forward_hook(lambda *_: None)
    if fails:
        with torch.no_grad():
            network[0].bias[0] = float("nan")

    def all_of_it():
        trained = [parameter.requires_grad for parameter in network.parameters()]
        grads = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
        modes = [(module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in network.modules()]
        return [copy.deepcopy(part) for part in (network.state_dict(), trained, grads, modes, rng_states())]

    before = all_of_it()
    identities = [id(parameter) for parameter in network.parameters()]
    loader = DataLoader(TensorDataset(inputs_of(64)), 16, shuffle=True)
    if fails:
        with pytest.raises(ValueError, match="finite"):
            analyze(network, loader)
    else:
        analyze(network, loader).recipe(keep_params=0.5)
    for one, other in zip(before, all_of_it(), strict=True):
        assert same(one, other)
    assert identities == [id(parameter) for parameter in network.parameters()]


def test_a_recipe_by_hand_can_be_previewed():
    network, analysis = analysed("projection")
    table = analysis.preview(Recipe(keep={"two": (0, 3)}))
    assert {row.name: row.kept for row in table.rows if row.kept != row.channels} == {"two": 2, "skip": 2}
    assert {row.note for row in table.rows if row.name in ("two", "skip")} == {"", "follows skip"} or {"", "follows two"}
    with pytest.raises(ValueError, match="cannot be removed: they are the output of the network"):
        analysis.preview(Recipe(keep={"head": (0, 3)}))
    assert count_parameters(network) == analysis.parameters(), "a preview cuts nothing"


# ---------------------------------------------------------------- milder recipes


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=20)
@given(share=st.floats(0, 1), energy=st.floats(0.3, 0.99))
def test_a_milder_recipe_removes_the_first_of_what_the_other_removes(name, share, energy):
    _, analysis = analysed(name)
    recipe = analysis.recipe(energy=energy)
    milder = analysis.milder(recipe, share)
    kept = {layer: set(channels) for layer, channels in recipe.keep.items()}
    for layer, found in analysis.graph.layers.items():
        whole = set(range(len(found.classes)))
        removed, more = whole - set(milder.keep.get(layer, whole)), whole - kept.get(layer, whole)
        assert removed <= more
    for group in analysis.spectra.values():
        position = group.group.members[group.group.name]
        order = [int(np.flatnonzero(position == one)[0]) for one in group.order.tolist() if one in position]
        layer = group.group.name
        before = [c for c in order if c not in recipe.keep.get(layer, range(len(position)))]
        after = [c for c in order if c not in milder.keep.get(layer, range(len(position)))]
        assert after == before[: len(after)]
        if len(analysis.spectra) == len(analysis.graph.groups()):
            assert len(after) == int(share * len(before))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_whole_of_a_recipe_is_the_recipe_and_nothing_of_it_is_no_cut(name):
    _, analysis = analysed(name)
    for recipe in (analysis.recipe(energy=0.8), analysis.random_recipe(keep_params=0.5, seed=3)):
        assert analysis.milder(recipe, 1).keep == recipe.keep
        assert not analysis.milder(recipe, 0).keep
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="`share` must lie"):
            analysis.milder(recipe, share)


def test_channels_of_one_layer_that_are_tied_are_pooled_like_tied_layers():
    # Channel i goes with channel i + 2; their responses are opposites, and the covariance of the sums would be zero.
    responses = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = torch.cov(torch.cat([responses, -responses], 1).T)
    group = ChannelGroup(np.array([7, 9]), {"conv": np.array([0, 1, 0, 1])})
    expected = (covariance[:2, :2] + covariance[2:, 2:]) / covariance.diagonal().sum()
    torch.testing.assert_close(pooled_covariance(group, {"conv": covariance}), expected)


def test_a_network_of_groups_and_gates_is_analysed_and_cut():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=2), nn.GLU(1), nn.ChannelShuffle(2)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    analysis = analyze(network, [IMAGES], compensate=True)
    recipe = analysis.recipe(keep_params=0.6)
    with pytest.warns(
        UserWarning, match=r"Layers '2' read removed channels but"
    ):  # which input of a group was removed is not known
        cut(network, recipe, IMAGES[:1], inputs=analysis.inputs)
    assert network[2].groups == 2
    assert count_parameters(network) == analysis.parameters(recipe) <= 0.6 * analysis.parameters()
