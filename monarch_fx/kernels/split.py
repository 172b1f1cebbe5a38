"""First halves of few columns, whose long sums are cut into parts: each has programs of its own (split-K).

A kernel stores the sums of all parts in float32, another one adds them up, always in the same order. Sizes are in parts
of ``ROW`` numbers, as in ``tiles``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from monarch_fx.kernels.tiles import first_sums, store_transposed


@triton.jit
def first(
    x_ptr, r_ptr, sums_ptr,
    tokens, p, stride_x, width, splits,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, ROW: tl.constexpr, T_ROW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """sums[k, i, token, n] = the i-th part of sum_c x[token, k * p + c] R[k, n, c]; a program has one k and one i.

    ``width`` is in parts of ``T_ROW``.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    p, stride_x, width = p * ROW, stride_x * ROW, width * T_ROW
    n = tl.program_id(0) * N + tl.arange(0, N)
    m = tl.program_id(2) * M + tl.arange(0, M)
    k, i = tl.program_id(1) // splits, tl.program_id(1) % splits
    terms = tl.cdiv(tl.cdiv(p, K), splits) * K
    acc = first_sums(
        x_ptr, r_ptr, m, n, k, i * terms, min(p, (i + 1) * terms), tokens, p, width, stride_x, M, N, K, EVEN
    )  # fmt: skip
    sums = sums_ptr + (tl.program_id(1) * tokens + m)[:, None].to(tl.int64) * width + n[None, :]
    tl.store(sums, acc, mask=(m[:, None] < tokens) & (n[None, :] < width))


@triton.jit
def total(
    sums_ptr, t_ptr,
    tokens, width, rank, stride_t, stride_j, splits,
    M: tl.constexpr, N: tl.constexpr, ROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """t[j, token, k * rank + i], as of ``tiles.first``, where column j * rank + i of the sums is n."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    width, rank, stride_t, stride_j = width * ROW, rank * ROW, stride_t * ROW, stride_j * ROW
    n = tl.program_id(0) * N + tl.arange(0, N)
    m = tl.program_id(2) * M + tl.arange(0, M)
    k = tl.program_id(1)
    inside = (m[:, None] < tokens) & (n[None, :] < width)
    acc = tl.zeros((M, N), tl.float32)
    for i in range(splits):
        row = ((k * splits + i) * tokens + m)[:, None].to(tl.int64) * width
        acc += tl.load(sums_ptr + row + n[None, :], mask=inside, other=0.0)
    store_transposed(acc, t_ptr, m, n, k, tokens, width, rank, stride_t, stride_j)
