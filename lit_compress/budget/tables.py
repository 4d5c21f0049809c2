"""JPEG quantisation tables learnt from images, for a size of the file."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lit_compress.budget.cdf import CDFTransform
from lit_compress.budget.dct import block_dct, image_blocks
from lit_compress.budget.jpeg import JPEGTables, Subsampling, encode_jpeg, read_image, steps_for_bits, whole_table
from lit_compress.budget.split import BudgetSplit
from lit_compress.models.normed_mlp import NormedMLP

ImageLike = str | Path | Image.Image | Tensor

_COEFFICIENTS = 64
_BATCH = 256  # blocks
_MOST_BLOCKS = 20_000  # of each kind that learning looks at, so that its time does not grow with the images
_ROUNDS = 6  # of training, each followed by a search for the total that meets the size
# Squared error of red, green and blue that an error of both chroma planes makes, over that of an error of luma alone:
# ((1.402² + .714²) + (.344² + 1.772²)) / 3, by the matrix of JFIF.
_CHROMA_ERROR = 1.91
# Factors by which chroma planes are smaller, across and down.
_FACTORS: dict[str, tuple[int, int]] = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}


def jpeg_tables(
    images: ImageLike | list[ImageLike] | tuple[ImageLike, ...],
    bits: float,
    *,
    noise: Literal["normal", "uniform"] = "normal",
    subsampling: Subsampling = "4:2:0",
    steps: int = 1200,
    seed: int = 0,
    progress: Callable[[range], Iterable[int]] | None = None,
) -> JPEGTables:
    """Quantisation tables for one image or a set, such that the files have the size asked for.

    A budget of bits is split over the 64 coefficients of luma blocks and the 64 of chroma blocks; a coefficient with B bits has
    the step 2^(8 - B). The noise of quantisation is added to the coefficients, a network of one hidden layer decodes blocks of
    pixels from them, and its squared error (in red, green and blue) moves the split. The total is searched so that real files
    meet the size.

    Args:
        images: Files, images or uint8 tensors, all grey or all in colour; see :func:`~lit_compress.budget.save_jpeg`.
        bits: Size of the file in bits per pixel; over a set, of all files together.
        noise: ``"normal"`` adds normal noise of deviation 2^-B after each coefficient is mapped to a normal variable, as the
            source has it; ``"uniform"`` adds to the coefficient itself what rounding to the step leaves, evenly spread.
        subsampling: Of chroma.
        steps: Of training, altogether, each on 256 blocks.
        seed: Of the draw of blocks, the network and the noise.
        progress: Wraps the range of rounds, e.g. ``tqdm``.

    Returns:
        Tables for :func:`~lit_compress.budget.save_jpeg`. Their entries are whole numbers: the size met is the nearest to be had.

    Raises:
        ValueError: If there is no image, grey and colour are mixed, or no table reaches the size; then the range is named.

    Source: *Resource-Efficient Feature Gathering at Test Time*, section 3.3.3. Chroma, the size in real bits, and the uniform
    noise are ours.
    """
    pictures = [read_image(image) for image in (images if isinstance(images, (list, tuple)) else [images])]
    if not pictures or len({picture.mode for picture in pictures}) != 1:
        raise ValueError(f"Expected images that are all grey or all in colour but got {[picture.mode for picture in pictures]}.")
    if noise not in ("normal", "uniform"):
        raise ValueError(f"Argument `noise` must be 'normal' or 'uniform' but got {noise!r}.")
    size = _Size(pictures, subsampling)
    size.check(bits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        learner = _Learner(pictures, subsampling, noise)
        total = size.total_for(bits, learner.tables, halvings=8)
        rounds = range(_ROUNDS)
        for _ in rounds if progress is None else progress(rounds):
            learner.train_for(max(steps // _ROUNDS, 1), total)
            total = size.total_for(bits, learner.tables, halvings=8)
        return learner.tables(size.total_for(bits, learner.tables, halvings=20))


class _Size:
    """Bits per pixel of real files."""

    def __init__(self, pictures: list[Image.Image], subsampling: Subsampling) -> None:
        self._pictures = pictures
        self._subsampling = subsampling
        self._pixels = sum(picture.width * picture.height for picture in pictures)

    def of(self, tables: JPEGTables) -> float:
        return 8 * sum(len(encode_jpeg(picture, tables, self._subsampling)) for picture in self._pictures) / self._pixels

    def check(self, bits: float) -> None:
        coarse, fine = (self.of(JPEGTables((step,) * 64, (step,) * 64)) for step in (255, 1))
        if not coarse <= bits <= fine:
            raise ValueError(f"Tables reach from {coarse:.3g} to {fine:.3g} bits per pixel here, but {bits:g} were asked for.")

    def total_for(self, bits: float, tables: Callable[[float], JPEGTables], halvings: int) -> float:
        """The total whose tables come nearest to a size, by bisection: the size grows with the total."""
        low, high = 1e-3, 4096.0  # from all steps at 255 to those of a share of .2 % at 1
        nearest = (float("inf"), low)
        for _ in range(halvings):
            middle = (low * high) ** 0.5
            found = self.of(tables(middle))
            nearest = min(nearest, (abs(found - bits), middle))
            low, high = (low, middle) if found > bits else (middle, high)
        return nearest[1]


class _Plane(nn.Module):
    """Blocks of luma or chroma: their coefficients, the map that makes them normal, and the decoder."""

    coefficients: Tensor

    def __init__(self, blocks: Tensor, noise: str) -> None:
        super().__init__()
        chosen = torch.randperm(len(blocks))[:_MOST_BLOCKS]
        self.register_buffer("coefficients", block_dct(blocks[chosen].float() - 128).flatten(1))
        self.normal = CDFTransform(self.coefficients) if noise == "normal" else None
        self.scale = self.coefficients.std(dim=0) + 1e-3
        self.decoder = NormedMLP(_COEFFICIENTS, (128,), _COEFFICIENTS)

    def loss(self, bits: Tensor) -> Tensor:
        """Squared error of decoded pixels, on their scale of 0 to 255, with each coefficient at so many bits."""
        clean = self.coefficients[torch.randint(len(self.coefficients), (_BATCH,))]
        if self.normal is None:
            noisy = clean + steps_for_bits(bits) * (torch.rand_like(clean) - 0.5)
        else:
            noisy = self.normal.inverse(self.normal(clean) + torch.exp2(-bits) * torch.randn_like(clean))
        # Orthonormal transforms keep squared errors, so the decoder's coefficients are as good as its pixels.
        decoded: Tensor = self.decoder(noisy / self.scale)
        return (decoded * self.scale - clean).square().mean()


class _Learner:
    """The split of the bits and the decoders, in training."""

    def __init__(self, pictures: list[Image.Image], subsampling: Subsampling, noise: str) -> None:
        planes = [_planes(picture, subsampling) for picture in pictures]
        kinds = [torch.cat([luma for luma, _ in planes])]
        across, down = _FACTORS[subsampling]
        samples, self._weights = [1.0], [1.0]  # samples for each pixel, which a bit costs; and what an error of theirs weighs
        if pictures[0].mode == "RGB":
            kinds.append(torch.cat([chroma for _, chroma in planes if chroma is not None]))
            samples.append(2 / (across * down))
            self._weights.append(_CHROMA_ERROR)
        self._planes = [_Plane(blocks, noise) for blocks in kinds]
        self._budget = BudgetSplit(
            _COEFFICIENTS * len(kinds), process="quantization", price=np.repeat(samples, _COEFFICIENTS).tolist()
        )
        networks = [parameter for plane in self._planes for parameter in plane.parameters()]
        self._optimizer = torch.optim.Adam([{"params": networks, "lr": 2e-3}, {"params": self._budget.parameters(), "lr": 0.02}])

    def train_for(self, steps: int, total: float) -> None:
        for _ in range(steps):
            bits = self._budget.resources(total).split(_COEFFICIENTS)
            losses = [weight * plane.loss(each) for weight, plane, each in zip(self._weights, self._planes, bits, strict=True)]
            loss = torch.stack(losses).sum()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()

    @torch.no_grad()
    def tables(self, total: float) -> JPEGTables:
        luma, *chroma = (whole_table(steps_for_bits(bits)) for bits in self._budget.resources(total).split(_COEFFICIENTS))
        return JPEGTables(luma, chroma[0] if chroma else luma)


def _planes(picture: Image.Image, subsampling: Subsampling) -> tuple[Tensor, Tensor | None]:
    """Blocks of luma, and of both chroma planes together, as an encoder sees them."""
    if picture.mode == "L":
        return _blocks(picture), None
    luma, *chroma = picture.convert("YCbCr").split()
    factors = _FACTORS[subsampling]
    return _blocks(luma), torch.cat([_blocks(plane.reduce(factors)) for plane in chroma])


def _blocks(plane: Image.Image) -> Tensor:
    return image_blocks(torch.from_numpy(np.array(plane)))
