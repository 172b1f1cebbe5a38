"""Any model -> FX graphs in which every parameter is a named node.

Nothing is computed and no weight is copied: the graph is exported under fake tensors. Where export can't follow (a
decision on data), dynamo's graphs are taken from a real run; without any inputs, a symbolic trace, or at least the
known layer types, tell the products.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from monarch_fx.errors import CaptureError, ExampleInputsError
from monarch_fx.passes.inputs import Inputs


@dataclass
class Captured:
    """The graphs of one run.

    Attributes:
        graphs: One where export worked; several where dynamo had to break.
        parameters: Nodes that are parameters, with their qualified names.
        buffers: Nodes that are buffers or constants.
        sizes: The symbols of the input sizes, with their values in the captured run.
        symbol_names: The same symbols, as "input_ids.0".
        how: How the graphs were captured, in words.
        given: Whether the inputs were the user's.
    """

    graphs: list[fx.Graph]
    parameters: dict[fx.Node, str]
    buffers: dict[fx.Node, str]
    how: str
    given: bool
    sizes: dict[sympy.Symbol, int] = field(default_factory=dict)
    symbol_names: dict[sympy.Symbol, str] = field(default_factory=dict)


def capture(model: nn.Module, inputs: Inputs | None) -> Captured:
    """Captures ``model``, which is left as it was.

    Raises:
        ExampleInputsError: The model itself can't run on the inputs.
        CaptureError: No front end could capture it.
    """
    if inputs is None:
        with _quiet(model):
            try:
                return _symbolic_trace(model)
            except Exception as error:  # any model code may fail under proxies
                return _known_layers(model, f"without inputs, and {type(error).__name__} under symbolic tracing")
    inputs = inputs.on(_device(model))
    failures = []
    with _quiet(model):
        for front_end in (_export_dynamic, _export_static, _dynamo):
            try:
                return front_end(model, inputs)
            except Exception as error:  # a front end fails in its own ways; the next one is tried
                failures.append(f"{front_end.__name__[1:]}: {_first_line(error)}")
        if not inputs.given:
            return _known_layers(model, "its own dummy inputs could not be captured")
        try:
            model(*inputs.args, **inputs.kwargs)
        except Exception as error:
            raise ExampleInputsError(
                f"{type(model).__name__} can't run on example_inputs: {type(error).__name__}: {_first_line(error)}"
            ) from error
    raise CaptureError(f"No graph of {type(model).__name__} could be captured. " + "; ".join(failures))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _device(model: nn.Module) -> torch.device | None:
    first = next(model.parameters(), None)
    return None if first is None else first.device


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no fused attention, no third-party warnings; everything is put back after."""
    training = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    exporter = logging.getLogger("torch.export")
    level = exporter.level
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        exporter.setLevel(logging.ERROR)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in training.items():
            module.training = mode


def _export_dynamic(model: nn.Module, inputs: Inputs) -> Captured:
    def spec(leaf: Any) -> Any:
        return dict.fromkeys(range(leaf.ndim), torch.export.Dim.AUTO) if isinstance(leaf, torch.Tensor) else None

    shapes: Any = pytree.tree_map(spec, inputs.kwargs if not inputs.args else inputs.args)
    if inputs.args and inputs.kwargs:
        shapes = _named_specs(model, inputs, spec)
    program = torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False)
    return captured_program(program, "torch.export with symbolic sizes", inputs.given)


def _named_specs(model: nn.Module, inputs: Inputs, spec: Any) -> dict[str, Any]:
    import inspect

    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    return {name: pytree.tree_map(spec, value) for name, value in bound.arguments.items()}


def _export_static(model: nn.Module, inputs: Inputs) -> Captured:
    program = torch.export.export(model, inputs.args, inputs.kwargs, strict=False)
    return captured_program(program, "torch.export with the sizes of the inputs", inputs.given)


def captured_program(program: torch.export.ExportedProgram, how: str, given: bool) -> Captured:
    """The graph of an ``ExportedProgram``, its placeholders told apart by the signature."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    captured = Captured([program.graph], {}, {}, how, given)
    for spec in program.graph_signature.input_specs:
        node = nodes[spec.arg.name]
        if spec.kind is InputKind.PARAMETER:
            captured.parameters[node] = str(spec.target)
        elif spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            captured.buffers[node] = str(spec.target)
        else:
            _name_symbols(captured, node)
    return captured


def _name_symbols(captured: Captured, node: fx.Node) -> None:
    value = node.meta.get("val", node.meta.get("example_value"))
    for d, size in enumerate(getattr(value, "shape", ())):
        expr = size.node.expr if isinstance(size, torch.SymInt) else None
        if isinstance(expr, sympy.Symbol) and expr not in captured.symbol_names:
            captured.symbol_names[expr] = f"{node.name}.{d}"
            hint = size.node.hint
            if hint is not None:
                captured.sizes[expr] = int(hint)


def _dynamo(model: nn.Module, inputs: Inputs) -> Captured:
    names = {id(p): name for name, p in model.named_parameters()}
    buffers = {id(b): name for name, b in model.named_buffers()}
    captured = Captured([], {}, {}, "dynamo, in the graphs of a real run", inputs.given)

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        captured.graphs.append(gm.graph)
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        for node, value in zip(placeholders, example_inputs, strict=True):
            if id(value) in names:
                captured.parameters[node] = names[id(value)]
            elif id(value) in buffers:
                captured.buffers[node] = buffers[id(value)]
            else:
                _name_symbols(captured, node)
        return gm.forward

    torch._dynamo.reset()
    try:
        torch.compile(model, backend=collect, dynamic=True)(*inputs.args, **inputs.kwargs)
    finally:
        torch._dynamo.reset()
    if not captured.parameters:
        raise CaptureError("dynamo captured no parameter")
    captured.how += f" ({len(captured.graphs)} graphs)"
    return captured


class _Inliner(fx.Tracer):
    """Traces into every module, so that all weights are read in sight."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def _symbolic_trace(model: nn.Module) -> Captured:
    graph = _Inliner(param_shapes_constant=True).trace(model)
    return captured_graph(graph, model, "torch.fx.symbolic_trace without inputs")


def captured_graph(graph: fx.Graph, model: nn.Module, how: str) -> Captured:
    """The graph of a ``GraphModule``: its parameters are ``get_attr`` nodes."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    captured = Captured([graph], {}, {}, how, given=False)
    for node in graph.nodes:
        if node.op == "get_attr":
            known = captured.parameters if node.target in parameters else captured.buffers
            known[node] = str(node.target)
        elif node.op == "placeholder":
            _name_symbols(captured, node)
    return captured


def _known_layers(model: nn.Module, why: str) -> Captured:
    """A graph with one product for every layer of a known type: what is left where nothing can be run."""
    graph = fx.Graph()
    x = graph.placeholder("tokens")
    captured = Captured([graph], {}, {}, f"known layer types only ({why})", given=False)

    def weight(name: str) -> fx.Node:
        node = graph.create_node("get_attr", name)
        captured.parameters[node] = name
        return node

    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Linear) and "weight" in own:
            graph.call_function(F.linear, (x, weight(f"{prefix}weight")))
        elif type(module).__name__ == "Conv1D" and "weight" in own:  # transformers': weight (in, out)
            graph.call_function(torch.matmul, (x, weight(f"{prefix}weight")))
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and "weight" in own:
            call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[module.weight.ndim - 2]
            settings = (module.stride, module.padding, module.dilation, module.groups)
            graph.call_function(call, (x, weight(f"{prefix}weight"), None, *settings))
        elif isinstance(module, nn.MultiheadAttention):
            for name in own:
                if name.endswith("proj_weight"):
                    graph.call_function(F.linear, (x, weight(f"{prefix}{name}")))
    graph.output(x)
    return captured
