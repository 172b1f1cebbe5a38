"""Dense weight -> the Monarch matrix whose outputs are nearest on given inputs, as the model's loss feels them.

With C = E[x x^T] of the inputs and G = E[g g^T] of the loss gradients at the outputs the error is
``tr G (W - M) C (W - M)^T``; without gradients G = I, and it is that of the outputs themselves. A single block is
solved exactly by the SVD of G^(1/2) W C^(1/2) (with G = I as in SVD-LLM, arXiv 2403.07378). Several start from that of
each by itself, and alternate between two least-squares problems: all L of a row of blocks together, all R of a column
together. Each is solved exactly, so that none of them can make the error larger.

Where M gets other inputs x' than W, those of a model that is compressed already, C = E[x' x'^T]. The regression of W x
on x' is ``W + W E[(x - x') x'^T] C^-1``; what M is to come near to is half-way there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from monarch_fx.errors import StructureError
from monarch_fx.projection.blocks import check_weight, cut
from monarch_fx.projection.closed_form import balanced, project
from monarch_fx.structure import Monarch, MonarchShape

DAMPING = 1e-3  # of the mean energy, added to every feature's: what few calibration tokens can't tell apart
SWEEPS = 32
FEW_SWEEPS = 4  # for an error within about 5 %
ENOUGH = 1e-3  # a sweep that lowers the error by less is the last one
RIDGE = 1e-12
MENDED = 0.5  # of what regression mends: all of it keeps too much to the calibration data (chosen on other articles)


@torch.no_grad()
def project_on_inputs(
    weight: Tensor, shape: MonarchShape, gram: Tensor, gradients: Tensor | None = None, drift: Tensor | None = None
) -> Monarch:
    """The Monarch matrix of this shape whose outputs are nearest to those of ``weight``.

    Args:
        weight: (out, in), or (B, out, in) for B matrices that see the same inputs; real.
        shape: Size, grid and rank.
        gram: (in, in), the mean of x x^T over calibration inputs.
        gradients: (out, out), the mean of g g^T over loss gradients at the outputs; None: all outputs count alike.
        drift: (in, in), the mean of (x - x') x'^T, where ``gram`` is that of other inputs x' than those x that
            ``weight`` is multiplied with; None: they are the same.

    Returns:
        Factors in the weight's dtype, on its device. Never worse on those inputs than ``project``.

    Raises:
        StructureError, WeightError, MetaDeviceError: As ``project``, or a Gram matrix has another size.
    """
    check_weight(weight)
    C, G = _metrics(weight, shape, gram, gradients)
    best = project(weight, shape)
    if drift is not None:
        step = torch.cholesky_solve(drift.to(C.device).double().mT, torch.linalg.cholesky(C)).mT
        weight = weight.detach().double() @ (torch.eye(len(C), dtype=C.dtype, device=C.device) + MENDED * step)
    monarch = Monarch.empty(shape, len(weight) if weight.ndim == 3 else None, best.R.dtype, weight.device)
    parts = (weight.detach(), monarch.L, monarch.R)
    for matrix, L, R in zip(*(t if weight.ndim == 3 else t[None] for t in parts), strict=True):
        left, right = balanced(*_alternate(matrix.double(), shape, C, G, SWEEPS))
        L.copy_(left)
        R.copy_(right.transpose(0, 1))
    return min(best, monarch, key=lambda found: output_error(weight, found, gram, gradients))


def output_error(weight: Tensor, monarch: Monarch, gram: Tensor, gradients: Tensor | None = None) -> float:
    """``||(W - M) x|| / ||W x||`` over the inputs that ``gram`` is the mean of; root mean square, in the norm of
    ``gradients`` where they are given."""
    return relative_error(weight.detach().double() - monarch.to_dense().detach().double(), weight, gram, gradients)


def relative_error(wrong: Tensor, weight: Tensor, gram: Tensor, gradients: Tensor | None = None) -> float:
    """``output_error`` of a weight that misses ``wrong``, of the same shape."""
    total = max(energy(weight, gram, gradients), torch.finfo(torch.float64).tiny)
    return (max(energy(wrong, gram, gradients), 0.0) / total) ** 0.5  # in this order NaN stays NaN


@torch.no_grad()
def projected_error2(weight: Tensor, shape: MonarchShape, gram: Tensor, gradients: Tensor | None = None) -> float:
    """Relative squared error of a quick ``project_on_inputs``, in the damped norms in which ``tail_errors`` guesses it.

    Of several blocks it is a few percent too high: the projection takes more sweeps.
    """
    C, G = _metrics(weight, shape, gram, gradients)
    wrong, total = 0.0, 0.0
    for matrix in weight.detach().double().reshape(-1, *weight.shape[-2:]):
        L, R = _alternate(matrix, shape, C, G, FEW_SWEEPS)
        made = _rows(L.mT @ R)[: shape.out_features, : shape.in_features]
        wrong, total = wrong + energy(matrix - made, C, G), total + energy(matrix, C, G)
    return wrong / max(total, torch.finfo(torch.float64).tiny)


def energy(matrix: Tensor, gram: Tensor, gradients: Tensor | None = None) -> float:
    """``tr G A C A^T`` of a matrix A (out, in), summed over a batch of them."""
    A = matrix.detach().double()
    felt = A if gradients is None else gradients.to(A.device).double() @ A
    return float(((A @ gram.to(A.device).double()) * felt).sum())


def _metrics(weight: Tensor, shape: MonarchShape, gram: Tensor, gradients: Tensor | None) -> tuple[Tensor, Tensor]:
    """Damped C and G on the weight's device; without gradients G is I."""
    C = damped(gram.to(weight.device), shape.in_features)
    if gradients is None:
        return C, torch.eye(shape.out_features, dtype=C.dtype, device=C.device)
    return C, damped(gradients.to(weight.device), shape.out_features)


def damped(gram: Tensor, features: int) -> Tensor:
    """C + lambda I in float64: every formula uses the same one, or sweeps could make the error larger.

    Rounding leaves negative energies where features vary little about a large mean: then lambda is as large as needed.

    Raises:
        StructureError: ``gram`` is not (features, features).
    """
    if tuple(gram.shape) != (features, features):
        raise StructureError(f"The Gram matrix of {features} features is square, got shape {tuple(gram.shape)}.")
    C = gram.double()
    C, one = (C + C.mT) / 2, torch.eye(features, dtype=C.dtype, device=C.device)
    mean = float(C.diagonal().mean())
    more = DAMPING * (mean if mean > 0 else 1.0)
    is_finite = bool(torch.isfinite(C).all())  # else it has no root, however damped
    while is_finite and int(torch.linalg.cholesky_ex(C + more * one).info):
        more *= 10
    return C + more * one


def block_roots(C: Tensor, nblocks: int) -> Tensor:
    """Lower triangular roots (nblocks, p, p) of the diagonal blocks of C, padded to equal sizes."""
    return torch.linalg.cholesky(_diagonal(_padded(C, nblocks), nblocks))


def _padded(C: Tensor, nblocks: int) -> Tensor:
    """With features that are never anything behind the last: they get the smallest energy, and keep roots regular."""
    more = -C.shape[0] % nblocks
    return (
        torch.block_diag(C, float(C.diagonal().min()) * torch.eye(more, dtype=C.dtype, device=C.device)) if more else C
    )


def _diagonal(C: Tensor, nblocks: int) -> Tensor:
    """The diagonal blocks (nblocks, p, p)."""
    return C.unflatten(1, (nblocks, -1)).unflatten(0, (nblocks, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _alternate(matrix: Tensor, shape: MonarchShape, C: Tensor, G: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """L (n_out, n_in, rank, s) and R (n_out, n_in, rank, p)."""
    n_out, n_in = shape.nblocks_out, shape.nblocks_in
    W = cut(matrix, (n_out, n_in))  # (n_out, n_in, s, p)
    left, right = block_roots(G, n_out), block_roots(C, n_in)
    L, R = _best(W, left[:, None], right, shape.rank)
    if n_out == n_in == 1:
        return L, R
    C, G = _padded(C, n_in), _padded(G, n_out)
    E = W - L.mT @ R
    error = float("inf")
    for _ in range(sweeps):
        _refit(E, L, R, C, G, left)
        _refit(E.mT.transpose(0, 1), R.transpose(0, 1), L.transpose(0, 1), G, C, right)
        last, error = error, float(((G @ _rows(E) @ C) * _rows(E)).sum())
        if error > (1 - ENOUGH) * last:
            break
    return L, R


def _rows(blocks: Tensor) -> Tensor:
    """(n_out, n_in, s, p) as the matrix (n_out * s, n_in * p)."""
    return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def _best(T: Tensor, left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L (..., rank, s) and R (..., rank, p) with ``left^T (T - L^T R) right`` smallest, for T (..., s, p)."""
    A = left.mT @ T @ right
    if A.shape[-2] <= A.shape[-1]:
        vectors = torch.linalg.eigh(A @ A.mT).eigenvectors[..., -rank:]
        # the projection onto the rows' span commutes with the right root
        return torch.linalg.solve_triangular(left.mT, vectors, upper=True).mT, (left @ vectors).mT @ T
    vectors = torch.linalg.eigh(A.mT @ A).eigenvectors[..., -rank:]
    return (T @ right @ vectors).mT, torch.linalg.solve_triangular(right.mT, vectors, upper=True).mT


def _refit(E: Tensor, L: Tensor, R: Tensor, C: Tensor, G: Tensor, left: Tensor) -> None:
    """Makes L the best for these R, in place, all blocks of a row together and one row after the other; E (n_out, n_in,
    s, p) is what is missing, W - M. With V_j the R_jk on a block diagonal L_j gets more by
    ``(V_j C V_j^T)^-1 V_j C (G_jj^-1 (G E)_j)^T``."""
    n_out, n_in, rank, _ = R.shape
    s = E.shape[2]
    for j in range(n_out):
        V = torch.block_diag(*R[j])
        VC = V @ C  # (n_in * rank, n_in * p)
        normal = VC @ V.mT
        normal.diagonal().add_(RIDGE * (float(normal.diagonal().mean()) or 1.0))
        felt = torch.cholesky_solve(G[j * s : (j + 1) * s] @ (_rows(E) @ VC.mT), left[j])
        more = torch.linalg.solve(normal, felt.mT).unflatten(0, (n_in, rank))
        L[j] += more
        E[j] -= more.mT @ R[j]
