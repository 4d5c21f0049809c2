"""Cosines, tables and files: against scipy, the independent vectors, Pillow's own tables, and what a decoder reads back."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from scipy.fft import dctn

from lit_compress.budget import JPEGTables, jpeg_tables, save_jpeg, standard_tables
from lit_compress.budget.cdf import CDFTransform
from lit_compress.budget.dct import block_dct, image_blocks, inverse_block_dct
from lit_compress.budget.jpeg import encode_jpeg, quantized, read_image, steps_for_bits, whole_table
from lit_compress.cli import main

VECTORS = np.load(Path(__file__).parent / "reference" / "independent_vectors.npz")


def picture(height=48, width=64, seed=0):
    """Smooth colours with a little noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [128 + 90 * np.sin(x / 9 + 2 * c) * np.cos(y / 7 - c) + generator.normal(0, 4, (height, width)) for c in range(3)]
    return torch.from_numpy(np.stack(planes).clip(0, 255).astype(np.uint8))


def tables_in_file(content):
    """The DQT segments of a file, read by hand and put from zigzag into rows."""
    order = sorted(((r, c) for r in range(8) for c in range(8)), key=lambda at: (sum(at), at[0] if sum(at) % 2 else at[1]))
    found, place = {}, 2
    while content[place + 1] != 0xDA:
        marker, length = content[place + 1], struct.unpack(">H", content[place + 2 : place + 4])[0]
        segment = content[place + 4 : place + 2 + length]
        while marker == 0xDB and segment:
            assert segment[0] >> 4 == 0, "8 bits a step"
            table = np.zeros((8, 8), dtype=int)
            for (row, column), step in zip(order, segment[1:65], strict=True):
                table[row, column] = step
            found[segment[0] & 15], segment = tuple(table.ravel().tolist()), segment[65:]
        place += 2 + length
    return found


def test_cosines_are_scipy_s_and_undo_themselves():
    blocks = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    coefficients = block_dct(blocks)
    np.testing.assert_allclose(coefficients, dctn(blocks.numpy(), axes=(2, 3), norm="ortho"), atol=1e-12)
    torch.testing.assert_close(inverse_block_dct(coefficients), blocks)


def test_a_block_equals_the_independent_vectors():
    coefficients = block_dct(torch.from_numpy(VECTORS["jpeg_block"]) - 128)
    np.testing.assert_allclose(coefficients, VECTORS["jpeg_dct_ortho_of_block_minus128"], atol=1e-9)
    bits = 128 * torch.from_numpy(VECTORS["jpeg_gamma"]).flatten().softmax(0).reshape(8, 8)
    np.testing.assert_allclose(bits, VECTORS["jpeg_B"], rtol=1e-12)
    steps = steps_for_bits(bits)
    np.testing.assert_allclose(steps, VECTORS["jpeg_Q_eq3_17"], rtol=1e-12)
    np.testing.assert_array_equal((coefficients / steps).round(), VECTORS["jpeg_z_eq3_16"])
    np.testing.assert_allclose(inverse_block_dct(quantized(coefficients, steps)) + 128, VECTORS["jpeg_recon"], atol=1e-9)


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 100])
def test_standard_tables_are_pillow_s(quality):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="JPEG", quality=quality)
    ours = standard_tables(quality)
    assert tables_in_file(file.getvalue()) == {0: ours.luma, 1: ours.chroma}


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_a_file_holds_the_tables_and_a_decoder_sees_their_rounding(subsampling, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tables = JPEGTables(*(tuple(torch.randint(1, 256, (64,), generator=generator).tolist()) for _ in range(2)))
    bits = save_jpeg(picture(), tmp_path / "f.jpg", tables, subsampling)
    content = (tmp_path / "f.jpg").read_bytes()
    assert bits == 8 * len(content) / (48 * 64)
    assert tables_in_file(content) == {0: tables.luma, 1: tables.chroma}
    assert Image.open(tmp_path / "f.jpg").size == (64, 48)


def test_the_decoder_s_pixels_are_those_of_our_rounding(tmp_path):
    grey = picture()[0]
    tables = standard_tables(20)
    save_jpeg(grey, tmp_path / "f.jpg", tables)
    decoded = torch.from_numpy(np.array(Image.open(tmp_path / "f.jpg"))).float()
    steps = torch.tensor(tables.luma).reshape(8, 8).float()
    ours = inverse_block_dct(quantized(block_dct(image_blocks(grey).float() - 128), steps)) + 128
    # Encoder and decoder work in whole numbers, so a coefficient near the middle of two steps may go either way.
    off = (image_blocks(decoded) - ours.round().clamp(0, 255)).abs()
    assert off.mean() < 0.3
    assert (off > 1).float().mean() < 0.02


def test_blocks_are_in_reading_order_and_the_edge_is_repeated():
    plane = torch.arange(10 * 17).reshape(10, 17)
    blocks = image_blocks(plane)
    assert torch.equal(blocks[1], plane[:8, 8:16])
    assert torch.equal(blocks[5][:2, 0], plane[8:, 16])
    assert (blocks[5][2:] == plane[9, 16]).all()


def test_finer_tables_make_larger_and_better_files():
    sizes = [len(encode_jpeg(picture(), standard_tables(quality))) for quality in (5, 30, 80)]
    assert sizes == sorted(sizes)


def test_what_is_no_jpeg_matter_is_converted_or_refused(tmp_path):
    colour = Image.fromarray(picture().permute(1, 2, 0).numpy())
    assert read_image(colour.convert("P")).mode == "RGB"
    assert read_image(colour.convert("1")).mode == "L"
    assert read_image(colour.convert("CMYK")).mode == "RGB"
    assert np.array_equal(read_image(colour.convert("RGBA")), colour)
    glass = colour.convert("RGBA")
    glass.putalpha(128)
    with pytest.raises(ValueError, match="no transparency; put the image on a background"):
        read_image(glass)
    with pytest.raises(ValueError, match="8 bits a channel but the image has mode I;16"):
        read_image(Image.fromarray(np.zeros((8, 8), dtype=np.uint16)))
    (tmp_path / "f.png").write_text("no image")
    with pytest.raises(ValueError, match=r"f.png is not an image"):
        read_image(tmp_path / "f.png")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"uint8 tensor .* but got torch.float32 \(8, 8\)"):
        read_image(torch.zeros(8, 8))


def test_tables_keep_to_a_baseline_file():
    assert whole_table(torch.tensor([0.2] * 32 + [700.4] * 32)) == (1,) * 32 + (255,) * 32
    with pytest.raises(ValueError, match="`chroma` must hold 64 whole numbers from 1 to 255"):
        JPEGTables((1,) * 64, (256,) * 64)
    with pytest.raises(ValueError, match="must lie in 1 to 100 but got 0"):
        standard_tables(0)


# --- learnt tables


def test_columns_become_normal_and_come_back():
    generator = torch.Generator().manual_seed(0)
    samples = torch.stack([-torch.rand(20_000, generator=generator).log(), torch.randn(20_000, generator=generator).exp()], dim=1)
    transform = CDFTransform(samples)
    normal = transform(samples)
    for column in normal.T:
        assert stats.kstest(column.numpy(), "norm").statistic < 0.01
    torch.testing.assert_close(transform.inverse(normal), samples, rtol=1e-3, atol=1e-4)
    beyond = torch.tensor([[2.0, 500.0], [-1.0, -5.0]])
    torch.testing.assert_close(transform.inverse(transform(beyond)), beyond, rtol=1e-3, atol=1e-2)


def test_columns_of_few_values_can_be_mapped_back_too():
    samples = torch.cat([torch.zeros(900, 2), torch.ones(100, 2)])
    samples[:, 1] = 5.0
    transform = CDFTransform(samples)
    torch.testing.assert_close(transform.inverse(transform(samples)), samples, rtol=0, atol=2e-3)


@pytest.mark.parametrize("steps", [4.0, 16.0])
def test_evenly_spread_noise_is_that_of_real_rounding(steps):
    """For coefficients that spread well over a step; below, rounding leaves the coefficient itself."""
    coefficients = 60 * torch.randn(20_000, 1, 1, generator=torch.Generator().manual_seed(0))
    error = quantized(coefficients, torch.tensor(steps)) - coefficients
    assert error.std() == pytest.approx(steps / 12**0.5, rel=0.02)
    assert error.abs().max() <= steps / 2


@pytest.mark.parametrize("noise", ["normal", "uniform"])
@pytest.mark.parametrize("image", [picture(96, 96), picture(96, 96)[0]], ids=["colour", "grey"])
def test_files_have_the_size_asked_for(image, noise, tmp_path):
    tables = jpeg_tables(image, bits=1.5, noise=noise, steps=60)
    assert save_jpeg(image, tmp_path / "f.jpg", tables) == pytest.approx(1.5, rel=0.03)


def test_coefficients_that_say_more_get_finer_steps():
    generator = torch.Generator().manual_seed(0)
    stripes = 128 + 50 * torch.randn(1, 128, generator=generator).repeat(128, 1) + 3 * torch.randn(128, 128, generator=generator)
    luma = torch.tensor(jpeg_tables(stripes.clamp(0, 255).to(torch.uint8), bits=1.0, noise="uniform", steps=600).luma)
    luma = luma.reshape(8, 8).float()  # upright stripes have horizontal frequencies alone: the first row
    assert luma[0].mean() < 0.5 * luma[1:].mean()


def test_the_global_random_state_is_left_alone_and_the_seed_decides():
    image, state = picture(32, 32), torch.get_rng_state()
    first = jpeg_tables(image, 4.0, steps=12, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert jpeg_tables(image, 4.0, steps=12, seed=3) == first


def test_tables_say_what_they_cannot_do():
    with pytest.raises(ValueError, match=r"reach from .* to .* bits per pixel here, but 50 were asked for"):
        jpeg_tables(picture(), bits=50)
    with pytest.raises(ValueError, match="all grey or all in colour"):
        jpeg_tables([picture(), picture()[0]], bits=1)
    with pytest.raises(ValueError, match="'normal' or 'uniform' but got 'pink'"):
        jpeg_tables(picture(), bits=1, noise="pink")


def test_the_command_writes_files_of_the_size(tmp_path, capsys):
    for index in range(2):
        Image.fromarray(picture(64, 64, seed=index).permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    images = [str(tmp_path / f"{index}.png") for index in range(2)]
    main(["jpeg", *images, "--bits", "2", "--out", str(tmp_path / "out"), "--noise", "uniform"])
    sizes = [8 * (tmp_path / "out" / f"{index}.jpg").stat().st_size / 64**2 for index in range(2)]
    assert np.mean(sizes) == pytest.approx(2, rel=0.03)
    shown = capsys.readouterr().out
    assert f"1.jpg: {sizes[1]:.3f} bits per pixel" in shown
    assert "chroma" in shown
    for arguments, text in [
        ([images[0], "--bits", "1", "--out", str(tmp_path / "out" / "0.jpg")], "exists; give another"),
        ([*images, "--bits", "1", "--out", str(tmp_path / "x.jpg")], "`--out` is a folder"),
        ([images[0], "--bits", "99", "--out", str(tmp_path / "x.jpg")], "99 were asked for"),
    ]:
        with pytest.raises(SystemExit, match="1"):
            main(["jpeg", *arguments])
        assert text in capsys.readouterr().err
