"""The reconstruction loss, the masks of boxes and the balance of losses, each against the same written out slowly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lit_compress.detection import box_masks
from lit_compress.losses import Balance, balance, roi_reconstruction
from lit_compress.losses.balancing import mean_balance


def slow_loss(made, target, mask):
    """Position by position, as equation 3.3.4 has it."""
    total = 0.0
    images, channels, height, width = made.shape
    for image in range(images):
        for row in range(height):
            for column in range(width):
                if not mask[image, 0, row, column]:
                    continue
                for channel in range(channels):
                    x = abs(float(made[image, channel, row, column] - target[image, channel, row, column]))
                    total += x * x / 2 if x < 1 else x - 0.5
    return total


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (3, 2, 7, 1), (2, 1, 1, 6)], ids=str)
def test_the_loss_is_the_sum_over_masked_positions(shape):
    made, target = torch.randn(shape, dtype=torch.float64) * 2, torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(shape[0], 1, *shape[2:]) < 0.4
    assert roi_reconstruction(made, target, mask).item() == pytest.approx(slow_loss(made, target, mask), rel=1e-12)
    everywhere = torch.ones_like(mask)
    assert roi_reconstruction(made, target).item() == pytest.approx(slow_loss(made, target, everywhere), rel=1e-12)
    assert 0 < mask.sum() < mask.numel()


def test_nothing_outside_of_the_mask_counts_or_has_a_gradient():
    made = torch.tensor([[[[0.5, math.inf, math.nan, -3.0]]]], requires_grad=True)
    mask = torch.tensor([[[[True, False, False, True]]]])
    loss = roi_reconstruction(made, torch.zeros(1, 1, 1, 4), mask)
    assert loss.item() == 0.125 + 2.5
    loss.backward()
    assert made.grad.flatten().tolist() == [0.5, 0.0, 0.0, -1.0]


def test_an_image_without_boxes_gives_zero_and_not_nan():
    made = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = roi_reconstruction(made, torch.randn(2, 3, 4, 4), box_masks([torch.zeros(0, 4)] * 2, (4, 4), (8, 8)))
    loss.backward()
    assert loss.item() == 0
    assert (made.grad == 0).all()


def test_gradients_are_right():
    made, target = (torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, 3, 3) < 0.5
    assert torch.autograd.gradcheck(lambda *maps: roi_reconstruction(*maps, mask), (made, target))


def test_a_sum_over_a_large_map_stays_finite_in_half_precision():
    made = torch.full((1, 64, 60, 60), 2.0, dtype=torch.float16)  # 64 · 3600 · 1.5 = 345,600, and float16 ends at 65,504
    assert roi_reconstruction(made, torch.zeros_like(made)).item() == 345_600


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 3)), r"one shape but got \(1, 1, 2, 2\) and \(1, 1, 2, 3\)"),
        ((torch.zeros(1, 1, 2, 2),) * 2 + (torch.ones(1, 1, 2, 2),), "boolean mask .* but got torch.float32"),
        ((torch.zeros(1, 1, 2, 2),) * 2 + (torch.ones(1, 2, 2).bool(),), r"of shape \(1, 2, 2\)"),
    ],
)
def test_maps_and_masks_that_do_not_fit_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        roi_reconstruction(*arguments)


# ---------------------------------------------------------------- masks


def slow_mask(boxes, size, stride):
    """A position is reached if the whole pixels that the divided box touches include it."""
    found = torch.zeros(len(boxes), 1, *size, dtype=torch.bool)
    for image, several in enumerate(boxes):
        for left, top, right, bottom in several.tolist():
            for row in range(size[0]):
                for column in range(size[1]):
                    down = math.floor(top / stride[0]) <= row < math.ceil(bottom / stride[0])
                    across = math.floor(left / stride[1]) <= column < math.ceil(right / stride[1])
                    found[image, 0, row, column] |= down and across
    return found


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (32, 32), (4, 2)], ids=str)
def test_masks_agree_with_those_made_pixel_by_pixel(stride):
    generator = torch.Generator().manual_seed(sum(stride))
    size = (96 // stride[0], 128 // stride[1])
    boxes = []
    for count in (0, 1, 5):
        corner = torch.rand(count, 2, generator=generator) * 150 - 20  # some begin or end outside of the image
        boxes.append(torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 40], 1))
    boxes.append(torch.tensor([[16.0, 32.0, 48.0, 64.0], [3.0, 3.0, 3.0, 3.0]]))  # on edges of positions; without any area
    assert torch.equal(box_masks(boxes, size, stride), slow_mask(boxes, size, stride))


@given(
    x=st.floats(0, 63),
    y=st.floats(0, 63),
    width=st.floats(0.1, 40),
    height=st.floats(0.1, 40),
    stride=st.sampled_from([1, 2, 4, 8]),
)
def test_a_box_is_covered_and_by_less_than_a_position_too_much(x, y, width, height, stride):
    box = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float64)
    rows, columns = box_masks([box], (128, 128), (stride, stride))[0, 0].nonzero().unbind(1)
    for low, high, positions in ((y, y + height, rows), (x, x + width, columns)):
        first, last = int(positions.min()), int(positions.max())  # a tensor of integers is compared with a number in float32
        assert first * stride <= low < (first + 1) * stride
        assert (last + 1) * stride >= high > last * stride


def test_boxes_and_strides_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"boxes \(m, 4\) but got shape \(2, 5\)"):
        box_masks([torch.zeros(2, 5)], (4, 4), (1, 1))
    with pytest.raises(ValueError, match="`stride` must be positive"):
        box_masks([torch.zeros(2, 4)], (4, 4), (0, 1))
    assert box_masks([], (4, 5), (1, 1)).shape == (0, 1, 4, 5)


# ---------------------------------------------------------------- balance


def test_weights_give_each_term_the_share_of_the_gradient_that_is_asked_for():
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    found = network(torch.randn(7, 4))
    loss, terms = found.square().mean(), {"large": 1e6 * found.abs().sum(), "small": 1e-3 * found.pow(4).mean()}
    shared = list(network[0].parameters())
    measured = balance(loss, terms, shared)
    assert all(parameter.grad is None for parameter in network.parameters())

    def length(one):
        network.zero_grad()
        one.backward(retain_graph=True)
        return torch.cat([parameter.grad.flatten() for parameter in shared]).norm().item()

    assert measured.own == pytest.approx(length(loss), rel=1e-6)
    for name, weight in measured.weights(share=0.25).items():
        assert length(weight * terms[name]) == pytest.approx(0.25 * length(loss), rel=1e-5)
        assert measured.shares({"large": weight, "small": weight})[name] == pytest.approx(0.25, rel=1e-6)


def test_what_is_frozen_or_has_no_graph_counts_for_nothing():
    weight, frozen = torch.tensor([3.0], requires_grad=True), torch.tensor([5.0])
    measured = balance((weight * frozen).sum(), {"none": torch.tensor(4.0), "other": weight.sum()}, [weight, frozen])
    assert measured == Balance(own=5.0, terms={"none": 0.0, "other": 1.0})
    assert measured.weights(1.0) == {"none": 0.0, "other": 5.0}
    with pytest.raises(ValueError, match="share no layer that is trained"):
        balance(weight.sum(), {}, [frozen])
    with pytest.raises(ValueError, match="depends on no parameter that is trained"):
        balance(frozen.sum(), {}, [weight])
    with pytest.raises(ValueError, match="`share` must be positive"):
        measured.weights(0.0)


def test_the_mean_leaves_batches_out_in_which_a_term_shows_nothing():
    found = [Balance(1.0, {"a": 2.0, "b": 0.0}), Balance(3.0, {"a": 0.0, "b": 0.0}), Balance(2.0, {"a": 4.0, "b": 0.0})]
    assert mean_balance(found) == Balance(2.0, {"a": 3.0, "b": 0.0})
    assert mean_balance(found).weights(0.5) == {"a": 1.0 / 3.0, "b": 0.0}
