"""Few tokens in a compiled graph: Inductor allocates what they write, and emits one call that launches both halves.

The operators look at their arguments, find the launches for these sizes and allocate results and intermediates, anew in
each call. Where kernels are launched one by one, that takes the host longer than they run; of a compiled graph all is
known beforehand.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.virtualized import V
from triton.errors import TritonError

from monarch_fx.kernels import gpu
from monarch_fx.kernels.choice import FEW_TOKENS, TOGETHER
from monarch_fx.kernels.launch import ALIGNED, REMEMBERED, Launch, few_launches, filled, launches_together

NAME = "monarch_few_tokens"  # among Inductor's external kernels


class Products(NamedTuple):
    """What is known of products that read the same few rows; stands as text in what Inductor writes.

    Attributes:
        together: Of the operator ``together``, else of ``product``.
        tokens: Rows.
        R, L: Shapes of the factors.
        biases: Which products have one.
        gate: Whether there is a tensor of gates.
        activation: The operator's, None for none of ``together``.
        dtype: Its name in torch.
        device: Its name.
    """

    together: bool
    tokens: int
    R: tuple[tuple[int, ...], ...]
    L: tuple[tuple[int, ...], ...]
    biases: tuple[bool, ...]
    gate: bool
    activation: str | None
    dtype: str
    device: str

    @property
    def is_gated(self) -> bool:
        """Whether one product is the gate of the other, and there is one result."""
        return self.together and self.activation is not None

    @property
    def rows(self) -> list[int]:
        """Features of each result."""
        return [n_out * s for n_out, _, _, s in (self.L[1:] if self.is_gated else self.L)]

    @property
    def sizes(self) -> list[int]:
        """Numbers of each result and intermediate, which lie one after the other."""
        depths = (n_in * n_out * rank for n_in, n_out, rank, _ in self.R)
        return [self.tokens * numbers for numbers in (*self.rows, *depths)]

    @property
    def starts(self) -> list[int]:
        """Numbers before each of them, and before the end; all are ``ALIGNED``."""
        aligned = (-(-size // ALIGNED) * ALIGNED for size in self.sizes)
        return functools.reduce(lambda starts, size: [*starts, starts[-1] + size], aligned, [0])


class Launches(NamedTuple):
    """Both halves, and their operands among all: x, R, L, biases, the gate; results, and intermediates."""

    first: Launch
    second: Launch
    of_first: Callable[[Sequence[Any]], Sequence[Any]]
    of_second: Callable[[Sequence[Any]], Sequence[Any]]
    parts: list[tuple[int, int]]  # of the memory: where each one starts, its numbers
    bytes_before: list[int]

    def __call__(self, operands: Sequence[Tensor], memory: Tensor) -> bool:
        """False where an operand isn't aligned: these kernels are compiled for such that are."""
        at = memory.data_ptr()
        addresses = [operand.data_ptr() for operand in operands]
        if functools.reduce(operator.or_, addresses, at) % ALIGNED:
            return False
        addresses += [at + before for before in self.bytes_before]
        first = second = operands
        if self.first.run is None or self.second.run is None:  # only a kernel that isn't compiled yet sees the tensors
            tensors = [*operands, *(memory.narrow(0, *part) for part in self.parts)]
            first, second = self.of_first(tensors), self.of_second(tensors)
        self.first(first, self.of_first(addresses))
        self.second(second, self.of_second(addresses))
        return True


@functools.lru_cache(REMEMBERED)
def prepared(products: str) -> Launches | None:
    """Of products as text; None where no kernel takes them."""
    known = Products(*ast.literal_eval(products))
    count, starts = len(known.R), known.starts
    dtype, device = getattr(torch, known.dtype), torch.device(known.device)
    # where each operand stands among all
    R, L = list(range(1, 1 + count)), list(range(1 + count, 1 + 2 * count))
    end = 1 + 2 * count + sum(known.biases)
    places = iter(range(1 + 2 * count, end))
    biases = [next(places) if biased else None for biased in known.biases]
    y = list(range(end + known.gate, end + known.gate + len(known.rows)))
    t = list(range(y[-1] + 1, y[-1] + 1 + count))
    extra = [y[-1] if bias is None else bias for bias in biases]
    x_features = known.R[0][0] * known.R[0][3]
    found: tuple[Any, ...] | None
    if known.together:
        s = tuple([factor[3] for factor in known.L])
        gated = known.activation
        found = launches_together(known.tokens, x_features, known.R, s, known.biases, gated, dtype, device, True)
        of_first = 0, *filled(R), *filled(t)
        of_second = (*t, *L, *y, *extra) if gated else (*filled(t), *filled(L), *filled(y), *filled(extra))
    else:
        strides, kinds = (x_features, known.rows[0], known.rows[0]), (*known.biases, known.activation, known.gate)
        found = few_launches(known.tokens, strides, known.R[0], known.L[0], kinds, dtype, device, True)
        of_first, of_second = (0, *R, *t), (*t, *L, *y, *extra, end if known.gate else y[0])
    if found is None:
        return None
    first, second = found[-2:]
    parts = list(zip(starts[:-1], known.sizes, strict=True))
    before = [start * dtype.itemsize for start in starts[:-1]]
    return Launches(first, second, operator.itemgetter(*of_first), operator.itemgetter(*of_second), parts, before)


_failed: set[str] = set()


def few_tokens(*operands: Tensor, products: str, out: Tensor) -> None:
    """What the emitted call runs: x (tokens, in_features), factors, biases, the gate; into ``out``, flat."""
    if operands[0].is_cuda and products not in _failed:
        launches = prepared(products)
        try:
            if launches is not None and launches(operands, out):
                return
        except (TritonError, RuntimeError):
            _failed.add(products)  # the operator meets the same, and says so
    _by_operator(Products(*ast.literal_eval(products)), operands, out)


def _by_operator(known: Products, operands: Sequence[Tensor], out: Tensor) -> None:
    rest = iter(operands)
    x = next(rest)
    R, L = ([next(rest) for _ in known.R] for _ in range(2))
    biases = [next(rest) if biased else None for biased in known.biases]
    if known.together:
        results = gpu.together(x, R, L, biases, known.activation)
    else:
        results = [gpu.product(x, R[0], L[0], biases[0], next(rest, None), known.activation)]
    for start, result in zip(known.starts, results, strict=False):
        out.narrow(0, start, result.numel()).copy_(result.flatten())


def register() -> None:
    """Makes Inductor lower the operators so."""
    setattr(extern_kernels, NAME, few_tokens)
    for op, lower in ((gpu.product, _lower_product), (gpu.together, _lower_together)):
        register_lowering(op, type_promotion_kind=None)(lower)


def _lower_product(x: Any, R: Any, L: Any, bias: Any, gate: Any, activation: str) -> Any:
    results = _emitted(False, x, [R], [L], [bias], gate, activation)
    return _fallback(gpu.product)(x, R, L, bias, gate, activation) if results is None else results[0]


def _lower_together(x: Any, R: list[Any], L: list[Any], biases: list[Any], gated: str | None) -> Any:
    results = _emitted(True, x, R, L, biases, None, gated)
    return _fallback(gpu.together)(x, R, L, biases, gated) if results is None else results


def _fallback(op: Any) -> Callable[..., Any]:
    return fallback_handler(op, add_to_fallback_set=False)


def _emitted(
    together: bool, x: Any, R: list[Any], L: list[Any], biases: list[Any], gate: Any, activation: str | None
) -> list[Any] | None:
    """Each result (tokens, rows), as Inductor has it; None where the operator itself does as well."""
    extra = [operand for operand in (*biases, gate) if operand is not None]
    sizes = [operand.get_size() for operand in (x, *R, *L, *extra)]
    if V.graph.cpp_wrapper or not all(isinstance(size, (int, sympy.Integer)) for shape in sizes for size in shape):
        return None
    shapes = [tuple(int(size) for size in shape) for shape in sizes]
    (tokens, _), count, device, dtype = shapes[0], len(R), x.get_device(), x.get_dtype()
    if not (0 < tokens <= FEW_TOKENS and count <= TOGETHER and gpu.computes(dtype)):
        return None
    known = Products(
        together,
        tokens,
        tuple(shapes[1 : 1 + count]),
        tuple(shapes[1 + count : 1 + 2 * count]),
        tuple(bias is not None for bias in biases),
        gate is not None,
        activation,
        str(dtype).removeprefix("torch."),
        str(device),
    )
    products = repr(tuple(known))
    if prepared(products) is None:
        return None
    operands = [ir.ExternKernel.require_contiguous(operand) for operand in (x, *R, *L, *extra)]
    layout = ir.FixedLayout(device, dtype, [known.starts[-1]], [1])
    call = ir.ExternKernelOut(
        layout, operands, kwargs={"products": products}, python_kernel_name=f"extern_kernels.{NAME}"
    )
    memory, view = ir.TensorBox.create(call), lowerings[torch.ops.aten.as_strided.default]
    return [
        view(memory, [tokens, rows], [rows, 1], start) for rows, start in zip(known.rows, known.starts, strict=False)
    ]
