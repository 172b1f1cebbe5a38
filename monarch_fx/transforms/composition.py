"""Products and Kronecker products of Monarch matrices, where one alone is not enough."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from monarch_fx.errors import StructureError
from monarch_fx.structure import Monarch


class Product:
    """A product of matrices, MM* for example (Dao et al. 2022, section 3.2).

    Args:
        factors: Monarch matrices or compositions of them, in the order in which they multiply x: W is the last one
            times ... times the first one.
        real: W is the real part of that product. x is then real, or its real and imaginary part are multiplied each.

    Raises:
        StructureError: There are no factors, one gives what the next one can't take, or one is a batch.
    """

    def __init__(self, factors: Sequence[Transform], real: bool = False) -> None:
        self.factors = _checked(factors)
        self.real = real
        for first, then in zip(self.factors, self.factors[1:], strict=False):
            if first.out_features != then.in_features:
                raise StructureError(
                    f"A factor with {first.out_features} outputs stands before one with {then.in_features} inputs: "
                    "factors come in the order in which they multiply x."
                )

    @property
    def in_features(self) -> int:
        return self.factors[0].in_features

    @property
    def out_features(self) -> int:
        return self.factors[-1].out_features

    @property
    def params(self) -> int:
        """Stored numbers of all factors; a complex one counts once."""
        return sum(factor.params for factor in self.factors)

    @property
    def flops(self) -> int:
        """Floating-point operations for one x (in_features,), as ``Monarch.flops``."""
        return sum(factor.flops for factor in self.factors)

    @property
    def combine(self) -> Callable[..., Tensor]:
        """(x, factors) -> y, for factors of any kind."""
        return functools.partial(_chain, real=self.real)

    def __call__(self, x: Tensor) -> Tensor:
        """``x W^T``: (..., in_features) -> (..., out_features)."""
        return self.combine(x, self.factors)

    def to_dense(self) -> Tensor:
        """W (out_features, in_features)."""
        dense = self.factors[0].to_dense()
        for factor in self.factors[1:]:
            matrix = factor.to_dense()
            dtype = torch.promote_types(matrix.dtype, dense.dtype)
            dense = matrix.to(dtype) @ dense.to(dtype)
        return dense.real if self.real else dense

    def __repr__(self) -> str:
        name = "Product of " if not self.real else "Real part of the product of "
        return f"{name}{list(reversed(self.factors))}"


class Kronecker:
    """``left (x) right``: multiplies the columns of a matrix by ``left`` and its rows by ``right``.

    x is the matrix (left.in_features, right.in_features), flattened.

    Args:
        left: A Monarch matrix or a composition.
        right: The same.

    Raises:
        StructureError: One of them is a batch.
    """

    def __init__(self, left: Transform, right: Transform) -> None:
        self.factors = _checked((left, right))

    @property
    def in_features(self) -> int:
        return self.factors[0].in_features * self.factors[1].in_features

    @property
    def out_features(self) -> int:
        return self.factors[0].out_features * self.factors[1].out_features

    @property
    def params(self) -> int:
        """Stored numbers of both; a complex one counts once."""
        return sum(factor.params for factor in self.factors)

    @property
    def flops(self) -> int:
        """Floating-point operations for one x (in_features,), as ``Monarch.flops``."""
        left, right = self.factors
        return left.in_features * right.flops + right.out_features * left.flops

    @property
    def combine(self) -> Callable[..., Tensor]:
        """(x, factors) -> y, for factors of any kind."""
        return _kronecker

    def __call__(self, x: Tensor) -> Tensor:
        """``x W^T``: (..., in_features) -> (..., out_features)."""
        return self.combine(x, self.factors)

    def to_dense(self) -> Tensor:
        """W (out_features, in_features)."""
        return torch.kron(*(factor.to_dense() for factor in self.factors))

    def __repr__(self) -> str:
        return "Kronecker product of {} and {}".format(*self.factors)


Transform = Monarch | Product | Kronecker


def _checked(factors: Iterable[Transform]) -> tuple[Transform, ...]:
    factors = tuple(factors)
    if not factors:
        raise StructureError("A product needs at least one factor, got none.")
    for factor in factors:
        if isinstance(factor, Monarch) and factor.R.ndim != 4:
            raise StructureError(f"Factors are single matrices, got a batch of {factor.R.shape[0]}: {factor!r}.")
    return factors


def _chain(x: Tensor, factors: Iterable[Callable[[Tensor], Tensor]], real: bool) -> Tensor:
    if real and x.is_complex():
        return torch.complex(_chain(x.real, factors, real), _chain(x.imag, factors, real))
    for factor in factors:
        x = factor(x)
    return x.real if real and x.is_complex() else x


def _kronecker(x: Tensor, factors: Iterable[Any]) -> Tensor:
    left, right = factors
    rows = right(x.unflatten(-1, (left.in_features, right.in_features)))  # (..., left in, right out)
    return left(rows.mT).mT.flatten(-2)
