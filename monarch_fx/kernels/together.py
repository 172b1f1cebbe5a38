"""Few tokens with several products that read the same ones: one launch for all first halves, one for all second ones.

A token's product is two short kernels, and a small one leaves most of a GPU idle. A program here finds by its number
which product's tile it has; the tiles are those of ``tiles`` or, where ``C`` isn't 0, of ``held`` for one token and of
``ahead`` for more, in one row, and so are sizes in parts of ``ROW``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from monarch_fx.kernels import ahead
from monarch_fx.kernels.epilogue import finished
from monarch_fx.kernels.held import first_rows, loaded_columns, second_columns, summed_columns
from monarch_fx.kernels.tiles import first_tile, second_sums, second_tile


@triton.jit
def first(
    x_ptr, r0_ptr, r1_ptr, r2_ptr, t0_ptr, t1_ptr, t2_ptr,
    tokens, stride_x, p0, p1, p2, width0, width1, width2, rank0, rank1, rank2, n_in0, n_in1, n_in2,
    COUNT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
    ROW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As ``tiles.first``, for COUNT products; bit i of EVEN: no tile of product i is cut off."""
    if PDL:
        if C:
            gdc_wait()
            gdc_launch_dependents()
        else:
            gdc_launch_dependents()
            gdc_wait()
    r, t = (r0_ptr, r1_ptr, r2_ptr), (t0_ptr, t1_ptr, t2_ptr)
    p, width = (p0 * ROW, p1 * ROW, p2 * ROW), (width0 * ROW, width1 * ROW, width2 * ROW)
    rank, n_in = (rank0 * ROW, rank1 * ROW, rank2 * ROW), (n_in0, n_in1, n_in2)
    m = tl.arange(0, M)
    tile = tl.program_id(0)
    for i in tl.static_range(COUNT):
        columns = tl.cdiv(width[i], N)
        if (tile >= 0) & (tile < columns * n_in[i]):
            n = tile % columns * N + tl.arange(0, N)
            depth = n_in[i] * rank[i]
            if C and M == 1:
                first_rows(x_ptr, r[i], t[i], n, tile // columns, p[i], width[i], rank[i], depth, N, K, C)
            elif C:
                ahead.first_rows(
                    x_ptr, r[i], t[i], n, tile // columns,
                    tokens, p[i], width[i], rank[i], stride_x * ROW, depth, tokens * depth, M, N, K, C,
                )  # fmt: skip
            else:
                first_tile(
                    x_ptr, r[i], t[i], m, n, tile // columns,
                    tokens, p[i], width[i], rank[i], stride_x * ROW, depth, tokens * depth, M, N, K, (EVEN >> i) & 1,
                )  # fmt: skip
        tile -= columns * n_in[i]


@triton.jit
def second(
    t0_ptr, t1_ptr, t2_ptr, l0_ptr, l1_ptr, l2_ptr, y0_ptr, y1_ptr, y2_ptr, bias0_ptr, bias1_ptr, bias2_ptr,
    tokens, depth0, depth1, depth2, s0, s1, s2, n_out0, n_out1, n_out2,
    COUNT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
    ROW: tl.constexpr, PDL: tl.constexpr, BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """As ``tiles.second``, for COUNT products; bit i of BIAS: product i has one."""
    if PDL and C == 0:
        gdc_wait()
    t, w, y, bias = (
        (t0_ptr, t1_ptr, t2_ptr), (l0_ptr, l1_ptr, l2_ptr), (y0_ptr, y1_ptr, y2_ptr), (bias0_ptr, bias1_ptr, bias2_ptr)
    )  # fmt: skip
    depth, s = (depth0 * ROW, depth1 * ROW, depth2 * ROW), (s0 * ROW, s1 * ROW, s2 * ROW)
    n_out = n_out0, n_out1, n_out2
    m = tl.arange(0, M)
    tile = tl.program_id(0)
    for i in tl.static_range(COUNT):
        columns = tl.cdiv(s[i], N)
        if (tile >= 0) & (tile < columns * n_out[i]):
            n = tile % columns * N + tl.arange(0, N)
            j = (tile // columns).to(tl.int64)
            if C and M == 1:
                second_columns(
                    t[i], w[i], y[i], bias[i], y[i], n, j,
                    depth[i], s[i], N, K, C, PDL, (BIAS >> i) & 1, "none", False, FAST,
                )  # fmt: skip
            elif C:
                ahead.second_columns(
                    t[i], w[i], y[i], bias[i], y[i], n, j,
                    tokens, depth[i], s[i], depth[i], tokens * depth[i], n_out[i] * s[i], 0,
                    M, N, K, C, PDL, (BIAS >> i) & 1, "none", False, FAST,
                )  # fmt: skip
            else:
                second_tile(
                    t[i], w[i], y[i], bias[i], y[i], m, n, j,
                    tokens, depth[i], s[i], depth[i], tokens * depth[i], n_out[i] * s[i], 0,
                    M, N, K, (EVEN >> i) & 1, (BIAS >> i) & 1, "none", False, FAST,
                )  # fmt: skip
        tile -= columns * n_out[i]


@triton.jit
def gated(
    t0_ptr, t1_ptr, l0_ptr, l1_ptr, y_ptr, bias0_ptr, bias1_ptr,
    tokens, depth0, depth1, s0, s1, n_out1,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, ROW: tl.constexpr,
    PDL: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y = act(product 0) * product 1; s0 is s1, or both are multiples of N: a tile lies in one block of each.

    Half of C chunks, rounded up, are enough for either.
    """
    if PDL and C == 0:
        gdc_wait()
    depth0, depth1, s0, s1 = depth0 * ROW, depth1 * ROW, s0 * ROW, s1 * ROW
    m = tl.arange(0, M)
    n = tl.program_id(0) * N + tl.arange(0, N)
    j = tl.program_id(1).to(tl.int64)
    column = j * s1 + tl.program_id(0) * N
    j0, n0 = column // s0, tl.multiple_of(column % s0, N) + tl.arange(0, N)
    if C:
        columns0 = loaded_columns(l0_ptr, n0, j0, depth0, s0, K, (C + 1) // 2)
        columns1 = loaded_columns(l1_ptr, n, j, depth1, s1, K, (C + 1) // 2)
        if PDL:
            gdc_wait()
        gate = summed_columns(columns0, t0_ptr, j0, depth0, N, K, (C + 1) // 2)
        acc = summed_columns(columns1, t1_ptr, j, depth1, N, K, (C + 1) // 2)
    else:
        gate = second_sums(t0_ptr, l0_ptr, m, n0, j0, tokens, depth0, s0, depth0, tokens * depth0, M, N, K, EVEN & 1)
        acc = second_sums(
            t1_ptr, l1_ptr, m, n, j, tokens, depth1, s1, depth1, tokens * depth1, M, N, K, (EVEN >> 1) & 1
        )
    inside = (m[:, None] < tokens) & (n[None, :] < s1)
    columns = tl.where(n < s1, j * s1 + n, 0)
    y = y_ptr + m[:, None].to(tl.int64) * (n_out1 * s1) + (j * s1 + n)[None, :]
    gate = finished(gate, bias0_ptr + columns, y, inside, BIAS & 1, ACT, False, FAST)
    acc = gate * finished(acc, bias1_ptr + columns, y, inside, (BIAS >> 1) & 1, "none", False, FAST)
    tl.store(y, acc.to(y_ptr.dtype.element_ty), mask=inside)
