"""The symbols that the cost formulas are written in, and what follows from sizes alone."""

import sympy
from sympy import Expr, Min, ceiling

# fmt: off
SIZES = sympy.symbols(
    "tokens in_features out_features nblocks_out nblocks_in rank batch dtype_bytes splits together",
    positive=True,
    integer=True,
)
tokens, in_features, out_features, nblocks_out, nblocks_in, rank, batch, dtype_bytes, splits, together = SIZES

DEVICE = sympy.symbols(
    "peak_flops bandwidth_bytes_per_s copy_bytes_per_s tile units launch_s overlap fill "
    "kernel_efficiency kernel_launch_s kernel_overlap kernel_operand_bytes_per_s fused_efficiency vector_flops "
    "cache_bytes",
    nonnegative=True,
)
(
    peak_flops, bandwidth_bytes_per_s, copy_bytes_per_s, tile, units, launch_s, overlap, fill,
    kernel_efficiency, kernel_launch_s, kernel_overlap, kernel_operand_bytes_per_s, fused_efficiency, vector_flops,
    cache_bytes,
) = DEVICE
# fmt: on


def ceil_div(a: Expr, b: Expr) -> Expr:
    """The quotient of integers, rounded up; the half keeps rounding errors of NumPy from adding one."""
    return ceiling((a - sympy.Rational(1, 2)) / b)


def at_least_one(n: Expr) -> Expr:
    """1 for n >= 1, 0 for n = 0; unlike ``Piecewise`` it broadcasts in NumPy."""
    return Min(n, 1)


def several(n: Expr) -> Expr:
    return at_least_one(n - 1)


p = ceil_div(in_features, nblocks_in)  # columns of a block
s = ceil_div(out_features, nblocks_out)  # its rows
