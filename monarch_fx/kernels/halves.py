"""Both halves of a product, and what runs each of them: a Triton kernel, or a library.

The first half's is cuBLAS where one row or column of blocks leaves nothing to transpose, or for two large rows; the
second one's where tokens are many and the result gets neither a bias nor an activation. On a CPU, where all of this is
tested, and where a kernel fails, plain batched products do the same.
"""

from __future__ import annotations

import functools
import importlib
import math
import operator
import subprocess
import types
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monarch_fx.errors import MonarchWarning
from monarch_fx.kernels import reference
from monarch_fx.kernels.choice import FEW_TOKENS, fused_tokens, is_own_second, library_tokens

HALF = (torch.bfloat16, torch.float16)


def uses_tf32() -> bool:
    """Whether PyTorch multiplies float32 matrices in TF32 on a GPU: ``torch.set_float32_matmul_precision("high")``."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def computes(dtype: torch.dtype) -> bool:
    """Whether there are kernels for it."""
    return dtype in HALF or (dtype == torch.float32 and uses_tf32())


@functools.cache
def launchers() -> Any:
    """What launches the Triton kernels, None where there is no Triton. Imported here alone: CPU users need none."""
    try:
        modules = {name: importlib.import_module(f"monarch_fx.kernels.{name}") for name in ("few", "launch")}
    except ImportError as error:
        warnings.warn(f"Monarch products run on slower kernels, without Triton: {error}.", MonarchWarning, stacklevel=2)
        return None
    importlib.import_module("monarch_fx.kernels.inductor").install()
    importlib.import_module("monarch_fx.kernels.lowering").register()
    return types.SimpleNamespace(**modules)


def both_halves(
    x: Tensor, R: Tensor, L: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str
) -> Tensor:
    """Writes ``y`` (tokens, n_out * s), and gives the intermediate (n_out, tokens, n_in * rank)."""
    t, kinds = first_half(x, R), (bias is not None, activation, gate is not None)
    if len(x) == 0:
        return t
    if is_second_kernel(x.dtype, x.device, len(x), R.shape, L.shape, *kinds):
        second_half(t, L, y, bias, gate, activation)
    else:
        second_half_by_library(t, L, y, bias, gate, activation)
    return t


def first_half(x: Tensor, R: Tensor) -> Tensor:
    """The intermediate (n_out, tokens, n_in * rank)."""
    n_in, n_out, rank, p = R.shape
    tokens, t = len(x), intermediate(x, R)
    by_library = tokens >= library_tokens(n_in, n_out, rank, p, units(x.device), x.dtype.itemsize)
    if tokens == 0 or (not by_library and ran("the first half", "launch.first_half", x, R, t)):
        return t
    if n_in == 1:
        torch.mm(x, R.flatten(0, 2).mT, out=t.transpose(0, 1).flatten(1))
        return t
    first_half_by_rows(x, R, out=t)
    return t


def first_half_by_rows(x: Tensor, R: Tensor, *, out: Tensor) -> None:
    """Into ``out`` (n_out, tokens, n_in * rank), one call of a library for each row of blocks."""
    blocks = blocks_of(x, len(R))
    for row, factors in zip(out, R.unbind(1), strict=True):
        torch.bmm(blocks, factors.mT, out=blocks_of(row, len(R)))


def second_half(t: Tensor, L: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str) -> None:
    """Writes ``y`` (tokens, n_out * s) by a Triton kernel, or where there is none by a library."""
    if not ran("the second half", "launch.second_half", t, L, y, bias, gate, activation):
        second_half_by_library(t, L, y, bias, gate, activation)


def second_half_by_library(
    t: Tensor, L: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str
) -> None:
    """Writes ``y`` (tokens, n_out * s)."""
    n_out = L.shape[0]
    if n_out == 1 and bias is not None:
        torch.addmm(bias, t[0], L.flatten(0, 2), out=y)
    else:
        torch.bmm(t, L.flatten(1, 2), out=blocks_of(y, n_out))
        if bias is not None:
            y += bias
    if gate is not None or activation != "none":
        y.copy_(reference.activated(y, gate, activation))


def one_kernel_tokens(dtype: torch.dtype, device: torch.device, R: Sequence[int], L: Sequence[int]) -> float:
    """From how many tokens one kernel runs the whole product with factors of these sizes; infinity: never."""
    triton = launchers() if device.type == "cuda" and dtype in HALF else None
    n_in, n_out, rank, p = R
    return math.inf if triton is None else fused_tokens(n_in, n_out, rank, p, L[3], units(device))


def is_second_kernel(
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    R: Sequence[int],
    L: Sequence[int],
    has_bias: bool,
    activation: str,
    has_gate: bool,
) -> bool:
    """Whether the second half is a Triton kernel: where a library's would take a pass more, or longer."""
    n_in, n_out, rank, p = R
    if tokens <= FEW_TOKENS or dtype not in HALF:
        return tokens <= FEW_TOKENS
    is_plain = not has_gate and activation == "none" and (not has_bias or n_out == 1)
    if not (is_plain and _starts_early(device)):
        return not is_plain
    after_library = tokens >= library_tokens(n_in, n_out, rank, p, units(device), dtype.itemsize)
    return is_own_second(tokens, L[3], n_in * rank, n_out, units(device), after_library=after_library)


def _starts_early(device: torch.device) -> bool:
    """Whether a kernel can start before the one in front of it has ended; on a CPU as on such a GPU."""
    triton = launchers() if device.type == "cuda" else None
    return triton is None or bool(triton.launch.has_hopper_features(device))


def units(device: torch.device) -> int:
    """Multiprocessors of a GPU that these kernels run on, else 1."""
    triton = launchers() if device.type == "cuda" else None
    return 1 if triton is None else triton.launch.units(device)


_failed: set[tuple[Any, ...]] = set()


def ran(what: str, launcher: str, *operands: Any) -> bool:
    """Whether a Triton kernel has run: not on a CPU, in other dtypes, or without Triton.

    Where it can't be compiled, that is said once for these sizes. Running out of memory is the caller's to know.
    """
    x, factors = operands[0], operands[1]
    if not x.is_cuda or not computes(x.dtype) or launchers() is None:
        return False
    if _failed and _case(what, x, factors) in _failed:
        return False
    run, index = operator.attrgetter(launcher)(launchers()), x.get_device()
    try:
        if index == torch.cuda.current_device():
            return bool(run(*operands))
        with torch.cuda.device(index):  # Triton launches on the current device, whatever the tensors are on
            return bool(run(*operands))
    except torch.OutOfMemoryError:
        raise
    except failures() as error:
        _failed.add(_case(what, x, factors))
        warnings.warn(
            f"The Triton kernel for {what} of a Monarch product failed on {tuple(x.shape)} {x.dtype}, factor sizes "
            f"{_sizes(factors)}: {type(error).__name__}: {str(error)[:500]}. Batched products run instead, slower.",
            MonarchWarning,
            stacklevel=2,
        )
        return False


@functools.cache
def failures() -> tuple[type[Exception], ...]:
    """What compiling and launching a kernel raises: Triton, its compilers, a cache that can't be written."""
    triton_error = importlib.import_module("triton.errors").TritonError
    return triton_error, RuntimeError, OSError, subprocess.SubprocessError


def _case(what: str, x: Tensor, factors: Tensor | list[Tensor]) -> tuple[Any, ...]:
    return what, _sizes(factors), x.dtype, x.device


def _sizes(factors: Tensor | list[Tensor]) -> str:
    return ", ".join(str(tuple(factor.shape)) for factor in (factors if isinstance(factors, list) else [factors]))


def rows_of(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def intermediate(x: Tensor, R: Tensor) -> Tensor:
    (n_in, n_out, rank, _), tokens = R.shape, x.shape[0]
    if n_in == 1:
        return x.new_empty(tokens, n_out, rank).transpose(0, 1)
    return x.new_empty(n_out, tokens, n_in * rank)


def blocks_of(x: Tensor, count: int) -> Tensor:
    """(tokens, count * n) as (count, tokens, n)."""
    return x.view(x.shape[0], count, x.shape[1] // count).transpose(0, 1)  # unflatten takes three times as long
