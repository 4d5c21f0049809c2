"""Buoys in the tropical Pacific: tell what one of them measures from the others."""

import os
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning import LightningDataModule
from sklearn.cluster import DBSCAN
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from typing_extensions import override

Floats = NDArray[np.float64]
Days = DataLoader[tuple[Tensor, ...]]

FEATURES = ("zonal wind", "meridional wind", "humidity", "air temperature", "sea surface temperature")
"""What a buoy measures, in metres a second, percent and degrees Celsius."""


class Records(NamedTuple):
    """Daily records of buoys side by side."""

    values: Floats
    """``(D, C, F)``, NaN where missing."""
    positions: Floats
    """``(C, 2)``: degrees north, degrees east in [0, 360)."""


class TAODataModule(LightningDataModule):
    """Daily records of ten buoys of the Tropical Atmosphere Ocean array, 1980 to 1998: one told from the nine others.

    Batch: ``(readings (N, 9, I, 5) float32, targets (N, 5) float32, missing (N, 45) float32)``, standardised by the training
    days. A missing feature reads 0, the mean, and has a 1 in ``missing``; a missing target is NaN.

    Rows of the file belong to one buoy if their positions are dense (DBSCAN: a mooring drifts and is renewed). The ten buoys are
    chosen greedily: first the one with most days, then again and again the one that leaves the longest unbroken run of days on
    which all chosen have a record. That run is shared out in time: first training, then validation, then the test.

    The file has one record a day, so what a budget buys is simulated: in training and validation I is 1 and the record stands
    for the truth, to which the budget adds noise; in the test I is ``readings``, each of them the record with noise of its own
    (variance 1, in units of the standardised features), to be averaged over as many as the budget buys.

    Args:
        target: Which of the ten buoys, in the order chosen, is told from the others.
        data_dir: Folder that holds ``tao/tao-all2.dat``. ``None`` takes ``$LIT_COMPRESS_DATA``, or ``./data`` without it.
        synthetic: Whether to take made-up buoys, whose records agree the more the nearer they are, in place of the file.
        readings: I in the test: the most that a budget can buy of one buoy.
        val_fraction: Share of the days to validate on.
        test_fraction: Share of the days to test on.
        batch_size: Days in a batch.
        seed: Of the noise of the test's readings, and of the made-up buoys.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If a number is out of range.

    Source: *Resource-Efficient Feature Gathering at Test Time*, section 3.3.2; data: UCI *El Nino*, from NOAA's Pacific Marine
    Environmental Laboratory. The distance of DBSCAN, the split in time and the simulated readings are ours.

    Example:
        >>> data = TAODataModule(target=3, synthetic=True)
        >>> readings, targets, missing = next(iter(data.test_dataloader()))
        >>> readings.shape, targets.shape, missing.shape
        (torch.Size([64, 9, 32, 5]), torch.Size([64, 5]), torch.Size([64, 45]))
    """

    def __init__(
        self,
        target: int = 0,
        data_dir: str | Path | None = None,
        synthetic: bool = False,
        readings: int = 32,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= target < 10:
            raise ValueError(f"Argument `target` must be one of the ten buoys, 0 to 9, but got {target}.")
        if readings < 1 or batch_size < 1:
            raise ValueError(f"Arguments `readings` and `batch_size` must be at least 1 but got {readings} and {batch_size}.")
        if val_fraction < 0 or test_fraction <= 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                "Arguments `val_fraction` and `test_fraction` must leave days to train on, and to test on, but got "
                f"{val_fraction} and {test_fraction}."
            )
        self.target = target
        self.data_dir = Path(data_dir or os.environ.get("LIT_COMPRESS_DATA", "data"))
        self.synthetic = synthetic
        self.readings = readings
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.batch_size = batch_size
        self.seed = seed

    @property
    def positions(self) -> Floats:
        """``(10, 2)``: degrees north, degrees east in [0, 360), of all buoys, in the order chosen."""
        return self._records.positions

    @property
    def context_names(self) -> tuple[str, ...]:
        """Names of the nine buoys told from, e.g. ``"5N165E"``."""
        return tuple(_name(*position) for index, position in enumerate(self.positions) if index != self.target)

    @property
    def target_name(self) -> str:
        """Name of the buoy that is told."""
        return _name(*self.positions[self.target])

    @override
    def setup(self, stage: str) -> None:
        _ = self._records  # read now, so that a missing file shows before training begins

    @override
    def train_dataloader(self) -> Days:
        return DataLoader(self._days("train"), batch_size=self.batch_size, shuffle=True, drop_last=True)

    @override
    def val_dataloader(self) -> Days:
        return DataLoader(self._days("val"), batch_size=self.batch_size)

    @override
    def test_dataloader(self) -> Days:
        return DataLoader(self._days("test"), batch_size=self.batch_size)

    @override
    def predict_dataloader(self) -> Days:
        return self.test_dataloader()

    @cached_property
    def _records(self) -> Records:
        if self.synthetic:
            return synthetic_buoys(self.seed)
        file = self.data_dir / "tao" / "tao-all2.dat"
        if not file.exists():
            raise FileNotFoundError(
                f"{file.resolve()} is missing. Take tao-all2.dat.gz from UCI's El Nino data set and unpack it there, choose the "
                "folder that holds `tao` by `data_dir` or the environment variable LIT_COMPRESS_DATA, or set `synthetic=True`."
            )
        return read_buoys(file)

    def _days(self, part: str) -> Dataset[tuple[Tensor, ...]]:
        values = torch.from_numpy(self._records.values)
        days = len(values)
        last = days - round(self.test_fraction * days)
        middle = last - round(self.val_fraction * days)
        known = values[:middle]
        mean = known.nanmean(dim=0)
        std = (known - mean).square().nanmean(dim=0).sqrt()
        slices = {"train": slice(middle), "val": slice(middle, last), "test": slice(last, None)}
        records = ((values - mean) / std)[slices[part]].float()
        others = [buoy for buoy in range(10) if buoy != self.target]
        features, missing = records[:, others].nan_to_num(0.0), records[:, others].isnan().float().flatten(1)
        readings = features.unsqueeze(2)
        if part == "test":
            generator = torch.Generator().manual_seed(self.seed)
            shape = (*readings.shape[:2], self.readings, readings.shape[3])
            readings = readings + torch.randn(shape, generator=generator)
        return TensorDataset(readings, records[:, self.target], missing)


def read_buoys(file: Path, count: int = 10) -> Records:
    """The buoys of the original file with the longest unbroken run of common days, on those days.

    Args:
        file: ``tao-all2.dat``: number, year, month, day, date, latitude, longitude and five features, ``.`` where missing.
        count: Buoys to choose.
    """
    rows = np.array([[np.nan if cell == "." else float(cell) for cell in line.split()] for line in file.open(encoding="ascii")])
    day = np.array([date(1900 + int(year), int(month), int(number)).toordinal() for year, month, number in rows[:, 1:4]])
    day -= day.min()
    places = np.stack([rows[:, 5], rows[:, 6] % 360], axis=1)
    buoy = _clustered(places)
    present = np.zeros((buoy.max() + 1, day.max() + 1), dtype=bool)
    present[buoy[buoy >= 0], day[buoy >= 0]] = True
    chosen = _greedy(present, count)
    start, stop = _longest_run(np.logical_and.reduce(present[chosen]))
    values = np.full((stop - start, count, len(FEATURES)), np.nan)
    for index, which in enumerate(chosen):
        mine = (buoy == which) & (day >= start) & (day < stop)
        values[day[mine] - start, index] = rows[mine, 7:]
    positions = np.stack([places[buoy == which].mean(axis=0) for which in chosen])
    return Records(values, positions)


def synthetic_buoys(seed: int, days: int = 800) -> Records:
    """Ten made-up buoys in three groups, some records missing: waves that agree the more the nearer two buoys are.

    Args:
        seed: Of everything random.
        days: Length of the records.
    """
    generator = np.random.default_rng(seed)
    positions = np.array(
        [(0, 250), (-5, 250), (-2, 250), (8, 165), (5, 165), (2, 165), (-2, 165), (9, 220), (-5, 220), (0, 235)], dtype=float
    )
    apart = np.linalg.norm((positions[:, None] - positions) * (1, 0.3), axis=2)  # the ocean's waves are long in longitude
    near = np.linalg.cholesky(np.exp(-apart / 6) + 1e-6 * np.eye(10))
    shocks = near @ generator.normal(size=(days, 10, len(FEATURES)))
    values = np.empty_like(shocks)
    values[0] = shocks[0]
    for index in range(1, days):  # a memory of two days, with a variance of 1
        values[index] = 0.6 * values[index - 1] + 0.8 * shocks[index]
    values[generator.random(values.shape) < 0.08] = np.nan
    return Records(values, positions)


def _clustered(places: Floats) -> NDArray[np.int64]:
    """Index of the buoy of each row, -1 for none. Half a degree is above a mooring's drift and far below the grid's 2 degrees."""
    cells, cell, weight = np.unique(places.round(1), axis=0, return_inverse=True, return_counts=True)
    clusters = DBSCAN(eps=0.5, min_samples=500).fit(cells, sample_weight=weight).labels_  # 500 rows: above a year
    return np.asarray(clusters[cell.ravel()], dtype=np.int64)


def _greedy(present: NDArray[np.bool_], count: int) -> list[int]:
    chosen = [int(present.sum(axis=1).argmax())]
    while len(chosen) < count:
        common = np.logical_and.reduce(present[chosen])
        left = [buoy for buoy in range(len(present)) if buoy not in chosen]
        runs = [_longest_run(common & present[buoy]) for buoy in left]
        chosen.append(left[max(range(len(left)), key=lambda index: runs[index][1] - runs[index][0])])
    return chosen


def _longest_run(days: NDArray[np.bool_]) -> tuple[int, int]:
    """Start and end of the longest stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], days, [False]]).astype(np.int8)))
    if not len(edges):
        return 0, 0
    starts, stops = edges[::2], edges[1::2]
    longest = int((stops - starts).argmax())
    return int(starts[longest]), int(stops[longest])


def _name(north: float, east: float) -> str:
    latitude, longitude = round(north), round(east)
    across = f"{longitude}E" if longitude <= 180 else f"{360 - longitude}W"
    return f"{abs(latitude)}{'S' if latitude < 0 else 'N'}{across}"
