"""A dense matrix that is a product of two Monarch matrices -> these matrices (Dao et al. 2022, Algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from monarch_fx.errors import RecoveryError, StructureError
from monarch_fx.projection.blocks import check_weight
from monarch_fx.structure import Monarch
from monarch_fx.transforms import Product
from monarch_fx.transforms.sizes import split


@torch.no_grad()
def recover_factors(A: Tensor, nblocks: int | None = None, rtol: float | None = None) -> Product:
    """The factors of a matrix of the class MM*, by simultaneous diagonalisation (Dao et al. 2022, Algorithm 2).

    With b = ``nblocks`` and n = b m let A_ij[s, t] = A[s b + i, t b + j]. A is in MM* where it has invertible U_i, V_j
    and diagonal D_ij, all m x m, with ``A_ij = U_i D_ij V_j``. The theorem assumes that A is invertible and no entry of
    D_ij zero, so that every A_ij is invertible. One row r and one column c of invertible ones are enough here, and the
    best conditioned are taken: V_c diagonalises all A_ic^-1 A_ij A_rj^-1 A_rc, so that a random combination of
    these has its eigenvectors. O(n^3 / b) operations, in float64.

    The error is the rounding of A times the condition numbers of the blocks r and c and of the eigenvectors: for real
    normal factors and n = 256 about 1e-10, and 1e-3 to 5e-2 where A was rounded to float32. It is measured, and refused
    where it exceeds ``rtol``.

    Args:
        A: (n, n), floating-point or complex.
        nblocks: b, a divisor of n; default: the one nearest to the root of n, from below.
        rtol: Largest relative error in the Frobenius norm; default: the root of the dtype's epsilon.

    Returns:
        Two Monarch matrices with ``A = factors[1] @ factors[0]``: V_j and D_ij in the first one, identities and U_i in
        the second. They are complex where eigenvalues are; then ``real`` says whether A is. Factors are not unique, and
        have the precision of A, or float32 where that is less.

    Raises:
        StructureError: A is not square, or ``nblocks`` doesn't divide its size.
        WeightError, MetaDeviceError: As ``project``.
        RecoveryError: No row or no column of blocks is invertible, or the factors found miss A by more than ``rtol``.
    """
    check_weight(A)
    if A.ndim != 2 or len(A) != A.shape[1]:
        raise StructureError(f"A must be a square matrix, got shape {tuple(A.shape)}.")
    n = len(A)
    b = split(n, "recover_factors")[0] if nblocks is None else nblocks
    if not isinstance(b, int) or not 0 < b <= n or n % b:
        raise StructureError(f"nblocks must be a divisor of the size {n}, got {nblocks!r}.")
    eps = torch.finfo(A.dtype).eps
    rtol = eps**0.5 if rtol is None else rtol
    wide = A.to(torch.complex128 if A.is_complex() else torch.float64)
    blocks = wide.reshape(n // b, b, n // b, b).permute(1, 3, 0, 2)  # (b, b, m, m)
    found = [_product(*factors, dtype=A.dtype) for factors in _diagonalised(blocks, eps)]
    errors = [_relative(product.to_dense() - wide, wide) for product in found]
    error = min(errors)
    if error > rtol:
        raise RecoveryError(
            f"The {n}x{n} matrix is not in MM* with {b} blocks: the factors of simultaneous diagonalisation miss it by "
            f"{error:.1e} of its norm, more than rtol={rtol:.1e}. Try another nblocks, or project it."
        )
    return found[errors.index(error)]


def _relative(difference: Tensor, whole: Tensor) -> float:
    error = float(torch.linalg.norm(difference) / torch.linalg.norm(whole))
    return math.inf if math.isnan(error) else error


def _diagonalised(blocks: Tensor, eps: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """U (b, m, m), D (b, b, m) and V (b, m, m) with blocks[i, j] nearly ``U[i] diag(D[i, j]) V[j]``, in two ways: with
    close eigenvalues taken as different, and as equal."""
    conditions = torch.linalg.cond(blocks).nan_to_num(torch.inf, torch.inf)  # NaN where a block is zero
    rows, columns = conditions.amax(1), conditions.amax(0)
    worst = max(float(rows.min()), float(columns.min()))
    if not worst < 1 / eps:
        b = len(blocks)
        raise RecoveryError(
            f"Algorithm 2 needs a row and a column of invertible blocks; with {b}x{b} blocks the best have a condition "
            f"number of {worst:.1e}: try another nblocks."
        )
    row, column = blocks[rows.argmin()], blocks[:, columns.argmin()]
    corner = row[columns.argmin()]
    F = torch.linalg.solve(column.unsqueeze(1), blocks)
    F = torch.linalg.solve(row, F, left=False) @ corner
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(F.shape[:2], generator=draw, dtype=torch.float64, device="cpu").to(F.device)
    weights = weights / torch.linalg.matrix_norm(F).clamp_min(torch.finfo(torch.float64).tiny)
    combination = torch.einsum("ij,ijst->st", weights.to(F.dtype), F)
    for closeness in (0.0, eps**0.5):
        Q = _eigenvectors(combination, closeness)
        D = torch.linalg.solve_ex(Q, F.to(Q.dtype) @ Q).result.diagonal(dim1=-2, dim2=-1)
        yield column.to(Q.dtype) @ Q, D, torch.linalg.solve_ex(corner.to(Q.dtype) @ Q, row.to(Q.dtype)).result


def _eigenvectors(G: Tensor, closeness: float) -> Tensor:
    """Columns that diagonalise G. Eigenvalues of a relative distance up to ``closeness`` are taken as equal, and get an
    orthonormal basis of their space."""
    values, vectors = torch.linalg.eig(G)
    scale = values.abs().max()
    near = (values - values.unsqueeze(1)).abs() <= closeness * scale
    count, cluster = connected_components(near.cpu().numpy(), directed=False)
    for index in range(count):
        members = torch.as_tensor(cluster == index, device=G.device)
        if (size := int(members.sum())) > 1:
            mean = values[members].mean()
            mean = mean.real.to(values.dtype) if mean.imag.abs() <= closeness * scale else mean
            shifted = G - mean * torch.eye(len(G), dtype=values.dtype, device=G.device)
            values[members] = mean
            vectors[:, members] = torch.linalg.svd(shifted).Vh[-size:].mH
    return vectors if G.is_complex() or bool(values.imag.any()) else vectors.real


def _product(U: Tensor, D: Tensor, V: Tensor, dtype: torch.dtype) -> Product:
    """The two Monarch matrices, in the precision of ``dtype`` or float32. Inputs and outputs stand interleaved in A."""
    b, m, _ = U.shape
    real = U.is_complex() and not dtype.is_complex
    dtype = torch.promote_types(dtype, torch.complex64 if real else torch.float32)
    order = torch.arange(b * m, device=U.device).view(b, m).T.flatten()
    identity = torch.eye(b, dtype=dtype, device=U.device).expand(m, b, b).unsqueeze(2)
    first = Monarch(
        V.unsqueeze(2).to(dtype), D.permute(2, 1, 0).unsqueeze(2).contiguous().to(dtype), input_permutation=order
    )
    second = Monarch(identity.contiguous(), U.mT.unsqueeze(2).contiguous().to(dtype), output_permutation=order)
    return Product([first, second], real=real)
