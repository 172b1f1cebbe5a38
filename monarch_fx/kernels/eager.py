"""Products in eager mode past PyTorch's dispatcher, where nobody has to see the operators.

A product of few tokens takes the host longer than the GPU. Half of that is two operators, one in the other, and the
questions that they ask about their arguments; here these are asked once for all sizes, and the inner one's body is
called by itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from monarch_fx.kernels import gpu, padding
from monarch_fx.kernels.halves import HALF

REMEMBERED = 4096  # products, of all layers' sizes and numbers of tokens
PLAIN = frozenset({Tensor, nn.Parameter})  # other types are told of operators


def product(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None, out_features: int | None) -> Tensor | None:
    """``monarch_bmm`` in half precision on a GPU, without gradients.

    None where the operator is to be called: it says what is wrong with arguments, pads, differentiates, and is seen.
    """
    dtype, device, are_graded = x.dtype, x.device, torch.is_grad_enabled()
    for operand in (x, R, L) if bias is None else (x, R, L, bias):
        if type(operand) not in PLAIN or operand.dtype != dtype or operand.device != device or operand.is_neg():
            return None
        if are_graded and operand.requires_grad:
            return None
    if dtype not in HALF or not gpu.serves(x, R) or _is_watched():
        return None
    rows = _rows(x.shape, R.shape, L.shape, None if bias is None else bias.shape, out_features)
    if rows is None:
        return None
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = gpu.plain(flat, R, L, bias, None, "none", is_watched=False)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)


def _is_watched() -> bool:
    """Whether a mode, a trace, autocast or a profiler wants the operator; of transforms ``gpu.serves`` knows."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or torch._C._is_any_autocast_enabled()
        or torch._C._autograd._profiler_enabled()
    )


@functools.lru_cache(REMEMBERED)
def _rows(
    x: Sequence[int], R: Sequence[int], L: Sequence[int], bias: Sequence[int] | None, out_features: int | None
) -> int | None:
    """Features of the result; None where sizes disagree, or x or factors are padded."""
    if len(x) == 0 or len(R) != 4 or len(L) != 4:
        return None
    (n_in, n_out, rank, p), s = R, L[3]
    rows = n_out * s
    agree = x[-1] == n_in * p and tuple(L[:3]) == (n_out, n_in, rank) and out_features in (None, rows)
    if not agree or bias not in (None, (rows,)):
        return None
    sides = padding.padded_sides((n_in, n_out, rank, p, s), (x[-1], rows), trained=False, in_tf32=False)
    return rows if sides == (p, s) or padding.are_few(math.prod(x[:-1])) else None
