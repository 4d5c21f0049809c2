"""``lit-compress jpeg``: quantisation tables learnt from images, and the files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from lit_compress.budget.jpeg import encode_jpeg, read_image, save_jpeg, standard_tables
from lit_compress.budget.pictures import plot_jpegs
from lit_compress.budget.sizes import FileSizes
from lit_compress.budget.tables import jpeg_tables


def main(args: Sequence[str]) -> None:
    """Learn tables for one image or a set, write the JPEG files, and say their sizes."""
    parser = argparse.ArgumentParser(
        prog="lit-compress jpeg",
        description="Learn quantisation tables from images and write them as JPEG files that any viewer opens.",
    )
    parser.add_argument("images", nargs="+", type=Path, help="files that Pillow reads; several share their tables")
    parser.add_argument("--bits", type=float, required=True, help="size of the files in bits per pixel")
    parser.add_argument("--out", type=Path, required=True, help="file to write; for several images a folder")
    parser.add_argument("--picture", type=Path, help="PNG file with a part of the first image, before and after")
    parser.add_argument("--subsampling", choices=["4:4:4", "4:2:2", "4:2:0"], default="4:2:0", help="of chroma (default: 4:2:0)")
    parser.add_argument(
        "--loss", choices=["squared_error", "mlp", "ms_ssim"], default="squared_error", help="what the tables are to be good at"
    )
    parser.add_argument("--noise", choices=["measured", "normal"], default="measured", help="that training adds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    several = len(options.images) > 1
    if several and options.out.suffix:
        raise ValueError(f"With several images `--out` is a folder but got {options.out}.")
    files = [options.out / f"{image.stem}.jpg" if several else options.out for image in options.images]
    if known := [str(file) for file in (*files, options.picture) if file is not None and file.exists()]:
        raise ValueError(f"{', '.join(known)} exists; choose another name.")
    if len(set(files)) < len(files):
        raise ValueError("Two images have the same name; write them one after another.")
    tables = jpeg_tables(
        options.images,
        options.bits,
        loss=options.loss,
        noise=options.noise,
        subsampling=options.subsampling,
        seed=options.seed,
        progress=lambda rounds: tqdm(rounds, desc="Learning tables", leave=False),
    )
    for image, file in zip(options.images, files, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        print(f"{file}: {save_jpeg(image, file, tables, options.subsampling):.3f} bits per pixel")
    for name, table in (("luma", tables.luma), ("chroma", tables.chroma)):
        print(f"\n{name}")
        for row in range(0, 64, 8):
            print(" ".join(f"{step:3d}" for step in table[row : row + 8]))
    if options.picture is not None:
        first = read_image(options.images[0])
        sizes = FileSizes([first], options.subsampling)
        quality = sizes.standard_quality(sizes.of(tables))
        named = {f"standard, quality {quality}": standard_tables(quality), "learnt": tables}
        contents = {name: encode_jpeg(first, each, options.subsampling) for name, each in named.items()}
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        plot_jpegs(first, contents).savefig(options.picture, dpi=100)
