"""Sizes of real JPEG files, and the search for the tables that meet one."""

from collections.abc import Callable, Sequence

from PIL import Image

from lit_compress.budget.jpeg import JPEGTables, Subsampling, encode_jpeg, standard_tables

_COARSEST, _FINEST = 255.0, 1.0  # of a baseline file's steps
_TOTALS = (1e-4, 1e3)  # bits per pixel: every step is at its coarsest below and at its finest above, whatever the split
_TOLERANCE = 0.03  # of the size


class FileSizes:
    """Bits per pixel of real files.

    Args:
        pictures: Whose files are meant, all together.
        subsampling: Of chroma.
    """

    def __init__(self, pictures: Sequence[Image.Image], subsampling: Subsampling) -> None:
        self._pictures = pictures
        self._subsampling = subsampling
        self._pixels = sum(picture.width * picture.height for picture in pictures)

    def of(self, tables: JPEGTables) -> float:
        """Bits per pixel with these tables."""
        return 8 * sum(len(encode_jpeg(picture, tables, self._subsampling)) for picture in self._pictures) / self._pixels

    def flat_step(self, bits: float) -> float:
        """The one step for all coefficients that comes nearest to a size.

        Raises:
            ValueError: If no table reaches the size; the range is named.
        """
        small, large = (self.of(_flat(step)) for step in (_COARSEST, _FINEST))
        if not small <= bits <= large:
            raise ValueError(f"Tables reach from {small:.3g} to {large:.3g} bits per pixel here, but {bits:g} were asked for.")
        return 1 / self._search(bits, lambda fineness: _flat(1 / fineness), (1 / _COARSEST, 1 / _FINEST), halvings=8)[0]

    def standard_quality(self, bits: float) -> int:
        """The quality at which the standard's tables come nearest to a size."""
        return min(range(1, 101), key=lambda quality: abs(self.of(standard_tables(quality)) - bits))

    def total_for(self, bits: float, tables: Callable[[float], JPEGTables], halvings: int = 12) -> float:
        """The total whose tables come nearest to a size.

        Args:
            bits: Of the files, per pixel.
            tables: From a total, which the size grows with, to tables.
            halvings: Of the range of totals, on a logarithmic scale.
        """
        return self._search(bits, tables, _TOTALS, halvings)[0]

    def meet(self, bits: float, tables: Callable[[float], JPEGTables]) -> float:
        """Like :meth:`total_for`, as near as can be.

        Raises:
            ValueError: If that is not within 3 %; then the sizes next to it are named.
        """
        total, size, below, above = self._search(bits, tables, _TOTALS, halvings=20)
        if abs(size / bits - 1) > _TOLERANCE:
            raise ValueError(
                f"{bits:g} bits per pixel cannot be met within {_TOLERANCE:.0%}: the nearest sizes that these tables reach are "
                f"{below:.3g} and {above:.3g}."
            )
        return total

    def _search(
        self, bits: float, tables: Callable[[float], JPEGTables], limits: tuple[float, float], halvings: int
    ) -> tuple[float, float, float, float]:
        """Bisection: what came nearest, its size, and the sizes found next below and above."""
        low, high = limits
        found: list[tuple[float, float]] = []  # sizes, and what they are of
        for _ in range(halvings):
            middle = (low * high) ** 0.5
            found.append((self.of(tables(middle)), middle))
            low, high = (low, middle) if found[-1][0] > bits else (middle, high)
        size, nearest = min(found, key=lambda each: abs(each[0] - bits))
        below = max((each for each, _ in found if each <= bits), default=size)
        above = min((each for each, _ in found if each >= bits), default=size)
        return nearest, size, below, above


def _flat(step: float) -> JPEGTables:
    table = (round(step),) * 64
    return JPEGTables(table, table)
