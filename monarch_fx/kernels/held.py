"""One token: halves whose programs load what they need of a factor into registers, all of it at once.

A second half does so before it waits for the first one. That one lets it start only when it has itself waited: what is
in front of both may have written the factors (a cast, an optimizer's step), and is over then. Sums are each thread's
own, not tensor cores', since what these read goes through shared memory once more. Products that read the same token
run these functions, too (``together``). Sizes are in parts of ``ROW`` numbers, as in ``tiles``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from monarch_fx.kernels.epilogue import finished


@triton.jit
def first(
    x_ptr, r_ptr, t_ptr,
    p, width, rank, depth,
    N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ROW: tl.constexpr, T_ROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """t[j, k * rank + i] = sum_c x[k * p + c] R[k, j * rank + i, c], in C chunks of K; a program has one k.

    Sizes of t, and ``depth``, its numbers for one j, are in parts of ``T_ROW``.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n = tl.program_id(0) * N + tl.arange(0, N)  # over j and i
    k = tl.program_id(1)
    first_rows(x_ptr, r_ptr, t_ptr, n, k, p * ROW, width * T_ROW, rank * T_ROW, depth * T_ROW, N, K, C)


@triton.jit
def first_rows(
    x_ptr, r_ptr, t_ptr, n, k,
    p, width, rank, depth,
    N: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Rows ``n`` of what block column k gives."""
    c = tl.arange(0, K)
    r = r_ptr + (k * width + n)[:, None].to(tl.int64) * p + c[None, :]
    rows = ()
    for i in tl.static_range(C):
        rows += (tl.load(r + i * K, mask=(n[:, None] < width) & (c[None, :] < p - i * K), other=0.0),)
    x = x_ptr + k * p + c
    acc = tl.zeros((N, K), tl.float32)
    for i in tl.static_range(C):
        acc += rows[i].to(tl.float32) * tl.load(x + i * K, mask=c < p - i * K, other=0.0).to(tl.float32)[None, :]
    to = t_ptr + (n // rank).to(tl.int64) * depth + k * rank + n % rank
    tl.store(to, tl.sum(acc, 1).to(t_ptr.dtype.element_ty), mask=n < width)


@triton.jit
def second(
    t_ptr, l_ptr, y_ptr, bias_ptr, gate_ptr,
    depth, s,
    N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ROW: tl.constexpr, PDL: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y[j * s + n] = sum_d t[j, d] L[j, d, n], in C chunks of K; a program has one j."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    j = tl.program_id(1).to(tl.int64)
    second_columns(
        t_ptr, l_ptr, y_ptr, bias_ptr, gate_ptr, n, j, depth * ROW, s * ROW, N, K, C, PDL, BIAS, ACT, GATED, FAST
    )


@triton.jit
def second_columns(
    t_ptr, l_ptr, y_ptr, bias_ptr, gate_ptr, n, j,
    depth, s,
    N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Columns ``n`` of block row j."""
    columns = loaded_columns(l_ptr, n, j, depth, s, K, C)
    if PDL:
        gdc_wait()
    acc = summed_columns(columns, t_ptr, j, depth, N, K, C)
    inside = (n < s)[None, :]
    column = j * s + n
    bias = bias_ptr + tl.where(n < s, column, 0)
    acc = finished(acc, bias, gate_ptr + column[None, :], inside, BIAS, ACT, GATED, FAST)
    tl.store(y_ptr + column[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def loaded_columns(l_ptr, n, j, depth, s, K: tl.constexpr, C: tl.constexpr):
    """C chunks (K, N) of columns ``n`` of L."""
    d = tl.arange(0, K)
    w = l_ptr + (j * depth + d[:, None]) * s + n[None, :]
    columns = ()
    for i in tl.static_range(C):
        columns += (tl.load(w + i * K * s, mask=(d[:, None] < depth - i * K) & (n[None, :] < s), other=0.0),)
    return columns


@triton.jit
def summed_columns(columns, t_ptr, j, depth, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """Their products (1, N) with row j of the intermediate."""
    d = tl.arange(0, K)
    t = t_ptr + j * depth + d
    acc = tl.zeros((K, N), tl.float32)
    for i in tl.static_range(C):
        acc += columns[i].to(tl.float32) * tl.load(t + i * K, mask=d < depth - i * K, other=0.0).to(tl.float32)[:, None]
    return tl.sum(acc, 0)[None, :]
