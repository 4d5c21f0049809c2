"""Channel features, stage by stage: against the toolbox's, and the same written as plain loops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from lit_compress.detection import ACFChannels
from lit_compress.detection.acf import gradient, luv, oriented, smoothed

REFERENCE = np.load(Path(__file__).parent / "reference" / "acf_channels.npz")


def planes(name):
    """A reference array as ``(1, C, H, W)``."""
    array = torch.from_numpy(REFERENCE[name].astype(np.float32))
    return (array if array.ndim == 3 else array[..., None]).permute(2, 0, 1).unsqueeze(0)


def close(ours, name, tolerance):
    """The toolbox's tables and approximate roots are off by a few thousandths, which is where the tolerances come from."""
    np.testing.assert_allclose(ours, planes(name), atol=tolerance, rtol=0)


def test_colours_are_the_toolbox_s():
    close(luv(planes("img") / 255), "luv", 1e-3)
    np.testing.assert_allclose(luv(planes("img") / 255)[:, 0], planes("luv")[:, 0], atol=1e-6)  # a table on both sides
    # Its own formula in double precision, without the approximate roots.
    colours = torch.from_numpy(REFERENCE["luv_colors_in"]).T[None, :, :, None]
    np.testing.assert_allclose(luv(colours)[0, :, :, 0].T, REFERENCE["luv_colors_out_double_noSSE"], atol=1e-12)
    close(smoothed(planes("luv"), 1), "luv_smooth", 1e-6)


def test_gradients_are_the_toolbox_s():
    magnitude, orientation = gradient(planes("luv_smooth"))
    close(magnitude, "M_raw", 1e-3)
    off = (orientation - planes("O")).abs()
    assert torch.minimum(off, math.pi - off).max() < 0.02
    close(smoothed(planes("M_raw"), 5), "S", 1e-5)
    close(planes("M_raw") / (planes("S") + 0.005), "M", 1e-3)


def test_orientations_are_the_toolbox_s():
    histogram = oriented(planes("M"), planes("O"), 6)
    close(nn.functional.avg_pool2d(histogram, 4), "H", 1e-5)


def test_channels_are_the_toolbox_s():
    image = torch.from_numpy(REFERENCE["img"]).permute(2, 0, 1)
    for options, name in (({}, "chns"), ({"smooth_channels": 1}, "chns_smoothed_r1")):
        found = ACFChannels(**options)(image).unsqueeze(0)
        expected = planes(name)
        for channels, tolerance in ((slice(0, 3), 3e-3), (slice(3, 4), 1e-3), (slice(4, 10), 1.5e-2)):
            np.testing.assert_allclose(found[:, channels], expected[:, channels], atol=tolerance, rtol=0)


def test_smoothing_is_a_triangle_over_a_mirrored_image():
    image = torch.rand(2, 3, 9, 7, dtype=torch.float64)
    for radius in (1, 2, 5):
        kernel = np.convolve(np.ones(radius + 1), np.ones(radius + 1)) / (radius + 1) ** 2
        padded = np.pad(image.numpy(), ((0, 0), (0, 0), (radius, radius), (radius, radius)), mode="symmetric")
        rows = np.apply_along_axis(np.convolve, 2, padded, kernel, mode="valid")
        np.testing.assert_allclose(
            smoothed(image, radius), np.apply_along_axis(np.convolve, 3, rows, kernel, mode="valid"), atol=1e-12
        )


def test_the_rest_is_what_plain_loops_find():
    image = torch.rand(1, 3, 6, 5, dtype=torch.float64)
    magnitude, orientation = gradient(image)
    shares = oriented(magnitude, orientation, 6)
    for y in range(6):
        for x in range(5):
            best = (0.0, 0.0, 0.0)
            for channel in image[0].numpy():
                # One-sided at the border, central inside.
                down = (channel[min(y + 1, 5), x] - channel[max(y - 1, 0), x]) / (min(y + 1, 5) - max(y - 1, 0))
                across = (channel[y, min(x + 1, 4)] - channel[y, max(x - 1, 0)]) / (min(x + 1, 4) - max(x - 1, 0))
                if math.hypot(down, across) > best[0]:
                    best = (math.hypot(down, across), down, across)
            angle = math.atan2(best[1], best[2]) % math.pi
            assert float(magnitude[0, 0, y, x]) == pytest.approx(best[0], abs=1e-12)
            assert float(orientation[0, 0, y, x]) == pytest.approx(angle, abs=1e-12)
            expected = [0.0] * 6
            bin_of = int(angle * 6 / math.pi)
            share = angle * 6 / math.pi - bin_of
            expected[bin_of % 6] += (1 - share) * best[0]
            expected[(bin_of + 1) % 6] += share * best[0]
            np.testing.assert_allclose(shares[0, :, y, x], expected, atol=1e-12)


def test_an_image_is_as_it_is_in_a_batch_and_bytes_are_as_floats():
    images = torch.randint(0, 256, (3, 3, 33, 26), dtype=torch.uint8)
    channels = ACFChannels()
    together = channels(images)
    assert together.shape == (3, 10, 8, 6)
    for image, expected in zip(images, together, strict=True):
        torch.testing.assert_close(channels(image), expected)
    torch.testing.assert_close(channels(images.float() / 255), together)
    torch.testing.assert_close(channels(images[..., :32, :24]), together, msg="what fills no cell is left out")


def test_it_stands_in_front_of_a_network_and_in_a_transform():
    channels = ACFChannels(size=(20, 12))
    assert not list(channels.parameters())
    assert channels.out_channels == 10
    network = nn.Sequential(channels, nn.Conv2d(10, 4, 3))
    assert network(torch.rand(2, 3, 40, 24)).shape == (2, 4, 18, 10)
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), channels])
    assert transform(torch.zeros(3, 40, 24, dtype=torch.uint8)).shape == (10, 20, 12)


def test_sums_are_means_times_the_cell():
    image = torch.rand(3, 32, 32)
    torch.testing.assert_close(ACFChannels(reduce="sum")(image), 16 * ACFChannels()(image))
    assert ACFChannels(shrink=1)(image).shape == (10, 32, 32)
    assert ACFChannels(orientations=4)(image).shape == (8, 8, 8)


def test_gradients_go_through_and_stay_finite():
    image = torch.rand(1, 3, 16, 16)
    image[..., :8] = 0  # black and flat: roots and angles have no derivative there
    image.requires_grad_()
    ACFChannels()(image).sum().backward()
    assert image.grad.isfinite().all()
    assert image.grad.abs().sum() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_the_same():
    image = torch.rand(2, 3, 64, 32)
    # Convolutions may round to TF32 there.
    torch.testing.assert_close(ACFChannels()(image.cuda()).cpu(), ACFChannels()(image), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrink": 0}, "`shrink` must be at least 1"),
        ({"orientations": 0}, "`orientations` must be at least 1"),
        ({"smooth": -1}, "`smooth` must be at least 0"),
        ({"reduce": "max"}, '"mean" or "sum" but got \'max\''),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ACFChannels(**options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(1, 32, 32), "Expected RGB images"),
        (torch.rand(3, 4, 32), "at least 5 pixels each way"),
        (torch.ones(3, 32, 32, dtype=torch.int64), r"floating point dtype in \[0, 1\], or of uint8, but got torch.int64"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        ACFChannels()(image)
