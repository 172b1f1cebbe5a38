"""Two Triton kernels for half-precision Monarch products without a copy between them.

The first stores its result block-transposed, which the second one, or cuBLAS, reads as plain rows. Both read every
byte of their factor once for each tile of tokens: with few tokens they run at the speed of reading the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST, LARGEST = 16, 128  # tokens in a tile


@triton.jit
def _first(
    x_ptr,
    r_ptr,
    t_ptr,
    tokens,
    p,
    width,
    rank,
    stride_x,
    stride_t,
    stride_j,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """t[j, token, k * rank + i] = sum_c x[token, k * p + c] R[k, j * rank + i, c]; a program has one k."""
    n = tl.program_id(0) * N + tl.arange(0, N)  # over j and i
    k = tl.program_id(1)
    m = tl.program_id(2) * M + tl.arange(0, M)
    c = tl.arange(0, K)
    x = x_ptr + m[:, None].to(tl.int64) * stride_x + k * p + c[None, :]
    r = r_ptr + (k * width + n)[:, None].to(tl.int64) * p + c[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, p, K):
        inside = c[None, :] < p - start
        a = tl.load(x + start, mask=(m[:, None] < tokens) & inside, other=0.0)
        b = tl.load(r + start, mask=(n[:, None] < width) & inside, other=0.0)
        acc = tl.dot(a, b.T, acc)
    to = (
        (n // rank)[None, :].to(tl.int64) * stride_j
        + m[:, None].to(tl.int64) * stride_t
        + (k * rank + n % rank)[None, :]
    )
    tl.store(t_ptr + to, acc.to(t_ptr.dtype.element_ty), mask=(m[:, None] < tokens) & (n[None, :] < width))


@triton.jit
def _second(
    t_ptr,
    l_ptr,
    y_ptr,
    tokens,
    depth,
    s,
    stride_t,
    stride_j,
    stride_y,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """y[token, j * s + n] = sum_d t[j, token, d] L[j, d, n]; a program has one j."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    j = tl.program_id(1).to(tl.int64)
    m = tl.program_id(2) * M + tl.arange(0, M)
    d = tl.arange(0, K)
    t = t_ptr + j * stride_j + m[:, None].to(tl.int64) * stride_t + d[None, :]
    l = l_ptr + (j * depth + d[:, None]) * s + n[None, :]  # noqa: E741
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, depth, K):
        a = tl.load(t + start, mask=(m[:, None] < tokens) & (d[None, :] < depth - start), other=0.0)
        b = tl.load(l, mask=(d[:, None] < depth - start) & (n[None, :] < s), other=0.0)
        acc = tl.dot(a, b, acc)
        l += K * s  # noqa: E741
    to = m[:, None].to(tl.int64) * stride_y + j * s + n[None, :]
    tl.store(y_ptr + to, acc.to(y_ptr.dtype.element_ty), mask=(m[:, None] < tokens) & (n[None, :] < s))


def first_pass(x: Tensor, R: Tensor, t: Tensor) -> None:
    """x (tokens, n_in * p) with R (n_in, n_out, rank, p) into t (n_out, tokens, n_in * rank)."""
    n_in, n_out, rank, p = R.shape
    tokens, width = x.shape[0], n_out * rank
    M, N, meta = _tiles(tokens, width, n_in, x.device)
    grid = (triton.cdiv(width, N), n_in, triton.cdiv(tokens, M))
    _first[grid](x, R, t, tokens, p, width, rank, x.stride(0), t.stride(1), t.stride(0), M=M, N=N, **meta)


def second_pass(t: Tensor, L: Tensor, y: Tensor) -> None:
    """t (n_out, tokens, n_in * rank) with L (n_out, n_in, rank, s) into y (tokens, n_out * s)."""
    n_out, n_in, rank, s = L.shape
    tokens = t.shape[1]
    M, N, meta = _tiles(tokens, s, n_out, t.device)
    grid = (triton.cdiv(s, N), n_out, triton.cdiv(tokens, M))
    _second[grid](t, L, y, tokens, n_in * rank, s, t.stride(1), t.stride(0), y.stride(0), M=M, N=N, **meta)


def _tiles(tokens: int, columns: int, blocks: int, device: torch.device) -> tuple[int, int, dict[str, Any]]:
    """The largest tiles that still give (nearly) every multiprocessor one. Measured on an H200, bfloat16."""
    M = min(LARGEST, max(SMALLEST, triton.next_power_of_2(tokens)))
    M = 64 if M > 16 and tokens <= 512 else M
    rows = blocks * triton.cdiv(tokens, M)
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    N = next((n for n in (128, 64, 32) if rows * triton.cdiv(columns, n) >= units), 32)
    if M == LARGEST:
        return M, 128, {"K": 64, "num_warps": 4, "num_stages": 3}
    return M, N, {"K": 64 if N * M > 1024 else 128, "num_warps": 4, "num_stages": 4}
