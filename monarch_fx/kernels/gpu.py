"""What monarch_bmm runs on a GPU: products that write their results where the next one reads them, without copies.

With many tokens the first product is one cuBLAS call per row of blocks, into a strided slice of the intermediate; with
fewer it is a Triton kernel that stores block-transposed. The second product writes strided rows: one cuBLAS call, or a
Triton kernel where tokens are few. The backward pass runs the same op with the factors swapped, since the transposed
matrix is Monarch(L, R).
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from monarch_fx.errors import MonarchWarning
from monarch_fx.kernels import reference

HALF = (torch.bfloat16, torch.float16)
CUBLAS_FLOPS = 8e9  # in one call of the first product; below, the Triton kernel's single launch is faster (H200)
FEW_TOKENS = 128  # up to which the second product is a Triton kernel, too


def serves(x: Tensor, R: Tensor) -> bool:
    """Whether this op takes the product: half precision on a GPU, a grid, no function transform."""
    if not x.is_cuda or R.dim() != 4 or R.shape[0] * R.shape[1] == 1:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if dtype not in HALF or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return _two_pass() is not None


@functools.cache
def _two_pass() -> Any:
    """The Triton kernels, None where there are none; imported here alone, since most users of a CPU have no Triton."""
    try:
        return importlib.import_module("monarch_fx.kernels.two_pass")
    except ImportError as error:
        warnings.warn(f"Monarch products run on slower kernels, without Triton: {error}.", MonarchWarning, stacklevel=2)
        return None


def products(x: Tensor, R: Tensor, L: Tensor) -> Tensor:
    """x (*, n_in * p) -> (*, n_out * s), contiguous."""
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        x, R, L = x.to(dtype), R.to(dtype), L.to(dtype)
    y, _ = two_products(x.reshape(-1, x.shape[-1]), R, L)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@torch.library.custom_op("monarch_fx_kernels::two_products", mutates_args=())
def two_products(x: Tensor, R: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """x (tokens, n_in * p) -> y (tokens, n_out * s) and the intermediate (n_out, tokens, n_in * rank)."""
    n_in, n_out, rank, p = R.shape
    tokens = x.shape[0]
    x, R, L = x if x.stride(1) == 1 else x.contiguous(), R.contiguous(), L.contiguous()
    t, y = _outputs(x, R, L)
    if tokens == 0:
        return y, t
    if n_in == 1:
        torch.mm(x, R.flatten(0, 2).mT, out=t.transpose(0, 1).flatten(1))
    elif 2 * tokens * n_in * rank * p >= CUBLAS_FLOPS:
        for j in range(n_out):
            torch.bmm(_blocks(x, n_in), R[:, j].mT, out=_blocks(t[j], n_in))
    else:
        _two_pass().first_pass(x, R, t)
    if tokens <= FEW_TOKENS:
        _two_pass().second_pass(t, L, y)
    else:
        torch.bmm(t, L.flatten(1, 2), out=_blocks(y, n_out))
    return y, t


def _outputs(x: Tensor, R: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    (n_in, n_out, rank, _), tokens = R.shape, x.shape[0]
    y = x.new_empty(tokens, n_out * L.shape[3])
    if n_in == 1:  # the first product's own result is already what the second one reads
        return x.new_empty(tokens, n_out, rank).transpose(0, 1), y
    return x.new_empty(n_out, tokens, n_in * rank), y


def _blocks(x: Tensor, count: int) -> Tensor:
    """(tokens, count * n) as (count, tokens, n)."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


@two_products.register_fake
def _(x: Tensor, R: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    t, y = _outputs(x, R, L)
    return y, t


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, R, L, t = ctx.saved_tensors
    to_x, to_R, to_L = ctx.needs_input_grad
    if torch.is_grad_enabled():  # a graph of the gradients is wanted: the intermediate must be in it
        y = reference.monarch_bmm(x, R, L)
        wanted = [operand for operand, needed in zip((x, R, L), ctx.needs_input_grad, strict=True) if needed]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
        return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)
    grad_x = grad_R = grad_L = None
    if to_x or to_R:
        grad_x, grad_t = two_products(grad, L, R)  # grad_t (n_in, tokens, n_out * rank)
        grad_R = torch.bmm(grad_t.mT, _blocks(x, R.shape[0])).view_as(R) if to_R else None
    if to_L:
        grad_L = torch.bmm(t.mT, _blocks(grad, L.shape[0])).view_as(L)
    return grad_x, grad_R, grad_L


two_products.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.monarch_fx_kernels.two_products)
def _flops(x: torch.Size, R: torch.Size, L: torch.Size, *args: Any, **kwargs: Any) -> int:
    n_in, n_out, rank, p = R
    return 2 * x[0] * n_in * n_out * rank * (p + L[3])
