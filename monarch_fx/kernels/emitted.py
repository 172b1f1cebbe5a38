"""What the calls run that Inductor emits (``lowering``): launches worked out once, into memory that it allocates.

An operator looks at its arguments, finds the launches for these sizes and allocates results and intermediates, anew in
each call. Where kernels are launched one by one, that takes the host longer than many of them run; of a compiled graph
all is known beforehand, and stands as text in the call.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monarch_fx.kernels import gpu, halves
from monarch_fx.kernels.few import filled, launches_alone, launches_together
from monarch_fx.kernels.launch import ALIGNED, REMEMBERED, Launch, SplitLaunch, first_launch, second_launch


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

    first: Launch | SplitLaunch
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
        found = launches_alone(known.tokens, strides, known.R[0], known.L[0], kinds, dtype, device, True)
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
        except torch.OutOfMemoryError:
            raise
        except halves.failures():
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


class Half(NamedTuple):
    """What is known of one half of a product of many tokens; stands as text in what Inductor writes.

    Attributes:
        is_first: x and R into the intermediate; else the intermediate and L into results.
        tokens: Rows.
        factor: Shape of R or L.
        strides: Of the intermediate.
        kinds: Of a second half: whether it has a bias, its activation, whether it has a gate.
        dtype: Its name in torch.
        device: Its name.
    """

    is_first: bool
    tokens: int
    factor: tuple[int, ...]
    strides: tuple[int, ...]
    kinds: tuple[bool, str, bool]
    dtype: str
    device: str


@functools.lru_cache(REMEMBERED)
def prepared_half(half: str) -> tuple[Launch | SplitLaunch, Callable[[Sequence[Any]], Sequence[Any]]] | None:
    """Of a half as text, the launch, and its operands among x or the intermediate, factor, bias, gate, what is written.

    None where no kernel takes it.
    """
    known = Half(*ast.literal_eval(half))
    blocks, _, _, size = known.factor
    operands = getattr(torch, known.dtype), torch.device(known.device), True
    if known.is_first:
        first = first_launch(known.tokens, blocks * size, known.factor, known.strides, *operands)
        return None if first is None else (first, operator.itemgetter(0, 1, 2))
    strides = known.strides, blocks * size, blocks * size
    has_bias, _, gated = known.kinds
    end = 2 + has_bias + gated
    of_second = operator.itemgetter(0, 1, end, 2 if has_bias else end, end - 1 if gated else end)
    second = second_launch(known.tokens, known.factor, strides, known.kinds, *operands)
    return None if second is None else (second, of_second)


def half_of_many_tokens(*operands: Tensor, half: str, out: Tensor) -> None:
    """What the emitted call runs: x and R, or the intermediate, L, bias and gate where there are; into ``out``."""
    tensors = [*operands, out]
    if out.is_cuda and half not in _failed:
        prepared = prepared_half(half)
        addresses = [tensor.data_ptr() for tensor in tensors]
        if prepared is not None and functools.reduce(operator.or_, addresses) % ALIGNED == 0:
            launch, of_launch = prepared
            try:
                launch(of_launch(tensors), of_launch(addresses))
                return
            except torch.OutOfMemoryError:
                raise
            except halves.failures():
                _failed.add(half)  # the operator meets the same, and says so
    known = Half(*ast.literal_eval(half))
    if known.is_first:
        out.copy_(halves.first_half(*operands))
        return
    rest = iter(operands)
    t, L = next(rest), next(rest)
    has_bias, activation, gated = known.kinds
    bias, gate = next(rest) if has_bias else None, next(rest) if gated else None
    halves.second_half(t, L, out, bias, gate, activation)
