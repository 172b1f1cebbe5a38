"""linear(x, W, b)  ->  monarch_bmm(x, R, L, b)"""

from typing import Any

from monarch_fx.rules.base import Product, Refusal, Static


def linear(input: Any, weight: Any, bias: Any = None) -> Product | Refusal | None:
    """``F.linear`` with a static weight (out, in)."""
    if not isinstance(weight, Static):
        return None
    if isinstance(bias, Static):
        return Refusal("its bias is a view of a rewritten parameter")
    if isinstance(input, Static):
        return Refusal("both operands are static")
    if weight.ndim != 2:
        return Refusal(f"the weight of linear has {weight.ndim} dimensions, not 2")
    if weight.gathered:
        return Refusal("its rows are chosen at run time")
    matrix = weight.matrix(out=[0], inp=[1])
    return Product(matrix, input, lambda multiply: multiply(input, bias), bias=bias)
