"""Images with pedestrians, and beside them the boxes that another detector proposes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from typing_extensions import override

from lit_compress.datamodules.pedestrian_images import PedestrianDataModule, PedestrianImage, Split
from lit_compress.pedestrians.annotations import Detections
from lit_compress.pedestrians.results import read_results


class ProposedPedestrianDataModule(PedestrianDataModule):
    """Any images with pedestrians, with a detector's boxes in their targets, for :class:`~lit_compress.detection.FastRCNN`.

    Batch: as :class:`~lit_compress.datamodules.PedestrianDataModule`, and in each target ``proposals`` ``(n, 4)`` float32: left,
    top, right, bottom in pixels, mirrored along with the image.

    Args:
        source: Where the images come from; its own ``batch_size``, ``num_workers`` and ``augment`` are passed over.
        proposals: Boxes for all splits, as :func:`~lit_compress.pedestrians.read_results` reads them. An image that is not there
            has none.
        batch_size: Images in a batch.
        num_workers: Processes that load data; 0 loads in the main process.
        augment: Whether training images are mirrored at random.

    Raises:
        ValueError: If a number is out of range, or a file is damaged.
        FileNotFoundError: If there are no proposals.

    Example:
        >>> import tempfile
        >>> from lit_compress.datamodules import SyntheticPedestrianDataModule
        >>> from lit_compress.pedestrians import Detections, write_results
        >>> path = f"{tempfile.mkdtemp()}/boxes.json"
        >>> write_results(path, {"test_000000": Detections.of([[10, 20, 41, 100, 0.9]])})
        >>> data = ProposedPedestrianDataModule(SyntheticPedestrianDataModule(), path)
        >>> images, targets = next(iter(data.test_dataloader()))
        >>> targets[0]["proposals"]
        tensor([[ 10.,  20.,  51., 120.]])
    """

    def __init__(
        self,
        source: PedestrianDataModule,
        proposals: str | Path,
        batch_size: int = 1,
        num_workers: int = 0,
        augment: bool = True,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, augment=augment)
        self.source, self.proposals = source, Path(proposals)

    @override
    def find_images(self, split: Split) -> Sequence[PedestrianImage]:
        return self.source.images(split)

    @property
    @override
    def proposed(self) -> Mapping[str, Detections]:
        return self._read

    @cached_property
    def _read(self) -> Mapping[str, Detections]:
        return read_results(self.proposals)
