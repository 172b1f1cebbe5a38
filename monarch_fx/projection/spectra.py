"""Errors of all ranks of a grid at once, from the singular values of its blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from monarch_fx.projection.blocks import check_weight, cut, small_gram

Grid = tuple[int, int]  # (nblocks_out, nblocks_in)


@torch.no_grad()
def tail_errors(weight: Tensor, grids: Sequence[Grid]) -> dict[Grid, Tensor]:
    """Relative squared error of the closed-form projection, for every grid and rank.

    Args:
        weight: (out, in), or (B, out, in) for B matrices of the same structure.
        grids: Pairs (nblocks_out, nblocks_in).

    Returns:
        For each grid a float64 tensor ``tail`` on the CPU of length ``min(p, s) + 1``: ``tail[rank]`` is
        ``||W - M||_F^2 / ||W||_F^2``, that is the energy of all singular values beyond ``rank``. It falls from 1 to 0,
        and is all 0 where W is 0. Its square root is good to 1e-3 (float32 Grams; float64 for float64 weights), and to
        1e-6 where it exceeds 1 %.

    Raises:
        StructureError, WeightError, MetaDeviceError: As ``project``.
    """
    check_weight(weight)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    matrices = wide.reshape(-1, *weight.shape[-2:])
    matrices = matrices / matrices.abs().max().clamp_min(torch.finfo(wide.dtype).tiny)  # squares stay in range
    return {grid: _tail(torch.stack([_energies(matrix, grid) for matrix in matrices]).sum(0)) for grid in grids}


def _energies(matrix: Tensor, grid: Grid) -> Tensor:
    """Squared singular values in falling order, summed over the blocks: (min(p, s),)."""
    gram = small_gram(cut(matrix, grid))
    return torch.linalg.eigvalsh(gram).double().clamp_min(0).sum((0, 1)).flip(0).cpu()


def _tail(energies: Tensor) -> Tensor:
    """``tail[r]``: the share of the energy from index r on."""
    tail = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    return tail / tail[0].clamp_min(torch.finfo(tail.dtype).tiny)


def expected_seconds(sizes: Sequence[tuple[int, int, int]], grids: Sequence[Grid]) -> float:
    """Rough time of ``tail_errors`` for float32 weights of (batch, out, in) on two CPU cores, to announce long waits.

    Fitted on an AVX-512 machine with MKL, for sides of blocks from 96 to 8192.
    """
    total = 0.0
    for batch, out, inp in sizes:
        for n_out, n_in in grids:
            side = min(-(-out // n_out), -(-inp // n_in))
            gram = 2 * out * inp * side / 185e9
            eigenvalues = n_out * n_in * (1.8e-11 * side**3 + 1.8e-8 * side**2)
            total += batch * (gram + eigenvalues)
    return total


def prior_tail(out_features: int, in_features: int, grid: Grid) -> Tensor:
    """The prior where a model has no values: what ``tail_errors`` would give for independent Gaussian entries.

    Every block's spectrum then follows the law of Marchenko and Pastur (1967). It is the cautious prior:
    trained weights have more energy in few directions, and so smaller errors, at any rank.

    Returns:
        A float64 tensor of length ``min(p, s) + 1`` that falls from 1 to 0.
    """
    s, p = -(-out_features // grid[0]), -(-in_features // grid[1])
    side, aspect = min(s, p), min(s, p) / max(s, p)
    # eigenvalues x = 1 + aspect - 2 sqrt(aspect) cos(angle), largest first, with density sin(angle)^2 / x
    angle = torch.linspace(math.pi, 0, 2049, dtype=torch.float64)
    angle = (angle[1:] + angle[:-1]) / 2
    energy = angle.sin().square()
    number = energy / (1 + aspect - 2 * math.sqrt(aspect) * angle.cos())
    return _interpolate(number.cumsum(0), energy.cumsum(0), side)


def _interpolate(number: Tensor, energy: Tensor, side: int) -> Tensor:
    """The tail of ``side`` singular values from cumulative counts and energies of a density, largest values first."""
    zero = number.new_zeros(1)
    number, energy = torch.cat([zero, number / number[-1]]), torch.cat([zero, energy / energy[-1]])
    ranks = torch.linspace(0, 1, side + 1, dtype=number.dtype)
    after = torch.searchsorted(number, ranks).clamp(1, len(number) - 1)
    weight = (ranks - number[after - 1]) / (number[after] - number[after - 1])
    tail = 1 - torch.lerp(energy[after - 1], energy[after], weight.clamp(0, 1))
    tail[-1] = 0
    return tail
