"""Zeros where rows of operands that don't start at multiples of 16 bytes would make a product of many tokens slow.

The rules were read off 36 products of 49 to 50258 features, 1024 to 98304 tokens, on an H100 in bfloat16
(benchmarks/results/padded-sides-h100). Copies of factors cost little. Copies of activations pay in training; in
inference they do where sizes are odd, which are the slowest, and sums long, or where the grid's own padding copies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

ROW = 8  # numbers of 16 bytes, which kernels load and store at once, in half precision
TF32_ROW = 4  # and in float32
SIDE_ROW = 16  # what p and s are padded to where they are; low rank, a library's alone, to ``ROW``
LOW_RANK_ROW = 4  # with which low rank is fast enough as it is in training
LONG_SUMS = 256  # over ranks, of one number of x or of the result
PADDED_TOKENS = 512  # from which copies of factors cost less than they save


def padded_rank(rank: int) -> int:
    """The rank that is computed with."""
    return _up(rank, ROW)


def padded_sides(
    sizes: tuple[int, int, int, int, int], features: tuple[int, int], *, trained: bool, in_tf32: bool
) -> tuple[int, int]:
    """p and s that are computed with.

    Args:
        sizes: n_in, n_out, rank, p and s of the factors.
        features: Of x and of the result, fewer than theirs where the grid pads.
        trained: Gradients are wanted.
        in_tf32: Numbers have four bytes.
    """
    n_in, n_out, rank, p, s = sizes
    is_low = n_in == n_out == 1
    row = LOW_RANK_ROW if is_low else TF32_ROW if in_tf32 else ROW

    def padded(size: int, terms: int, is_copied: bool) -> int:
        fits = size % row == 0 if trained or is_copied else size % 2 == 0 or terms < LONG_SUMS
        return size if fits else _up(size, ROW if is_low else SIDE_ROW)

    return padded(p, n_out * rank, features[0] < n_in * p), padded(s, n_in * rank, features[1] < n_out * s)


def is_aligned(rank: int) -> bool:
    """Whether the rank isn't padded."""
    return rank % ROW == 0


def pad_ranks(R: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors with zeros behind their ranks; themselves where nothing is to be padded."""
    wanted = padded_rank(R.shape[2])
    return _pad(R, wanted, R.shape[3]), _pad(L, wanted, L.shape[3])


def pad_all(x: Tensor, R: Tensor, L: Tensor, out_features: int, *, trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x (tokens, in_features) as the grid pads it, and for many tokens all three with zeros behind p and s, and behind
    ranks where those or gradients are wanted."""
    (n_in, n_out, rank, p), (tokens, in_features) = R.shape, x.shape
    if in_features < n_in * p:
        x = F.pad(x, (0, n_in * p - in_features))
    if are_few(tokens):
        return x, R, L
    sizes, features = (n_in, n_out, rank, p, L.shape[3]), (in_features, out_features)
    wider, s = padded_sides(sizes, features, trained=trained, in_tf32=x.dtype == torch.float32)
    if not trained and (wider, s) == (p, L.shape[3]):  # ranks alone are padded where tokens are counted
        return x, R, L
    rank = padded_rank(rank)
    if wider > p:
        x = F.pad(x.unflatten(1, (n_in, p)), (0, wider - p)).flatten(1)
    return x, _pad(R, rank, wider), _pad(L, rank, s)


def are_few(tokens: int) -> bool:
    """Whether copies of factors would cost more than they save; without a guard where the number is symbolic."""
    return bool(statically_known_true(tokens < PADDED_TOKENS))


def _up(size: int, row: int) -> int:
    return -(-size // row) * row


def _pad(factor: Tensor, rank: int, columns: int) -> Tensor:
    more = columns - factor.shape[3], rank - factor.shape[2]
    return F.pad(factor, (0, more[0], 0, more[1])) if any(more) else factor
