"""Learnt JPEG tables beside the standard's at equal sizes of the file, on Kodak images.

    python -m benchmarks.experiments.jpeg_kodak kodim05.png --bits 0.4 1.0

Prints a markdown table; PSNR of red, green and blue, the standard tables' interpolated over their qualities.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lit_compress.budget import JPEGTables, jpeg_tables, standard_tables
from lit_compress.budget.jpeg import encode_jpeg, read_image


def point(image: Image.Image, tables: JPEGTables) -> tuple[float, float]:
    """Bits per pixel and PSNR in dB of the real file."""
    content = encode_jpeg(image, tables)
    decoded = np.asarray(Image.open(io.BytesIO(content)), dtype=float)
    error = np.square(decoded - np.asarray(image, dtype=float)).mean()
    return 8 * len(content) / (image.width * image.height), 10 * np.log10(255**2 / error)


def main() -> None:
    """Learn and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--bits", nargs="+", type=float, default=[0.25, 0.5, 1.0, 1.5, 2.0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print('| image | bits per pixel | standard tables | `"normal"` | `"uniform"` |\n|---|---|---|---|---|')
    for file in options.images:
        image = read_image(file)
        sizes, quality = np.array([point(image, standard_tables(quality)) for quality in range(2, 98, 3)]).T
        for bits in options.bits:
            learnt = [point(image, jpeg_tables(image, bits, noise=noise)) for noise in ("normal", "uniform")]
            standard = np.interp(bits, sizes, quality)
            print(f"| {file.stem} | {bits:g} | {standard:.2f} dB | {learnt[0][1]:.2f} dB | {learnt[1][1]:.2f} dB |", flush=True)


if __name__ == "__main__":
    main()
