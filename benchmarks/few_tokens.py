"""Kernels for few tokens that are only tried (``held_kernels``), beside those in use; H100 and H200."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import monarch_fx as mfx
from benchmarks.gate import check_exact
from benchmarks.gpu import CACHE_BYTES, ROUNDING, calls, factors, graph_seconds, shape_at
from benchmarks.registry import Table, benchmark
from monarch_fx.structure import MonarchShape

SIZES = (4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192)
GRIDS = (2, 2), (4, 4), (2, 8), (8, 2)
HELD_BYTES = 12 * 1024  # of a factor by a warp; 96 registers of a thread
D = 128  # of a second half's chunks


class Tiles(NamedTuple):
    """Rows of R in a program of the first half and its warps, columns of L and warps of the second one."""

    rows: int
    first_warps: int
    columns: int
    second_warps: int

    def chunk(self, p: int) -> int:
        """Of the first half: threads have 16 bytes of it."""
        return min(256 * self.first_warps, 1 << (p - 1).bit_length())


TRIED = tuple(
    Tiles(*first, *second)
    for first, second in itertools.product(((4, 4), (8, 4), (4, 8), (8, 8), (16, 8)), ((16, 8), (32, 8), (16, 16)))
)


@benchmark("few-tokens-gpu")
def few_tokens() -> Iterator[Table]:
    """Decoding: halves whose factors are loaded before they may begin, beside those in use and dense."""
    header = "tokens", "in -> out", "ratio", "structure", "dense us", "in use us", "held us", "next one early us"
    table = Table((*header, "tiles", "speed-up x kept, beyond an empty launch"))
    floor = graph_seconds([functools.partial(torch.zeros(1, device="cuda").fill_, 1.0)] * 8)
    for tokens, size, ratio in itertools.product((1, 4), SIZES, (0.5, 0.33)):
        x = torch.randn(tokens, size[0], device="cuda").bfloat16()
        copies = math.ceil(CACHE_BYTES / (2 * size[0] * size[1]))
        weights = [torch.randn(size[::-1], device="cuda").bfloat16() / 64 for _ in range(copies)]
        dense = graph_seconds([functools.partial(F.linear, x, weight) for weight in weights])
        del weights
        for grid in GRIDS:
            shape = shape_at(ratio, *size, grid)
            assert shape is not None
            in_turn = calls(x, shape, copies)
            used = graph_seconds(in_turn)
            made = [factors(shape) for _ in in_turn]
            held = {tiles: seconds(x, made, tiles, False) for tiles in TRIED if fits(shape, tiles)}
            best = min(held, key=lambda tiles: held[tiles])
            early = seconds(x, made, best, True)
            times = [dense, used, held[best], early]
            shown = [f"{time_s * 1e6:.2f}" for time_s in times]
            kept = ", ".join(f"{(dense - floor) / (time_s - floor) * shape.ratio:.2f}" for time_s in times[1:])
            about = f"{tokens}", f"{size[0]} -> {size[1]}", f"{ratio}", str(shape).split(" (")[0]
            table.rows.append((*about, *shown, " ".join(map(str, best)), kept))
            tried = [[*tiles, time_s] for tiles, time_s in held.items()]
            table.raw[", ".join(about)] = {"dense": dense, "in use": used, "held": tried, "next one early": early}
        yield table


def fits(shape: MonarchShape, tiles: Tiles) -> bool:
    """Whether a program's threads can hold its part of each factor."""
    chunk, depth = tiles.chunk(shape.p), shape.nblocks_in * shape.rank
    of_first = tiles.rows * 2 * chunk * math.ceil(shape.p / chunk) / tiles.first_warps
    of_second = tiles.columns * 2 * D * math.ceil(depth / D) / tiles.second_warps
    return max(of_first, of_second) <= HELD_BYTES


def seconds(x: Tensor, made: list[tuple[Tensor, Tensor]], tiles: Tiles, early: bool) -> float:
    """Of the product by these kernels, with the factors in turn; the first one is checked."""
    R, L = made[0]
    exact = mfx.Monarch(R.double(), L.double())(x.double())
    check_exact(f"{tiles}", product(x, R, L, tiles, early), exact, ROUNDING)
    return graph_seconds([functools.partial(product, x, R, L, tiles, early) for R, L in made])


def product(x: Tensor, R: Tensor, L: Tensor, tiles: Tiles, early: bool) -> Tensor:
    """x (tokens, n_in * p) times the matrix of these factors; p, s and rank are multiples of 8.

    ``early``: the kernel behind may be launched while the second half runs.
    """
    from benchmarks import held_kernels

    (n_in, n_out, rank, p), s, tokens = R.shape, L.shape[3], len(x)
    depth, width = n_in * rank, n_out * rank
    t, y = x.new_empty(n_out, tokens, depth), x.new_empty(tokens, n_out * s)
    on_gpu: dict[str, Any] = {"launch_pdl": True} if x.is_cuda else {}
    K = tiles.chunk(p)
    held_kernels.first[-(-width // tiles.rows), n_in](
        *(x, R, t, tokens, p // 8, n_in * p // 8, width // 8, rank // 8, depth // 8, tokens * depth // 8),
        **{"K": K, "N": tiles.rows, "C": -(-p // K), "PDL": x.is_cuda, "num_warps": tiles.first_warps, **on_gpu},
    )
    features = {"PDL": x.is_cuda, "EARLY": x.is_cuda and early, "num_warps": tiles.second_warps, **on_gpu}
    held_kernels.second[-(-s // tiles.columns), n_out](
        *(t, L, y, tokens, depth // 8, s // 8, depth // 8, tokens * depth // 8, n_out * s // 8),
        **{"D": D, "N": tiles.columns, "C": -(-depth // D), **features},
    )
    return y
