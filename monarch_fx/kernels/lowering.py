"""How Inductor lowers the operators: to calls of ``emitted``, and to products of its own where these are a library's.

Only sizes that are known, few tokens or many: of any number of tokens the operators decide themselves, when they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import add_needs_realized_inputs, fallback_handler, lowerings, register_lowering
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.virtualized import V

from monarch_fx.kernels import emitted, gpu, halves, padding
from monarch_fx.kernels.choice import FEW_TOKENS, TOGETHER, library_tokens

EMITTED: dict[str, Callable[..., None]] = {
    "monarch_few_tokens": emitted.few_tokens,
    "monarch_half": emitted.half_of_many_tokens,
    "monarch_rows": halves.first_half_by_rows,
}
FEW_CALL, HALF_CALL, ROWS_CALL = EMITTED

aten = torch.ops.aten


def register() -> None:
    """Makes Inductor lower the operators so."""
    for name, call in EMITTED.items():
        setattr(extern_kernels, name, call)
    lowered: dict[Any, Callable[..., Any]] = {
        gpu.product: _product,
        gpu.together: _together,
        gpu.product_and_intermediate: _product_and_intermediate,
    }
    for op, lower in lowered.items():
        register_lowering(op, type_promotion_kind=None)(lower)
        add_needs_realized_inputs(op)  # else readers lowered before them compute an operand themselves


def _product(x: Any, R: Any, L: Any, bias: Any, gate: Any, activation: str) -> Any:
    found = _few(False, x, [R], [L], [bias], gate, activation)
    if found is None and not _is_one_kernel(x, R, L):
        found = _halves(x, R, L, bias, gate, activation)
    return _operator(gpu.product)(x, R, L, bias, gate, activation) if found is None else found[0]


def _is_one_kernel(x: Any, R: Any, L: Any) -> bool:
    sizes = _sizes((x, R, L))
    if sizes is None:
        return False
    (tokens, _), *factors = sizes
    return tokens >= halves.one_kernel_tokens(x.get_dtype(), x.get_device(), *factors)


def _together(x: Any, R: list[Any], L: list[Any], biases: list[Any], gated: str | None) -> Any:
    found = _few(True, x, R, L, biases, None, gated)
    return _operator(gpu.together)(x, R, L, biases, gated) if found is None else found


def _product_and_intermediate(x: Any, R: Any, L: Any, bias: Any) -> Any:
    found = _halves(x, R, L, bias, None, "none")
    return _operator(gpu.product_and_intermediate)(x, R, L, bias) if found is None else found


def _operator(op: Any) -> Callable[..., Any]:
    return fallback_handler(op, add_to_fallback_set=False)


def _sizes(operands: Sequence[Any]) -> list[tuple[int, ...]] | None:
    """Of each operand; None where one isn't known, or where no Python may be emitted."""
    sizes = [operand.get_size() for operand in operands]
    if V.graph.cpp_wrapper or not all(isinstance(size, (int, sympy.Integer)) for shape in sizes for size in shape):
        return None
    return [tuple(int(size) for size in shape) for shape in sizes]


def _few(
    together: bool, x: Any, R: list[Any], L: list[Any], biases: list[Any], gate: Any, activation: str | None
) -> Sequence[Any] | None:
    """Each result (tokens, rows) of few tokens, by one call; None where that isn't to be."""
    extra = [operand for operand in (*biases, gate) if operand is not None]
    shapes, count, dtype = _sizes((x, *R, *L, *extra)), len(R), x.get_dtype()
    if shapes is None or not (0 < shapes[0][0] <= FEW_TOKENS and count <= TOGETHER and halves.computes(dtype)):
        return None
    known = emitted.Products(
        together,
        shapes[0][0],
        tuple(shapes[1 : 1 + count]),
        tuple(shapes[1 + count : 1 + 2 * count]),
        tuple(bias is not None for bias in biases),
        gate is not None,
        activation,
        _name(dtype),
        str(x.get_device()),
    )
    products = repr(tuple(known))
    if emitted.prepared(products) is None:
        return None
    operands = [_contiguous(operand) for operand in (x, *R, *L, *extra)]
    memory = _call(FEW_CALL, operands, [known.starts[-1]], [1], products=products)
    return [
        _strided(memory, [known.tokens, rows], [rows, 1], start)
        for rows, start in zip(known.rows, known.starts, strict=False)
    ]


def _halves(x: Any, R: Any, L: Any, bias: Any, gate: Any, activation: str) -> Sequence[Any] | None:
    """y (tokens, n_out * s) and the intermediate (n_out, tokens, n_in * rank) of many tokens, half by half.

    As ``gpu`` runs them. None where the operator itself is to decide.
    """
    extra = [operand for operand in (bias, gate) if operand is not None]
    shapes, dtype = _sizes((x, R, L, *extra)), x.get_dtype()
    if shapes is None or shapes[0][0] <= FEW_TOKENS or not halves.computes(dtype):
        return None
    (tokens, _), (n_in, n_out, rank, p), (*_, s), *_ = shapes
    if tokens >= padding.PADDED_TOKENS and not padding.is_aligned(rank):
        return None
    kinds = bias is not None, activation, gate is not None
    is_kernel = halves.is_second_kernel(dtype, x.get_device(), tokens, shapes[1], shapes[2], *kinds)
    if not is_kernel and (gate is not None or activation != "none" or (bias is not None and n_out > 1)):
        return None
    depth, about = n_in * rank, (_name(dtype), str(x.get_device()))
    strides = (tokens * depth, depth, 1) if n_in > 1 else (rank, n_out * rank, 1)
    x, R, L, *extra = (_contiguous(operand) for operand in (x, R, L, *extra))
    first = emitted.Half(True, tokens, (n_in, n_out, rank, p), strides, (False, "none", False), *about)
    if tokens < library_tokens(n_in, n_out, rank, p, halves.units(x.get_device()), dtype.itemsize):
        if emitted.prepared_half(repr(tuple(first))) is None:
            return None
        t = _call(HALF_CALL, [x, R], [n_out, tokens, depth], strides, half=repr(tuple(first)))
    elif n_in == 1:
        columns = _call("mm", [x, _turned(R, n_out * rank, p)], [tokens, n_out * rank], [n_out * rank, 1])
        t = _strided(columns, [n_out, tokens, rank], strides)
    else:
        t = _call(ROWS_CALL, [x, R], [n_out, tokens, depth], strides)
    size, rows = [tokens, n_out * s], n_out * s
    if is_kernel:
        second = emitted.Half(False, tokens, (n_out, n_in, rank, s), strides, kinds, *about)
        return _call(HALF_CALL, [t, L, *extra], size, [rows, 1], half=repr(tuple(second))), t
    if n_out == 1:
        product = lowerings[aten.mm.default if bias is None else aten.addmm.default]
        return product(*extra, _strided(t, [tokens, depth], strides[1:]), _reshaped(L, depth, s)), t
    y = _call("bmm", [t, _realized(_reshaped(L, n_out, depth, s))], [n_out, tokens, s], [s, rows, 1])
    return _strided(y, size, [rows, 1]), t


def _call(name: str, operands: list[Any], size: Sequence[int], strides: Sequence[int], **text: str) -> Any:
    """What an external kernel of Inductor's writes into a tensor of this size and these strides."""
    layout = ir.FixedLayout(operands[0].get_device(), operands[0].get_dtype(), list(size), list(strides))
    call = ir.ExternKernelOut(layout, operands, kwargs=text, python_kernel_name=f"extern_kernels.{name}")
    return ir.TensorBox.create(call)


def _strided(written: Any, size: Sequence[int], strides: Sequence[int], start: int = 0) -> Any:
    """A view of what a call has written."""
    return lowerings[aten.as_strided.default](written, list(size), list(strides), start)


def _reshaped(tensor: Any, *size: int) -> Any:
    return lowerings[aten.view.default](tensor, list(size))


def _turned(factor: Any, *size: int) -> Any:
    """The factor as matrices of this size, transposed."""
    axes = [*range(len(size) - 2), len(size) - 1, len(size) - 2]
    return _realized(lowerings[aten.permute.default](_reshaped(factor, *size), axes))


def _contiguous(tensor: Any) -> Any:
    tensor.realize()  # else a view of what isn't is copied, and that computed again by its other readers
    return ir.ExternKernel.require_contiguous(tensor)


def _realized(tensor: Any) -> Any:
    """As an external kernel can read it; a view stays one."""
    return ir.ExternKernel.realize_input(tensor)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
