"""act(monarch_bmm(x, ...))  ->  monarch_bmm(x, ..., activation=act);  act(g) * monarch_bmm(...)  ->  ... gate=g

Whether a kernel's epilogue computes the activation is the operator's decision.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

PRODUCTS = (torch.ops.monarch_fx.monarch_bmm, torch.ops.monarch_fx.monarch_bmm.default)
PRODUCTS_OF_TWO = (operator.mul, torch.mul, torch.ops.aten.mul.Tensor)
IN_PLACE = (  # what ``x += y`` and its like are in a graph
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
)
NAMES = {
    F.gelu: "gelu",
    torch.ops.aten.gelu.default: "gelu",
    F.silu: "silu",
    torch.ops.aten.silu.default: "silu",
    F.relu: "relu",
    torch.relu: "relu",
    torch.ops.aten.relu.default: "relu",
}


def fuse_activations(graph: fx.Graph) -> None:
    """Moves activations, and the multiplication of a gated MLP, into the products whose results they take."""
    for fuse in (_fuse_gate, _fuse_activation):  # a gate takes its activation along
        for node in list(graph.nodes):
            if is_product(node) and is_plain(node) and len(node.users) == 1:
                fuse(graph, node, *node.users)


def is_product(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in PRODUCTS


def is_plain(node: fx.Node) -> bool:
    """Whether a product has neither activation nor gate."""
    return node.kwargs.get("activation", "none") == "none" and node.kwargs.get("gate") is None


def may_change(node: fx.Node) -> bool:
    """Whether a tensor, or a mode such as autocast, may be another one behind the node than before it."""
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.endswith("_") or node.target in IN_PLACE or isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    in_place = node.kwargs.get("inplace") or node.kwargs.get("out") or any(value is True for value in node.args)
    return bool(in_place) or node.is_impure()


def activation_of(node: fx.Node) -> tuple[str, Any]:
    """The name of an activation and what it is applied to; ("", None) for any other node."""
    name = NAMES.get(node.target, "") if node.op == "call_function" else ""
    if not name or not node.args:
        return "", None
    if node.kwargs.get("inplace") or (len(node.args) > 1 and name != "gelu"):
        return "", None
    approximate = node.kwargs.get("approximate", "none")
    return ("gelu_tanh" if approximate == "tanh" else name), node.args[0]


def _fuse_activation(graph: fx.Graph, product: fx.Node, user: fx.Node) -> None:
    activation, of = activation_of(user)
    if of is product:
        _fuse(graph, product, user, activation=activation)


def _fuse_gate(graph: fx.Graph, product: fx.Node, user: fx.Node) -> None:
    """``user`` multiplies the product by something: by an activation that was computed before the product?"""
    if user.target not in PRODUCTS_OF_TWO or user.kwargs:
        return
    factors = [factor for factor in user.args if factor is not product]
    if len(user.args) != 2 or len(factors) != 1 or not isinstance(factors[0], fx.Node):
        return
    active = factors[0]
    activation, gate = activation_of(active)
    if not isinstance(gate, fx.Node) or len(active.users) != 1 or not active < product or not _alike(gate, product):
        return
    between = list(graph.nodes)
    between = between[between.index(active) : between.index(product)]
    if any(may_change(node) for node in between):  # the gate is read later than the activation was
        return
    _fuse(graph, product, user, activation=activation, gate=gate)
    graph.erase_node(active)


def _fuse(graph: fx.Graph, product: fx.Node, user: fx.Node, **options: Any) -> None:
    """One node with ``options`` in the place of the product and of ``user``, its only reader."""
    assert callable(product.target)
    with graph.inserting_before(product):
        fused = graph.call_function(product.target, product.args, {**product.kwargs, **options})
    fused.meta.update(user.meta)
    user.replace_all_uses_with(fused)
    graph.erase_node(user)
    graph.erase_node(product)


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes are known to have the same shape and dtype."""
    a, b = (node.meta.get("example_value", node.meta.get("val")) for node in (one, other))
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype
