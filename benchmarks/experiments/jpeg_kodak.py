"""Learnt JPEG tables beside the standard's at equal sizes of the file, on Kodak images (the thesis's figures 3.12 to 3.14).

    python -m benchmarks.experiments.jpeg_kodak DIR --out docs/images/jpeg_kodak

Writes OUT.json after every run (and goes on from it), OUT.png (gains against size), OUT_picture.png (an image by all tables), and
markdown tables on the standard output. DIR holds the images; the first half of them, in the order of their names, are also
learnt from together, and the tables tried on the others. `--arms document` adds the source's own noise and bits.
"""

import argparse
import io
from collections.abc import Sequence
from math import log10
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.interpolate import PchipInterpolator
from scipy.stats import binomtest
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from benchmarks.experiments.gathering import Runs, interval, quiet
from lit_compress.budget import JPEGTables, jpeg_tables, standard_tables
from lit_compress.budget.jpeg import encode_jpeg, read_image
from lit_compress.budget.pictures import plot_jpegs
from lit_compress.budget.sizes import FileSizes

SIZES = (0.25, 0.5, 1.0, 1.5, 2.0)
ARMS = {
    "squared_error": {"loss": "squared_error"},
    "mlp": {"loss": "mlp"},
    "ms_ssim": {"loss": "ms_ssim"},
    "document": {"loss": "mlp", "noise": "normal"},
}
# Sizes about evenly apart on a logarithmic scale.
QUALITIES = (2, 4, 8, 14, 22, 34, 48, 62, 74, 83, 89, 93, 96)
METRICS = {"psnr": "PSNR", "ssim": "SSIM", "ms_ssim": "MS-SSIM"}


def pixels(image: Image.Image) -> Tensor:
    """``(1, 3, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def measured(image: Image.Image, tables: JPEGTables) -> dict[str, float]:
    """Bits per pixel of the real file, and how near its pixels are; all in dB: similarities s as -10 log10(1 - s)."""
    content = encode_jpeg(image, tables)
    decoded, original = pixels(Image.open(io.BytesIO(content))), pixels(image)
    ssim = structural_similarity_index_measure(decoded, original, data_range=1.0)
    ms_ssim = multiscale_structural_similarity_index_measure(decoded, original, data_range=1.0)
    return {
        "bits": 8 * len(content) / (image.width * image.height),
        "psnr": float(peak_signal_noise_ratio(decoded, original, data_range=1.0)),
        "ssim": -10 * log10(1 - float(ssim)),
        "ms_ssim": -10 * log10(1 - float(ms_ssim)),
    }


def study(runs: Runs, files: Sequence[Path], sizes: Sequence[float], arms: Sequence[str]) -> None:
    """Every image by the standard's tables over their quality, and by its own at each size."""
    for file in files:
        image = read_image(file)
        for quality in QUALITIES:
            key = {"image": file.stem, "arm": "standard", "quality": quality}
            runs.get(key, lambda image=image, quality=quality: measured(image, standard_tables(quality)))
        for bits in sizes:
            for arm in arms:

                def own(image: Image.Image = image, bits: float = bits, arm: str = arm) -> dict:
                    tables = jpeg_tables(image, bits, **ARMS[arm])
                    return {**measured(image, tables), "luma": tables.luma, "chroma": tables.chroma}

                runs.get({"image": file.stem, "arm": arm, "asked": bits}, own)


def carry_over(runs: Runs, files: Sequence[Path], sizes: Sequence[float]) -> None:
    """The second half of the images by tables learnt from the first."""
    half = len(files) // 2
    for bits in sizes:
        learnt: list[JPEGTables] = []
        for file in files[half:]:

            def shared(file: Path = file, bits: float = bits, learnt: list[JPEGTables] = learnt) -> dict:
                if not learnt:
                    learnt.append(jpeg_tables(list(files[:half]), bits))
                return measured(read_image(file), learnt[0])

            runs.get({"image": file.stem, "arm": "shared", "asked": bits, "learnt_from": half}, shared)


def gains(done: list[dict], arm: str, metric: str, against: str = "standard") -> dict[float, list[float]]:
    """Decibels above another arm's curve over the logarithm of the size, at the size of each file: asked size to images."""
    found: dict[float, list[float]] = {}
    for run in done:
        curve = sorted(
            (np.log(each["bits"]), each[metric]) for each in done if each["image"] == run["image"] and each["arm"] == against
        )
        if run["arm"] == arm and len(curve) > 1 and curve[0][0] <= np.log(run["bits"]) <= curve[-1][0]:
            sizes, values = np.array(curve).T
            found.setdefault(run["asked"], []).append(run[metric] - float(PchipInterpolator(sizes, values)(np.log(run["bits"]))))
    return dict(sorted(found.items()))


def table(done: list[dict]) -> str:
    """Gains over the standard's tables, and on how many images, as markdown."""
    heads = " | ".join(f"{name}, dB | wins" for name in METRICS.values())
    lines = [f"| tables | bits per pixel | {heads} | images |", "|---|---|" + "---|---|" * len(METRICS) + "---|"]
    for arm in (*ARMS, "shared"):
        columns = {metric: gains(done, arm, metric) for metric in METRICS}
        for asked in columns["psnr"]:
            cells = [f"{interval(columns[metric][asked])} | {wins(columns[metric][asked])}" for metric in METRICS]
            lines.append(f"| {arm} | {asked:g} | {' | '.join(cells)} | {len(columns['psnr'][asked])} |")
    return "\n".join(lines)


def against_each_other(done: list[dict]) -> str:
    """MS-SSIM's tables above those of the MLP, on both metrics (the thesis's figure 3.13), as markdown."""
    lines = ["| asked, bits per pixel | PSNR, dB | MS-SSIM, dB | wins on MS-SSIM |", "|---|---|---|---|"]
    psnr, ms_ssim = ({asked: pairs(done, metric, asked) for asked in SIZES} for metric in ("psnr", "ms_ssim"))
    for asked in SIZES:
        if psnr[asked]:
            lines.append(f"| {asked:g} | {interval(psnr[asked])} | {interval(ms_ssim[asked])} | {wins(ms_ssim[asked])} |")
    return "\n".join(lines)


def pairs(done: list[dict], metric: str, asked: float) -> list[float]:
    """By how much the tables of MS-SSIM are above those of the MLP, image by image; both files are within 3 % of the size."""
    of = {(run["image"], run["arm"]): run[metric] for run in done if run.get("asked") == asked}
    return [value - of[image, "mlp"] for (image, arm), value in of.items() if arm == "ms_ssim" and (image, "mlp") in of]


def wins(differences: Sequence[float]) -> str:
    """Share above 0, with its 95 % interval by Wilson."""
    above = sum(difference > 0 for difference in differences)
    low, high = binomtest(above, len(differences)).proportion_ci(method="wilson")
    return f"{100 * above / len(differences):.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def picture(done: list[dict]) -> Figure:
    """Gains against size, a line an arm, a panel a metric."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (metric, name) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        axes.axhline(0, color="black", linewidth=0.8)
        for arm in (*ARMS, "shared"):
            if found := gains(done, arm, metric):
                axes.plot(list(found), [np.mean(each) for each in found.values()], marker="o", markersize=4, label=arm)
                lowest, highest = (list(map(of, found.values())) for of in (min, max))
                axes.fill_between(list(found), lowest, highest, alpha=0.12)
        axes.set(title=name, xlabel="bits per pixel", ylabel="gain over the standard's tables, dB")
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def comparison(done: list[dict], file: Path, asked: float) -> Figure:
    """A part of an image by the standard's tables and by each arm's, at one size."""
    image = read_image(file)
    known = {run["arm"]: run for run in done if run["image"] == file.stem and run.get("asked") == asked and "luma" in run}
    nearest = FileSizes([image], "4:2:0").standard_quality(asked)
    tables = {f"standard, quality {nearest}": standard_tables(nearest)}
    tables |= {arm: JPEGTables(tuple(run["luma"]), tuple(run["chroma"])) for arm, run in known.items()}
    return plot_jpegs(image, {name: encode_jpeg(image, each) for name, each in tables.items()})


def main() -> None:
    """Run what is asked for and not yet done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder with PNG files")
    parser.add_argument("--sizes", nargs="+", type=float, default=SIZES, help="bits per pixel")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["squared_error", "mlp", "ms_ssim"])
    parser.add_argument("--limit", type=int, help="only so many images")
    parser.add_argument("--shown", type=float, default=0.5, help="bits per pixel of the picture of the first image")
    parser.add_argument("--out", type=Path, default=Path("jpeg_kodak"))
    options = parser.parse_args()
    quiet()
    runs = Runs(options.out.with_suffix(".json"))
    files = sorted(options.images.glob("*.png"))[: options.limit]
    study(runs, files, options.sizes, options.arms)
    carry_over(runs, files, options.sizes)
    picture(runs.done).savefig(options.out.with_suffix(".png"), dpi=100)
    comparison(runs.done, files[0], options.shown).savefig(options.out.with_name(f"{options.out.name}_picture.png"), dpi=100)
    print(table(runs.done), against_each_other(runs.done), sep="\n\n")


if __name__ == "__main__":
    main()
