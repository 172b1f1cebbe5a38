"""First halves of few columns, whose long sums are cut into parts: each has programs of its own (split-K).

A kernel stores the sums of all parts in float32, tile by tile as in ``tiles`` or through descriptors as in
``persistent``; another one adds them up, always in the same order. Sizes are in parts of ``ROW`` numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from monarch_fx.kernels import persistent, tiles


@triton.jit
def first(
    x_ptr, r_ptr, sums_ptr,
    tokens, p, stride_x, width,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr, ROW: tl.constexpr,
    T_ROW: tl.constexpr, PDL: tl.constexpr,
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
    k, i = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS
    terms = tl.cdiv(tl.cdiv(p, K), SPLITS) * K
    acc = tiles.first_sums(
        x_ptr, r_ptr, m, n, k, i * terms, min(p, (i + 1) * terms), tokens, p, width, stride_x, M, N, K, EVEN
    )  # fmt: skip
    sums = sums_ptr + (tl.program_id(1) * tokens + m)[:, None].to(tl.int64) * width + n[None, :]
    tl.store(sums, acc, mask=(m[:, None] < tokens) & (n[None, :] < width))


@triton.jit
def described(
    x_desc, r_desc, sums_ptr,
    tokens, p, width,
    N_IN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, ROW: tl.constexpr,
    UNITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same by programs that walk over tiles of all parts; ``width`` is in parts of ``ROW``."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    width = width * ROW
    tiles_m = tl.cdiv(tokens, M)
    tiles_n = tl.cdiv(width, N)
    terms = tl.cdiv(tl.cdiv(p, K), SPLITS) * K
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n * N_IN * SPLITS, UNITS, flatten=True):
        part, row, column = persistent.place(tile, tiles_m, tiles_n)
        k, i = part // SPLITS, part % SPLITS
        own = column * N
        row, column = persistent.begin(row, M, tokens), persistent.begin(column, N, width)
        acc = persistent.first_sums(
            x_desc, r_desc, row, column, k, i * terms, min(p, (i + 1) * terms), p, M, N, K
        )  # fmt: skip
        n = column + tl.arange(0, N)
        m = row + tl.arange(0, M)
        sums = sums_ptr + (part * tokens + m)[:, None].to(tl.int64) * width + n[None, :]
        tl.store(sums, acc, mask=(m[:, None] < tokens) & (own <= n[None, :]) & (n[None, :] < width))


@triton.jit
def total(
    sums_ptr, t_ptr,
    tokens, width, rank, stride_t, stride_j,
    M: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, ROW: tl.constexpr, PDL: tl.constexpr,
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
    sums = sums_ptr + (k * SPLITS * tokens + m)[:, None].to(tl.int64) * width + n[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for i in tl.static_range(SPLITS):  # from one address: others, computed anew, are loaded later
        acc += tl.load(sums + tl.cast(i * tokens, tl.int64) * width, mask=inside, other=0.0)
    tiles.store_transposed(acc, t_ptr, m, n, k, tokens, width, rank, stride_t, stride_j)
