"""Entropies of sigmoid units and what PIB keeps, against a slow version in plain Python, and over two real processes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.selection import pib
from lit_compress.statistics import StreamingEntropies, StreamingMean

REFERENCE = Path(__file__).parent / "reference"
RECORDED = json.loads((REFERENCE / "pib.json").read_text())
Q = torch.from_numpy(np.load(REFERENCE / "pib.npz")["q"])


def activations(*shape, seed=0, dtype=torch.float64):
    """Mostly sure ones; some exactly 0 or 1, a unit that is always 0 and one that is always 1."""
    logits = 8 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = logits.sigmoid().to(dtype)
    q[logits > 14], q[logits < -14] = 1, 0
    q[:, 0], q[:, 1] = 0, 1
    return q


def slow(q, marginal):
    """Noise and marginal of each unit by the formulas, one sample and one position at a time."""
    limits = torch.finfo(q.dtype)

    def log2(value, least):
        return math.log2(max(value, least))

    def bits(p):
        return 0.0 if p in (0, 1) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)

    noise, marginals = [], []
    for unit in q.double().flatten(2).unbind(1) if q.ndim > 2 else q.double().unsqueeze(2).unbind(1):
        noise.append(0.0)
        marginals.append(0.0)
        for samples in unit.T.tolist():
            mean = math.fsum(samples) / len(samples)
            noise[-1] += math.fsum(map(bits, samples)) / len(samples)
            ones = math.fsum(log2(value, limits.tiny) for value in samples) / len(samples)
            zeros = math.fsum(log2(1 - value, limits.eps / 4) for value in samples) / len(samples)
            marginals[-1] += bits(mean) if marginal == "exact" else min(1.0, -mean * ones - (1 - mean) * zeros)
    return noise, marginals


@pytest.mark.parametrize("marginal", ["jensen", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(40, 6), (40, 6, 3), (30, 4, 3, 2)], ids=str)
def test_entropies_are_those_of_the_formulas(shape, dtype, marginal):
    q = activations(*shape, dtype=dtype)
    assert all(some.any() for some in (q == 0, q == 1, (q > 0.2) & (q < 0.8)))
    found = pib.entropies(q, marginal)
    noise, marginals = slow(q, marginal)
    np.testing.assert_allclose(found.noise, noise, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.marginal, marginals, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.information, np.subtract(marginals, noise).clip(0), rtol=1e-9, atol=1e-11)


def test_the_recorded_vectors_are_met():
    jensen, exact = pib.entropies(Q), pib.entropies(Q, marginal="exact")
    np.testing.assert_allclose(jensen.noise, RECORDED["H_cond_per_node"], rtol=1e-12)
    np.testing.assert_allclose(jensen.marginal, RECORDED["weighted_jensen_clipped"], rtol=1e-12)
    np.testing.assert_allclose(jensen.information, RECORDED["MI_weighted_jensen"], rtol=1e-12)
    np.testing.assert_allclose(exact.marginal, RECORDED["plugin_entropy_of_mean"], rtol=1e-12)
    np.testing.assert_allclose(exact.information, RECORDED["MI_plugin"], rtol=1e-12)
    np.testing.assert_allclose(pib.scores(jensen, "A"), RECORDED["InfoScore_A_upper"], rtol=1e-12)
    assert float(jensen.noise.sum()) == pytest.approx(RECORDED["H_cond_layer_eq4_4_11"], rel=1e-12)
    assert pib.least_width(jensen, "A") == RECORDED["MinWidth_A"]
    assert pib.least_width(jensen, "C") == RECORDED["MinWidth_C_weighted_jensen"]
    assert pib.least_width(exact, "C") == RECORDED["MinWidth_C_plugin"]


@pytest.mark.parametrize("shape", [(40, 5), (40, 5, 3, 2)], ids=str)
def test_what_units_tell_of_the_label_is_the_mutual_information_of_bit_and_label(shape):
    """By the joint distribution written out, one bit at a time."""
    q, labels = activations(*shape, seed=2), torch.arange(40) % 3 * 5
    expected = []
    for channel in range(5):
        total = 0.0
        for unit in q[:, channel].reshape(40, -1).T.tolist():
            joint = {(bit, int(label)): 0.0 for bit in (0, 1) for label in labels}
            for chance, label in zip(unit, labels.tolist(), strict=True):
                joint[1, label] += chance / 40
                joint[0, label] += (1 - chance) / 40
            of_bit = {bit: sum(p for (b, _), p in joint.items() if b == bit) for bit in (0, 1)}
            of_label = {int(label): sum(p for (_, y), p in joint.items() if y == label) for label in labels}
            total += sum(p * math.log2(p / (of_bit[b] * of_label[y])) for (b, y), p in joint.items() if p > 0)
        expected.append(total)
    np.testing.assert_allclose(pib.relevance(q, labels), expected, atol=1e-12)


def test_what_units_tell_needs_a_label_each():
    with pytest.raises(ValueError, match=r"one label a sample but got \(3,\) for activations \(4, 2\)"):
        pib.relevance(torch.rand(4, 2), torch.zeros(3))


def test_jensen_is_a_bound_on_the_exact_marginal():
    q = activations(50, 20, 2, 2, seed=3)
    jensen, exact = pib.entropies(q), pib.entropies(q, "exact")
    assert (jensen.marginal >= exact.marginal).all()
    assert (jensen.marginal > exact.marginal + 0.1).any()
    assert (exact.marginal >= exact.noise - 1e-9).all()


def test_units_go_from_the_least_informative_on_until_the_room_is_needed():
    # Noise of 1, .9, .8, .6 and 0 bits; variant A: scores 0, .1, .2, .4, 1, sum 1.7, so two stay, though one is above a half.
    found = pib.Entropies(noise=torch.tensor([1.0, 0.9, 0.8, 0.6, 0.0]), marginal=torch.ones(5))
    assert pib.least_width(found, "A") == 2
    assert pib.keep_units(found, "A").tolist() == [3, 4]
    # Variant C with a marginal of .7 in the last unit and what it must be elsewhere: information .7 bits, so one stays.
    silent = pib.Entropies(found.noise, marginal=torch.tensor([1.0, 0.9, 0.8, 0.6, 0.7]))
    assert pib.least_width(silent, "C") == 1
    assert pib.keep_units(silent, "C").tolist() == [4]
    # Variant B scores as C does and leaves as much room as A.
    assert pib.keep_units(silent, "B").tolist() == [3, 4]


def test_a_score_of_exactly_a_half_stays():
    found = pib.Entropies(noise=torch.tensor([0.5, 0.5, 1.0, 1.0]), marginal=torch.ones(4))
    assert pib.least_width(found) == 1
    assert pib.keep_units(found).tolist() == [0, 1]


def test_the_variants_differ_on_a_unit_that_is_sure_and_says_nothing():
    # A silent unit, an informative one, and noise. Bounds 1, 1, 0; information 0, 1, 0.
    found = pib.Entropies(noise=torch.tensor([0.0, 0.0, 1.0]), marginal=torch.tensor([0.0, 1.0, 1.0]))
    assert pib.keep_units(found, "A").tolist() == [0, 1]
    assert pib.keep_units(found, "B").tolist() == [1, 2]  # room for two, and of the equals 0 and 2 the first one goes
    assert pib.keep_units(found, "C").tolist() == [1]


def test_a_layer_without_information_keeps_one_unit():
    found = pib.Entropies(noise=torch.ones(4), marginal=torch.ones(4))
    assert pib.width_of(found, "C") == 1
    assert len(pib.keep_units(found, "C")) == 1


def test_a_channel_is_judged_by_all_of_its_positions():
    """Six positions: one of 0 bits of noise and five of 1 bit are below half; four of 0 bits and two of 1 are above."""
    q = torch.full((8, 2, 3, 2), 0.5)
    q[:, 0, 0, 0] = 1
    q[:, 1, :2] = 1
    found = pib.entropies(q)
    assert found.noise.tolist() == [5, 2]
    assert found.positions == 6
    np.testing.assert_allclose(pib.scores(found, "A"), [1 / 6, 4 / 6])
    assert pib.keep_units(q).tolist() == [1]


@given(splits=st.lists(st.integers(0, 40), max_size=6), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_any_split_into_batches_gives_the_same(splits, seed):
    q = activations(40, 3, 2, 2, seed=seed, dtype=torch.float32)
    metric = StreamingEntropies(shape=(3, 2, 2))
    for batch in q.tensor_split(sorted(splits)):
        metric.update(batch)
    for row, marginal in enumerate(("jensen", "exact"), start=1):
        expected = pib.entropies(q, marginal)
        torch.testing.assert_close(metric.compute()[0], expected.noise, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(metric.compute()[row], expected.marginal, rtol=1e-10, atol=1e-10)
        assert metric.entropies(marginal).positions == 4


def test_a_layer_of_one_unit_keeps_its_shape():
    metric = StreamingEntropies(shape=(1,))
    metric.update(torch.tensor([[0.5], [1.0]]))
    assert metric.compute().shape == (3, 1)
    assert metric.middle == 0.5


def test_metrics_merge_by_addition_and_refuse_others():
    q = activations(30, 4)
    one, other, whole = (StreamingEntropies(shape=(4,)) for _ in range(3))
    one.update(q[:11]), other.update(q[11:]), whole.update(q)
    one.merge_state(other)
    one.merge_state(StreamingEntropies(shape=(4,)).metric_state)
    torch.testing.assert_close(one.compute(), whole.compute(), rtol=1e-12, atol=1e-12)
    assert int(one.count) == 30
    with pytest.raises(ValueError, match=r"`sums` has shape \(5, 4\) but got \(5, 3\)"):
        one.merge_state(StreamingEntropies(shape=(3,)))
    with pytest.raises(ValueError, match="Expected a StreamingEntropies or its `metric_state` but got StreamingMean"):
        one.merge_state(StreamingMean(4))


@pytest.mark.parametrize(
    ("q", "options", "text"),
    [
        (torch.tensor([[0.5, 1.2]]), {}, "must lie in .0, 1. but range from 0.5 to 1.2: are they those of a sigmoid"),
        (torch.tensor([[float("nan")]]), {}, "must lie in"),
        (torch.tensor([0.5]), {}, "Expected activations"),
        (torch.tensor([[1]]), {}, "floating point"),
        (torch.rand(0, 3), {}, "at least 1 sample"),
        (torch.rand(2, 3), {"marginal": "none"}, "`marginal` must be"),
        (torch.rand(2, 3), {"variant": "D"}, "`variant` must be"),
    ],
)
def test_refuses_what_is_no_activation(q, options, text):
    with pytest.raises(ValueError, match=text):
        pib.keep_units(q, **options)


def test_refuses_another_shape_and_nothing():
    metric = StreamingEntropies(shape=(3, 2))
    with pytest.raises(ValueError, match=r"shape \(N, 3, 2\) but got \(4, 3, 5\); a feature map must have one size"):
        metric.update(torch.rand(4, 3, 5))
    with pytest.raises(ValueError, match="at least 1 sample"):
        metric.entropies()
