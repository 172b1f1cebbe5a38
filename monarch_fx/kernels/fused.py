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
    x_desc, r_desc, l_desc, y_desc, bias_ptr, gate_ptr,
    tokens, p, s, stride_gate,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, M: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """y[token, j * s + n] = sum_k sum_i (sum_c x[token, k * p + c] R[k, j, i, c]) L[j, k, i, n].

    p is a multiple of K and s one of N; rows of the factors from the rank to RANK are read as zeros.
    """
    j = tl.program_id(0)
    row = tl.program_id(1) * M
    if PDL:
        gdc_wait()
    t = ()
    for k in tl.static_range(N_IN):
        acc = tl.zeros((M, RANK), tl.float32)
        for c in tl.range(0, p, K, num_stages=STAGES):
            a = x_desc.load([row, k * p + c])
            b = r_desc.load([k, j, 0, c]).reshape(RANK, K)
            acc = tl.dot(a, b.T, acc)
        t = t + (acc.to(x_desc.dtype),)  # noqa: RUF005 (Triton has no unpacking)
    m = (row + tl.arange(0, M))[:, None]
    for start in tl.range(0, s, N, num_stages=2):
        y = tl.zeros((M, N), tl.float32)
        for k in tl.static_range(N_IN):
            y = tl.dot(t[k], l_desc.load([j, k, 0, start]).reshape(RANK, N), y)
        n = j * s + start + tl.arange(0, N)
        gate = gate_ptr + m.to(tl.int64) * stride_gate + n[None, :]
        y = finished(y, bias_ptr + n, gate, m < tokens, BIAS, ACT, GATED, FAST)
        y_desc.store([row, j * s + start], y.to(y_desc.dtype))
