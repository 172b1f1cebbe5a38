"""grouped_mm(x, W, offs)  ->  monarch_grouped_mm(x, R, L, offs)"""

from typing import Any

from monarch_fx.rules.base import Product, Refusal, Static, ndim


def grouped_mm(
    input: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Product | Refusal | None:
    """Rows x (S, in) sorted by expert times static experts W (E, in, out), as mixtures of experts call it."""
    if not isinstance(mat2, Static):
        return Refusal("grouped_mm with a static left operand") if isinstance(input, Static) else None
    if mat2.ndim != 3 or mat2.gathered or offs is None or ndim(input) != 2 or bias is not None or out_dtype is not None:
        return Refusal("a form of grouped_mm other than (rows, experts, offs)")
    matrix = mat2.matrix(out=[2], inp=[1], batch=[0])
    return Product(matrix, input, lambda multiply: multiply(input, offs=offs))
