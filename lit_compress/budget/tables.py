"""JPEG quantisation tables learnt from images, for a size of the file."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lit_compress.budget.jpeg import JPEGTables, Subsampling, read_image
from lit_compress.budget.planes import ImagePatches, unit_side
from lit_compress.budget.sizes import FileSizes
from lit_compress.budget.table_learner import TableLearner, TableLoss, TableNoise

ImageLike = str | Path | Image.Image | Tensor

_ROUNDS = 4  # of training, each begun by a search for the total that meets the size
_BATCH_PIXELS = 2**15  # 512 blocks of luma
_PERCEPTUAL_PIXELS = 2**16  # a patch or two, which perceptual losses need larger


def jpeg_tables(
    images: ImageLike | list[ImageLike] | tuple[ImageLike, ...],
    bits: float,
    *,
    loss: TableLoss = "squared_error",
    noise: TableNoise = "measured",
    subsampling: Subsampling = "4:2:0",
    steps: int | None = None,
    side: int = 192,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] | None = None,
) -> JPEGTables:
    """Quantisation tables for one image or a set, such that the files have the size asked for.

    A budget of bits is split over the 64 coefficients of luma blocks and the 64 of chroma blocks, and the split is learnt by the
    loss of what is left of patches; see :class:`~lit_compress.budget.table_learner.TableLearner`. The total is searched so that
    real files meet the size.

    Args:
        images: Files, images or uint8 tensors, all grey or all in colour; see :func:`~lit_compress.budget.save_jpeg`.
        bits: Size of the file in bits per pixel; over a set, of all files together.
        loss: What the tables are to be good at: ``"squared_error"`` (PSNR), ``"mlp"`` (the same through a learnt decoder, as the
            source has it), ``"ms_ssim"``, or a function from decoded and original pixels ``(N, 1 or 3, S, S)`` in [0, 1] to a
            scalar that falls as they come to look alike, e.g. LPIPS.
        noise: That training adds: ``"measured"``, or ``"normal"`` as the source has it.
        subsampling: Of chroma.
        steps: Of training, altogether; by default 400, and 80 with a perceptual loss.
        side: Of the patches that a perceptual loss sees, in pixels; of smaller images, as much as there is.
        seed: Of the draw of patches, the network and the noise.
        progress: Wraps the range of rounds, e.g. ``tqdm``.

    Returns:
        Tables for :func:`~lit_compress.budget.save_jpeg`, whose files are within 3 % of the size.

    Raises:
        ValueError: If there is no image, grey and colour are mixed, or no table reaches the size; then the range is named.

    Source: *Resource-Efficient Feature Gathering at Test Time*, section 3.3.3. Chroma, the size in real bits, the measured noise
    and MS-SSIM are ours.

    Example:
        >>> from lit_compress.budget import save_jpeg
        >>> noise = (torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
        >>> tables = jpeg_tables(noise, bits=3.0, steps=60)
        >>> round(save_jpeg(noise, "noise.jpg", tables), 1)
        3.0
    """
    pictures = [read_image(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
    learner = TableLearner(bool(pictures) and pictures[0].mode == "RGB", subsampling, loss, noise)
    unit = unit_side(learner.colour, subsampling)
    perceptual = learner.perceptual is not None
    if perceptual and pictures:
        least = min(min(picture.size) for picture in pictures)
        side = min(side, -(-least // unit) * unit)
    patches = ImagePatches(pictures, side if perceptual else unit, subsampling, seed)
    sizes = FileSizes(pictures, subsampling)
    step = sizes.flat_step(bits)
    batch = max((_PERCEPTUAL_PIXELS if perceptual else _BATCH_PIXELS) // patches.side**2, 1)
    length = max((steps or (80 if perceptual else 400)) // _ROUNDS, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        learner.measure(patches.planes)
        learner.start_from(step)
        optimizer = torch.optim.Adam(learner.parameter_groups(lr=2e-3))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _ROUNDS * length)
        rounds = range(_ROUNDS)
        for _ in rounds if progress is None else progress(rounds):
            learner.total.fill_(sizes.total_for(bits, learner.tables))
            for _ in range(length):
                chosen = torch.randint(len(patches), (batch,))
                optimizer.zero_grad()
                learner(tuple(plane[chosen] for plane in patches.planes)).backward()
                optimizer.step()
                schedule.step()
        return learner.tables(sizes.meet(bits, learner.tables))
