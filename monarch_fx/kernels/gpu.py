"""What monarch_bmm runs on a GPU: products that write their results where the next one reads them, without copies.

A product has two halves (``halves.py``), or is one kernel where that is faster. The first half stores its result
block-transposed, the second one writes strided rows. Several products that read the same few tokens run half by half
together. The backward pass runs the same halves with the factors swapped, since the transposed matrix is Monarch(L, R).
Sizes that would slow them down are padded (``padding.py``). Inner operators are opaque to compilers, where halves
aren't a library's alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.flop_counter import register_flop_formula

from monarch_fx.kernels import autocast, halves, padding, reference
from monarch_fx.kernels.choice import FEW_TOKENS, SOME_TOKENS, TOGETHER, are_summed_apart


def serves(x: Tensor, R: Tensor) -> bool:
    """Whether these kernels take the product: half precision or TF32 on a GPU, one matrix, no function transform."""
    if not x.is_cuda or R.dim() != 4 or _are_transformed():
        return False
    return halves.computes(autocast.dtype(x)) and halves.launchers() is not None


def takes_epilogue(x: Tensor) -> bool:
    """Whether bias and activation cost less in these kernels than behind them; for TF32 see ``choice.tf32_tokens``."""
    return autocast.dtype(x) != torch.float32


def recomputes(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None) -> bool:
    """Whether a backward pass follows, and can compute the intermediate anew; on any device, of real numbers."""
    if not torch.is_grad_enabled() or R.dim() != 4 or R.is_complex() or _are_transformed():
        return False
    return any(operand is not None and operand.requires_grad for operand in (x, R, L, bias))


def _are_transformed() -> bool:
    """Whether a function transform, or forward-mode differentiation, wants to see the ATen operations."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0


def serves_together(x: Tensor, R: list[Tensor], L: list[Tensor], biases: list[Tensor | None]) -> bool:
    """Whether these kernels take several products of x together: without padding, broadcast biases or gradients."""
    if torch.is_grad_enabled() and any(o is not None and o.requires_grad for o in (x, *R, *L, *biases)):
        return False
    if autocast.dtype(x) not in halves.HALF or not all(
        serves(x, factor) and x.shape[-1] == factor.shape[0] * factor.shape[3] for factor in R
    ):
        return False
    rows = [factor.shape[0] * factor.shape[3] for factor in L]
    return all(bias is None or bias.shape == (count,) for bias, count in zip(biases, rows, strict=True))


def products(
    x: Tensor,
    R: Tensor,
    L: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    recompute: bool = False,
    out_features: int | None = None,
) -> Tensor:
    """x (*, in_features) -> (*, out_features), contiguous; bias (out_features,), gate like the result.

    ``in_features`` and ``out_features`` (default: all) are fewer than ``n_in * p`` and ``n_out * s`` where the grid
    pads them.
    """
    if autocast.is_on(x.device):
        x, R, L = autocast.cast(x), autocast.cast(R), autocast.cast(L)
        bias, gate = (extra if extra is None else autocast.cast(extra) for extra in (bias, gate))
    trained = torch.is_grad_enabled() and any(o is not None and o.requires_grad for o in (x, R, L, bias, gate))
    run = functools.partial(_differentiable, recompute=recompute) if trained else plain
    rows, n_out, s = x.reshape(-1, x.shape[-1]), L.shape[0], L.shape[3]
    out_features = n_out * s if out_features is None else out_features
    gate = None if gate is None else gate.reshape(-1, gate.shape[-1])
    rows, R, L = padding.pad_all(rows, R, L, out_features, trained=trained)  # out here autograd cuts gradients
    if n_out * L.shape[3] == out_features:
        y = run(rows, R, L, bias, gate, activation)
    else:
        y = _cut(run(rows, R, L, None, None, "none"), L.shape[3], s, out_features)
        y = reference.activated(reference.finished(y, bias, None), gate, activation)
    return y.reshape(*x.shape[:-1], out_features)


def _cut(y: Tensor, padded: int, s: int, out_features: int) -> Tensor:
    """The first ``s`` of each ``padded`` columns of y, ``out_features`` of them: a view, or one pass and one back."""
    n_out = y.shape[1] // padded
    if n_out == 1 or s == padded:
        return y[:, :out_features]
    kept = [max(0, min(s, out_features - j * s)) for j in range(n_out)]
    pieces = y.split_with_sizes([size for width in kept for size in (width, padded - width)], 1)
    return torch.cat(pieces[::2], 1)


def plain(
    x: Tensor,
    R: Tensor,
    L: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    *,
    is_watched: bool = True,
) -> Tensor:
    """x (tokens, n_in * p) -> (tokens, n_out * s), without gradients; as an operator where that ``is_watched``."""
    if gate is None and activation == "none" and _is_open(x, R, L):
        return reference.monarch_bmm(x, R, L, bias)
    return (product if is_watched else _product)(x, R, L, bias, gate, activation)


def _is_open(x: Tensor, R: Tensor, L: Tensor) -> bool:
    """Whether compilers see the two products, which are a library's: these they launch with less work for the host.

    So is low rank without an epilogue, where tokens are known to be many.
    """
    n_in, n_out, rank, _ = R.shape
    are_many = statically_known_true(x.shape[0] > SOME_TOKENS)  # without a guard where their number is symbolic
    if not (n_in == n_out == 1 and padding.is_aligned(rank) and are_many):
        return False
    least = halves.one_kernel_tokens(x.dtype, x.device, R.shape, L.shape)
    return math.isinf(least) or not statically_known_true(x.shape[0] >= least)


def _differentiable(
    x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str, *, recompute: bool
) -> Tensor:
    """As ``plain``, with gradients. Of low rank compilers see the library's products (``_is_open``)."""
    if R.shape[0] == R.shape[1] == 1 and not recompute:
        y = reference.monarch_bmm(x, R, L, bias)
    else:
        y = _Differentiable.apply(x, R, L, bias, recompute)
    return reference.activated(y, gate, activation)  # whose own gradient is PyTorch's


def products_together(
    x: Tensor, R: list[Tensor], L: list[Tensor], biases: list[Tensor | None], gated: str | None
) -> list[Tensor]:
    """x (*, in_features) -> each (*, n_out * s), contiguous; with ``gated`` one, ``gated(first product) * second``."""
    if autocast.is_on(x.device):
        x, R, L = autocast.cast(x), [autocast.cast(factor) for factor in R], [autocast.cast(factor) for factor in L]
        biases = [bias if bias is None else autocast.cast(bias) for bias in biases]
    rows = x.reshape(-1, x.shape[-1])
    if statically_known_true(rows.shape[0] > FEW_TOKENS):
        if gated is None:
            return [products(x, *operands, None, "none") for operands in zip(R, L, biases, strict=True)]
        gate = products(x, R[0], L[0], biases[0], None, "none")
        return [products(x, R[1], L[1], biases[1], gate, gated)]
    results = together(rows, R, L, biases, gated)
    return [y.reshape(*x.shape[:-1], y.shape[-1]) for y in results]


def _product(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str) -> Tensor:
    """x (tokens, n_in * p) -> (tokens, n_out * s): ``act(M x + bias)``, or ``act(gate) * (M x + bias)``."""
    x, R, L, tokens = halves.rows_of(x), R.contiguous(), L.contiguous(), x.shape[0]
    y = x.new_empty(tokens, L.shape[0] * L.shape[3])
    if tokens == 0:
        return y
    bias, gate = None if bias is None else bias.contiguous(), None if gate is None else halves.rows_of(gate)
    if tokens <= FEW_TOKENS and halves.ran("both halves", "few.product", x, R, L, y, bias, gate, activation):
        return y
    is_one = tokens >= halves.one_kernel_tokens(x.dtype, x.device, R.shape, L.shape)
    if not (is_one and halves.ran("one kernel", "launch.whole", x, R, L, y, bias, gate, activation)):
        if not padding.is_aligned(R.shape[2]) and tokens >= padding.PADDED_TOKENS:
            R, L = padding.pad_ranks(R, L)
        halves.both_halves(x, R, L, y, bias, gate, activation)
    return y


def _together(
    x: Tensor, R: list[Tensor], L: list[Tensor], biases: list[Tensor | None], gated: str | None
) -> list[Tensor]:
    """x (tokens, in_features) -> each (tokens, n_out * s); with ``gated`` one, ``gated(first product) * second``."""
    if 0 < x.shape[0] <= FEW_TOKENS and len(R) <= TOGETHER:
        x, R, L = halves.rows_of(x), [factor.contiguous() for factor in R], [factor.contiguous() for factor in L]
        biases = [bias if bias is None else bias.contiguous() for bias in biases]
        y = _fake_together(x, R, L, biases, gated)
        if halves.ran("several products", "few.products", x, R, L, y, biases, gated):
            return y
    if gated is None:
        return [_product(x, *factors, None, "none") for factors in zip(R, L, biases, strict=True)]
    gate = _product(x, R[0], L[0], biases[0], None, "none")
    return [_product(x, R[1], L[1], biases[1], gate, gated)]


def _product_and_intermediate(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (tokens, n_in * p) -> (tokens, n_out * s), and the intermediate (n_out, tokens, n_in * rank) for gradients."""
    x, R, L = halves.rows_of(x), R.contiguous(), L.contiguous()
    y = x.new_empty(len(x), L.shape[0] * L.shape[3])
    return y, halves.both_halves(x, R, L, y, None if bias is None else bias.contiguous(), None, "none")


def _left_gradient(x: Tensor, R: Tensor, grad: Tensor) -> Tensor:
    """Of grad (tokens, n_out * s), with the intermediate computed anew from x (tokens, n_in * p)."""
    n_in, n_out, rank, _ = R.shape
    t, grad = halves.first_half(halves.rows_of(x), R.contiguous()), halves.rows_of(grad)
    return _sums(t, halves.blocks_of(grad, n_out)).unflatten(1, (n_in, rank))


def _sums(a: Tensor, b: Tensor) -> Tensor:
    """The sums over tokens of a (blocks, tokens, m) times b (blocks, tokens, n): (blocks, m, n)."""
    if a.is_cuda and a.dtype == torch.float32 and are_summed_apart(len(a), a.shape[2], b.shape[2]):
        return torch.stack([torch.mm(one.mT, other) for one, other in zip(a, b, strict=True)])
    return torch.bmm(a.mT, b)


class _Differentiable(torch.autograd.Function):
    """x (tokens, n_in * p) -> (tokens, n_out * s).

    A function, and not a formula of the inner operator's: PyTorch would run that at each call of compiled graphs, too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None, recompute: bool) -> Tensor:
        _, to_R, to_L, *_ = ctx.needs_input_grad
        if recompute or not to_L:
            ctx.save_for_backward(x if to_R or to_L else None, R, L, None)
            return product(x, R, L, bias, None, "none")
        y, t = product_and_intermediate(x, R, L, bias)
        ctx.save_for_backward(x, R, L, t)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, R, L, t = ctx.saved_tensors
        to_x, to_R, to_L, to_bias, _ = ctx.needs_input_grad
        grad_bias = grad.sum(0) if to_bias else None
        if torch.is_grad_enabled():  # a graph of the gradients is wanted
            return *_graphed_gradients(x, R, L, grad, (to_x, to_R, to_L)), grad_bias, None
        grad_x = grad_R = grad_L = None
        if to_x or to_R:
            grad_x, grad_t = product_and_intermediate(grad, L, R, None)  # grad_t (n_in, tokens, n_out * rank)
            grad_R = _sums(grad_t, halves.blocks_of(x, R.shape[0])).view_as(R) if to_R else None
        if to_L and t is not None:
            grad_L = _sums(t, halves.blocks_of(grad, L.shape[0])).view_as(L)
        elif to_L:
            grad_L = left_gradient(x, R, grad)
        return grad_x, grad_R, grad_L, grad_bias, None


def _graphed_gradients(
    x: Tensor | None, R: Tensor, L: Tensor, grad: Tensor, wanted: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Gradients of x, R and L that can be differentiated; x is None where none of the factors' is wanted."""
    if x is None:
        return [reference.monarch_bmm(grad, L, R) if wanted[0] else None, None, None]
    # Aliases: x may depend on the factors, and what reaches them through it is added up by who asked for this
    operands = [operand.view_as(operand) for operand in (x, R, L)]
    y = reference.monarch_bmm(*operands)
    differentiated = [operand for operand, needed in zip(operands, wanted, strict=True) if needed]
    found = iter(torch.autograd.grad(y, differentiated, grad, create_graph=True))
    return [next(found) if needed else None for needed in wanted]


def _fake_product(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str) -> Tensor:
    return x.new_empty(x.shape[0], L.shape[0] * L.shape[3])


def _fake_together(
    x: Tensor, R: list[Tensor], L: list[Tensor], biases: list[Tensor | None], gated: str | None
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], factor.shape[0] * factor.shape[3]) for factor in (L if gated is None else L[1:])]


def _fake_product_and_intermediate(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], L.shape[0] * L.shape[3]), halves.intermediate(x, R)


def _fake_left_gradient(x: Tensor, R: Tensor, grad: Tensor) -> Tensor:
    n_in, n_out, rank, _ = R.shape
    return x.new_empty(n_out, n_in, rank, grad.shape[1] // n_out)


# Without torch.library.custom_op, whose wrapper takes longer than some of the kernels
_LIBRARY = torch.library.Library("monarch_fx_kernels", "FRAGMENT")
# Operands of any strides do: with exact ones Inductor writes an activation twice, for the product and to be saved.
_TAGS = {"tags": (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)}
_LIBRARY.define("product(Tensor x, Tensor R, Tensor L, Tensor? bias, Tensor? gate, str activation) -> Tensor", **_TAGS)
_LIBRARY.define("product_and_intermediate(Tensor x, Tensor R, Tensor L, Tensor? bias) -> (Tensor, Tensor)", **_TAGS)
# One operator, since compilers would find that the intermediate is known from the forward pass, and keep it
_LIBRARY.define("left_gradient(Tensor x, Tensor R, Tensor grad) -> Tensor", **_TAGS)
_LIBRARY.define("together(Tensor x, Tensor[] R, Tensor[] L, Tensor?[] biases, str? gated) -> Tensor[]", **_TAGS)
_LIBRARY.impl("product", _product, "CompositeExplicitAutograd")
_LIBRARY.impl("product_and_intermediate", _product_and_intermediate, "CompositeExplicitAutograd")
_LIBRARY.impl("left_gradient", _left_gradient, "CompositeExplicitAutograd")
_LIBRARY.impl("together", _together, "CompositeExplicitAutograd")
product = torch.ops.monarch_fx_kernels.product.default
product_and_intermediate = torch.ops.monarch_fx_kernels.product_and_intermediate.default
left_gradient = torch.ops.monarch_fx_kernels.left_gradient.default
together = torch.ops.monarch_fx_kernels.together.default
torch.library.register_fake(product, _fake_product, lib=_LIBRARY)
torch.library.register_fake(product_and_intermediate, _fake_product_and_intermediate, lib=_LIBRARY)
torch.library.register_fake(left_gradient, _fake_left_gradient, lib=_LIBRARY)
torch.library.register_fake(together, _fake_together, lib=_LIBRARY)


@register_flop_formula([torch.ops.monarch_fx_kernels.product, torch.ops.monarch_fx_kernels.product_and_intermediate])
def _flops(x: Sequence[int], R: Sequence[int], L: Sequence[int], *args: Any, **kwargs: Any) -> int:
    n_in, n_out, rank, p = R
    return 2 * x[0] * n_in * n_out * rank * (p + L[3])


@register_flop_formula(torch.ops.monarch_fx_kernels.left_gradient)
def _flops_of_gradient(x: torch.Size, R: torch.Size, grad: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _flops(x, R, (0, 0, 0, grad[1] // R[1]))


@register_flop_formula(torch.ops.monarch_fx_kernels.together)
def _flops_together(x: torch.Size, R: list[torch.Size], L: list[torch.Size], *args: Any, **kwargs: Any) -> int:
    return sum(_flops(x, *factors) for factors in zip(R, L, strict=True))
