"""The two Triton kernels of a product with many tokens: one program per multiprocessor walks over tiles of results.

Operands come through tensor descriptors (the copy engine of Hopper GPUs). As in ``tiles``, the first stores
block-transposed, and the second has bias, activation and gate in its epilogue.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from monarch_fx.kernels.epilogue import finished

GROUP = tl.constexpr(8)  # tiles of tokens that stay together, so that a factor's tile is read from L2


@triton.jit
def place(tile, tiles_m, tiles_n):
    """Which block, tile of tokens and tile of columns the ``tile``-th one is."""
    block = tile // (tiles_m * tiles_n)
    rest = tile % (tiles_m * tiles_n)
    group = rest // (GROUP * tiles_n)
    rows = min(tiles_m - group * GROUP, GROUP)
    inner = rest % (GROUP * tiles_n)
    return block, group * GROUP + inner % rows, inner // rows


@triton.jit
def begin(number, size, end):
    """Where the ``number``-th tile begins: the last one ends with the operand, and shares results with its neighbour.

    What lies beyond an operand's end takes the copy engine longer than what is there.
    """
    return tl.minimum(number * size, tl.maximum(end - size, 0))


@triton.jit
def first(
    x_desc, r_desc, t_ptr,
    tokens, p, width, rank, stride_t, stride_j,
    N_IN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ROW: tl.constexpr, UNITS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """t[j, token, k * rank + i] = sum_c x[token, k * p + c] R[k, j * rank + i, c].

    Where K doesn't divide p, the last terms are numbers of x's next block times zeros, which are read behind R's rows.
    ``width``, ``rank`` and strides are given in parts of ``ROW``, as in ``tiles``.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    width, rank, stride_t, stride_j = width * ROW, rank * ROW, stride_t * ROW, tl.cast(stride_j, tl.int64) * ROW
    tiles_m = tl.cdiv(tokens, M)
    tiles_n = tl.cdiv(width, N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n * N_IN, UNITS, flatten=True):
        k, row, column = place(tile, tiles_m, tiles_n)
        own = column * N  # before it are columns of the tile before
        row, column = begin(row, M, tokens), begin(column, N, width)
        acc = first_sums(x_desc, r_desc, row, column, k, 0, p, p, M, N, K)
        n = column + tl.arange(0, N)  # over j and i
        m = row + tl.arange(0, M)
        to = t_ptr + (n // rank)[None, :].to(tl.int64) * stride_j
        to += m[:, None].to(tl.int64) * stride_t + (k * rank + n % rank)[None, :]
        tl.store(
            to, acc.to(t_ptr.dtype.element_ty), mask=(m[:, None] < tokens) & (own <= n[None, :]) & (n[None, :] < width)
        )


@triton.jit
def first_sums(x_desc, r_desc, row, column, k, start, end, p, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """The terms from ``start`` up to ``end`` of a tile of ``first``."""
    acc = tl.zeros((M, N), tl.float32)
    for c in range(start, end, K):
        a = x_desc.load([row, k * p + c])
        b = r_desc.load([k, column, c]).reshape(N, K)
        acc = tl.dot(a, b.T, acc)
    return acc


@triton.jit
def second(
    t_desc, l_desc, y_desc, bias_ptr, gate_ptr,
    tokens, depth, s, stride_gate,
    N_OUT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y[token, j * s + n] = sum_d t[j, token, d] L[j, d, n]; s is N or more."""
    if PDL:
        gdc_wait()
    tiles_m = tl.cdiv(tokens, M)
    tiles_n = tl.cdiv(s, N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n * N_OUT, UNITS, flatten=True):
        j, row, column = place(tile, tiles_m, tiles_n)
        row, column = begin(row, M, tokens), begin(column, N, s)
        acc = tl.zeros((M, N), tl.float32)
        for d in range(0, depth, K):
            a = t_desc.load([j, row, d]).reshape(M, K)
            b = l_desc.load([j, d, column]).reshape(K, N)
            acc = tl.dot(a, b, acc)
        n = j * s + column + tl.arange(0, N)
        m = (row + tl.arange(0, M))[:, None]
        gate = gate_ptr + m.to(tl.int64) * stride_gate + n[None, :]
        acc = finished(acc, bias_ptr + n, gate, m < tokens, BIAS, ACT, GATED, FAST)
        y_desc.store([row, j * s + column], acc.to(y_desc.dtype))
