"""Errors of all ranks of a grid at once, from the singular values of its blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monarch_fx.projection.activation import block_roots, damped
from monarch_fx.projection.blocks import check_weight, cut, small_gram

Grid = tuple[int, int]  # (nblocks_out, nblocks_in)
JACOBI = 512  # up to this side float32 goes another way on a GPU, which takes two to three times as long as float64


@torch.no_grad()
def tail_errors(
    weight: Tensor, grids: Sequence[Grid], gram: Tensor | None = None, gradients: Tensor | None = None
) -> dict[Grid, Tensor]:
    """Relative squared error of the closed-form projection, for every grid and rank.

    With a Gram matrix of inputs it is that of the outputs, and with one of loss gradients too that in their norm, each
    block by itself: exact for a single block (with inputs alone, for a single column). Several make up for each other's
    errors, or add to them: there it is a first guess.

    Args:
        weight: (out, in), or (B, out, in) for B matrices of the same structure.
        grids: Pairs (nblocks_out, nblocks_in).
        gram: (in, in), the mean of x x^T; see ``project_on_inputs``.
        gradients: (out, out), the mean of g g^T; see there.

    Returns:
        For each grid a float64 tensor ``tail`` on the CPU of length ``min(p, s) + 1``: ``tail[rank]`` is
        ``||W - M||_F^2 / ||W||_F^2``, that is the energy of all singular values beyond ``rank``. It falls from 1 to 0,
        and is all 0 where W is 0. Its square root is good to 1e-3 (float32 Grams; float64 for float64 weights and with
        ``gram``), and to 1e-6 where it exceeds 1 %.

    Raises:
        StructureError, WeightError, MetaDeviceError: As ``project``.
    """
    check_weight(weight)
    dtype = torch.promote_types(weight.dtype, torch.float32 if gram is None else torch.float64)
    scale = float(weight.abs().max()) or 1.0  # keeps squares in range
    left = _roots(gradients, weight.shape[-2], {grid[0] for grid in grids}, weight.device)
    right = _roots(gram, weight.shape[-1], {grid[1] for grid in grids}, weight.device)
    energies: dict[Grid, Tensor | float] = dict.fromkeys(grids, 0.0)
    for matrix in weight.detach().reshape(-1, *weight.shape[-2:]):
        for grid in grids:
            blocks = cut((matrix / scale).to(dtype), grid)
            blocks = blocks @ right[grid[1]] if right else blocks
            blocks = left[grid[0]].mT[:, None] @ blocks if left else blocks
            energies[grid] = energies[grid] + _energies(blocks)
    return {grid: tail_of(torch.as_tensor(energy, device="cpu")) for grid, energy in energies.items()}


def _roots(gram: Tensor | None, features: int, counts: set[int], device: torch.device) -> dict[int, Tensor]:
    """Roots of the diagonal blocks of the damped Gram matrix by the number of blocks; its mean energy is made 1."""
    if gram is None:
        return {}
    C = damped(gram.to(device), features)
    C = C / C.diagonal().mean()
    return {n: block_roots(C, n) for n in counts}


def _energies(blocks: Tensor) -> Tensor:
    """Squared singular values in falling order, summed over the blocks (n_out, n_in, s, p): (min(p, s),)."""
    gram = small_gram(blocks)
    if gram.is_cuda and gram.shape[-1] <= JACOBI:
        gram = gram.double()
    return torch.linalg.eigvalsh(gram).double().clamp_min(0).sum((0, 1)).flip(0).cpu()


def tail_of(energies: Tensor) -> Tensor:
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
