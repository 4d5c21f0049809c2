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
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from lit_compress.budget import JPEGTables, jpeg_tables, save_jpeg, standard_tables
from lit_compress.budget.cdf import CDFTransform
from lit_compress.budget.curves import QuantizationCurves
from lit_compress.budget.dct import block_dct, inverse_block_dct, joined_blocks, plane_blocks
from lit_compress.budget.jpeg import decoded_jpeg, encode_jpeg, psnr, quantized, read_image, steps_for_bits, whole_table
from lit_compress.budget.planes import ImagePatches, image_planes, pixels_of
from lit_compress.budget.sizes import FileSizes
from lit_compress.budget.table_learner import TableLearner
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
    ours = inverse_block_dct(quantized(block_dct(plane_blocks(grey[None, None]).float() - 128), steps)) + 128
    # Encoder and decoder work in whole numbers, so a coefficient near the middle of two steps may go either way.
    off = (plane_blocks(decoded[None, None]) - ours.round().clamp(0, 255)).abs()
    assert off.mean() < 0.3
    assert (off > 1).float().mean() < 0.02


def test_blocks_are_in_reading_order_and_can_be_joined():
    planes = torch.arange(2 * 3 * 16 * 24).reshape(2, 3, 16, 24)
    blocks = plane_blocks(planes)
    assert torch.equal(blocks[1], planes[0, 0, :8, 8:16])
    assert torch.equal(blocks[3], planes[0, 0, 8:, :8])
    assert torch.equal(blocks[6], planes[0, 1, :8, :8])
    assert torch.equal(joined_blocks(blocks, planes.shape), planes)


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


def coefficients_of(*scales, count=4000):
    """Columns of Laplacian numbers, of these scales."""
    generator = np.random.default_rng(0)
    return torch.from_numpy(np.stack([generator.laplace(scale=scale, size=count) for scale in scales], axis=1)).float()


@pytest.mark.parametrize("step", [2.0, 2**4.25, 64.0, 256.0])
def test_bits_and_errors_are_those_of_real_rounding(step):
    """At steps far above the coefficients, too, where rounding leaves the coefficient itself."""
    coefficients = coefficients_of(1, 12, 70)
    curves = QuantizationCurves(coefficients)
    whole = np.rint(coefficients.numpy() / step)
    bits = [stats.entropy(np.unique(column, return_counts=True)[1], base=2) for column in whole.T]
    steps = torch.full((3,), step)
    np.testing.assert_allclose(curves.bits(steps), bits, atol=1e-3)  # the knots are set apart by at most 44e-5
    np.testing.assert_allclose(curves.error(steps), np.sqrt(np.square(whole * step - coefficients.numpy()).mean(0)), rtol=1e-3)


def test_steps_have_the_bits_asked_for():
    curves = QuantizationCurves(coefficients_of(1, 12, 70))
    steps = curves.steps(torch.tensor([0.3, 2.0, 4.0]))
    torch.testing.assert_close(curves.bits(steps), torch.tensor([0.3, 2.0, 4.0]), atol=1e-3, rtol=0)
    assert curves.steps(torch.full((3,), 50.0)).tolist() == [1.0] * 3
    assert curves.steps(torch.full((3,), 0.0)).tolist() == [2048.0] * 3


def test_coefficients_that_are_all_the_same_cost_nothing():
    curves = QuantizationCurves(torch.zeros(10, 2))
    assert curves.bits(torch.tensor([1.0, 200.0])).abs().max() < 1e-3
    assert curves.error(torch.tensor([1.0, 200.0])).tolist() == [0.0, 0.0]


# --- planes and patches


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_planes_come_back_as_the_pixels_of_a_decoder(subsampling):
    """At steps of 1, what is lost is lost in the subsampling."""
    image = Image.fromarray(picture(64, 64).permute(1, 2, 0).numpy())
    decoded = decoded_jpeg(encode_jpeg(image, JPEGTables((1,) * 64, (1,) * 64), subsampling))
    planes = tuple(plane[None].float() for plane in image_planes(image, subsampling))
    ours = 255 * pixels_of(planes)[0].permute(1, 2, 0).numpy()
    off = np.abs(ours - np.asarray(decoded, dtype=float))
    assert off.mean() < 0.7  # both round to whole numbers, in the planes and at the end
    assert off.max() < 5


def test_patches_lie_side_by_side_and_the_last_is_flush_with_the_edge_repeated():
    grey = picture(20, 43)[0]
    patches = ImagePatches([Image.fromarray(grey.numpy())], side=16)
    padded = np.pad(grey.numpy(), ((0, 4), (0, 5)), mode="edge")  # up to whole blocks: 24 x 48
    expected = {padded[top : top + 16, left : left + 16].tobytes() for top in (0, 8) for left in (0, 16, 32)}
    assert {bytes(patches[index][0].numpy()) for index in range(len(patches))} == expected


def test_patches_of_all_planes_are_of_one_place():
    """A picture whose colours tell the place: chroma of a patch is the mean of its luma's neighbours."""
    image = Image.fromarray(picture(64, 96).permute(1, 2, 0).numpy())
    whole = image_planes(image, "4:2:0")
    luma, chroma = ImagePatches([image], side=32).planes
    for one, other in zip(luma, chroma, strict=True):
        places = [
            (top, left)
            for top in range(0, 64, 32)
            for left in range(0, 96, 32)
            if torch.equal(whole[0][:, top : top + 32, left : left + 32], one)
        ]
        (top, left), half = places[0], 16
        assert torch.equal(whole[1][:, top // 2 : top // 2 + half, left // 2 : left // 2 + half], other)


def test_of_large_sets_only_some_patches_are_taken():
    images = [Image.new("L", (2048, 1024)) for _ in range(4)]
    assert len(ImagePatches(images, side=256)) == 32  # 2^21 pixels, a quarter of them all


def test_patches_say_what_does_not_fit():
    grey, colour = Image.new("L", (64, 48)), Image.new("RGB", (64, 48))
    with pytest.raises(ValueError, match=r"all grey \(L\) or all in colour \(RGB\) but got \['L', 'RGB'\]"):
        ImagePatches([grey, colour], side=16)
    with pytest.raises(ValueError, match="but got none"):
        ImagePatches([], side=16)
    with pytest.raises(ValueError, match="multiple of 16 with 4:2:0 here but got 24"):
        ImagePatches([colour], side=24)
    with pytest.raises(ValueError, match="Patches of 64 pixels do not fit an image of 64 x 48"):
        ImagePatches([colour], side=64)
    with pytest.raises(ValueError, match="`subsampling` must be one of"):
        ImagePatches([colour], side=16, subsampling="4:1:1")


# --- what the split is learnt by


def natural(side=192, seed=0):
    """Colours whose power falls with the square of the frequency, as in photographs."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1.0
    planes = np.fft.ifft2(np.fft.fft2(generator.normal(size=(3, side, side))) / frequency).real
    mixed = np.einsum("rc,chw->rhw", [[1, 0.3, 0], [1, -0.2, -0.2], [1, 0, 0.3]], planes / planes.std())
    return torch.from_numpy((128 + 35 * mixed).clip(0, 255).astype(np.uint8))


def flat_learner(patches, step, **arguments):
    """A learner whose steps are all alike."""
    learner = TableLearner(patches.colour, **arguments)
    learner.measure(patches.planes)
    learner.start_from(step)
    bits = torch.cat([kind.curves.bits(torch.full((64,), step)) for kind in learner.kinds])
    learner.total.fill_((bits.clamp_min(1e-3) * learner.budget.price).sum())
    return learner


def test_training_sees_what_a_decoder_shows_of_the_file():
    generator = torch.Generator().manual_seed(0)
    noisy = natural() / 2 + 127 * torch.rand(3, 192, 192, generator=generator)  # no coefficient is always 0
    image = Image.fromarray(noisy.byte().permute(1, 2, 0).numpy())
    patches = ImagePatches([image], side=192, subsampling="4:4:4")
    seen = []
    learner = flat_learner(
        patches,
        16.0,
        subsampling="4:4:4",
        loss=lambda decoded, original: seen.append((decoded, original)) or decoded.sum(),
    )
    learner(patches.planes)
    tables = JPEGTables((16,) * 64, (16,) * 64)
    assert learner.tables() == tables
    decoded = torch.from_numpy(np.array(decoded_jpeg(encode_jpeg(image, tables, "4:4:4")))).permute(2, 0, 1)
    ours, original = (255 * each[0] for each in seen[0])
    # Encoder and decoder work in whole numbers, so coefficients near the middle of two steps may go either way: 1.2 levels.
    # Steps that were 1 % off would show as 2.
    assert (ours - decoded).abs().mean() < 1.4
    assert (original - decoded).abs().mean() > 4


def test_the_gradient_is_that_of_the_error_at_larger_and_smaller_totals():
    patches = ImagePatches([Image.fromarray(natural()[0].numpy())], side=192)
    learner = flat_learner(patches, 16.0)
    total = learner.total.item()
    learner.total.requires_grad_()
    learner(patches.planes).backward()

    @torch.no_grad()
    def loss_at(share):
        learner.total.fill_(total * share)
        return learner(patches.planes).item()

    # Over several pieces of the curves, so the slopes agree roughly.
    assert learner.total.grad.item() == pytest.approx((loss_at(1.1) - loss_at(0.9)) / (0.2 * total), rel=0.2)


def best_by_lagrange(image, bits):
    """Steps of least error + λ · entropy, each coefficient by itself, tried out one by one; λ by the size of the file."""
    luma, chroma = (
        block_dct(plane_blocks(plane[None].float()) - 128).flatten(1).double().numpy() for plane in image_planes(image, "4:2:0")
    )
    steps = np.unique(np.geomspace(1, 255, 60).round())
    curves = []
    for coefficients, weight in ((luma, 1.0), (chroma, 1.91 / 0.5)):  # what an error weighs, over the samples for a pixel
        whole = [np.rint(coefficients / step) for step in steps]
        errors = np.stack(
            [np.square(each * step - coefficients).mean(0) for each, step in zip(whole, steps, strict=True)], axis=1
        )
        entropies = [[stats.entropy(np.unique(c, return_counts=True)[1], base=2) for c in each.T] for each in whole]
        curves.append((weight * errors, np.array(entropies).T))
    low, high = 1e-2, 1e5
    for _ in range(25):
        weight = (low * high) ** 0.5
        tables = JPEGTables(*(tuple(steps[(e + weight * r).argmin(1)].astype(int).tolist()) for e, r in curves))
        larger = 8 * len(encode_jpeg(image, tables)) / image.width / image.height > bits
        low, high = (weight, high) if larger else (low, weight)
    return tables


@pytest.mark.parametrize("bits", [0.7, 2.0])
def test_tables_for_squared_error_come_near_the_best_and_beat_the_standard_s(bits):
    image = Image.fromarray(natural().permute(1, 2, 0).numpy())

    def decibels(tables):
        return psnr(image, decoded_jpeg(encode_jpeg(image, tables)))

    sizes = FileSizes([image], "4:2:0")
    learnt = decibels(jpeg_tables(image, bits))
    best = decibels(best_by_lagrange(image, bits))
    assert learnt > best - 0.1
    larger = next(standard_tables(quality) for quality in range(1, 101) if sizes.of(standard_tables(quality)) >= bits)
    assert learnt > decibels(larger)


def test_tables_are_best_at_what_they_were_learnt_for():
    image = Image.fromarray(natural().permute(1, 2, 0).numpy())

    def scores(loss):
        decoded = decoded_jpeg(encode_jpeg(image, jpeg_tables(image, 2.0, loss=loss, steps=60)))
        pixels = [torch.from_numpy(np.array(each)).permute(2, 0, 1)[None] / 255 for each in (decoded, image)]
        return psnr(image, decoded), float(multiscale_structural_similarity_index_measure(*pixels, data_range=1.0))

    by_error, by_similarity = scores("squared_error"), scores("ms_ssim")
    assert by_error[0] > by_similarity[0] + 0.1
    assert by_error[1] < by_similarity[1]


def test_a_metric_of_one_s_own_is_called_with_pixels_and_left_as_it_is():
    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 1, 1))
            self.dropout = torch.nn.Dropout()
            self.shapes = set()

        def forward(self, decoded, original):
            assert not self.dropout.training
            assert 0 <= float(decoded.detach().min()) <= float(decoded.detach().max()) <= 1
            self.shapes |= {decoded.shape, original.shape}
            return (self.weight * (decoded - original).abs()).mean()

    metric = Weighted()
    jpeg_tables(natural(80), bits=2.0, loss=metric, steps=8, side=64)
    assert metric.shapes == {(16, 3, 64, 64)}  # 65536 pixels
    assert torch.equal(metric.weight, torch.ones(3, 1, 1))
    assert metric.weight.grad is None


@pytest.mark.parametrize("loss", ["squared_error", "mlp"])
@pytest.mark.parametrize("noise", ["measured", "normal"])
@pytest.mark.parametrize("image", [picture(96, 96), picture(96, 96)[0]], ids=["colour", "grey"])
def test_files_have_the_size_asked_for(image, noise, loss, tmp_path):
    tables = jpeg_tables(image, bits=1.5, noise=noise, loss=loss, steps=60)
    assert save_jpeg(image, tmp_path / "f.jpg", tables) == pytest.approx(1.5, rel=0.03)


def test_bits_go_to_the_coefficients_that_say_something():
    generator = torch.Generator().manual_seed(0)
    stripes = 128 + 50 * torch.randn(1, 128, generator=generator).repeat(128, 1) + 3 * torch.randn(128, 128, generator=generator)
    stripes = stripes.clamp(0, 255).to(torch.uint8)
    steps = torch.tensor(jpeg_tables(stripes, bits=1.0).luma).reshape(8, 8)
    kept = (block_dct(plane_blocks(stripes[None, None]).float() - 128) / steps).round().abs().mean(dim=0)
    # Upright stripes have horizontal frequencies alone: the first row.
    assert kept[0].min() > 0.3
    assert kept[1:].max() < 0.03


def test_the_global_random_state_is_left_alone_and_the_seed_decides():
    image, state = picture(32, 32), torch.get_rng_state()
    first = jpeg_tables(image, 4.0, steps=12, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert jpeg_tables(image, 4.0, steps=12, seed=3) == first


def test_tables_say_what_they_cannot_do():
    with pytest.raises(ValueError, match=r"reach from .* to .* bits per pixel here, but 50 were asked for"):
        jpeg_tables(picture(), bits=50)
    with pytest.raises(ValueError, match=r"all grey \(L\) or all in colour"):
        jpeg_tables([picture(), picture()[0]], bits=1)
    with pytest.raises(ValueError, match="but got none"):
        jpeg_tables([], bits=1)
    with pytest.raises(ValueError, match="'measured' or 'normal' but got 'pink'"):
        jpeg_tables(picture(), bits=1, noise="pink")
    with pytest.raises(ValueError, match="'ms_ssim' or a function but got 'l1'"):
        jpeg_tables(picture(), bits=1, loss="l1")
    with pytest.raises(ValueError, match=r"MS-SSIM needs 161 pixels a side but the patches have \(48, 48\)"):
        jpeg_tables(picture(), bits=3, loss="ms_ssim")


def test_a_size_between_two_that_are_far_apart_is_refused_and_both_are_named():
    image = Image.fromarray(natural(64)[0].numpy())
    coarse, fine = (JPEGTables((step,) * 64, (step,) * 64) for step in (40, 10))
    sizes = FileSizes([image], "4:2:0")
    small, large = sizes.of(coarse), sizes.of(fine)
    message = f"cannot be met within 3%: the nearest sizes that these tables reach are {small:.3g} and {large:.3g}"
    with pytest.raises(ValueError, match=message):
        sizes.meet((small + large) / 2, lambda total: coarse if total < 1 else fine)


def test_the_command_writes_files_of_the_size(tmp_path, capsys):
    for index in range(2):
        Image.fromarray(picture(64, 64, seed=index).permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    images = [str(tmp_path / f"{index}.png") for index in range(2)]
    main(["jpeg", *images, "--bits", "2", "--out", str(tmp_path / "out"), "--picture", str(tmp_path / "p.png")])
    sizes = [8 * (tmp_path / "out" / f"{index}.jpg").stat().st_size / 64**2 for index in range(2)]
    assert np.mean(sizes) == pytest.approx(2, rel=0.03)
    shown = capsys.readouterr().out
    assert f"1.jpg: {sizes[1]:.3f} bits per pixel" in shown
    assert "chroma" in shown
    assert Image.open(tmp_path / "p.png").width > 500
    for arguments, text in [
        ([images[0], "--bits", "1", "--out", str(tmp_path / "out" / "0.jpg")], "exists; choose another"),
        ([*images, "--bits", "1", "--out", str(tmp_path / "x.jpg")], "`--out` is a folder"),
        ([images[0], "--bits", "99", "--out", str(tmp_path / "x.jpg")], "99 were asked for"),
    ]:
        with pytest.raises(SystemExit, match="1"):
            main(["jpeg", *arguments])
        assert text in capsys.readouterr().err
