"""Which channels the readers can best do without, and how they take over: least squares, said the slow way."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lit_compress import Recipe, analyze, cut
from lit_compress.callbacks import PFAPruning
from lit_compress.graph import trace
from lit_compress.inputs import readers
from lit_compress.models import ResNetCIFAR
from lit_compress.selection.reconstruction import Reading, removal_order, takeover
from lit_compress.spectra import PFA
from lit_compress.statistics import StreamingCovariance
from lit_compress.surgery import cut_copy
from tests.networks import Net, clone, conv, randomized, relative_error
from tests.test_compensation import EXACT, KEPT, images, vectors

RIDGE = 0.1  # of each variance, times channels over samples


def random_reading(generator, channels, size, samples=400, fixed=(), tied=False):
    """A reader of ``size`` channels, of which some may be chosen from, with data of a falling spectrum."""
    data = generator.normal(size=(samples, size)) @ np.diag(0.7 ** np.arange(size)) @ generator.normal(size=(size, size))
    weights = generator.normal(size=(size, 5))
    where = np.full(size, -1)
    free = np.setdiff1d(np.arange(size), fixed)[:channels]
    where[free] = generator.permutation(channels)[: len(free)]
    if tied:  # two rows that go together
        where[free[-1]] = where[free[0]]
    return Reading(np.atleast_2d(np.cov(data.T)), weights @ weights.T, where, samples)


def slow_order(readings, channels):
    """Try every channel in every step, and predict all that is gone from all that is left."""
    order = []
    for _ in range(channels):
        costs = {}
        for candidate in sorted(set(range(channels)) - set(order)):
            costs[candidate] = sum(share_lost(reading, {*order, candidate}) for reading in readings)
        order.append(min(costs, key=costs.get))
    return order


def share_lost(reading, gone):
    """The error of a reader's output, as a share of its variance, with the ridge on the covariance of all its channels."""
    size = len(reading.covariance)
    ridged = reading.covariance + RIDGE * size / reading.samples * np.diag(reading.covariance.diagonal())
    lost = np.flatnonzero(np.isin(reading.channels, list(gone)))
    left = np.setdiff1d(np.arange(size), lost)
    unexplained = (
        ridged[np.ix_(lost, lost)]
        - ridged[np.ix_(lost, left)] @ np.linalg.pinv(ridged[np.ix_(left, left)]) @ ridged[np.ix_(left, lost)]
    )
    return (unexplained * reading.gram[np.ix_(lost, lost)]).sum() / (reading.covariance * reading.gram).sum()


@given(seed=st.integers(0, 10_000), channels=st.integers(1, 9), count=st.integers(1, 3), fixed=st.booleans(), tied=st.booleans())
@settings(max_examples=60, deadline=None)
def test_each_time_the_channel_goes_whose_loss_costs_least(seed, channels, count, fixed, tied):
    generator = np.random.default_rng(seed)
    readings = [random_reading(generator, channels, channels + 2 * fixed, fixed=(0, channels) if fixed else (), tied=tied)
                for _ in range(count)]  # fmt: skip
    order = removal_order(readings, channels)
    assert sorted(order.tolist()) == list(range(channels))
    assert order.tolist() == slow_order(readings, channels)


def test_readers_of_different_channels_are_weighed_by_the_share_that_they_lose():
    generator = np.random.default_rng(0)
    one, other = random_reading(generator, 6, 6), random_reading(generator, 4, 4)
    large = other._replace(covariance=1e6 * other.covariance, gram=1e4 * other.gram)  # another unit, the same shares
    assert removal_order([one, other], 6).tolist() == removal_order([one, large], 6).tolist() == slow_order([one, other], 6)


def test_the_prediction_is_numpys_least_squares():
    generator = np.random.default_rng(0)
    data = generator.normal(size=(2_000_000 // 8, 6)) @ generator.normal(size=(6, 6)) + 3
    kept, removed = np.array([0, 2, 3]), np.array([1, 4, 5])
    centred = data - data.mean(0)
    expected = np.linalg.lstsq(centred[:, kept], centred[:, removed])[0].T
    # The ridge is 2.4e-6 of the mean variance here.
    np.testing.assert_allclose(takeover(np.cov(data.T), kept, removed, len(data)), expected, atol=1e-4)


def test_few_vectors_do_not_fit_chance():
    """Hardly more samples than channels, all independent: least squares would fit them, and there is nothing to predict."""
    data = np.random.default_rng(0).normal(size=(60, 50))
    kept, removed = np.arange(40), np.arange(40, 50)
    covariance = np.cov(data.T)
    assert (takeover(covariance, kept, removed, 60) ** 2).sum() < 0.6 * (takeover(covariance, kept, removed, 10**9) ** 2).sum()


def test_a_layer_that_is_given_nothing_but_zeros_has_no_say_and_breaks_nothing():
    zeros = Reading(np.zeros((3, 3)), np.eye(3), np.arange(3), 100)
    other = Reading(np.diag([2.0, 3.0, 1.0]), np.eye(3), np.arange(3), 100)
    assert removal_order([zeros, other], 3).tolist() == [2, 0, 1]
    assert removal_order([zeros], 3).tolist() == [0, 1, 2]
    assert takeover(np.zeros((3, 3)), np.array([0]), np.array([1, 2]), 100).tolist() == [[0.0], [0.0]]


# ---------------------------------------------------------------- in a network


def repeated(layer):
    """Let channel 1 be twice channel 0, and channel 4 three times channel 2: positive factors, which a ReLU passes. In place."""
    for copied, original, factor in ((1, 0, 2.0), (4, 2, 3.0)):
        layer.weight.data[copied] = factor * layer.weight.data[original]
        layer.bias.data[copied] = factor * layer.bias.data[original]


# A sigmoid is no linear function of another one's.
LINEAR = [name for name in EXACT if name != "linear with norm"]


@pytest.mark.parametrize("name", LINEAR)
def test_channels_that_the_others_predict_are_given_back_by_the_readers(name):
    build, _ = EXACT[name]
    x = images(600) if build().a.weight.ndim == 4 else vectors(6000)
    if name == "linear over tokens":
        x = images(600)[:, 0]
    torch.manual_seed(0)
    model = randomized(build()).eval()
    repeated(model.a)
    errors = {}
    for how in (True, "linear"):
        net = copy.deepcopy(model)
        inputs = analyze(net, x.split(100), compensate=how).inputs
        cut(net, Recipe(keep={"a": KEPT}), x[:2], inputs=inputs)
        with torch.no_grad():
            errors[how] = relative_error(clone(net(x)), clone(model(x)))
    # What is left is the ridge, 1e-4 of the mean variance and more of that of a narrow channel.
    assert errors["linear"] < 5e-3
    assert errors[True] > 10 * errors["linear"]


def test_without_a_place_for_the_mean_the_weights_take_it_as_far_as_they_can():
    torch.manual_seed(0)
    model = randomized(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4, bias=False)))
    repeated(model[0])
    x = vectors(60_000)
    uncut = copy.deepcopy(model)
    inputs = analyze(model, x.split(10_000), compensate="linear").inputs
    cut(model, Recipe(keep={"0": KEPT}), x[:2], inputs=inputs)
    with torch.no_grad():
        assert relative_error([model(x)], [uncut(x)]) < 2e-3
        hidden = uncut[1](uncut[0](x)).double().numpy()
    # Least squares through the origin, of all places.
    kept, removed = list(KEPT), [1, 4]
    share = np.linalg.lstsq(hidden[:, kept], hidden[:, removed])[0].T
    expected = uncut[2].weight.detach().numpy()[:, kept] + uncut[2].weight.detach().numpy()[:, removed] @ share
    np.testing.assert_allclose(model[2].weight.detach().numpy(), expected, atol=2e-3)


def test_the_compensated_convolution_is_the_least_squares_one():
    """A pointwise convolution: the fit of its whole output to what it gave, over all samples and places, is plain regression."""
    torch.manual_seed(0)
    model = randomized(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))).eval()
    x = images(500, size=8)
    with torch.no_grad():
        hidden = model[1](model[0](x)).movedim(1, -1).flatten(0, 2).double().numpy()
        given = model(x).movedim(1, -1).flatten(0, 2).double().numpy()
    kept = list(KEPT)
    fit = np.linalg.lstsq(np.column_stack([hidden[:, kept], np.ones(len(hidden))]), given)[0]
    inputs = analyze(model, x.split(60), compensate="linear").inputs
    np.testing.assert_allclose(inputs["2"].covariance.numpy(), np.cov(hidden.T), rtol=1e-5, atol=1e-7)
    assert inputs["2"].samples == len(x)
    cut(model, Recipe(keep={"0": KEPT}), x[:2], inputs=inputs)
    np.testing.assert_allclose(model[2].weight.detach().numpy()[:, :, 0, 0], fit[:-1].T, atol=1e-3)
    np.testing.assert_allclose(model[2].bias.detach().numpy(), fit[-1], atol=1e-3)


def test_reconstruction_keeps_what_the_readers_need_and_correlation_does_not_look():
    """Channel 0 is read with large weights and is like no other; 1 to 5 are alike, and nobody listens to them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    model[0].weight.data = torch.eye(5)[[0, 1, 2, 3, 4, 4]] + 0.3 * torch.eye(5)[[1, 0, 0, 0, 0, 0]]
    model[1].weight.data[:, 0], model[1].weight.data[:, 1:] = 10.0, 0.01
    orders = {}
    for select in ("correlation", "reconstruction"):
        (found,) = analyze(model, [vectors(500)], method=PFA(select)).rankings.values()
        orders[select] = found.order.tolist()
    assert orders["reconstruction"][-1] == 0
    assert orders["correlation"][-1] != 0


def test_a_network_loses_less_by_reconstruction():
    torch.manual_seed(0)
    model = randomized(
        nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 10, 3, bias=False), nn.BatchNorm2d(10), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(10 * 4, 20), nn.ReLU(), nn.Linear(20, 4),
        )
    ).eval()  # fmt: skip
    x, errors = images(300, size=8), {}
    for select in ("correlation", "reconstruction"):
        for compensate in (False, True, "linear"):
            net = copy.deepcopy(model)
            analysis = analyze(net, x.split(100), method=PFA(select), compensate=compensate)
            recipe = analysis.recipe(keep_params=0.4)
            assert ("select=reconstruction" in recipe.method) == (select == "reconstruction")
            cut(net, recipe, x[:2], inputs=analysis.inputs)
            with torch.no_grad():
                errors[select, compensate] = relative_error([net(x)], [model(x)])
    for select in ("correlation", "reconstruction"):
        assert errors[select, "linear"] < errors[select, True] < errors[select, False]
    assert errors["reconstruction", "linear"] < 0.8 * errors["correlation", "linear"]


def test_residual_streams_are_chosen_by_all_their_readers(tmp_path):
    torch.manual_seed(0)
    model = randomized(ResNetCIFAR(8)).eval()
    x = torch.randn(64, 3, 32, 32)
    uncut = copy.deepcopy(model)
    analysis = analyze(model, x.split(32), method=PFA("reconstruction"), compensate="linear")
    stream = max(analysis.rankings.values(), key=lambda found: len(found.group.members))
    assert len(stream.group.members) > 2
    recipe = analysis.recipe(energy=0.95)
    cut(model, recipe, x[:2], inputs=analysis.inputs)
    assert torch.isfinite(model(x)).all()
    plain = copy.deepcopy(uncut)
    cut(plain, recipe, x[:2])
    with torch.no_grad():
        assert relative_error([model(x)], [uncut(x)]) < relative_error([plain(x)], [uncut(x)])


def test_inactive_channels_go_first_whatever_they_cost():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].weight.data[3] = 0
    (found,) = analyze(model, [vectors(300)], method=PFA("reconstruction")).rankings.values()
    assert found.inactive == 1
    assert found.order[0] == 3
    assert sorted(found.order.tolist()) == list(range(6))


def test_readers_that_cannot_tell_are_named_and_their_channels_chosen_by_correlation():
    model = randomized(Net(lambda m, x: m.f(F.relu(m.b(F.relu(m.a(x)))).mean((2, 3))), a=conv(3, 6),
                           b=nn.ConvTranspose2d(6, 4, 3), f=nn.Linear(4, 2))).eval()  # fmt: skip
    x = images(100)
    with pytest.warns(UserWarning, match="Of what reads the channels of 'a', too little is known"):
        found = analyze(model, [x], method=PFA("reconstruction")).rankings
    expected = analyze(model, [x]).rankings
    assert torch.equal(found["a"].order, expected["a"].order)
    assert found.keys() == expected.keys() == {"a", "b"}


def test_channels_of_several_layers_side_by_side_are_predicted_by_all_of_them():
    """A concatenation of two maps; flattened with a vector behind, channels have unequally many places, and it is said."""

    def side_by_side(m, x):
        return m.f(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1).mean((2, 3)))

    torch.manual_seed(0)
    model = randomized(Net(side_by_side, a=conv(3, 6), b=conv(3, 4), f=nn.Linear(10, 2))).eval()
    repeated(model.a)
    model.b.weight.data[:2], model.b.bias.data[:2] = model.a.weight.data[[1, 4]], model.a.bias.data[[1, 4]]
    x, uncut = images(400), copy.deepcopy(model)
    inputs = analyze(model, x.split(100), compensate="linear").inputs
    assert inputs["f"].covariance.shape == (10, 10)
    cut(model, Recipe(keep={"a": (3, 5), "b": range(2)}), x[:2], inputs=inputs)
    with torch.no_grad():
        lost = copy.deepcopy(uncut)
        cut(lost, Recipe(keep={"a": (3, 5), "b": range(2)}), x[:2], inputs=analyze(uncut, [x], compensate=True).inputs)
        assert relative_error([model(x)], [uncut(x)]) < 0.6 * relative_error([lost(x)], [uncut(x)])

    def uneven(m, x):
        return m.f(torch.cat([F.relu(m.a(x)).flatten(1), m.b(x.mean((2, 3)))], 1))

    model = randomized(Net(uneven, a=conv(3, 6), b=nn.Linear(3, 4), f=nn.Linear(6 * 36 + 4, 2))).eval()
    analysis = analyze(model, [x], compensate="linear")
    assert analysis.inputs["f"].covariance is None
    with pytest.warns(UserWarning, match="Layers 'f' read removed channels but not all of their channels have as many places"):
        cut(model, Recipe(keep={"a": KEPT}), x[:2], inputs={**analysis.inputs, "other": inputs["f"]})


def compensated_error(model, x, recipe, how, other=None):
    """What a cut costs on the data of the analysis, or on others: root mean square, relative."""
    net, seen = copy.deepcopy(model), x if other is None else other
    cut(net, recipe, x[:2], inputs=analyze(net, x.split(100), compensate=how).inputs)
    with torch.no_grad():
        found, expected = net(seen), model(seen)
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")], ids="".join)
def test_maps_may_stand_side_by_side_in_any_order(order):
    """As the skips of a U-Net do: what was made last comes first."""

    def side_by_side(m, x):
        maps = {"a": F.relu(m.a(x)), "b": F.relu(m.b(x))}
        return m.f(torch.cat([maps[name] for name in order], 1).mean((2, 3)))

    torch.manual_seed(0)
    model = randomized(Net(side_by_side, a=conv(3, 6), b=conv(3, 4), f=nn.Linear(10, 2))).eval()
    repeated(model.a)
    assert compensated_error(model, images(600), Recipe(keep={"a": KEPT}), "linear") < 1e-2


def test_places_of_a_flattened_map_have_means_of_their_own():
    """Where a mean hangs on the place alone, the bias gives it back; the prediction has no part in it."""
    torch.manual_seed(0)
    model = randomized(nn.Sequential(conv(3, 6), nn.Flatten(), nn.Linear(6 * 36, 4))).eval()
    x = 0.3 * images(500) + 3 * torch.randn(1, 3, 6, 6)
    recipe = Recipe(keep={"0": KEPT})
    assert compensated_error(model, x, recipe, "linear") < compensated_error(model, x, recipe, True)
    given = analyze(model, x.split(100), compensate="linear").inputs["2"]
    with torch.no_grad():
        maps = model[0](x).double().flatten(2)
    within = sum(np.cov(maps[:, :, place].T.numpy(), bias=True) for place in range(36)) / 36
    np.testing.assert_allclose(given.covariance.numpy(), within, rtol=1e-4, atol=1e-6)


def test_tied_channels_of_a_convolution_in_groups_are_predicted_one_by_one():
    torch.manual_seed(0)
    model = randomized(nn.Sequential(conv(3, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1))).eval()
    graph = trace(model, lambda: model(images(1)))
    reader = readers(graph)["4"]
    assert reader.slots.tolist() == [[index] for index in range(8)]
    x = images(500)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the convolution in groups cannot be compensated
        recipe = analyze(model, [x], method=PFA("reconstruction")).recipe(energy=0.8, include=["2"])
        assert len(recipe.keep["2"]) < 8
        errors = {how: compensated_error(model, x, recipe, how) for how in (False, True, "linear")}
    assert errors["linear"] < errors[True] < errors[False]


def test_positions_of_a_few_smooth_images_are_not_taken_for_many_samples():
    smooth = [F.interpolate(torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(count)), 16, mode="bicubic")
              for count in (60, 300)]  # fmt: skip
    torch.manual_seed(0)
    model = randomized(nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 4, 1))).eval()
    recipe = Recipe(keep={"0": range(40)})
    found = {how: compensated_error(model, smooth[0], recipe, how, smooth[1]) for how in (True, "linear")}
    assert found["linear"] < found[True]


def test_channels_of_small_variance_are_predicted_beside_one_of_a_large():
    covariance = np.diag([1e6, 1e-2, 1.0, 1e-2])
    covariance[1, 3] = covariance[3, 1] = 1e-2  # the last is the second once more
    found = takeover(covariance, np.array([0, 1, 2]), np.array([3]), 10_000)
    np.testing.assert_allclose(found, [[0, 1, 0]], atol=1e-3)


def test_inputs_follow_a_recipe_to_the_network_that_a_module_holds():
    torch.manual_seed(0)
    net = randomized(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)))
    module, x = Net(lambda m, x: m.net(x), net=net), vectors(500)
    analysis = analyze(module, [x], compensate="linear")
    inner = copy.deepcopy(net)
    cut(inner, Recipe(keep={"net.0": KEPT}), x[:2], inputs=analysis.inputs)
    cut(module, Recipe(keep={"net.0": KEPT}), x[:2], inputs=analysis.inputs)
    assert torch.equal(inner(x), module(x))


def test_a_copy_of_another_network_is_refused_and_stays():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    analysis = analyze(model, [vectors(100)], compensate="linear")
    copied = copy.deepcopy(model)
    plan = cut(model, Recipe(keep={"0": KEPT}), vectors(2), graph=analysis.graph, inputs=analysis.inputs)
    for other in (nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)), nn.Sequential(copied)):
        with pytest.raises(ValueError, match="no copy of the network before the cut"):
            cut_copy(other, plan, analysis.graph, analysis.inputs)
    cut_copy(copied, plan, analysis.graph, analysis.inputs)
    assert torch.equal(copied(vectors(3)), model(vectors(3)))


def test_more_rows_than_are_added_at_once_with_one_that_is_not_finite_leave_the_states(monkeypatch):
    monkeypatch.setattr("lit_compress.statistics.covariance._ROWS", 8)
    data = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    metric = StreamingCovariance(3)
    metric.update(data)
    torch.testing.assert_close(metric.compute(), torch.cov(data.double().T))
    data[-1, 1] = torch.nan
    with pytest.raises(ValueError, match=r"channels \[1\] hold NaN"):
        metric.update(data)
    assert int(metric.count) == 30


def test_the_places_of_a_flattened_map_are_those_of_its_channels():
    model = nn.Sequential(conv(3, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 2))
    (reader,) = readers(trace(model, lambda: model(images(1)))).values()
    assert reader.slots.tolist() == np.arange(6 * 36).reshape(6, 36).tolist()
    last = Net(lambda m, x: m.f(F.relu(m.a(x)).movedim(1, -1).flatten(1)), a=conv(3, 6), f=nn.Linear(36 * 6, 2))
    (reader,) = readers(trace(last, lambda: last(images(1)))).values()
    assert reader.slots.tolist() == np.arange(36 * 6).reshape(36, 6).T.tolist()


@pytest.mark.parametrize(
    "call",
    [
        lambda: PFA("magnitude"),
        lambda: PFAPruning(select="magnitude"),
    ],
    ids=["method", "callback"],
)
def test_an_unknown_way_to_select_is_refused_with_the_known_ones(call):
    with pytest.raises((ValueError, MisconfigurationException), match="'correlation' or 'reconstruction' but got 'magnitude'"):
        call()


@pytest.mark.parametrize("wrong", ["mean", "quadratic", 2, None])
def test_an_unknown_compensation_is_refused(wrong):
    with pytest.raises(MisconfigurationException, match="`compensate` must be True, False or 'linear' but got"):
        PFAPruning(compensate=wrong)
    with pytest.raises(ValueError, match="`compensate` must be True, False or 'linear' but got"):
        analyze(nn.Linear(2, 2), [torch.rand(4, 2)], compensate=wrong)
