"""Random features and layers made of diagonals between fixed transforms."""

from __future__ import annotations

from torch import Tensor

from monarch_fx.errors import StructureError
from monarch_fx.transforms.algebra import reordered, scaled
from monarch_fx.transforms.composition import Product
from monarch_fx.transforms.cosine import dct
from monarch_fx.transforms.kronecker import hadamard
from monarch_fx.transforms.sizes import FLOATS, checked_vectors


def fastfood(S: Tensor, G: Tensor, permutation: Tensor, B: Tensor) -> Product:
    """Fastfood, ``diag(S) H diag(G) P H diag(B)`` (Le et al. 2013): the product of two Monarch matrices.

    H is ``hadamard(n)``, and P x is ``x[permutation]``. For n = k1 k2 there are 2 n (k1 + k2) stored numbers and 4 n
    (k1 + k2) FLOPs. Random features of a Gaussian kernel of width sigma take random signs as B, normal numbers as G,
    lengths as S, and all over ``sigma * sqrt(n)``.

    Args:
        S, G, B: (n,), of one floating-point dtype; n is a power of two from 4 on.
        permutation: (n,) int64.

    Raises:
        StructureError: The sizes differ, or are no power of two.
        WeightError: The dtypes differ, or are not floating-point.
    """
    checked_vectors("fastfood", FLOATS, S=S, G=G, B=B)
    _check_lengths("fastfood", S=S, G=G, permutation=permutation, B=B)
    H = hadamard(len(B), dtype=B.dtype, device=B.device)
    return Product([reordered(scaled(H, columns=B), rows=permutation), scaled(H, rows=S, columns=G)])


def acdc(A: Tensor, D: Tensor) -> Product:
    """An ACDC layer, ``C^-1 diag(D) C diag(A)`` (Moczulski et al. 2016): the product of two real Monarch matrices.

    C is the orthonormal ``dct(n)``. For n = k1 k2 there are 4 n (k1 + k2) stored numbers and 8 n (k1 + k2) FLOPs.

    Args:
        A, D: (n,), of one floating-point dtype; n is composite.

    Raises:
        StructureError: The sizes differ, or have no two factors above 1.
        WeightError: The dtypes differ, or are not floating-point.
    """
    checked_vectors("acdc", FLOATS, A=A, D=D)
    _check_lengths("acdc", A=A, D=D)
    C = dct(len(A), norm="ortho", dtype=A.dtype, device=A.device)
    return Product([scaled(C, rows=D, columns=A), C.transpose()])


def _check_lengths(name: str, **vectors: Tensor) -> None:
    if len({value.shape for value in vectors.values()}) > 1:
        sizes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in vectors.items())
        raise StructureError(f"The vectors of {name} must have one length, got {sizes}.")
