"""The two Triton kernels of a product with few tokens, or with sizes that tensor descriptors can't have.

The first stores its result block-transposed, which the second reads as plain rows. Both read every byte of their factor
once for each tile of tokens: with few tokens they run at the speed of reading the weights. The second one is launched
while the first one ends (programmatic dependent launch), where the GPU can do that.

Sizes and strides are given in parts of ``ROW`` numbers: of a number Triton knows at most that 16 divides it, but rows
of 16 bytes are enough to be loaded and stored at once. Between rows of blocks lie all tokens: 2**31 numbers and more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from monarch_fx.kernels.epilogue import finished


@triton.jit
def first(
    x_ptr, r_ptr, t_ptr,
    tokens, p, stride_x, width, rank, stride_t, stride_j,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, ROW: tl.constexpr, T_ROW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """t[j, token, k * rank + i] = sum_c x[token, k * p + c] R[k, j * rank + i, c]; a program has one k.

    Sizes of t are in parts of ``T_ROW``.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    p, stride_x = p * ROW, stride_x * ROW
    width, rank, stride_t, stride_j = width * T_ROW, rank * T_ROW, stride_t * T_ROW, tl.cast(stride_j, tl.int64) * T_ROW
    n = tl.program_id(0) * N + tl.arange(0, N)  # over j and i
    m = tl.program_id(2) * M + tl.arange(0, M)
    k = tl.program_id(1)
    first_tile(x_ptr, r_ptr, t_ptr, m, n, k, tokens, p, width, rank, stride_x, stride_t, stride_j, M, N, K, EVEN)


@triton.jit
def first_tile(
    x_ptr, r_ptr, t_ptr, m, n, k,
    tokens, p, width, rank, stride_x, stride_t, stride_j,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Rows ``m`` and columns ``n`` of what block column k gives."""
    acc = first_sums(x_ptr, r_ptr, m, n, k, 0, p, tokens, p, width, stride_x, M, N, K, EVEN)
    store_transposed(acc, t_ptr, m, n, k, tokens, width, rank, stride_t, stride_j)


@triton.jit
def first_sums(
    x_ptr, r_ptr, m, n, k, begin, end,
    tokens, p, width, stride_x,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The terms of ``first_tile`` from ``begin`` up to ``end``."""
    c = tl.arange(0, K)
    x = x_ptr + m[:, None].to(tl.int64) * stride_x + k * p + c[None, :]
    r = r_ptr + (k * width + n)[:, None].to(tl.int64) * p + c[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for start in range(begin, end, K):
        if EVEN:
            a = tl.load(x + start, mask=m[:, None] < tokens, other=0.0)
            b = tl.load(r + start)
        else:
            inside = c[None, :] < p - start
            a = tl.load(x + start, mask=(m[:, None] < tokens) & inside, other=0.0)
            b = tl.load(r + start, mask=(n[:, None] < width) & inside, other=0.0)
        acc = tl.dot(a, b.T, acc)
    return acc


@triton.jit
def store_transposed(acc, t_ptr, m, n, k, tokens, width, rank, stride_t, stride_j):
    """Columns of rows of blocks ``n // rank``, where the second half finds them."""
    row = m[:, None].to(tl.int64) * stride_t + (k * rank + n % rank)[None, :]
    to = t_ptr + (n // rank)[None, :].to(tl.int64) * stride_j + row
    tl.store(to, acc.to(t_ptr.dtype.element_ty), mask=(m[:, None] < tokens) & (n[None, :] < width))


@triton.jit
def second(
    t_ptr, l_ptr, y_ptr, bias_ptr, gate_ptr,
    tokens, depth, s, stride_t, stride_j, stride_y, stride_gate,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, ROW: tl.constexpr, PDL: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y[token, j * s + n] = sum_d t[j, token, d] L[j, d, n]; a program has one j."""
    if PDL:
        gdc_wait()
    depth, s, stride_t, stride_j, stride_y, stride_gate = (
        depth * ROW, s * ROW, stride_t * ROW, tl.cast(stride_j, tl.int64) * ROW, stride_y * ROW, stride_gate * ROW
    )  # fmt: skip
    n = tl.program_id(0) * N + tl.arange(0, N)
    m = tl.program_id(2) * M + tl.arange(0, M)
    j = tl.program_id(1).to(tl.int64)
    second_tile(
        t_ptr, l_ptr, y_ptr, bias_ptr, gate_ptr, m, n, j,
        tokens, depth, s, stride_t, stride_j, stride_y, stride_gate, M, N, K, EVEN, BIAS, ACT, GATED, FAST,
    )  # fmt: skip


@triton.jit
def second_tile(
    t_ptr, l_ptr, y_ptr, bias_ptr, gate_ptr, m, n, j,
    tokens, depth, s, stride_t, stride_j, stride_y, stride_gate,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Rows ``m`` and columns ``n`` of block row j."""
    acc = second_sums(t_ptr, l_ptr, m, n, j, tokens, depth, s, stride_t, stride_j, M, N, K, EVEN)
    store_finished(
        acc, y_ptr, bias_ptr, gate_ptr, m, n, j, tokens, s, stride_y, stride_gate, BIAS, ACT, GATED, FAST
    )  # fmt: skip


@triton.jit
def store_finished(
    acc, y_ptr, bias_ptr, gate_ptr, m, n, j,
    tokens, s, stride_y, stride_gate,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Results of block row j, with what ``epilogue`` does to them."""
    inside = (m[:, None] < tokens) & (n[None, :] < s)
    column = j * s + n
    bias = bias_ptr + tl.where(n < s, column, 0)
    gate = gate_ptr + m[:, None].to(tl.int64) * stride_gate + column[None, :]
    acc = finished(acc, bias, gate, inside, BIAS, ACT, GATED, FAST)
    y = y_ptr + m[:, None].to(tl.int64) * stride_y + column[None, :]
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def second_sums(
    t_ptr, l_ptr, m, n, j,
    tokens, depth, s, stride_t, stride_j,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What ``second_tile`` has before its epilogue."""
    d = tl.arange(0, K)
    t = t_ptr + j * stride_j + m[:, None].to(tl.int64) * stride_t + d[None, :]
    w = l_ptr + (j * depth + d[:, None]) * s + n[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        if EVEN:
            a = tl.load(t + start, mask=m[:, None] < tokens, other=0.0)
            b = tl.load(w)
        else:
            a = tl.load(t + start, mask=(m[:, None] < tokens) & (d[None, :] < depth - start), other=0.0)
            b = tl.load(w, mask=(d[:, None] < depth - start) & (n[None, :] < s), other=0.0)
        acc = tl.dot(a, b, acc)
        w += K * s
    return acc
