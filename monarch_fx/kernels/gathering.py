"""y1 = monarch_bmm(x, ...); y2 = monarch_bmm(x, ...)  ->  y1, y2 = monarch_together(x, ...)

The queries, keys and values of an attention; the two products of a gated MLP. Whether kernels run them together is the
operator's decision.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from monarch_fx.kernels.choice import TOGETHER
from monarch_fx.kernels.fusion import is_plain, is_product, may_change


def gather_products(graph: fx.Graph) -> None:
    """One node, where the first one stands, for products of the same x that follow each other.

    Between them is no other product, so that no result has to be kept for long, and nothing that may change a tensor.
    """
    group: list[fx.Node] = []
    for node in list(graph.nodes):
        if is_product(node):
            gate = node.kwargs.get("gate")
            if gate in group and list(gate.users) == [node] and _joins(node, gate):
                group.remove(gate)
                _replace(graph, group)
                _replace(graph, [gate, node])
                group = []
            elif is_plain(node) and 0 < len(group) < TOGETHER and _joins(node, group[0]):
                group.append(node)
            else:
                _replace(graph, group)
                group = [node] if is_plain(node) and _operands(node) else []
        elif may_change(node):
            _replace(graph, group)
            group = []
    _replace(graph, group)


def _operands(product: fx.Node) -> list[Any] | None:
    """x, R, L, bias; None where the product has more than these, and where the grid pads its matrix."""
    if (
        product.kwargs.get("out_features") is not None
        or product.kwargs.get("recompute")
        or not 3 <= len(product.args) <= 4
    ):
        return None
    return [*product.args, product.kwargs.get("bias")][:4]


def _joins(product: fx.Node, first: fx.Node) -> bool:
    """Whether the product reads the same x, and could stand where ``first`` does."""
    operands = _operands(product)
    if operands is None or operands[0] is not first.args[0]:
        return False
    later = [operand for operand in operands if isinstance(operand, fx.Node) and not operand < first]
    return all(operand.op == "get_attr" for operand in later)


def _replace(graph: fx.Graph, group: list[fx.Node]) -> None:
    """One node for the products of the group; the last one may have the first one as its gate."""
    if len(group) < 2:
        return
    first, last = group[0], group[-1]
    is_gated = last.kwargs.get("gate") is not None
    x, R, L, bias = ([*column] for column in zip(*map(_operands, group), strict=True))
    for operand in (*R, *L, *bias):
        if isinstance(operand, fx.Node) and not operand < first:
            first.prepend(operand)
    with graph.inserting_before(first):
        together = graph.call_function(
            torch.ops.monarch_fx.monarch_together.default,
            (x[0], R, L, bias),
            {"gated": last.kwargs["activation"]} if is_gated else {},
        )
        for i, product in enumerate([last] if is_gated else group):
            result = graph.call_function(operator.getitem, (together, i))
            result.meta.update(product.meta)
            product.replace_all_uses_with(result)
    for product in reversed(group):
        graph.erase_node(product)
