"""What monarch_bmm means: two batched products with a transpose of whole blocks between; Inductor lowers it from here.

That transpose is the only copy of its own: bias and activation fuse into the one back to (tokens, out_features).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

THREAD_BLOCKS, PART = 512, 256  # of a GPU's gradient: as many at most, each of as many tokens at least

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def monarch_bmm(
    x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None = None, *, out_features: int | None = None
) -> Tensor:
    """See ``monarch_fx.kernels.op.monarch_bmm``."""
    if R.dim() == 5:
        return _batched(x, R, L, bias, out_features)
    n_in, n_out, rank, p = R.shape
    s = L.shape[-1]
    lead = x.shape[:-1]
    x = padded(x, n_in * p)
    if n_in == n_out == 1:  # low rank
        return _linear(F.linear(x, R.flatten(0, 2)), L.flatten(0, 2).mT, bias, out_features)
    x = x.reshape(-1, n_in, p).transpose(0, 1)  # (n_in, tokens, p)
    t = blockwise(x, R.flatten(1, 2).mT)  # (n_in, tokens, n_out * rank)
    t = t.unflatten(2, (n_out, rank)).permute(1, 2, 0, 3).flatten(2)  # (tokens, n_out, n_in * rank)
    if n_out == 1:
        return _linear(t.reshape(*lead, n_in * rank), L.flatten(0, 2).mT, bias, out_features)
    y = blockwise(t.transpose(0, 1), L.flatten(1, 2))  # (n_out, tokens, s)
    return finished(y.transpose(0, 1).reshape(*lead, n_out * s), bias, out_features)


def blockwise(x: Tensor, weight: Tensor) -> Tensor:
    """(blocks, tokens, k) @ (blocks, k, n), with tokens in ``_parts`` where the gradient's sums over them are long."""
    parts = _parts(x, weight)
    if parts == 1:
        return torch.bmm(x, weight)
    return torch.matmul(x.unflatten(1, (parts, -1)), weight.unsqueeze(1)).flatten(1, 2)


def _parts(x: Tensor, weight: Tensor) -> int:
    """In how many parts a GPU adds up the gradient of ``weight``: a library's batched product has one thread block for
    every 64 x 64 of its results and walks through all tokens with it, however few there are."""
    if not (x.is_cuda and weight.requires_grad and torch.is_grad_enabled() and type(x.shape[1]) is int):
        return 1
    blocks, k, n = weight.shape
    tiles = blocks * -(-k // 64) * -(-n // 64)
    wanted = min(THREAD_BLOCKS // tiles, x.shape[1] // PART)
    return math.gcd(x.shape[1], 1 << max(0, wanted.bit_length() - 1))


def _batched(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None, out_features: int | None) -> Tensor:
    """x (B, tokens, in_features); the same two products, with B in front of every grid."""
    batch, n_in, n_out, rank, p = R.shape
    s = L.shape[-1]
    tokens = x.shape[1]
    x = padded(x, n_in * p).unflatten(2, (n_in, p)).transpose(1, 2).reshape(batch * n_in, tokens, p)
    t = torch.bmm(x, R.reshape(batch * n_in, n_out * rank, p).mT)
    t = t.reshape(batch, n_in, tokens, n_out, rank).permute(0, 3, 2, 1, 4).reshape(batch * n_out, tokens, n_in * rank)
    y = torch.bmm(t, L.reshape(batch * n_out, n_in * rank, s))
    return finished(y.reshape(batch, n_out, tokens, s).transpose(1, 2).flatten(2), bias, out_features)


def padded(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int | None) -> Tensor:
    """A last stage that is one plain product takes the bias into it."""
    if bias is None or bias.dim() != 1:
        return finished(F.linear(x, weight), bias, out_features)
    if out_features is not None and out_features < len(weight):
        weight = weight[:out_features]  # not always: the gradient of a part is copied into a whole
    return F.linear(x, weight, bias)


def finished(y: Tensor, bias: Tensor | None, out_features: int | None) -> Tensor:
    y = y if out_features is None else y[..., :out_features]
    if bias is None:
        return y.contiguous()  # as linear's result: callers take views of it
    return y + bias.to(y.dtype)  # autocast: a float32 bias must not widen the result


def activated(y: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """``act(y)``, or ``act(gate) * y``."""
    return ACTIVATIONS[activation](y) if gate is None else ACTIVATIONS[activation](gate) * y
