"""Which structures are considered for a product."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from monarch_fx.config import MonarchConfig
from monarch_fx.records import Candidate
from monarch_fx.structure import MonarchShape

RANKS_PER_GRID = 16
FEWEST_RANKS = 3  # to choose from; else sums may be of any length


@dataclass(frozen=True)
class Option:
    """One way to carry out a product.

    Attributes:
        shape: The structure, or None for dense.
        error2: Estimated ``||W - M||_F^2 / ||W||_F^2``.
        time_s: Predicted seconds of all calls in one run.
        params: Stored numbers of all its matrices, padding included.
    """

    shape: MonarchShape | None
    error2: float
    time_s: float
    params: int

    @property
    def grid(self) -> tuple[int, int] | None:
        """Of the structure; None for dense."""
        return None if self.shape is None else self.shape.grid


def grids(candidate: Candidate, config: MonarchConfig) -> tuple[tuple[int, int], ...]:
    """The (nblocks_out, nblocks_in) that are considered; empty where a forced grid has more blocks than the matrix rows
    or columns.

    Without a forced grid these are 1x1 and all pairs of ``config.nblocks_choices`` that divide the sizes into blocks no
    smaller than ``config.rank_multiple``. A size that no choice divides is padded.
    """
    n_out, n_in = candidate.out_features, candidate.in_features
    if config.grid is not None:
        fits = config.grid[0] <= n_out and config.grid[1] <= n_in
        return (config.grid,) if fits else ()
    pairs = itertools.product(_counts(n_out, config), _counts(n_in, config))
    return tuple(sorted({(1, 1), *pairs}))


def shapes(
    candidate: Candidate, config: MonarchConfig, budget: float | None, terms: int = 1
) -> tuple[MonarchShape, ...]:
    """The structures that are considered: one where ``config`` and ``budget`` leave no choice (see ``is_forced``), else
    those of every grid with fewer parameters than the dense matrix, at ranks that are multiples of
    ``config.rank_multiple`` and, where enough of them are left, make sums over ranks multiples of ``terms``."""
    if is_forced(config, budget):
        return tuple(_forced(candidate, config, grid) for grid in grids(candidate, config))
    return tuple(
        MonarchShape(candidate.in_features, candidate.out_features, *grid, rank)
        for grid in grids(candidate, config)
        for rank in _ranks(candidate, config, grid, budget, terms)
    )


def is_forced(config: MonarchConfig, budget: float | None) -> bool:
    """Whether the user chose the structure: a grid and a rank, or a grid and no budget that could give the rank."""
    return config.grid is not None and (config.rank is not None or budget is None)


def _counts(size: int, config: MonarchConfig) -> list[int]:
    """Block counts for one direction."""
    counts = [n for n in config.nblocks_choices if size >= n * config.rank_multiple]
    dividing = [n for n in counts if size % n == 0]
    return dividing if any(n > 1 for n in dividing) else counts


def _forced(candidate: Candidate, config: MonarchConfig, grid: tuple[int, int]) -> MonarchShape:
    n_in, n_out = candidate.in_features, candidate.out_features
    one = MonarchShape(n_in, n_out, *grid, rank=1)
    # without a rank the authors' (Dao et al. 2022, section 3.1)
    rank = config.rank or max(1, min(n_in, n_out) // (grid[0] * grid[1]))
    return MonarchShape(n_in, n_out, *grid, rank=min(rank, one.full_rank))


def _ranks(
    candidate: Candidate, config: MonarchConfig, grid: tuple[int, int], budget: float | None, terms: int
) -> list[int]:
    """At most ``RANKS_PER_GRID`` ranks in even steps, and the one that meets the budget if all products do."""
    n_in, n_out, step = candidate.in_features, candidate.out_features, config.rank_multiple
    one = MonarchShape(n_in, n_out, *grid, rank=1)
    dense = n_in * n_out
    highest = min((dense - 1) // one.params, one.full_rank)
    full = math.lcm(step, terms // math.gcd(terms, *grid))  # sums have nblocks_in, in gradients nblocks_out ranks
    if highest // full >= FEWEST_RANKS:
        step = full
    most = highest // step
    multiples = set(np.linspace(1, most, min(most, RANKS_PER_GRID)).round().astype(int).tolist())
    multiples.add(min(int((budget or 1) * dense) // one.params // step, most))
    return sorted(step * m for m in multiples if m > 0)
