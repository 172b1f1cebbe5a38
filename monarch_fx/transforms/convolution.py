"""Circulant and Toeplitz matrices: convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from monarch_fx.transforms.algebra import scaled
from monarch_fx.transforms.composition import Product
from monarch_fx.transforms.fourier import fourier
from monarch_fx.transforms.sizes import COMPLEX, checked_vectors

_DTYPES = (torch.float32, torch.float64, *COMPLEX)  # half precision has no complex products


def circulant(c: Tensor) -> Product:
    """``scipy.linalg.circulant(c)``, the circular convolution with c: the product of two complex Monarch matrices.

    A DFT, the spectrum of c (in the rows of the first factor), and an inverse DFT: MM* (Dao et al. 2022, section
    3.2). Real where c is. For n = k1 k2 there are 2 n (k1 + k2) complex parameters and 16 n (k1 + k2) FLOPs. A prime n
    is embedded as in ``toeplitz``.

    Args:
        c: First column, (n,); float32, float64 or complex.

    Raises:
        StructureError: ``c`` is not a vector.
        WeightError: ``c`` has another dtype.
    """
    checked_vectors("circulant", _DTYPES, c=c)
    n = len(c)
    if all(n % k for k in range(2, math.isqrt(n) + 1)):
        return toeplitz(c, torch.cat([c[:1], c[1:].flip(0)]))
    return _convolution(c, n, n)


def toeplitz(c: Tensor, r: Tensor | None = None) -> Product:
    """``scipy.linalg.toeplitz(c, r)``, a convolution with any boundaries: the product of two complex Monarch matrices.

    The matrix is a corner of a circulant one of a size N >= len(c) + len(r) - 1, whose DFTs are cut to the columns and
    rows in use. ``params`` and ``flops`` count what is left, for n = len(c) = len(r) about 8 n sqrt(n) complex numbers
    and 64 n sqrt(n) FLOPs: a real dense matrix has fewer below n = 256 and n = 1024. Real where c and r are.

    Args:
        c: First column, (out_features,); float32, float64 or complex.
        r: First row, (in_features,), of the same dtype; ``r[0]`` is ignored. Default: the conjugate of c.

    Raises:
        StructureError: ``c`` or ``r`` is not a vector.
        WeightError: They have another dtype, or two.
    """
    r = c.conj() if r is None else r
    checked_vectors("toeplitz", _DTYPES, c=c, r=r)
    needed = len(c) + len(r) - 1
    blocks = math.isqrt(min(len(c), len(r)))
    zeros = c.new_zeros(-needed % blocks)
    return _convolution(torch.cat([c, zeros, r[1:].flip(0)]), len(r), len(c))


def _convolution(c: Tensor, inputs: int, outputs: int) -> Product:
    """The first rows and columns of the circulant matrix of c."""
    n, dtype = len(c), c.dtype.to_complex()
    k1, k2 = _blocks(n, inputs), _blocks(n, outputs)
    forward = fourier((k1, n // k1), -1, 1.0, dtype, c.device, inputs=inputs)
    backward = fourier((n // k2, k2), 1, 1 / n, dtype, c.device, outputs=outputs)
    return Product([scaled(forward, rows=torch.fft.fft(c)), backward], real=not c.is_complex())


def _blocks(n: int, features: int) -> int:
    """How many blocks of inputs (or outputs), out of the divisors of n, give a DFT of size n the fewest parameters."""
    return min((k for k in range(1, features + 1) if n % k == 0), key=lambda k: k + -(-features // k))
