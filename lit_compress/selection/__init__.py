"""Which channels to keep: one file of pure functions a method, from statistics to widths and channels."""

from lit_compress.selection import pfa, pib, vib

__all__ = ["pfa", "pib", "vib"]
