"""How long PFA takes to choose the filters of one very wide layer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.page import Section, main
from benchmarks.timing import Candidate, figure, interleaved, ratio_text, threads
from lit_compress.selection import pfa

MIXED, TIED = "select_filters, random responses", "select_filters, all filters tied"


def measure(quick: bool, rounds: int | None) -> Section:
    """4096 filters beside their eigenvalues, and a few beside the rule as it is written."""
    wide, few = (64, 16) if quick else (4096, 512)
    covariance, tied = random_covariance(wide), torch.full((wide, wide), 0.5, dtype=torch.float64).fill_diagonal_(1)
    small = random_covariance(few)
    with threads(1):
        compared = interleaved(
            Candidate("eigenvalues alone, torch.linalg.eigvalsh", lambda _: torch.linalg.eigvalsh(covariance)),
            [
                Candidate("spectrum", lambda _: pfa.spectrum(covariance)),
                Candidate(MIXED, lambda _: pfa.select_filters(covariance, wide // 2)),
                Candidate(TIED, lambda _: pfa.select_filters(tied, wide // 2)),
            ],
            rounds=rounds or (2 if quick else 5),
        )
        written = interleaved(
            Candidate("the rule as it is written", lambda _: as_written(small, few // 2)),
            [Candidate("select_filters", lambda _: pfa.select_filters(small, few // 2))],
            rounds=rounds or (2 if quick else 15),
        )
    assert pfa.select_filters(small, few // 2).tolist() == as_written(small, few // 2)  # or the comparison would be none
    worst = max(compared[name].wall.median for name in (MIXED, TIED))
    return Section(
        question="How long does filter selection take for a very wide layer?",
        target="under 2 s for 4096 filters.",
        tables={f"{wide} filters": compared.table(), f"{few} filters": written.table()},
        verdicts=[
            f"{'Met' if worst < 2 else 'NOT met'}: {wide} filters are selected in {figure(compared[MIXED].wall.median)} s, in "
            f"{figure(compared[TIED].wall.median)} s if every step is a tie of all; their eigenvalues take "
            f"{figure(compared.baseline.wall.median)} s",
            f"{few} filters take {ratio_text(written['select_filters'].ratio(written.baseline))}× the rule as it is written",
        ],
        settings={"threads": 1, "dtype": "float64"},
    )


def random_covariance(filters: int) -> Tensor:
    """Covariance of mixed random responses of twice as many samples."""
    generator = torch.Generator().manual_seed(0)
    responses = torch.randn(2 * filters, filters, generator=generator, dtype=torch.float64)
    # Neighbours share part of their responses, so that correlations differ.
    return torch.cov((responses + responses.roll(1, dims=1) * torch.linspace(0, 1, filters)).T)


def as_written(covariance: Tensor, keep: int) -> list[int]:
    """Remove the filter with the largest sum of absolute correlations, and begin again; ties are not looked after."""
    remaining = list(range(len(covariance)))
    correlations = covariance.abs().numpy()
    deviations = np.sqrt(correlations.diagonal())
    correlations /= np.outer(deviations, deviations)
    while len(remaining) > keep:
        del remaining[int(correlations[np.ix_(remaining, remaining)].sum(1).argmax())]
    return remaining


if __name__ == "__main__":
    main("filter_selection", measure)
