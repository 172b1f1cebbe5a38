"""addmm(b, x, W)  ->  monarch_bmm(x, R, L, b)"""

from typing import Any

from monarch_fx.rules.base import Product, Refusal, Static
from monarch_fx.rules.matmul import matmul


def addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> Product | Refusal | None:
    """``addmm``, ``addmv`` and ``baddbmm``: ``beta * input + alpha * (mat1 @ mat2)``."""
    product = matmul(mat1, mat2)
    if not isinstance(product, Product):
        return product
    if isinstance(input, Static):
        return Refusal("the added operand is a view of a rewritten parameter")
    if alpha == 1 and beta == 1 and isinstance(mat2, Static):
        return Product(product.matrix, product.x, lambda multiply: multiply(mat1, input), bias=input)
    # torch ignores the added operand where beta is 0, NaN included
    if beta == 0:
        return Product(product.matrix, product.x, lambda multiply: alpha * product.rewrite(multiply))
    return Product(product.matrix, product.x, lambda multiply: beta * input + alpha * product.rewrite(multiply))
