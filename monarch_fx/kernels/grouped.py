"""What monarch_grouped_mm means: two products whose rows are sorted by expert, with a block transpose between.

How many rows an expert gets is known only in the data: the loop over experts stands in an opaque op, which has its own
weight gradient for a partner; they are each other's derivatives, to any order. ``torch.nn.functional.grouped_mm``
doesn't serve: it refuses float64, rows not aligned to 16 bytes and, under fake tensors, all dtypes but bfloat16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from monarch_fx.kernels.reference import finished, monarch_bmm, padded


def monarch_grouped_mm(x: Tensor, R: Tensor, L: Tensor, offs: Tensor, *, out_features: int | None = None) -> Tensor:
    """See ``monarch_fx.kernels.op.monarch_grouped_mm``."""
    x = x.to(R.dtype)  # autocast has no rule for grouped products; transformers casts to the weight's dtype, too
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _masked(x, R, L, offs, out_features)
    n_in, n_out, rank, p = R.shape[1:]
    x = padded(x, n_in * p).unflatten(1, (n_in, p)).transpose(0, 1)  # (n_in, rows, p)
    t = grouped_bmm(x, R.flatten(2, 3).mT, offs)  # (n_in, rows, n_out * rank)
    t = t.unflatten(2, (n_out, rank)).permute(2, 1, 0, 3).flatten(2)  # (n_out, rows, n_in * rank)
    y = grouped_bmm(t, L.flatten(2, 3), offs)  # (n_out, rows, s)
    return finished(y.transpose(0, 1).flatten(1), None, out_features)


def _masked(x: Tensor, R: Tensor, L: Tensor, offs: Tensor, out_features: int | None) -> Tensor:
    """Every expert on every row: many more operations, but plain ones that vmap and forward-mode AD go through."""
    row = torch.arange(x.shape[0], device=x.device)
    expert = torch.searchsorted(offs, row.to(offs.dtype), right=True).unsqueeze(1)
    products = (monarch_bmm(x, R[e], L[e], out_features=out_features) for e in range(R.shape[0]))
    return sum((torch.where(expert == e, y, 0) for e, y in enumerate(products)), start=x.new_zeros(()))


# A namespace of their own: under monarch_fx stands one op a product, in graphs and in profiles.
@torch.library.custom_op("monarch_fx_kernels::grouped_bmm", mutates_args=())
def grouped_bmm(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """x (groups, rows, k) times weight (E, groups, k, n) of each row's expert -> (groups, rows, n); 0 past the last."""
    y = x.new_zeros(*x.shape[:2], weight.shape[3])
    for expert, rows in _segments(offs):
        y[:, rows] = x[:, rows] @ weight[expert]
    return y


@torch.library.custom_op("monarch_fx_kernels::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
    """Sums of outer products of rows of x (groups, rows, k) and y (groups, rows, n) -> (E, groups, k, n)."""
    outer = x.new_zeros(offs.shape[0], x.shape[0], x.shape[2], y.shape[2])
    for expert, rows in _segments(offs):
        outer[expert] = x[:, rows].mT @ y[:, rows]
    return outer


def _segments(offs: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, with their rows."""
    ends = offs.tolist()
    return ((e, slice(a, b)) for e, (a, b) in enumerate(itertools.pairwise([0, *ends])) if b > a)


@grouped_bmm.register_fake
def _(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[3])


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
    return x.new_empty(offs.shape[0], x.shape[0], x.shape[2], y.shape[2])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_bmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, offs = ctx.saved_tensors
    to_x, to_weight, _ = ctx.needs_input_grad
    grad_x = grouped_bmm(grad, weight.mH, offs) if to_x else None
    return grad_x, grouped_outer(x.conj(), grad, offs) if to_weight else None, None


def _grouped_outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, y, offs = ctx.saved_tensors
    to_x, to_y, _ = ctx.needs_input_grad
    grad_x = grouped_bmm(y.conj(), grad.mT, offs) if to_x else None
    return grad_x, grouped_bmm(x.conj(), grad, offs) if to_y else None, None


grouped_bmm.register_autograd(_grouped_bmm_backward, setup_context=_save)
grouped_outer.register_autograd(_grouped_outer_backward, setup_context=_save)
