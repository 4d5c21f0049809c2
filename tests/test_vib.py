"""The gate and its penalty, against the authors' layer (recorded), torch.distributions and numerical gradients."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_compress.layers import VIBGate
from lit_compress.selection import vib

REFERENCE = Path(__file__).parent / "reference"
RECORDED = json.loads((REFERENCE / "vibnet.json").read_text())
TENSORS = {name: torch.from_numpy(value) for name, value in np.load(REFERENCE / "vibnet.npz").items()}


def authors_gate(**options):
    gate = VIBGate(6, **options)
    with torch.no_grad():
        gate.mu.copy_(TENSORS["mu"]), gate.log_var.copy_(TENSORS["logD"])
    return gate


def test_the_authors_penalty_and_selection_are_met():
    """Recorded in float32, hence 1e-6."""
    mu, log_var = TENSORS["mu"], TENSORS["logD"]
    np.testing.assert_allclose(vib.kl(mu, log_var), RECORDED["per_unit_kl"], rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(vib.log_alpha(mu, log_var), RECORDED["logalpha"], rtol=2e-6, atol=1e-6)
    assert vib.keep_units(mu, log_var).tolist() == np.flatnonzero(RECORDED["hard_mask_thresh_0.0"]).tolist()
    gate = authors_gate()
    gate(TENSORS["x_fc"])
    assert gate.penalty().item() == pytest.approx(RECORDED["kl_fc"], rel=1e-6)
    np.testing.assert_allclose(gate.scale.detach(), RECORDED["weighted_mask_thresh_0.0"], atol=1e-7)


def test_the_authors_outputs_are_met(monkeypatch):
    gate = authors_gate()
    np.testing.assert_allclose(gate.eval()(TENSORS["x_fc"]).detach(), TENSORS["eval_out_fc"], rtol=1e-6)
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: TENSORS["train_eps_fc"])
    np.testing.assert_allclose(gate.train()(TENSORS["x_fc"]).detach(), TENSORS["train_out_fc"], rtol=1e-5, atol=1e-7)


def test_the_penalty_is_the_divergence_from_a_marginal_of_the_best_variance():
    """For an input of energy 1: N(mu, sigma²) from N(0, mu² + sigma²), which no other variance comes closer to."""
    mu, log_var = torch.tensor([0.3, -1.2, 2.0]).double(), torch.tensor([-1.0, 0.5, -3.0]).double()
    here = torch.distributions.Normal(mu, (0.5 * log_var).exp())
    marginal = torch.distributions.Normal(0.0, (mu.square() + log_var.exp()).sqrt())
    expected = torch.distributions.kl_divergence(here, marginal)
    torch.testing.assert_close(vib.kl(mu, log_var), expected, rtol=1e-6, atol=0)  # 1e-8 is added to the variance
    for factor in (0.9, 1.1):
        other = torch.distributions.Normal(0.0, marginal.scale * factor)
        assert (torch.distributions.kl_divergence(here, other) > expected).all()


def test_gradients_are_right():
    mu, log_var = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(vib.kl, (mu, log_var))


def test_a_higher_threshold_keeps_more():
    mu, log_var = torch.randn(50), torch.randn(50)
    kept = [set(vib.keep_units(mu, log_var, threshold).tolist()) for threshold in (-2.0, 0.0, 2.0)]
    assert kept[0] < kept[1] < kept[2]


def test_noise_is_drawn_once_for_each_sample_and_channel():
    gate = VIBGate(3)
    torch.nn.init.zeros_(gate.log_var)
    out = gate(torch.ones(5, 3, 4, 2))
    assert (out == out[:, :, :1, :1]).all()
    assert len(out[:, :, 0, 0].unique()) == 15


def test_noise_has_the_mean_and_spread_that_the_gate_says():
    gate = VIBGate(2)
    with torch.no_grad():
        gate.mu.copy_(torch.tensor([0.5, -2.0])), gate.log_var.copy_(torch.tensor([0.0, -2.0]))
    out = gate(torch.ones(20000, 2)).detach()
    # The standard error of the mean is 1 / sqrt(20000) = 0.007, that of the deviation 0.005.
    np.testing.assert_allclose(out.mean(0), [0.5, -2.0], atol=0.03)
    np.testing.assert_allclose(out.std(0), [1.0, np.exp(-1)], atol=0.02)


def test_evaluation_has_no_noise_and_switches_channels_off():
    gate = authors_gate().eval()
    x = torch.randn(4, 6, 3, 3)
    expected = x * torch.tensor(RECORDED["weighted_mask_thresh_0.0"]).view(1, 6, 1, 1)
    torch.testing.assert_close(gate(x), expected, rtol=1e-6, atol=1e-7)
    assert gate.keep.tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize(
    ("map_scale", "shape", "positions"),
    [
        ("height", (2, 6), 1),
        ("height", (2, 6, 4, 5), 4),
        ("area", (2, 6, 4, 5), 20),
        ("one", (2, 6, 4, 5), 1),
        ("height", (2, 6, 7), 7),
    ],
)
def test_the_penalty_grows_with_the_map_and_not_with_the_batch(map_scale, shape, positions):
    gate = authors_gate(map_scale=map_scale)
    for batch in (2, 9):
        gate(torch.zeros(batch, *shape[1:]))
        assert gate.penalty().item() == pytest.approx(positions * RECORDED["kl_fc"], rel=1e-6)


def test_channels_may_lie_last():
    gate = authors_gate(channel_dim=-1).eval()
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(gate(x), authors_gate().eval()(x.movedim(-1, 1)).movedim(1, -1))
    assert gate.train()(x).shape == (2, 5, 6)


def test_starts_as_the_authors_gate_does():
    gate = VIBGate(4000)
    # Standard errors: 0.01 / sqrt(4000) = 0.00016 of the mean and 0.00011 of the deviation.
    for values, mean in ((gate.mu, 1.0), (gate.log_var, -9.0)):
        assert float(values.mean()) == pytest.approx(mean, abs=0.001)
        assert float(values.std()) == pytest.approx(0.01, abs=0.0006)
    assert len(gate.keep) == 4000


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: VIBGate(0), "`channels` must be at least 1"),
        (lambda: VIBGate(3, map_scale="width"), "`map_scale` must be"),
        (lambda: VIBGate(3)(torch.zeros(2, 4)), r"Expected 3 channels in dimension 1 but got shape \(2, 4\)"),
        (lambda: vib.kl(torch.zeros(2), torch.zeros(3)), r"one shape but got \(2,\) and \(3,\)"),
    ],
)
def test_refuses_what_does_not_fit(make, text):
    with pytest.raises(ValueError, match=text):
        make()
