"""Any model -> FX graphs in which every parameter is a named node.

A GraphModule has one. Of other models nothing is computed and no weight is copied: the graph is exported under fake
tensors. Where export can't follow (a decision on data), a real run is recorded; without any inputs, a symbolic trace,
or at least the known layer types, tell the products.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from monarch_fx.errors import CaptureError
from monarch_fx.layers.attention import multi_head_attention
from monarch_fx.passes.inputs import Inputs, first_line
from monarch_fx.passes.modes import evaluating
from monarch_fx.rules import op_name

IMAGE_DIMENSIONS = 4  # from which only the first one, the batch, is symbolic


@dataclass
class Captured:
    """The graphs of one run.

    Attributes:
        graphs: In the order in which they run.
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
    own = _own_graph(model, inputs)
    if own is not None:
        return own
    if inputs is None:
        with _quiet(model):
            try:
                return _symbolic_trace(model)
            except Exception as error:  # any model code may fail under proxies
                return _known_layers(model, f"without inputs, and {type(error).__name__} under symbolic tracing")
    inputs = inputs.on(_device(model))
    failures = []
    with _quiet(model):
        for front_end in (_export_dynamic, _export_static, _recorded_run):
            try:
                return front_end(model, inputs)
            except Exception as error:  # a front end fails in its own ways; the next one is tried
                failures.append(f"{front_end.__name__[1:]}: {first_line(error)}")
        if not inputs.given:
            return _known_layers(model, f"{inputs.name} could not be captured")
        inputs.into(model)
    raise CaptureError(f"No graph of {type(model).__name__} could be captured. " + "; ".join(failures))


def value_of(node: Any) -> Any:
    """A node's (fake) value; None where none was captured. Dynamo's graphs have it under a name of their own."""
    return node.meta.get("val", node.meta.get("example_value"))


def _device(model: nn.Module) -> torch.device | None:
    first = next(model.parameters(), None)
    return None if first is None else first.device


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no fused attention, no third-party warnings; everything is put back after."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    disabled = logging.root.manager.disable
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        logging.disable(logging.CRITICAL)
        with evaluating(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _own_graph(model: nn.Module, inputs: Inputs | None) -> Captured | None:
    """That of a GraphModule whose products stand in it and whose shapes are known."""
    if not isinstance(model, fx.GraphModule):
        return None
    called = [model.get_submodule(node.target) for node in model.graph.nodes if node.op == "call_module"]
    if any(True for module in called for _ in module.parameters()):
        return None
    if inputs is not None and not has_shapes(model.graph):
        return None
    return captured_graph(model.graph, model, "the GraphModule's own graph")


def has_shapes(graph: fx.Graph) -> bool:
    """Whether the graph's nodes hold (fake) values."""
    return all(value_of(node) is not None for node in graph.nodes if node.op == "placeholder")


def _export_dynamic(model: nn.Module, inputs: Inputs) -> Captured:
    def spec(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        # Feature maps of any height and width take minutes to export (Swin); images seldom change theirs.
        return dict.fromkeys(range(leaf.ndim) if leaf.ndim < IMAGE_DIMENSIONS else (0,), torch.export.Dim.AUTO)

    shapes: Any = pytree.tree_map(spec, inputs.kwargs if not inputs.args else inputs.args)
    if inputs.args and inputs.kwargs:
        shapes = _named_specs(model, inputs, spec)
    return _export(model, inputs, shapes, "torch.export with symbolic sizes")


def _named_specs(model: nn.Module, inputs: Inputs, spec: Any) -> dict[str, Any]:
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    return {name: pytree.tree_map(spec, value) for name, value in bound.arguments.items()}


def _export_static(model: nn.Module, inputs: Inputs) -> Captured:
    return _export(model, inputs, None, "torch.export with the sizes of the inputs")


def _export(model: nn.Module, inputs: Inputs, shapes: Any, how: str) -> Captured:
    with contextlib.redirect_stderr(io.StringIO()):  # a failing export prints its whole graph
        program = torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False)
    return captured_program(program, how, inputs.given)


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
    value = value_of(node)
    for d, size in enumerate(getattr(value, "shape", ())):
        expr = size.node.expr if isinstance(size, torch.SymInt) else None
        if isinstance(expr, sympy.Symbol) and expr not in captured.symbol_names:
            captured.symbol_names[expr] = f"{node.name}.{d}"
            hint = size.node.hint
            if hint is not None:
                captured.sizes[expr] = int(hint)


def _recorded_run(model: nn.Module, inputs: Inputs) -> Captured:
    recorder = _Recorder(model)
    with recorder:
        model(*inputs.args, **inputs.kwargs)
    captured = recorder.captured
    captured.given = inputs.given
    return captured


class _Recorder(TorchFunctionMode):
    """Runs the model for real and writes down every call that reads a parameter; control flow may do as it likes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.graph = fx.Graph()
        self.captured = Captured([self.graph], {}, {}, "recorded in a real run (export could not follow)", given=True)
        # tensors made of parameters alone; kept alive, so that their ids stay theirs
        self.static: dict[int, tuple[torch.Tensor, fx.Node]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:  # its products are looked for one by one
                return multi_head_attention(*args, **kwargs)
        value = func(*args, **kwargs)
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        results = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        if results and any(id(t) in self.static or id(t) in self.names for t in operands):
            node = self.graph.call_function(func, *pytree.tree_map(self._argument, (args, kwargs)))
            picked = op_name(func) == "getitem" and id(args[0]) in self.static  # by an index made at run time
            if picked or all(id(t) in self.static or id(t) in self.names for t in operands):
                self._remember(value, node)
        return value

    def _argument(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in self.static:
            return self.static[id(leaf)][1]
        node = self.graph.create_node("get_attr" if id(leaf) in self.names else "placeholder", "x")
        node.meta["val"] = _shape_only(leaf)
        if id(leaf) in self.names:
            self.captured.parameters[node] = self.names[id(leaf)]
            self.static[id(leaf)] = leaf, node
        return node

    def _remember(self, value: Any, node: fx.Node) -> None:
        if isinstance(value, torch.Tensor):
            node.meta["val"] = _shape_only(value)
            self.static[id(value)] = value, node
        elif isinstance(value, (tuple, list)):
            for i, item in enumerate(value):
                self._remember(item, self.graph.call_function(operator.getitem, (node, i)))


def _shape_only(value: torch.Tensor) -> torch.Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


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
