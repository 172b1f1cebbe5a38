"""Halves of few tokens whose factors are loaded before they may read activations: Triton kernels that are only tried.

A program keeps all it needs of a factor in registers. The loads stand before the wait for the kernel in front: so a
second half's factor is on its way while the first half runs. Products are sums of a thread's own, not tensor cores',
since what these read goes through shared memory once more. A thread loads the activations that it needs itself where a
chunk has fewer numbers than a program has threads (``D`` of ``second``), or where it has 16 bytes in a row (``K`` of
``first``).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def first(
    x_ptr, r_ptr, t_ptr, tokens, p, stride_x, width, rank, stride_t, stride_j,
    K: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """t[j, token, k * rank + i] = sum_c x[token, k * p + c] R[k, j * rank + i, c], in C chunks of K.

    Sizes are in eights.
    """
    if PDL:
        gdc_launch_dependents()
    p, stride_x, width, rank = p * 8, stride_x * 8, width * 8, rank * 8
    stride_t, stride_j = stride_t * 8, stride_j * 8
    k = tl.program_id(1)
    n, c = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, K)
    r = r_ptr + (k * width + n)[:, None].to(tl.int64) * p + c[None, :]
    held = (tl.load(r, mask=(n < width)[:, None] & (c < p)[None, :], other=0.0),)
    for i in tl.static_range(1, C):
        held = held + (tl.load(r + i * K, mask=(n < width)[:, None] & (c < p - i * K)[None, :], other=0.0),)  # noqa: RUF005
    if PDL:
        gdc_wait()
    for m in range(tokens):
        x = x_ptr + m * stride_x + k * p + c
        acc = tl.zeros((N, K), tl.float32)
        for i in tl.static_range(C):
            acc += held[i].to(tl.float32) * tl.load(x + i * K, mask=c < p - i * K, other=0.0).to(tl.float32)[None, :]
        to = t_ptr + (n // rank).to(tl.int64) * stride_j + m * stride_t + k * rank + n % rank
        tl.store(to, tl.sum(acc, 1).to(t_ptr.dtype.element_ty), mask=n < width)


@triton.jit
def second(
    t_ptr, l_ptr, y_ptr, tokens, depth, s, stride_t, stride_j, stride_y,
    D: tl.constexpr, N: tl.constexpr, C: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y[token, j * s + n] = sum_d t[j, token, d] L[j, d, n], depth in C chunks of D; EARLY: so is the kernel behind."""
    if EARLY:
        gdc_launch_dependents()
    depth, s, stride_t, stride_j, stride_y = depth * 8, s * 8, stride_t * 8, stride_j * 8, stride_y * 8
    j = tl.program_id(1).to(tl.int64)
    d, n = tl.arange(0, D), tl.program_id(0) * N + tl.arange(0, N)
    w = l_ptr + (j * depth + d[:, None]) * s + n[None, :]
    held = (tl.load(w, mask=(d < depth)[:, None] & (n < s)[None, :], other=0.0),)
    for i in tl.static_range(1, C):
        held = held + (tl.load(w + i * D * s, mask=(d < depth - i * D)[:, None] & (n < s)[None, :], other=0.0),)  # noqa: RUF005
    if PDL:
        gdc_wait()
    for m in range(tokens):
        t = t_ptr + j * stride_j + m * stride_t + d
        acc = tl.zeros((D, N), tl.float32)
        for i in tl.static_range(C):
            acc += (
                held[i].to(tl.float32) * tl.load(t + i * D, mask=d < depth - i * D, other=0.0).to(tl.float32)[:, None]
            )
        tl.store(y_ptr + m * stride_y + j * s + n, tl.sum(acc, 0).to(y_ptr.dtype.element_ty), mask=n < s)
