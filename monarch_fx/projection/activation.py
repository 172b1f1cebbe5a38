"""Dense weight -> the Monarch matrix whose outputs are nearest on given inputs, not whose entries are.

With C = E[x x^T] of the inputs the error is ``tr (W - M) C (W - M)^T``. A single column of blocks is solved exactly by
the SVD of W C^(1/2) (as in SVD-LLM, arXiv 2403.07378); several columns by block descent, each step of which is exact:

    T_jk = W_jk + sum over l != k of (W_jl - M_jl) C_lk C_kk^-1      what block (j, k) has to be, the others given
    M_jk = best rank-r approximation of T_jk in the norm of C_kk

and by a joint least-squares fit of all L_j at the end. Neither can make the error larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monarch_fx.errors import StructureError
from monarch_fx.projection.blocks import check_weight, cut
from monarch_fx.projection.closed_form import balanced, project
from monarch_fx.structure import Monarch, MonarchShape

DAMPING = 1e-3  # of the mean energy of an input, added to every input's: what few calibration tokens can't tell apart
SWEEPS = 8
ENOUGH = 1e-3  # a sweep that lowers the error by less is the last one
RIDGE = 1e-12


@torch.no_grad()
def project_on_inputs(weight: Tensor, shape: MonarchShape, gram: Tensor) -> Monarch:
    """The Monarch matrix of this shape whose outputs are nearest to those of ``weight``.

    Args:
        weight: (out, in), or (B, out, in) for B matrices that see the same inputs; real.
        shape: Size, grid and rank.
        gram: (in, in), the mean of x x^T over calibration inputs.

    Returns:
        Factors in the weight's dtype, on its device. Never worse on those inputs than ``project``.

    Raises:
        StructureError, WeightError, MetaDeviceError: As ``project``, or ``gram`` has another size.
    """
    check_weight(weight)
    C = damped(gram.to(weight.device), shape.in_features)
    best = project(weight, shape)
    monarch = Monarch.empty(shape, len(weight) if weight.ndim == 3 else None, weight.dtype, weight.device)
    parts = (weight.detach(), monarch.L, monarch.R)
    for matrix, L, R in zip(*(t if weight.ndim == 3 else t[None] for t in parts), strict=True):
        left, right = balanced(*_descend(matrix.double(), shape, C))
        L.copy_(left)
        R.copy_(right.transpose(0, 1))
    return min(monarch, best, key=lambda found: output_error(weight, found, gram))


def output_error(weight: Tensor, monarch: Monarch, gram: Tensor) -> float:
    """``||(W - M) x|| / ||W x||`` over the inputs that ``gram`` is the mean of; root mean square."""
    C = gram.to(weight.device).double()
    W = weight.detach().double()
    E = W - monarch.to_dense().detach().double()
    energy = ((W @ C) * W).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float((((E @ C) * E).sum().clamp_min(0) / energy).sqrt())


def damped(gram: Tensor, in_features: int) -> Tensor:
    """C + lambda I in float64: every formula uses the same one, or the descent would not be monotone.

    Raises:
        StructureError: ``gram`` is not (in_features, in_features).
    """
    if tuple(gram.shape) != (in_features, in_features):
        raise StructureError(f"The Gram matrix of {in_features} inputs is square, got shape {tuple(gram.shape)}.")
    C = gram.double()
    energy = float(C.diagonal().mean()) or 1.0
    return (C + C.mT) / 2 + DAMPING * energy * torch.eye(in_features, dtype=C.dtype, device=C.device)


def whitened(matrix: Tensor, gram: Tensor, nblocks_in: int) -> Tensor:
    """The matrix (out, nblocks_in * p) whose blocks have W_k C_kk^(1/2) in the place of W_k, up to a rotation."""
    C, W = damped(gram, matrix.shape[1]), matrix.double()
    roots = torch.linalg.cholesky(_diagonal(_padded(C, nblocks_in), nblocks_in))
    blocks = cut(W, (1, nblocks_in))[0] @ roots  # (n_in, out, p)
    return blocks.transpose(0, 1).flatten(1)


def _padded(C: Tensor, nblocks_in: int) -> Tensor:
    """With inputs that are never anything behind the last: they get the smallest energy, and keep roots regular."""
    more = -C.shape[0] % nblocks_in
    return (
        torch.block_diag(C, float(C.diagonal().min()) * torch.eye(more, dtype=C.dtype, device=C.device)) if more else C
    )


def _diagonal(C: Tensor, nblocks_in: int) -> Tensor:
    """The diagonal blocks (n_in, p, p)."""
    return C.unflatten(1, (nblocks_in, -1)).unflatten(0, (nblocks_in, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _descend(matrix: Tensor, shape: MonarchShape, C: Tensor) -> tuple[Tensor, Tensor]:
    """L (n_out, n_in, rank, s) and R (n_out, n_in, rank, p)."""
    n_out, n_in, rank = shape.nblocks_out, shape.nblocks_in, shape.rank
    W = cut(matrix, (n_out, n_in))  # (n_out, n_in, s, p)
    C = _padded(C, n_in)
    own = _diagonal(C, n_in)
    roots = torch.linalg.cholesky(own)
    L = W.new_zeros(n_out, n_in, rank, shape.s)
    R = W.new_zeros(n_out, n_in, rank, shape.p)
    E = W.clone()
    error = float("inf")
    for sweep in range(SWEEPS):
        for k in range(n_in):
            T = W[:, k]
            if sweep:
                columns = C[:, k * shape.p : (k + 1) * shape.p]
                others = _rows(E) @ columns - (E[:, k] @ own[k]).flatten(0, 1)
                T = T + torch.cholesky_solve(others.mT, roots[k]).mT.unflatten(0, (n_out, -1))
            L[:, k], R[:, k] = _best(T, roots[k], rank)
            E[:, k] = W[:, k] - L[:, k].mT @ R[:, k]
        if n_in == 1:
            return L, R
        last, error = error, float(((_rows(E) @ C) * _rows(E)).sum())
        if error > (1 - ENOUGH) * last:
            break
    return _refitted(W, R, C), R


def _rows(blocks: Tensor) -> Tensor:
    """(n_out, n_in, s, p) as the matrix (n_out * s, n_in * p)."""
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def _best(T: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L (n_out, rank, s) and R (n_out, rank, p) with ``(T - L^T R) root`` smallest, for T (n_out, s, p)."""
    A = T @ root
    if A.shape[-2] <= A.shape[-1]:
        left = torch.linalg.eigh(A @ A.mT).eigenvectors[..., -rank:].mT
        return left, left @ T  # the projection onto the rows' span commutes with the root
    vectors = torch.linalg.eigh(A.mT @ A).eigenvectors[..., -rank:]
    return (A @ vectors).mT, torch.linalg.solve_triangular(root.mT, vectors, upper=True).mT


def _refitted(W: Tensor, R: Tensor, C: Tensor) -> Tensor:
    """All L of a row of blocks together: ``L_j = (V_j C V_j^T)^-1 V_j C W_j^T``, V_j the R_jk on a block diagonal."""
    n_out, n_in, rank, _ = R.shape
    found = []
    for j in range(n_out):
        VC = torch.block_diag(*R[j]) @ C  # (n_in * rank, n_in * p)
        normal = VC @ torch.block_diag(*R[j]).mT
        normal.diagonal().add_(RIDGE * float(normal.diagonal().mean()))
        found.append(torch.linalg.solve(normal, VC @ W[j].transpose(0, 1).flatten(1).mT).unflatten(0, (n_in, rank)))
    return torch.stack(found)
