"""Caltech's videos: ``.seq`` files of Norpix, read frame by frame."""

from __future__ import annotations

import io
import os
import struct
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from scipy.io import loadmat, savemat
from torch import Tensor

from lit_compress.pedestrians.annotations import Damaged, refuse_or_skip

_HEADER = 1024
_MAGIC = struct.pack("<I", 0xFEED) + "Norpix seq".encode("utf-16-le")
_KINDS = {100: "raw", 200: "raw", 102: "jpeg", 201: "jpeg", 1: "png", 2: "png"}
_MOSAICS = (101, 103)
_UNKNOWN = 2**32  # frames: more than any file holds


class SeqVideo:
    """A ``.seq`` video; frames are read when they are asked for, from where the file's index says they lie.

    The index is ``NAME-seek.mat`` beside the file, if there is one; without it, the sizes that stand before the frames lead from
    one to the next. The file stays open while the object lives; copies in other processes open it for themselves.

    Args:
        path: File.
        damaged: ``"raise"`` refuses a file that ends early or holds frames that are no images; ``"skip"`` leaves those frames out
            of :attr:`frames`, with a warning.

    Raises:
        ValueError: If the file is not such a video, is damaged, or holds images of a kind that is not read (Bayer mosaics). The
            error names the file.
        FileNotFoundError: If there is none.

    Source: the format's description in Piotr Dollár's toolbox (``seqIo``).

    Example::

        video = SeqVideo("set00/V000.seq")
        len(video), video[29].shape   # (1838, torch.Size([3, 480, 640]))
    """

    def __init__(self, path: str | Path, damaged: Damaged = "raise") -> None:
        self.path = Path(path)
        self._damaged = damaged
        self._opened: BinaryIO | None = None
        self._opener = 0  # process that has opened it
        header = self._bytes(0, _HEADER)
        if not header.startswith(_MAGIC) or len(header) < _HEADER:
            raise ValueError(f"{self.path} is no .seq video: it does not begin with the header of one.")
        numbers = struct.unpack_from("<9I", header, 548)
        self.width: int = numbers[0]
        self.height: int = numbers[1]
        self._bits: int = numbers[2]
        form: int = numbers[5]
        self._stride: int = max(numbers[8], 1)
        self._claimed: int = numbers[6]
        self.fps: float = struct.unpack_from("<d", header, 584)[0]
        if form in _MOSAICS:
            raise ValueError(f"{self.path} holds Bayer mosaics (image format {form}), which are not read; convert it.")
        if form not in _KINDS:
            raise ValueError(f"{self.path} has the unknown image format {form}.")
        self._kind = _KINDS[form]
        if not self._claimed:  # not said: as many as are found
            self._claimed = _UNKNOWN
            self._claimed = len(self._places)
        self.frames: tuple[int, ...] = tuple(self._whole_frames())
        """Numbers of the frames that can be read, from 0."""

    def __len__(self) -> int:
        """Frames of the video, damaged ones too."""
        return self._claimed

    def __getitem__(self, index: int) -> Tensor:
        """A frame, ``(3, H, W)`` uint8.

        Raises:
            IndexError: If there is none of that number.
            ValueError: If it cannot be read; the error names file and frame.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has frames 0 to {len(self) - 1} but {index} was asked for.")
        if index not in self._readable:
            raise ValueError(f"{self.path}: frame {index} is damaged.")
        if self._kind == "raw":
            channels = self._bits // 8
            pixels = np.frombuffer(self.encoded(index), np.uint8).reshape(self.height, self.width, channels)
            # Colours lie in the order blue, green, red.
            return torch.from_numpy(np.broadcast_to(pixels[..., ::-1], (self.height, self.width, 3)).copy()).permute(2, 0, 1)
        try:
            with Image.open(io.BytesIO(self.encoded(index))) as opened:
                pixels = np.array(opened.convert("RGB"))
        except OSError as error:
            raise ValueError(f"{self.path}: frame {index} is damaged ({error}).") from None
        if pixels.shape != (self.height, self.width, 3):
            raise ValueError(f"{self.path}: frame {index} has {pixels.shape[1::-1]} pixels, not {(self.width, self.height)}.")
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def encoded(self, index: int) -> bytes:
        """A frame as it lies in the file: a JPEG, a PNG, or raw pixels."""
        start, size = self._places[index]
        return self._bytes(start, size)

    def save_index(self) -> Path:
        """Write ``NAME-seek.mat``, from which the toolbox and this class read where the frames lie; give its path."""
        before = 0 if self._kind == "raw" else 4
        offsets = np.array([[start - before] for start, _ in self._places], dtype=np.float64)
        savemat(self._index_file, {"seek": offsets})
        return self._index_file

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_opened": None}

    def close(self) -> None:
        """Let the file go; asking for a frame opens it again."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def __del__(self) -> None:
        if getattr(self, "_opened", None) is not None:
            self.close()

    @property
    def _index_file(self) -> Path:
        return self.path.with_name(f"{self.path.stem}-seek.mat")

    @cached_property
    def _readable(self) -> frozenset[int]:
        return frozenset(self.frames)

    @cached_property
    def _size(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """Where each frame's bytes begin, and how many there are; fewer frames than claimed if the file ends early."""
        if self._kind == "raw":
            size = self.width * self.height * self._bits // 8
            whole = max((self._size - _HEADER - size) // self._stride + 1, 0)
            return [(_HEADER + index * self._stride, size) for index in range(min(self._claimed, whole))]
        if self._index_file.exists():
            return self._indexed()
        places: list[tuple[int, int]] = []
        start, padding = _HEADER, 0
        while len(places) < self._claimed and start + 4 <= self._size:
            size = self._size_at(start)
            if size <= 4 or start + size > self._size:
                break
            places.append((start + 4, size - 4))
            # Eight bytes follow, in other files sixteen: a size of 0 is none, so the frame begins further on.
            if len(places) == 1:
                padding = 8 if self._size_at(start + size + 8) else 16
            start += size + padding
        return places

    def _indexed(self) -> list[tuple[int, int]]:
        try:
            offsets = [int(offset) for offset in loadmat(self._index_file)["seek"].ravel()]
        except Exception as error:  # whatever a damaged Matlab file makes scipy raise
            raise ValueError(
                f"{self._index_file} is no index of a .seq video ({error}); delete it, the video is enough."
            ) from None
        if len(offsets) < self._claimed < _UNKNOWN:
            raise ValueError(f"{self._index_file} has {len(offsets)} of {self._claimed} frames; delete it, the video is enough.")
        within = [start for start in offsets[: self._claimed] if start + 4 <= self._size]
        return [(start + 4, self._size_at(start) - 4) for start in within]

    def _whole_frames(self) -> list[int]:
        whole = []
        for index in range(self._claimed):
            if index >= len(self._places):
                missing = f"its frames from {index} on, of {self._claimed}, are missing or cannot be found"
                refuse_or_skip(f"{self.path} is damaged: {missing}.", self._damaged)
                break
            if self._is_whole(*self._places[index]):
                whole.append(index)
            else:
                refuse_or_skip(f"{self.path} is damaged: frame {index} is no whole image.", self._damaged)
        return whole

    def _is_whole(self, start: int, size: int) -> bool:
        if size <= 0 or start + size > self._size:
            return False
        if self._kind == "jpeg":
            return self._bytes(start, 2) == b"\xff\xd8" and b"\xff\xd9" in self._bytes(start + max(size - 64, 0), min(size, 64))
        return self._kind == "raw" or self._bytes(start, 8) == b"\x89PNG\r\n\x1a\n"

    def _size_at(self, place: int) -> int:
        found = self._bytes(place, 4)
        return int.from_bytes(found, "little") if len(found) == 4 else 0

    def _bytes(self, start: int, size: int) -> bytes:
        # A forked process shares its parent's place in an open file: one would read where the other has gone.
        if self._opened is None or self._opener != os.getpid():
            self._opened, self._opener = self.path.open("rb"), os.getpid()
        self._opened.seek(start)
        return self._opened.read(size)
