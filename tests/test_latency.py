"""Latency: timed in turns on real widths, searched where it is noisy and not monotonic, and told when a cut made it worse."""

import copy
import re
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_compress import Recipe, Stopwatch, analyze, cut
from lit_compress.callbacks import MagnitudePruning, PFAPruning, PruningCallback, VIBPruning
from lit_compress.latency import Comparison, widest_within
from lit_compress.models import ResNetCIFAR
from lit_compress.report import Latency
from lit_compress.surgery import make_plan
from tests.modules import CLOCK, Small, every_epoch, new_trainer, same

WIDTH = 16
INPUTS = torch.randn(200, 24, generator=torch.Generator().manual_seed(0))  # more than the width, so that all widths are met


@pytest.fixture(autouse=True, scope="module")
def _clock():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_compress.report.time", CLOCK)
        yield


class Slow(nn.Module):
    """Takes half a millisecond for each of its input's channels, and three times as long if they are odd in number."""

    def __init__(self, odd: int = 3):
        super().__init__()
        self.odd, self.widths = odd, []

    def forward(self, x):
        width = x.shape[1]
        self.widths.append(width)
        CLOCK.sleep(0.0005 * width * (self.odd if width % 2 else 1))
        return x


def slow(odd: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, WIDTH), nn.Tanh(), Slow(odd), nn.Linear(WIDTH, 3))


def slow_analysis(odd: int = 3, net: nn.Module | None = None, **options):
    net = net or slow(odd)
    return net, analyze(net, [INPUTS], stopwatch=Stopwatch(net, INPUTS[:8], seconds=0.02), **options)


def seconds_of(net) -> float:
    """Of one run."""
    start = CLOCK.now
    net(INPUTS[:8])
    return CLOCK.now - start


# ---------------------------------------------------------------- the search


@given(st.lists(st.floats(0.01, 2), min_size=1, max_size=60), st.floats(0.05, 1.5))
def test_the_search_ends_where_the_next_wider_network_is_over_the_limit(ratios, limit):
    asked = []

    def ratio(step):
        asked.append(step)
        return ratios[step]

    step, reached = widest_within(len(ratios), lambda step: bytes([step]), ratio, limit)
    eighths = {part * (len(ratios) - 1) // 8 for part in range(9)}
    if step is None:
        assert all(ratios[step] > limit for step in eighths)
        assert reached == min(ratios[step] for step in eighths)
    else:
        assert reached == ratios[step] <= limit
        assert step == len(ratios) - 1 or ratios[step + 1] > limit
        assert all(ratios[wider] > limit for wider in eighths if wider > step)
    assert all(asked.count(one) == 1 + (one == step) for one in asked)  # the last one twice


@given(st.lists(st.floats(0.01, 2), min_size=1, max_size=60), st.floats(0.05, 1.5))
def test_where_latency_grows_with_the_width_the_widest_is_found(ratios, limit):
    ratios = sorted(ratios)
    step, _ = widest_within(len(ratios), lambda step: bytes([step]), ratios.__getitem__, limit)
    within = [step for step, ratio in enumerate(ratios) if ratio <= limit]
    assert step == (within[-1] if within else None)


def test_steps_with_one_network_are_measured_once():
    asked = []

    def ratio(step):
        asked.append(step // 10)
        return 0.1 * (step // 10) + 0.05

    step, reached = widest_within(100, lambda step: bytes([step // 10]), ratio, 0.5)
    assert (step, reached) == (49, pytest.approx(0.45))
    assert all(asked.count(one) == 1 + (one == 4) for one in asked)


def test_a_lucky_measurement_does_not_count():
    """Steps 0 to 4 take 0.1 to 0.5; step 5 is measured to take 0.4 first, and 0.6 from then on."""
    lucky = [0.4]

    def ratio(step):
        return lucky.pop() if step == 5 and lucky else 0.1 * (step + 1)

    assert widest_within(9, lambda step: bytes([step]), ratio, 0.55) == (4, pytest.approx(0.5))
    assert not lucky, "it was asked for"


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.2, 0.9))
def test_noise_never_lets_a_missed_second_look_pass(seed, limit):
    noise = torch.Generator().manual_seed(seed)
    last = {}

    def ratio(step):
        last[step] = 0.02 * (step + 1) * float(1 + 0.3 * torch.randn((), generator=noise).clamp(-2, 2))
        return last[step]

    step, reached = widest_within(50, lambda step: bytes([step]), ratio, limit)
    if step is not None:
        assert reached == last[step] <= limit


# ---------------------------------------------------------------- the stopwatch


def test_the_median_ratio_of_turns_is_taken():
    net, analysis = slow_analysis(odd=1)
    comparison = analysis.stopwatch.compare(make_plan(analysis.graph, Recipe(keep={"0": range(4)})))
    assert comparison.ratio == pytest.approx(0.25)
    assert comparison.before.median == pytest.approx(8)
    assert comparison.after.median == pytest.approx(2)
    assert set(net[2].widths[-8:]) == {4, WIDTH}


def test_every_run_has_a_context_of_its_own_that_is_not_timed():
    inside, net = [], slow()

    @contextmanager
    def context():
        inside.append(0)
        CLOCK.sleep(0.02)
        yield

    def run(model, inputs):
        inside[-1] += 1
        model(inputs)

    stopwatch = Stopwatch(net, INPUTS[:8], forward_fn=run, context=context, seconds=0.0)
    analysis = analyze(net, [INPUTS], stopwatch=stopwatch)
    comparison = stopwatch.compare(make_plan(analysis.graph, Recipe(keep={"0": range(4)})))
    assert inside == [1] * 28  # 2 turns to warm up and 5 that count, of two networks that run twice
    assert comparison.before.median == pytest.approx(8)


def test_slower_means_beyond_the_spread():
    before = Latency(2.0, 1.9, 2.1)
    assert not Comparison(before, Latency(2.2, 2.05, 2.4), 1.1).slower
    assert Comparison(before, Latency(2.2, 2.15, 2.4), 1.1).slower
    assert not Comparison(before, Latency(1.0, 0.9, 1.1), 0.5).slower


@pytest.mark.parametrize("skips", ["share", "pad"])
def test_timing_at_other_widths_changes_nothing_and_runs_real_widths(skips):
    torch.manual_seed(0)
    net = ResNetCIFAR(8, width=8)
    images = torch.randn(60, 3, 8, 8)

    def widths_seen(stopwatch, time_it):
        """Output channels of every convolution and norm, in the two networks that are timed."""
        seen = []
        handles = [
            module.register_forward_hook(lambda module, _, output: seen.append((module.weight.shape[0], output.shape[1])))
            for module in net.modules()
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
        ]
        before = copy.deepcopy(net.state_dict())
        kinds = [(type(module), module.training, dict(vars(module))) for module in net.modules()]
        identities = [id(tensor) for tensor in (*net.parameters(), *net.buffers())]
        time_it(stopwatch)
        assert same(dict(before), dict(net.state_dict()))
        assert identities == [id(tensor) for tensor in (*net.parameters(), *net.buffers())]
        assert repr(kinds) == repr([(type(module), module.training, dict(vars(module))) for module in net.modules()])
        for handle in handles:
            handle.remove()
        once, turns = len(handles), len(seen) // (2 * len(handles))
        assert turns >= 2 * (5 + 2)
        return seen[:once], seen[2 * once : 3 * once]  # the first turn: the one network twice, then the other

    def widths_of(network):
        found = []
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.register_forward_hook(lambda module, _, output: found.append((module.weight.shape[0], output.shape[1])))
        network.eval()(images[:2])
        return found

    original = widths_of(copy.deepcopy(net))
    for energy in (0.8, 0.5):  # the second cut is of a network that was cut and perhaps padded already
        stopwatch = Stopwatch(net, images[:4], seconds=0.0)
        analysis = analyze(net, [images], skips=skips, stopwatch=stopwatch)
        recipe = analysis.recipe(energy=energy)
        plan = make_plan(analysis.graph, recipe)
        present, small = copy.deepcopy(net), copy.deepcopy(net)
        cut(small, recipe, images[:2], graph=analysis.graph)
        assert widths_seen(stopwatch, lambda stopwatch, plan=plan: stopwatch.compare(plan)) == (original, widths_of(small))
        plan = cut(net, recipe, images[:2], graph=analysis.graph)
        found = widths_seen(stopwatch, lambda stopwatch, plan=plan: stopwatch.look_back(plan))
        assert found == (widths_of(present), widths_of(copy.deepcopy(net)))


def test_a_tensor_is_widened_by_copies_of_what_is_left():
    net = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))
    plan = cut(net, Recipe(keep={"0": (1, 2, 6)}), INPUTS[:2])
    wide = plan.widened("0.weight", net[0].weight.data)
    assert torch.equal(wide, net[0].weight.data[[0, 0, 1, 2, 2, 2, 2, 2]])
    assert torch.equal(plan.take("0.weight", wide), net[0].weight.data)
    assert torch.equal(plan.widened("2.weight", net[2].weight.data), net[2].weight.data[:, [0, 0, 1, 2, 2, 2, 2, 2]])
    with pytest.raises(ValueError, match=r"should have shape \(3, 24\) after the cut but has \(8, 24\)"):
        plan.widened("0.weight", wide)


def test_the_memory_format_is_kept_in_other_widths():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    plan = cut(net, Recipe(keep={"0": (1, 2, 6)}), torch.rand(2, 3, 6, 6))
    assert plan.widened("2.weight", net[2].weight.data).is_contiguous(memory_format=torch.channels_last)


def test_a_stopwatch_of_another_time_is_refused():
    net, analysis = slow_analysis()
    cut(net, Recipe(keep={"0": range(8)}), INPUTS[:2])
    with pytest.raises(ValueError, match="The network was cut since the stopwatch was made"):
        analysis.recipe(keep_latency=0.5)


def test_a_compiled_network_is_refused():
    net = slow()
    net[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"under `torch.compile` cannot be timed at many widths"):
        analyze(net, [INPUTS]).recipe(keep_latency=0.5)


# ---------------------------------------------------------------- a target


@pytest.mark.parametrize("target", [0.3, 0.6])
def test_the_network_really_runs_within_the_target_and_the_next_wider_does_not(target):
    net, analysis = slow_analysis(odd=1)
    recipe = analysis.recipe(keep_latency=target)
    assert recipe.method == f"pfa(keep_latency={target})"

    def ratio(width):
        small = copy.deepcopy(net)
        cut(small, Recipe(keep={"0": range(width)}), INPUTS[:2])
        return seconds_of(small) / seconds_of(net)

    assert ratio(recipe.widths["0"]) <= target
    assert ratio(recipe.widths["0"] + 1) > target


def test_a_narrower_network_that_is_slower_is_not_taken():
    """Of 16 channels 0.7 are 11.2, but 11 take as long as 33."""
    _, analysis = slow_analysis(odd=3)
    assert analysis.recipe(keep_latency=0.7).widths == {"0": 10}
    assert analysis.recipe(keep_latency=0.7, round_to=4).widths == {"0": 8}


def test_a_target_out_of_reach_names_the_smallest_that_is_not():
    _, analysis = slow_analysis(odd=1)
    said = r"with `min_width=8` the smallest network has (0\.\d{4}) of the original's latency at batch size 8"
    with pytest.raises(ValueError, match=said) as caught:
        analysis.recipe(keep_latency=0.4, min_width=8)
    assert float(re.search(said, str(caught.value))[1]) == 0.5


def test_a_target_needs_something_to_time():
    net = slow()
    analysis = analyze(net, [INPUTS], example_inputs=INPUTS[:2])
    with pytest.raises(ValueError, match=r"`keep_latency` needs something to time: `analyze\(\.\.\., stopwatch="):
        analysis.recipe(keep_latency=0.5)
    assert analyze(net, INPUTS.split(32)).stopwatch.batch_size == 32
    with pytest.raises(ValueError, match=r"Argument `keep_latency` must lie in \(0, 1\) but got 1.5"):
        analysis.recipe(keep_latency=1.5)
    with pytest.raises(MisconfigurationException, match=r"Argument `keep_latency` must lie in \(0, 1\) but got 1.0"):
        PFAPruning(keep_latency=1.0)


# ---------------------------------------------------------------- in a running Trainer


class SlowModule(Small):
    """Sleeps as :class:`Slow` does, in a step that also logs."""

    def __init__(self, odd: int = 1):
        super().__init__()
        self.net = slow(odd)


@pytest.fixture
def _briefly(monkeypatch):
    """Callbacks take 5 turns for a comparison, which is enough where all the time is slept."""
    monkeypatch.setattr("lit_compress.callbacks.steps.Stopwatch", partial(Stopwatch, seconds=0.02))


def fit_slow(folder, *callbacks, odd: int = 1, **options):
    torch.manual_seed(0)
    module = SlowModule(odd)
    trainer = new_trainer(folder, *callbacks, **{"max_epochs": 3, "enable_checkpointing": len(callbacks) > 1})
    data = DataLoader(TensorDataset(INPUTS, INPUTS[:, :3].argmax(1)), 32)
    trainer.fit(module, data, data, **options)
    return module


@pytest.mark.usefixtures("_briefly")
def test_two_cuts_are_measured_against_the_original_also_when_resumed(tmp_path):
    """0.26 in two cuts is 0.51 first. A second cut to 0.26 of what the first has left would end at 2 channels."""
    pruning = PFAPruning(keep_latency=0.26, every_n_epochs=1, max_cuts=2)
    fit_slow(tmp_path, pruning, every_epoch(tmp_path))
    widths = [report.recipe.widths["net.0"] for report in pruning.reports]
    assert widths == [8, 4]
    resumed = PFAPruning(keep_latency=0.26, every_n_epochs=1, max_cuts=2)
    fit_slow(tmp_path / "again", resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert [report.recipe.widths["net.0"] for report in resumed.reports] == widths
    first, second = pruning.reports
    assert first.before.latency.median == pytest.approx(8)
    assert second.before.latency.median == pytest.approx(first.after.latency.median)
    assert first.batch_size == 32


@pytest.mark.usefixtures("_briefly")
@pytest.mark.parametrize("kind", [MagnitudePruning, VIBPruning])
def test_other_methods_take_a_time_as_well(kind, tmp_path):
    pruning = kind(keep_latency=0.5, at_epoch=1)
    module = fit_slow(tmp_path, pruning)
    (report,) = pruning.reports
    assert "keep_latency=0.5" in report.recipe.method
    assert 1 < module.net[0].out_features < 12  # how well a time is met, other tests say


class To(PruningCallback):
    """Cuts the hidden layer to a width."""

    def __init__(self, width, **options):
        super().__init__(at_epoch=1, **options)
        self.width = width

    def choose(self, analysis):
        return Recipe(keep={"net.0": range(self.width)}, method="by hand")


def test_a_cut_that_makes_the_network_slower_says_so_with_both_figures(tmp_path):
    pruning = To(15)
    with pytest.warns(UserWarning, match="The cut has made the network slower") as warned:
        fit_slow(tmp_path, pruning, odd=3)
    (said,) = [str(one.message) for one in warned if "slower" in str(one.message)]
    (report,) = pruning.reports
    assert f"takes {report.after.latency} (median" in said
    assert f"took {report.before.latency} before" in said
    assert "at batch size 32 on cpu" in said
    assert "`round_to=8`" in said
    # 15 channels sleep for 22.5 ms instead of 8.
    assert report.before.latency.median == pytest.approx(8)
    assert report.after.latency.median == pytest.approx(22.5)


@pytest.mark.parametrize("width", [12, 16])
def test_a_cut_that_does_not_make_it_slower_says_nothing(tmp_path, recwarn, width):
    pruning = To(width)
    fit_slow(tmp_path, pruning, odd=3)
    assert len(pruning.reports) == 1
    assert not [one for one in recwarn if "slower" in str(one.message)]
