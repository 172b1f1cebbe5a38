"""A captured graph as text, one line a node."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from monarch_fx.passes.capture import Captured, value_of
from monarch_fx.rules import op_name


def listing(captured: Captured) -> list[str]:
    """One line a node: name, operation, operands, shape; a ``monarch_bmm`` shows its weight and its structure."""
    symbols = ", ".join(f"{symbol} = {name}" for symbol, name in captured.symbol_names.items())
    lines = [f"# {symbols}"] if symbols else []
    for graph in captured.graphs:
        for node in graph.nodes:
            if node in captured.parameters or node in captured.buffers or _checks_only(node):
                continue
            if node.op == "output":
                lines.append(f"return {_operands(node, captured)}")
                continue
            shown = (
                f"{node.name} = {_call(node)}({_operands(node, captured)})" if node.op != "placeholder" else node.name
            )
            note = _structure(node)
            shape = _shape(node)
            lines.append(f"{shown}{shape}{note}")
    return lines


def _checks_only(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node.target).startswith("_assert")


def _call(node: fx.Node) -> str:
    return op_name(node.target).removeprefix("monarch_fx::")


def _operands(node: fx.Node, captured: Captured) -> str:
    name = op_name(node.target)
    if name == "monarch_fx::monarch_bmm":
        owner = _owner(node, captured)
        bias = node.args[3] if len(node.args) > 3 else None
        shown = [str(node.args[0]), owner] + ([_operand(bias, captured)] if bias is not None else [])
        return ", ".join(shown)
    args = [_operand(a, captured) for a in node.args]
    return ", ".join(args + [f"{key}={_operand(a, captured)}" for key, a in node.kwargs.items()])


def _operand(value: Any, captured: Captured) -> str:
    if isinstance(value, fx.Node):
        return captured.parameters.get(value, captured.buffers.get(value, value.name))
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_operand(item, captured) for item in value) + "]"
    return repr(value) if isinstance(value, str) else str(value)


def _owner(node: fx.Node, captured: Captured) -> str:
    factor = next((captured.parameters[a] for a in node.all_input_nodes if a in captured.parameters), "?")
    for a in node.args[1:3]:
        if isinstance(a, fx.Node) and a in captured.parameters:
            factor = captured.parameters[a]
            break
    return factor.rpartition(".")[0]


def _shape(node: fx.Node) -> str:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return ""
    return f"  # ({', '.join(str(n) for n in value.shape)})"


def _structure(node: fx.Node) -> str:
    if op_name(node.target) not in ("monarch_fx::monarch_bmm", "monarch_fx::monarch_grouped_mm"):
        return ""
    factors = [value_of(a) for a in node.args[1:3]]
    if any(factor is None for factor in factors):  # traced without shapes
        return ""
    R, L = (factor.shape for factor in factors)
    inside = f"{R[-4] * R[-1]} -> {L[-4] * L[-1]}, grid {R[-3]}x{R[-4]}, rank {R[-2]}"
    batch = R[0] if len(R) == 5 else 1
    before, after = batch * R[-4] * R[-1] * L[-4] * L[-1], R.numel() + L.numel()
    return f", {inside}, {before:,} -> {after:,} parameters"
