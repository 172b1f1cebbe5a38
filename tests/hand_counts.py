"""A made-up profile, and expressions of costs as numbers, for tests of costs."""

import sympy

from monarch_fx.costs import DeviceProfile, symbols
from monarch_fx.structure import MonarchShape

PROFILE = DeviceProfile(
    name="test",
    source="made up",
    peak_flops={"float32": 1e12, "bfloat16": 4e12},
    bandwidth_bytes_per_s=1e11,
    copy_bytes_per_s=5e10,
    launch_s=1e-6,
)


def count(
    expression: sympy.Expr, shape: MonarchShape, tokens: int, batch: int = 1, dtype_bytes: int = 4, splits: int = 1
) -> int:
    """The value of an expression in sizes."""
    grid = (shape.nblocks_out, shape.nblocks_in, shape.rank)
    values = (tokens, shape.in_features, shape.out_features, *grid, batch, dtype_bytes, splits, 1)
    return int(expression.subs(dict(zip(symbols.SIZES, values, strict=True))))
