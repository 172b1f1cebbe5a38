"""The Haar wavelet transform."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from monarch_fx.structure import Monarch
from monarch_fx.transforms.sizes import FLOATS, checked_dtype, split_power


def haar(n: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Monarch:
    """The orthonormal Haar transform of all levels: one Monarch matrix of rank 1 with an output permutation.

    Row 0 is the mean, row 2^s + q the wavelet number q of level s, coarse levels first. R holds the Haar transform of
    every one of k1 blocks of k2 inputs, L that of their means, and identities for what is finished, the wavelets inside
    a block. For n = k1 k2 there are n (k1 + k2) stored numbers, many of them zero, and 2 n (k1 + k2) FLOPs; the cascade
    of filters takes about 3 n.

    Args:
        n: Size; a power of two from 4 on.
        dtype: Floating-point; default: PyTorch's.
        device: Of the factors.

    Raises:
        StructureError: Another size.
        ConfigError: Another dtype.
    """
    k1, k2 = split_power(n, "haar")
    dtype = checked_dtype(dtype, FLOATS, "haar")
    R = _matrix(k2).unsqueeze(1).expand(k1, -1, -1, -1)  # (k1, k2, 1, k2)
    L = torch.eye(k1, dtype=torch.float64).expand(k2, -1, -1).clone()  # (k2, k1, k1)
    L[0] = _matrix(k1).T
    j, block = torch.arange(k2).unsqueeze(-1), torch.arange(k1)
    width = 2 ** torch.floor(torch.log2(j.clamp_min(1).double())).long()  # wavelets of this level in a block
    row = torch.where(j == 0, block, (k1 + block) * width + j - width)
    return Monarch(
        R.to(device, dtype).contiguous(),
        L.unsqueeze(2).to(device, dtype),
        output_permutation=row.flatten().argsort().to(device),
    )


def _matrix(n: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while (size := len(matrix)) < n:
        coarse = torch.kron(matrix, matrix.new_tensor([[1, 1]]))
        fine = torch.kron(torch.eye(size, dtype=torch.float64), matrix.new_tensor([[1, -1]]))
        matrix = torch.cat([coarse, fine]) * math.sqrt(0.5)
    return matrix
