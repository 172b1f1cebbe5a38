"""Kronecker products of dense matrices, and Hadamard matrices, which are such products."""

from __future__ import annotations

import torch
from torch import Tensor

from monarch_fx.errors import StructureError
from monarch_fx.structure import Monarch
from monarch_fx.transforms.sizes import FLOATS, checked_dtype, split_power


def kronecker(A: Tensor, B: Tensor) -> Monarch:
    """``torch.kron(A, B)``: one Monarch matrix of rank 1 with an output permutation, differentiable in A and B.

    R holds B once per column of A, and L holds A once per row of B: for square A (a, a) and B (b, b) there are
    a b (a + b) stored numbers, and 2 a b (a + b) FLOPs (8 where complex).

    Args:
        A: (a_out, a_in).
        B: (b_out, b_in), of the same dtype and device.

    Raises:
        StructureError: One of them is not a matrix, or they differ in dtype or device.
    """
    if A.ndim != 2 or B.ndim != 2 or not A.numel() or not B.numel():
        raise StructureError(f"A and B must be matrices, got shapes {tuple(A.shape)} and {tuple(B.shape)}.")
    (a_out, a_in), b_out = A.shape, len(B)
    return Monarch(
        B.unsqueeze(1).expand(a_in, -1, -1, -1).contiguous(),  # (a_in, b_out, 1, b_in)
        A.mT.unsqueeze(1).expand(b_out, -1, -1, -1).contiguous(),  # (b_out, a_in, 1, a_out)
        output_permutation=torch.arange(a_out * b_out, device=A.device).view(b_out, a_out).T.flatten(),
    )


def hadamard(n: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Monarch:
    """``scipy.linalg.hadamard``, entries 1 and -1: the Kronecker product of two smaller ones; see ``kronecker``.

    Args:
        n: Size; a power of two from 4 on.
        dtype: Floating-point; default: PyTorch's.
        device: Of the factors.

    Raises:
        StructureError: Another size.
        ConfigError: Another dtype.
    """
    k1, k2 = split_power(n, "hadamard")
    dtype = checked_dtype(dtype, FLOATS, "hadamard")
    return kronecker(*(_sylvester(k).to(device, dtype) for k in (k1, k2)))


def _sylvester(n: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix
