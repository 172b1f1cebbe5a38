"""The plain pass: GraphModule -> GraphModule with ``monarch_bmm`` nodes."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from monarch_fx.errors import ExampleInputsError
from monarch_fx.layers.dense_like import DenseLike, WeightView, dispatch, view_of
from monarch_fx.layers.weight import MonarchWeight
from monarch_fx.passes.candidates import CASTS
from monarch_fx.passes.capture import has_shapes
from monarch_fx.passes.inputs import Inputs
from monarch_fx.rules import op_name
from monarch_fx.views import VIEW_OPERATIONS


def program_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a GraphModule over copies of its parameters, without input guards."""
    module = program.module(check_guards=False)
    for owner in module.modules():
        for key, parameter in list(owner._parameters.items()):
            if parameter is not None:
                owner._parameters[key] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    return module


def export_again(program: torch.export.ExportedProgram, module: fx.GraphModule) -> torch.export.ExportedProgram:
    """Exports a rewritten ``program_module`` with the same inputs, sizes as free as they were."""
    assert program.example_inputs is not None
    args, kwargs = program.example_inputs
    nodes = {node.name: node for node in program.graph.nodes}
    leaves = [nodes[name].meta["val"] for name in program.graph_signature.user_inputs if isinstance(name, str)]

    def spec(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        dim = torch.export.Dim
        return {d: dim.STATIC if type(n) is int else dim.AUTO for d, n in enumerate(value.shape)}

    flat, tree = pytree.tree_flatten((args, kwargs))
    shapes = pytree.tree_unflatten([spec(v) for v in leaves[: len(flat)]], tree)
    dynamic = shapes[0] if not kwargs else {**dict(zip(_names(module), shapes[0], strict=False)), **shapes[1]}
    return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)


def _names(module: fx.GraphModule) -> list[str]:
    return [node.target for node in module.graph.nodes if node.op == "placeholder"]


READS = {"getattr", "size", "dim", "numel"}  # what a weight answers without its values, and where traces have T


class _Factors:
    """What ``dispatch`` needs of a MonarchWeight, with proxies in the place of the factors."""

    observer = None

    def __init__(self, weight: MonarchWeight, path: str, tracer: fx.proxy.GraphAppendingTracer, mode: Any) -> None:
        self.outline, self.suffix, self.own_dtype = weight.outline, weight.suffix, weight.own_dtype
        self.recompute = weight.recompute
        for name, factor in weight.named_parameters():
            proxy = fx.Proxy(tracer.graph.create_node("get_attr", f"{path}.{name}"), tracer)
            proxy.node.meta["val"] = mode.from_tensor(factor.detach())
            setattr(self, name, proxy)
        self.some_factor = getattr(self, next(name for name, _ in weight.named_parameters()))

    def to_dense_root(self) -> Any:
        raise ValueError("what reads it is no product, and the graph has only its factors")


def expose(module: fx.GraphModule, inputs: Inputs | None) -> None:
    """Writes every product with a MonarchWeight into the graph as ``monarch_bmm`` over its factors; in place.

    Nodes keep their ``meta``; new nodes get ``meta["val"]`` where their inputs have it. The graph is linted.

    Raises:
        ExampleInputsError: A product can't be written without shapes, and neither graph nor inputs have them.
    """
    if inputs is not None and not has_shapes(module.graph):
        arguments = inspect.signature(module.forward).bind(*inputs.args, **inputs.kwargs).arguments.values()
        FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*arguments)
    old = module.graph
    new = fx.Graph()
    new._codegen = old._codegen
    tracer = fx.proxy.GraphAppendingTracer(new)
    env: dict[fx.Node, Any] = {}
    mode = _fake_mode(old)
    shared: dict[str, Any] = {}

    def value(node: fx.Node) -> Any:
        return env[node]

    for node in old.nodes:
        weight = _weight_at(module, node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        if weight is not None:
            root = shared.setdefault(node.target, _Factors(weight, str(node.target), tracer, mode))
            env[node] = WeightView(root, weight.strided)
        elif node.target is operator.getitem and isinstance(args[0], tuple):
            env[node] = args[0][args[1]]
        elif op_name(node.target) == "_assert_tensor_metadata" and _reads_weight(args, kwargs):
            continue  # of a cast: of the dense parameter
        elif node.op in ("call_function", "call_method") and _reads_weight(args, kwargs):
            last = len(new.nodes)
            try:
                env[node] = _evaluate(node, args, kwargs)
            except ValueError as error:
                raise ExampleInputsError(
                    f"The product {node.name!r} of the graph can't be rewritten: {error}."
                ) from error
            _fill_meta(new, last, node)
        else:
            plain = fx.node.map_arg((node.args, node.kwargs), lambda n: getattr(env[n], "node", env[n]))
            copied = new.create_node(node.op, node.target, *plain, name=node.name, type_expr=node.type)
            copied.meta = dict(node.meta)
            env[node] = fx.Proxy(copied, tracer)
    module.graph = new
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def conceal(module: fx.GraphModule) -> None:
    """The reverse of ``expose``, for weights that become dense again: products read the parameter; in place."""
    for node in list(module.graph.nodes):
        name = op_name(node.target)
        if name in ("monarch_fx::monarch_bmm", "monarch_fx::monarch_grouped_mm"):
            with module.graph.inserting_before(node):
                dense = _dense_node(module, node, grouped=name.endswith("grouped_mm"))
            if dense is None:
                continue
            dense.meta = dict(node.meta)
            node.replace_all_uses_with(dense)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()


def _dense_node(module: fx.GraphModule, node: fx.Node, grouped: bool) -> fx.Node | None:
    """The product of a ``monarch_bmm`` node with a view of the dense parameter; None where no MonarchWeight has its
    factors (the user's own call of the operator)."""
    call = module.graph.call_function
    x, _, _, *rest = node.args
    R: Any = node.args[1]
    picks, cast, detached = None, None, False
    while R.op in ("call_function", "call_method"):  # factors that are detached, picked by an index, or cast
        name = op_name(R.target)
        detached = detached or name == "detach"
        picks = R.args[1] if name == "getitem" else picks
        cast = R.args[1] if name == "to" else cast
        R = R.args[0]
    path, _, factor = str(R.target).rpartition(".")
    weight = module.get_submodule(path) if R.op == "get_attr" else None
    if not isinstance(weight, MonarchWeight):
        return None
    piece = next(i for i in range(len(weight.views)) if factor in (f"R{weight.suffix(i)}", f"L{weight.suffix(i)}"))
    view = weight.views[piece]
    matrix = view if factor.startswith("R") else view.transposed  # the factors stand in the other order
    parameter = module.graph.get_attr(path)
    parameter = module.graph.call_method("detach", (parameter,)) if detached else parameter
    dense = call(torch.as_strided, (parameter, *matrix.strided))
    if max(len(matrix.out), len(matrix.inp), len(matrix.batch)) > 1:
        batch = (matrix.batch_size,) if matrix.batch else ()
        dense = call(torch.reshape, (dense, (*batch, matrix.out_features, matrix.in_features)))
    if picks is not None:
        dense = call(operator.getitem, (dense, picks))
    if cast is not None:
        dense = module.graph.call_method("to", (dense, cast))
    turned = call(torch.transpose, (dense, -2, -1))
    if grouped:
        return call(F.grouped_mm, (x, turned), {"offs": rest[0]})
    y = call(torch.matmul, (x, turned))
    bias = rest[0] if rest else node.kwargs.get("bias")
    return y if bias is None else call(torch.add, (y, bias))


def _weight_at(module: nn.Module, node: fx.Node) -> MonarchWeight | None:
    if node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, MonarchWeight) else None


def _reads_weight(args: Any, kwargs: Any) -> bool:
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, DenseLike))
    return any(isinstance(leaf, DenseLike) for leaf in leaves)


def _evaluate(node: fx.Node, args: Any, kwargs: Any) -> Any:
    name = op_name(node.target)
    if name in VIEW_OPERATIONS and isinstance(args[0], DenseLike):
        plain = {key: a for key, a in kwargs.items() if key != "memory_format"}
        return view_of(args[0], name, *args[1:], **plain)
    if name in READS and isinstance(args[0], DenseLike):
        return getattr(*args) if name == "getattr" else getattr(args[0], name)(*args[1:])
    if name in CASTS and isinstance(args[0], DenseLike):
        return _cast(node, name, args[0], (*args[1:], *kwargs.values()))
    return dispatch(node.target, args, kwargs)


def _cast(node: fx.Node, name: str, operand: DenseLike, others: Sequence[Any]) -> Any:
    """A weight as the cast ``node`` gives it: by the captured result, or by the dtype that the graph names."""
    if "val" in node.meta:
        return operand.to(node.meta["val"].dtype)
    if any(isinstance(a, fx.Proxy) for a in others):
        raise ValueError(f"which dtype {name!r} gives its weight is known only when it runs: export the model instead")
    dtypes = [a for a in others if isinstance(a, torch.dtype)]
    return operand.to(*dtypes) if name in ("to", "_to_copy", "type") else getattr(operand, name)()


def _fake_mode(graph: fx.Graph) -> Any:
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def _fill_meta(graph: fx.Graph, start: int, origin: fx.Node) -> None:
    """Values, stack traces and module stacks for nodes that a rewrite made."""
    made = list(graph.nodes)[start:]
    for node in made:
        for key in ("stack_trace", "nn_module_stack"):
            if key in origin.meta:
                node.meta[key] = origin.meta[key]
        known = all("val" in a.meta for a in node.all_input_nodes)
        if node.op in ("call_function", "call_method") and "val" not in node.meta and known:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with torch.no_grad():
                if node.op == "call_function":
                    node.meta["val"] = node.target(*args, **kwargs)
                else:
                    node.meta["val"] = getattr(args[0], node.target)(*args[1:], **kwargs)
