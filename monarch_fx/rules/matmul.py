"""x @ W  ->  monarch_bmm(x, R, L);   W @ x  ->  monarch_bmm(x.mT, R, L).mT"""

from typing import Any

from monarch_fx.rules.base import Product, Refusal, Static, ndim


def matmul(input: Any, other: Any = None, *, mat2: Any = None) -> Product | Refusal | None:
    """``matmul``, ``mm``, ``mv`` and ``bmm`` with one static operand, on either side."""
    other = mat2 if other is None else other
    if isinstance(input, Static) and isinstance(other, Static):
        return Refusal("both operands are static")
    if isinstance(other, Static):
        return _right(input, other)
    if isinstance(input, Static):
        return _left(input, other)
    return None


def rmatmul(input: Any, other: Any) -> Product | Refusal | None:
    """``Tensor.__rmatmul__``: the operands the other way round."""
    return matmul(other, input)


def _right(x: Any, weight: Static) -> Product | Refusal | None:
    """x (*, in) @ W (in, out), or x (B, tokens, in) @ W (B, in, out)."""
    if weight.ndim == 1:
        return None
    if weight.ndim == 2 and not weight.gathered:
        return Product(weight.matrix(out=[1], inp=[0]), x, lambda multiply: multiply(x))
    if weight.ndim == 3 and ndim(x) == 3:
        return Product(weight.matrix(out=[2], inp=[1], batch=[0]), x, lambda multiply: multiply(x))
    return Refusal(f"a static operand of {weight.ndim} dimensions meets an activation of {ndim(x)}")


def _left(weight: Static, x: Any) -> Product | Refusal | None:
    """W (out, in) @ x (*, in, tokens), W (out, in) @ x (in,), or W (B, out, in) @ x (B, in, tokens)."""
    if weight.ndim == 1:
        return None
    if weight.ndim == 2 and not weight.gathered:
        matrix = weight.matrix(out=[0], inp=[1])
        if ndim(x) == 1:
            return Product(matrix, x, lambda multiply: multiply(x))
        return Product(matrix, x, lambda multiply: multiply(x.transpose(-2, -1)).transpose(-2, -1))
    if weight.ndim == 3 and ndim(x) == 3:
        matrix = weight.matrix(out=[1], inp=[2], batch=[0])
        return Product(matrix, x, lambda multiply: multiply(x.transpose(-2, -1)).transpose(-2, -1))
    return Refusal(f"a static operand of {weight.ndim} dimensions meets an activation of {ndim(x)}")
