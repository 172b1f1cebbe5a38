"""One Triton kernel for a whole product with many tokens and small blocks: the intermediate stays in registers.

A program has one tile of tokens and one row of blocks, so x is read once per row of blocks, from L2, and nothing is
computed twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from monarch_fx.kernels.epilogue import finished


@triton.jit
def product(
    x_desc, r_desc, r_rest_desc, l_desc, l_rest_desc, y_desc, bias_ptr, gate_ptr,
    tokens, p, s, stride_gate,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    RANK: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y[token, j * s + n] = sum_k sum_i (sum_c x[token, k * p + c] R[k, j, i, c]) L[j, k, i, n].

    s is N or more; where N doesn't divide it, the last tile shares results with its neighbour. Terms beyond p are
    zeros, as in ``persistent``. The rank is computed as RANK and, unless that is zero, REST, two powers of two; rows of
    the factors beyond it are read as zeros.
    """
    j = tl.program_id(0)
    row = tl.program_id(1) * M
    if PDL:
        gdc_wait()
    t = ()
    for k in tl.static_range(N_IN):
        acc = tl.zeros((M, RANK), tl.float32)
        rest = tl.zeros((M, REST if REST else 1), tl.float32)
        for c in tl.range(0, p, K, num_stages=STAGES):
            a = x_desc.load([row, k * p + c])
            acc = tl.dot(a, r_desc.load([k, j, 0, c]).reshape(RANK, K).T, acc)
            if REST:
                rest = tl.dot(a, r_rest_desc.load([k, j, RANK, c]).reshape(REST, K).T, rest)
        t = t + (acc.to(x_desc.dtype), rest.to(x_desc.dtype))  # noqa: RUF005 (Triton has no unpacking)
    m = (row + tl.arange(0, M))[:, None]
    for column in tl.range(0, s, N, num_stages=2):
        start = tl.minimum(column, s - N)
        y = tl.zeros((M, N), tl.float32)
        for k in tl.static_range(N_IN):
            y = tl.dot(t[2 * k], l_desc.load([j, k, 0, start]).reshape(RANK, N), y)
            if REST:
                y = tl.dot(t[2 * k + 1], l_rest_desc.load([j, k, RANK, start]).reshape(REST, N), y)
        n = j * s + start + tl.arange(0, N)
        gate = gate_ptr + m.to(tl.int64) * stride_gate + n[None, :]
        y = finished(y, bias_ptr + n, gate, m < tokens, BIAS, ACT, GATED, FAST)
        y_desc.store([row, j * s + start], y.to(y_desc.dtype))
