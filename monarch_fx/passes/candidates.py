"""Captured graphs -> the products with a static weight: candidates, and declined ones with a reason."""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn

from monarch_fx.kernels.fusion import activation_of
from monarch_fx.layers import MonarchWeight
from monarch_fx.passes.capture import Captured, value_of
from monarch_fx.records import Call, Candidate, Declined
from monarch_fx.rules import RULES, Product, Refusal, Static, op_name
from monarch_fx.views import VIEW_OPERATIONS, MatrixView, StridedView

CASTS = {"to", "_to_copy", "float", "double", "half", "bfloat16", "type_as", "type"}
_READS_NOTHING = {"sym_size", "size", "dim", "_assert_tensor_metadata", "getattr", "sym_numel", "numel"}
_KINDS = {
    "__matmul__": "matmul",
    "__rmatmul__": "matmul",
    "mm": "matmul",
    "_grouped_mm": "grouped_mm",
    "transformers::grouped_mm_fallback": "grouped_mm",
}


@dataclass(frozen=True)
class StaticValue:
    """A node's value that is a view of one parameter."""

    parameter: str
    static: Static


@dataclass(frozen=True)
class ComputedValue:
    """A node's value that depends on parameters, buffers and constants only, but is no view of one."""

    source: str
    parameter: bool


class _Activation:
    """Stands for an activation whose shape was not captured."""

    shape = None


@dataclass(frozen=True)
class Use:
    """One product node of a graph; ``x`` is the node of its activation, ``bias`` a parameter that it adds."""

    node: fx.Node
    x: fx.Node
    parameter: str
    product: Product
    kind: str
    tokens: str
    count: int
    bias: StaticValue | None


@dataclass
class Found:
    """What the graphs hold: ``uses`` by parameter, in graph order."""

    uses: dict[str, list[Use]] = field(default_factory=dict)
    declined: list[Declined] = field(default_factory=list)
    other_readers: dict[str, set[str]] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)


def find_products(captured: Captured, model: nn.Module) -> Found:
    """Follows every parameter through its views to the products that read it."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    found = Found()
    for graph in captured.graphs:
        for node in graph.nodes:
            if node in captured.parameters:
                name = captured.parameters[node]
                found.values[node] = StaticValue(name, Static(StridedView.whole(shapes[name])))
            elif node in captured.buffers:
                found.values[node] = ComputedValue(f"buffer {captured.buffers[node]}", parameter=False)
            elif node.op in ("call_function", "call_method"):
                _follow(node, captured, found)
    return found


def find_candidates(captured: Captured, model: nn.Module) -> tuple[list[Candidate], list[Declined]]:
    """The matrices that may be rewritten, and everything else that multiplies with a static weight."""
    found = find_products(captured, model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ties = tied_names(model)
    main = _main_count(use.count for uses in found.uses.values() for use in uses)
    readers: dict[fx.Node, list[Use]] = {}
    for use in itertools.chain.from_iterable(found.uses.values()):
        readers.setdefault(use.x, []).append(use)
    activations = {x: i for i, x in enumerate(readers)}
    candidates, declined = [], list(found.declined)
    for name, uses in found.uses.items():
        parameter = parameters[name]
        groups = _same_matrix(uses)
        reason = None
        if name in ties:
            reason = f"tied to {ties[name]}"
        elif found.other_readers.get(name):
            reason = f"also read by {', '.join(sorted(found.other_readers[name]))}, which needs the dense values"
        elif _overlap([matrix for matrix, _ in groups]):
            reason = "read through overlapping views"
        for matrix, group in groups:
            label = name + matrix.label(parameter.shape)
            calls = tuple(Call(use.tokens, use.count, use.count / main if main else 1.0) for use in group)
            if reason is not None:
                size = matrix.in_features, matrix.out_features, matrix.numel
                declined.append(Declined(label, group[0].kind, *size, len(group), reason))
                continue
            loneliest = min(group, key=lambda use: len(readers[use.x]))
            candidates.append(
                Candidate(
                    name=label,
                    parameter=name,
                    parameter_shape=tuple(parameter.shape),
                    view=matrix,
                    kind=group[0].kind,
                    calls=calls,
                    dtype=str(parameter.dtype).removeprefix("torch."),
                    bias=all(use.product.bias is not None for use in group),
                    activated=all(_is_activated(use.node) for use in group),
                    activation=activations[loneliest.x],
                    beside=tuple(u.product.matrix.out_features for u in readers[loneliest.x] if u is not loneliest),
                    own_bias=_own_bias(matrix, group, found, ties),
                )
            )
    declined += _unseen_layers(model, captured, found)
    return candidates, declined


def _own_bias(matrix: MatrixView, group: list[Use], found: Found, ties: dict[str, str]) -> tuple[str, int] | None:
    """The bias of a product, where all its calls add the same one, and nothing else reads any entry of it."""
    bias, size = group[0].bias, matrix.out_features
    if bias is None or matrix.batch or any(use.bias != bias or use.product.matrix != matrix for use in group):
        return None
    view = bias.static.view
    if (view.sizes, view.strides) != ((size,), (1,)) or bias.parameter in {*ties, *found.other_readers}:
        return None
    for use in itertools.chain.from_iterable(found.uses.values()):
        other = use.bias
        if other is None or other.parameter != bias.parameter or any(use is mine for mine in group):
            continue
        start, stop = other.static.view.offset, other.static.view.offset + other.static.view.sizes[0]
        if other.static.view.strides != (1,) or (start < view.offset + size and view.offset < stop):
            return None
    return bias.parameter, view.offset


def _is_activated(node: fx.Node) -> bool:
    """Whether the result goes into an activation that a kernel computes with the product, and nowhere else."""
    return len(node.users) == 1 and activation_of(next(iter(node.users)))[1] is node


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameters that two different modules own, each with another name of it."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((f"{path}.{key}" if path else key, module))
    ties = {}
    for names in owners.values():
        for name, module in names:
            other = next((n for n, m in names if m is not module or _key(n) != _key(name)), None)
            if other is not None:
                ties[name] = other
    return ties


def _key(name: str) -> str:
    return name.rpartition(".")[2]


def _follow(node: fx.Node, captured: Captured, found: Found) -> None:
    """Works out one node: a view of a parameter, a product, or another use."""
    name = op_name(node.target)
    statics = [a for a in node.all_input_nodes if isinstance(found.values.get(a), (StaticValue, tuple))]
    computed = [a for a in node.all_input_nodes if isinstance(found.values.get(a), ComputedValue)]
    if name.startswith("monarch_fx::"):
        _note_rewritten(node, captured, found)
        return
    if not statics and not computed:
        return
    if node.target is operator.getitem or name == "getitem":
        packed, index = node.args[0], node.args[1]
        values = found.values.get(packed) if isinstance(packed, fx.Node) else None
        if isinstance(values, tuple) and isinstance(index, int):
            found.values[node] = values[index]
            return
    if statics and (value := _as_view(node, name, found)) is not None:
        found.values[node] = value
        return
    rule = RULES.get(name)
    if rule is not None:
        operands = {a: _operand(a, found) for a in node.all_input_nodes}
        answer = _ask(rule, node, operands)
        if isinstance(answer, Product):
            tokens, count = _tokens(answer, captured)
            kind = _KINDS.get(name, name)
            parameter = next(found.values[a].parameter for a in statics if _is_weight(found.values[a], answer))
            x = next((a for a in node.all_input_nodes if a not in found.values), node)
            vectors = {a: found.values[a] for a in statics if _is_vector(found.values[a])}
            bias = next((value for a, value in vectors.items() if operands[a] is answer.bias), None)
            for value in vectors.values():
                if value is not bias:
                    found.other_readers.setdefault(value.parameter, set()).add(name)
            found.uses.setdefault(parameter, []).append(Use(node, x, parameter, answer, kind, tokens, count, bias))
            return
        if isinstance(answer, Refusal) or computed:
            _decline(node, name, answer, statics, computed, found)
    if len(statics) + len(computed) == len(node.all_input_nodes):
        sources = [_source(found.values[a]) for a in [*statics, *computed]]
        from_parameter = any(
            isinstance(found.values[a], StaticValue) or found.values[a].parameter
            for a in [*statics, *computed]
            if not isinstance(found.values[a], tuple)
        )
        found.values[node] = ComputedValue(sources[0], from_parameter)
    if name not in _READS_NOTHING:
        for a in statics:
            value = found.values[a]
            for item in value if isinstance(value, tuple) else (value,):
                found.other_readers.setdefault(item.parameter, set()).add(name)


def _is_weight(value: Any, product: Product) -> bool:
    """Whether this static operand is the product's matrix (a bias that is a parameter is static too)."""
    return (
        isinstance(value, StaticValue)
        and value.static.ndim > 1
        and product.matrix.numel
        <= math.prod([*value.static.view.sizes, *([value.static.picked[0]] if value.static.picked else [])])
    )


def _source(value: Any) -> str:
    first = value[0] if isinstance(value, tuple) else value
    return first.parameter if isinstance(first, StaticValue) else first.source


def _as_view(node: fx.Node, name: str, found: Found) -> Any:
    """The node's value where it is a view of its first argument; None where it is not."""
    base = found.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(base, StaticValue):
        return None
    if name in CASTS:
        value = value_of(node)
        return base if value is None or value.dtype.is_floating_point else None
    if name in ("index", "getitem"):
        gathered = _gathered(node, base, found)
        if gathered is not None:
            return gathered
    if name not in VIEW_OPERATIONS or any(isinstance(a, fx.Node) for a in node.args[1:]):
        return None
    kwargs = {key: a for key, a in node.kwargs.items() if key != "memory_format"}
    try:
        views = VIEW_OPERATIONS[name](base.static.view, *node.args[1:], **kwargs)
    except (TypeError, ValueError, IndexError):
        return None

    def made(view: StridedView) -> StaticValue:
        return StaticValue(base.parameter, Static(view, base.static.gathered, base.static.picked))

    return made(views) if isinstance(views, StridedView) else tuple(made(view) for view in views)


def _gathered(node: fx.Node, base: StaticValue, found: Found) -> StaticValue | None:
    """``W[index]`` with a tensor on the first of three dimensions: matrices chosen at run time."""
    index = node.args[1]
    index = index[0] if isinstance(index, (list, tuple)) and len(index) == 1 else index
    view = base.static.view
    if not isinstance(index, fx.Node) or index in found.values or view.ndim != 3 or base.static.gathered:
        return None
    value = value_of(index)
    if not isinstance(value, torch.Tensor) or value.ndim > 1 or value.dtype == torch.bool:
        return None
    if value.ndim == 1:
        return StaticValue(base.parameter, Static(view, gathered=True))
    rest = StridedView(view.sizes[1:], view.strides[1:], view.offset)
    return StaticValue(base.parameter, Static(rest, picked=(view.sizes[0], view.strides[0])))


def _is_vector(value: Any) -> bool:
    return isinstance(value, StaticValue) and value.static.ndim == 1


def _operand(node: fx.Node, found: Found) -> Any:
    """What a rule is given: matrices as Static, activations and biases as their (fake) values."""
    value = found.values.get(node)
    if isinstance(value, StaticValue) and value.static.ndim > 1:
        return value.static
    captured = value_of(node)
    return _Activation() if captured is None else captured


def _ask(rule: Any, node: fx.Node, operands: dict[fx.Node, Any]) -> Product | Refusal | None:
    """Calls a rule with the node's arguments."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), operands.__getitem__)
    try:
        answer: Product | Refusal | None = rule(*args, **kwargs)
    except (TypeError, ValueError, IndexError) as error:
        return Refusal(f"a form that the rule for {op_name(node.target)} doesn't read: {error}")
    return answer


def _tokens(product: Product, captured: Captured) -> tuple[str, int]:
    """Rows per matrix of the product, as text and as a number (0 where no sizes were captured)."""
    shape = getattr(product.x, "shape", None)
    if shape is None:
        return "tokens", 0
    sizes = [size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in shape]
    per_matrix = product.matrix.in_features * product.matrix.batch_size * product.thin
    expr = sympy.Mul(*sizes) / per_matrix
    known = expr.subs(captured.sizes)
    count = max(1, math.ceil(known)) if known.is_number else 0
    spelled = expr.subs({symbol: sympy.Symbol(name) for symbol, name in captured.symbol_names.items()})
    return str(spelled), int(count)


def _decline(
    node: fx.Node, name: str, answer: Any, statics: list[fx.Node], computed: list[fx.Node], found: Found
) -> None:
    """Writes down a product that can't be rewritten, with its reason."""
    kind = _KINDS.get(name, name)
    if isinstance(answer, Refusal):
        for value in (found.values[a] for a in statics):
            if not isinstance(value, StaticValue) or value.static.ndim < 2:
                continue
            sizes = value.static.view.sizes
            label = value.parameter + value.static.matrix([0], list(range(1, len(sizes)))).label(sizes)
            inputs = math.prod(sizes[1:])
            found.declined.append(Declined(label, kind, inputs, sizes[0], math.prod(sizes), 1, answer.reason))
        return
    dynamic = [a for a in node.all_input_nodes if a not in found.values]
    matrices = [a for a in computed if getattr(value_of(a), "ndim", 0) > 1]
    if not dynamic or not matrices:
        return
    value, shape = found.values[matrices[0]], value_of(matrices[0]).shape
    size = [int(n) if isinstance(n, int) else 0 for n in (math.prod(shape[1:]), shape[0])]
    what = (
        "its weight is computed at run time" if value.parameter else "its static operand is a buffer, not a parameter"
    )
    found.declined.append(Declined(value.source, kind, size[0], size[1], size[0] * size[1], 1, what))


def _note_rewritten(node: fx.Node, captured: Captured, found: Found) -> None:
    factor = next((captured.parameters[a] for a in node.all_input_nodes if a in captured.parameters), None)
    if factor is not None and value_of(node) is not None:
        R, L = (value_of(a).shape for a in node.args[1:3])
        owner = factor.rpartition(".")[0]
        if any(d.name == owner for d in found.declined):
            return
        size = R[-4] * R[-1], L[-4] * L[-1]
        params = math.prod(R) + math.prod(L)
        found.declined.append(Declined(owner, "monarch_bmm", *size, params, 1, "already a Monarch matrix"))


def _same_matrix(uses: Iterable[Use]) -> list[tuple[MatrixView, list[Use]]]:
    """Uses of one parameter by the matrix that they read; a transposed matrix is the same one."""
    groups: list[tuple[MatrixView, list[Use]]] = []
    for use in uses:
        matrix = use.product.matrix
        for known, group in groups:
            if matrix in (known, known.transposed):
                group.append(use)
                break
        else:
            groups.append((matrix, [use]))
    return groups


def _overlap(views: list[MatrixView]) -> bool:
    """Whether two of the matrices share an entry of the parameter."""
    if len(views) < 2:
        return False
    spans = sorted(view.entries() for view in views)
    if all(before[1] <= after[0] for before, after in itertools.pairwise(spans)):
        return False
    taken = torch.zeros(max(stop for _, stop in spans), dtype=torch.bool, device="cpu")
    for view in views:
        if view.gather(taken).any():
            return True
        view.scatter(taken, taken.new_ones(view.numel))
    return False


def _main_count(counts: Iterable[int]) -> int:
    """The token count that most products have; the larger one where two are equally common."""
    common = Counter(count for count in counts if count)
    return max(common, key=lambda count: (common[count], count)) if common else 0


def _unseen_layers(model: nn.Module, captured: Captured, found: Found) -> list[Declined]:
    """Matrices, embeddings aside, that the captured graphs never read."""
    mentioned = _mentioned(captured, found)
    seen = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in mentioned}
    noted = {d.name for d in found.declined}
    rows = []
    for path, module in model.named_modules():
        if isinstance(module, MonarchWeight):
            if path not in noted:
                size = math.prod(module.shape[1:]), module.shape[0]
                params = sum(factor.numel() for factor in module.parameters())
                rows.append(Declined(path, "monarch_bmm", *size, params, 0, "already a Monarch matrix"))
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or parameter.ndim < 2:
                continue
            name = f"{path}.{key}" if path else key
            size = math.prod(parameter.shape[1:]), parameter.shape[0]
            if not isinstance(module, nn.Embedding):
                kind = "linear" if isinstance(module, nn.Linear) else "parameter"
                reason = (
                    "not read in the captured run" if captured.given else "not seen: give example_inputs that use it"
                )
                rows.append(Declined(name, kind, *size, parameter.numel(), 0, reason))
    return rows


def _mentioned(captured: Captured, found: Found) -> set[str]:
    names = set(found.uses) | {d.name for d in found.declined}
    names |= {name for node, name in captured.parameters.items() if node.users}
    return names
