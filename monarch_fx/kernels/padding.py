"""Zeros where rows of operands that don't start at multiples of 16 bytes would make a product of many tokens slow.

The rule was read off 38 products of 49 to 4098 features, 4096 and 98304 tokens, on an H100 in bfloat16. Copies of
factors cost little: a rank that is no multiple of 8 made products 1.5 to 5 times as slow. Copies of activations pay
in training where p or s are no multiples of 4 (1.2 to 7.7 times as fast); in inference they mostly don't (0.6 to 1.1).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

ROW = 8  # numbers of 16 bytes, which kernels load and store at once
SIDE_ROW = 16  # what p and s are padded to where a kernel of this library computes with them
HALF_ROW = 4  # with which products are fast enough as they are, where padding takes copies of activations
PADDED_TOKENS = 512  # from which copies of factors cost less than they save


def padded_rank(rank: int) -> int:
    """The rank that is computed with."""
    return _up(rank, ROW)


def padded_side(n_in: int, n_out: int, size: int) -> int:
    """p or s that is computed with in training; low rank is a library's alone."""
    return size if size % HALF_ROW == 0 else _up(size, ROW if n_in == n_out == 1 else SIDE_ROW)


def is_aligned(rank: int, p: int = 0, s: int = 0) -> bool:
    """Whether nothing is padded."""
    return not (rank % ROW or p % HALF_ROW or s % HALF_ROW)


def pad_ranks(R: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors with zeros behind their ranks; themselves where nothing is to be padded."""
    wanted = padded_rank(R.shape[2])
    return _pad(R, wanted, R.shape[3]), _pad(L, wanted, L.shape[3])


def pad_all(x: Tensor, R: Tensor, L: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (tokens, n_in * p) and both factors with zeros behind ranks, p and s; for products with gradients."""
    n_in, n_out, rank, p = R.shape
    rank, s = padded_rank(rank), padded_side(n_in, n_out, L.shape[3])
    R_padded, L = _pad(R, rank, padded_side(n_in, n_out, p)), _pad(L, rank, s)
    if R_padded.shape[3] != p:
        x = F.pad(x.unflatten(1, (n_in, p)), (0, R_padded.shape[3] - p)).flatten(1)
    return x, R_padded, L


def are_few(tokens: int) -> bool:
    """Whether copies of factors would cost more than they save; without a guard where the number is symbolic."""
    return bool(statically_known_true(tokens < PADDED_TOKENS))


def _up(size: int, row: int) -> int:
    return -(-size // row) * row


def _pad(factor: Tensor, rank: int, columns: int) -> Tensor:
    more = columns - factor.shape[3], rank - factor.shape[2]
    return F.pad(factor, (0, more[0], 0, more[1])) if any(more) else factor
