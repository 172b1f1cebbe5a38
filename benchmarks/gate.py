"""Nothing is timed before its outputs are right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import monarch_fx as mfx

FLOAT64_TOLERANCE = 1e-10
FLOAT32_TOLERANCE = 1e-4
BFLOAT16_ROUNDING = 2.0**-8


class GateError(AssertionError):
    """A rewritten model's outputs are wrong: its speed means nothing."""


def check_rewritten(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """The rewritten ``model`` and its own ``to_dense`` agree in float64.

    Raises:
        GateError: They don't, by their relative difference in Frobenius norm.
    """
    exact = copy.deepcopy(model).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    _compare("the rewritten model and to_dense of it", exact, mfx.to_dense(exact), inputs, FLOAT64_TOLERANCE)


def check_compiled(compiled: Callable[..., Any], eager: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """The compiled model and the same model run eagerly agree in float32.

    Raises:
        GateError: They don't, by their relative difference in Frobenius norm.
    """
    _compare("the compiled model and the eager one", compiled, eager, inputs, FLOAT32_TOLERANCE)


def check_bfloat16(name: str, result: torch.Tensor, expected: torch.Tensor, roundings: int) -> None:
    """What a compiled model gives agrees with its eager dense equivalent, both in bfloat16.

    Args:
        name: Of the model.
        result: Of the compiled model.
        expected: Of ``to_dense`` of it, run eagerly.
        roundings: How many operations, one after the other, round their results: independent errors add up as the root.

    Raises:
        GateError: They don't, by their relative difference in Frobenius norm.
    """
    tolerance = BFLOAT16_ROUNDING * roundings**0.5
    _agree(f"{name}: the compiled model and to_dense of it, eager,", result.float(), expected.float(), tolerance)


def check_exact(what: str, result: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """``result`` is as near to ``exact`` (float64) as roundings allow.

    Raises:
        GateError: It isn't, by its relative error in Frobenius norm.
    """
    error = ((result.double() - exact).norm() / exact.norm()).item()
    if not error < tolerance:
        raise GateError(f"{what} is wrong by {error:.1e}: its speed means nothing.")


def _compare(
    what: str, one: Callable[..., Any], other: Callable[..., Any], inputs: dict[str, torch.Tensor], tolerance: float
) -> None:
    with torch.no_grad():
        _agree(what, _tensor(one(**inputs)), _tensor(other(**inputs)), tolerance)


def _agree(what: str, a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    difference = ((a - b).norm() / b.norm()).item()
    if not difference <= tolerance:
        raise GateError(f"Outputs of {what} differ by {difference:.1e}, more than {tolerance:.1e}.")


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
