"""2 to 16 tokens: halves whose programs ask for all they need of a factor at once, in chunks of shared memory.

A second half does so before it waits for the first one, as one token's do (``held``), and for the same reason that one
lets it start only when it has itself waited. Triton starts copies of a loop's next round where its last one ends, and
those of the first round in front of the loop, but leaves loads in a branch where they are: so those behind the wait
stand in one. A second half has a single round, and its loop for the sake of that alone. Sizes are in parts of ``ROW``
numbers, as in ``tiles``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from monarch_fx.kernels.tiles import store_finished, store_transposed


@triton.jit
def first(
    x_ptr, r_ptr, t_ptr,
    tokens, p, stride_x, width, rank, stride_t, stride_j,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ROW: tl.constexpr, T_ROW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """As ``tiles.first``, C chunks of K terms at once."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    p, stride_x = p * ROW, stride_x * ROW
    width, rank, stride_t, stride_j = width * T_ROW, rank * T_ROW, stride_t * T_ROW, stride_j * T_ROW
    n = tl.program_id(0) * N + tl.arange(0, N)  # over j and i
    k = tl.program_id(1)
    first_rows(x_ptr, r_ptr, t_ptr, n, k, tokens, p, width, rank, stride_x, stride_t, stride_j, M, N, K, C)


@triton.jit
def first_rows(
    x_ptr, r_ptr, t_ptr, n, k,
    tokens, p, width, rank, stride_x, stride_t, stride_j,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Rows ``n`` of what block column k gives."""
    m, c = tl.arange(0, M), tl.arange(0, K)
    x = x_ptr + m[:, None].to(tl.int64) * stride_x + k * p + c[None, :]
    r = r_ptr + (k * width + n)[:, None].to(tl.int64) * p + c[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, p, C * K):
        for i in tl.static_range(C):
            inside = c[None, :] < p - start - i * K
            a = tl.load(x + start + i * K, mask=(m[:, None] < tokens) & inside, other=0.0)
            b = tl.load(r + start + i * K, mask=(n[:, None] < width) & inside, other=0.0)
            acc = tl.dot(a, b.T, acc)
    store_transposed(acc, t_ptr, m, n, k, tokens, width, rank, stride_t, stride_j)


@triton.jit
def second(
    t_ptr, l_ptr, y_ptr, bias_ptr, gate_ptr,
    tokens, depth, s, stride_t, stride_j, stride_y, stride_gate,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ROW: tl.constexpr, PDL: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """As ``tiles.second``, C chunks of K terms at once."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    j = tl.program_id(1).to(tl.int64)
    second_columns(
        t_ptr, l_ptr, y_ptr, bias_ptr, gate_ptr, n, j,
        tokens, depth * ROW, s * ROW, stride_t * ROW, stride_j * ROW, stride_y * ROW, stride_gate * ROW,
        M, N, K, C, PDL, BIAS, ACT, GATED, FAST,
    )  # fmt: skip


@triton.jit
def second_columns(
    t_ptr, l_ptr, y_ptr, bias_ptr, gate_ptr, n, j,
    tokens, depth, s, stride_t, stride_j, stride_y, stride_gate,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Columns ``n`` of block row j."""
    m, d = tl.arange(0, M), tl.arange(0, K)
    t = t_ptr + j * stride_j + m[:, None].to(tl.int64) * stride_t + d[None, :]
    w = l_ptr + (j * depth + d[:, None]) * s + n[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, C * K):
        columns = ()
        for i in tl.static_range(C):
            there = (d[:, None] < depth - start - i * K) & (n[None, :] < s)
            columns += (tl.load(w + i * K * s, mask=there, other=0.0),)
        rows = ()
        for _ in tl.static_range(C):
            rows += (tl.zeros((M, K), t_ptr.dtype.element_ty),)
        if start < depth:  # always
            if PDL:
                gdc_wait()
            loaded = ()
            for i in tl.static_range(C):
                inside = (m[:, None] < tokens) & (d[None, :] < depth - start - i * K)
                loaded += (tl.load(t + start + i * K, mask=inside, other=0.0),)
            rows = loaded
        for i in tl.static_range(C):
            acc = tl.dot(rows[i], columns[i], acc)
        w += C * K * s
    store_finished(acc, y_ptr, bias_ptr, gate_ptr, m, n, j, tokens, s, stride_y, stride_gate, BIAS, ACT, GATED, FAST)
