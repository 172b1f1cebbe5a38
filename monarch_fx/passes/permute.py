"""Hidden features in another order: the same function.

    y = W2 f(W1 x + b1)    =    (W2 P^T) f(P W1 x + P b1)        f element by element, P any permutation

Features that products write, elementwise operations take along and products read may stand in any order: rows of the
first weights, columns of the second ones and biases are permuted once, which costs nothing when the model runs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as module_hooks

from monarch_fx.passes.calibrate import Calibration, Statistics
from monarch_fx.passes.candidates import Found, StaticValue, Use, find_products, tied_names
from monarch_fx.passes.capture import Captured, value_of
from monarch_fx.passes.rewrite import copy_with
from monarch_fx.records import Decision, HiddenOrder
from monarch_fx.rules import op_name
from monarch_fx.views import MatrixView

# Where products that contract the last dimension have their activation, their weight, and what is added.
_PRODUCTS = {"linear": (0, 1, 2), "matmul": (0, 1, None), "mm": (0, 1, None), "addmm": (1, 2, 0)}
_ELEMENTWISE = {
    *("gelu", "silu", "relu", "relu6", "sigmoid", "tanh", "elu", "leaky_relu", "mish", "hardswish", "hardtanh"),
    *("softplus", "erf", "exp", "neg", "square", "pow", "mul", "add", "sub", "div", "clamp", "dropout"),
    *("to", "_to_copy", "float", "type_as", "contiguous", "clone", "alias", "detach"),
}
_KEEP_THE_LAST_DIMENSION = {"view", "reshape", "_unsafe_view"}
_READ_SIZES = {"sym_size", "size", "dim", "_assert_tensor_metadata"}


@dataclass(frozen=True)
class Hidden:
    """Features that may stand in any order.

    Attributes:
        writers: Weights of the products that give them, and the dimension of each along which they run.
        readers: Weights of the products that see them, likewise.
        vectors: Biases and scales of them.
    """

    writers: tuple[tuple[str, int], ...]
    readers: tuple[tuple[str, int], ...]
    vectors: tuple[str, ...]

    def in_order(self, order: Tensor) -> HiddenOrder:
        along = (*self.writers, *self.readers, *((name, 0) for name in self.vectors))
        return HiddenOrder(along, tuple(order.tolist()))


def find_hidden(captured: Captured, model: nn.Module) -> list[Hidden]:
    """All hidden features of which the graph shows that nothing else sees them.

    They are left as they are where the output, a residual, a normalisation, a buffer or a forward hook sees them, where
    a weight is tied, or read twice or in part, and where their shapes were not captured. So they are where a parameter
    or buffer as long as they was not read, in the module around them: an adapter or a mask, which another run may use.
    What is computed in training alone, or for other arguments, without either, is not seen.
    """
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return []
    return list(_Search(captured, model, find_products(captured, model)))


def reordered(model: nn.Module, orders: Sequence[HiddenOrder]) -> nn.Module:
    """A copy of ``model`` with its hidden features in these orders, which computes the same and shares all other
    parameters with it; without orders ``model`` itself."""
    if not orders:
        return model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mine = {id(parameters[name]) for order in orders for name, _ in order.along}
    made = copy_with(model, {id(p): p for p in parameters.values() if id(p) not in mine})
    reorder(made, orders)
    return made


def reorder(model: nn.Module, orders: Iterable[HiddenOrder]) -> None:
    """As ``reordered``, in place."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for order in orders:
        made = {}  # all of them before any is exchanged: memory may run out in between
        for name, dimension in order.along:
            values = parameters[name].data
            made[name] = values.index_select(dimension, torch.tensor(order.order, device=values.device))
        for name, values in made.items():
            parameters[name].data = values


def reordered_statistics(
    calibrated: Calibration, views: Mapping[str, MatrixView], orders: Iterable[HiddenOrder]
) -> Calibration:
    """What the products of the reordered model see; ``views`` are those of the products by name."""
    changed: dict[str, dict[str, Tensor]] = {}
    for order in orders:
        for name, dimension in order.along:
            if name in calibrated.statistics and name in views:
                moments = "gradients" if dimension == _dimension(views[name].out) else "inputs"
                changed.setdefault(name, {})[moments] = torch.tensor(order.order, device="cpu")
    if not changed:
        return calibrated
    return dataclasses.replace(calibrated, statistics=_Reordered(calibrated.statistics, changed))


class _Reordered(Mapping[str, Statistics]):
    """Statistics that are put in order whenever they are read: of a large model two copies wouldn't fit.

    Args:
        statistics: As they were collected.
        changed: By product and by moments, what stands at each place from now on.
    """

    def __init__(self, statistics: Mapping[str, Statistics], changed: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.statistics, self.changed = statistics, changed

    def __getitem__(self, name: str) -> Statistics:
        seen, made = self.statistics[name], {}
        for moments, order in self.changed.get(name, {}).items():
            found = getattr(seen, moments)
            if found is not None:
                at = order.to(found.device)
                made[moments] = found[at][:, at]
            if moments == "inputs":
                made["mean"] = seen.mean[order.to(seen.mean.device)]
        return dataclasses.replace(seen, **made)

    def __contains__(self, name: object) -> bool:
        return name in self.statistics

    def __iter__(self) -> Iterator[str]:
        return iter(self.statistics)

    def __len__(self) -> int:
        return len(self.statistics)


def felt(orders: Iterable[HiddenOrder], decisions: Iterable[Decision]) -> tuple[HiddenOrder, ...]:
    """The orders along which a product is cut into blocks: dense and low-rank products are the same in any."""
    cut = set()
    for decision in decisions:
        shape, candidate = decision.shape, decision.candidate
        if shape is not None and shape.nblocks_out > 1:
            cut.add((candidate.name, _dimension(candidate.view.out)))
        if shape is not None and shape.nblocks_in > 1:
            cut.add((candidate.name, _dimension(candidate.view.inp)))
    return tuple(order for order in orders if not cut.isdisjoint(order.along))


def _dimension(dims: Sequence[tuple[int, int]]) -> int:
    """Which dimension of a matrix that is a whole parameter these (size, stride) are."""
    return 1 if dims[-1][1] == 1 else 0


class _Search:
    """Walks over the graphs from every product whose outputs may be free."""

    def __init__(self, captured: Captured, model: nn.Module, found: Found) -> None:
        self.captured, self.found = captured, found
        self.ties, self.modules = tied_names(model), dict(model.named_modules(remove_duplicate=False))
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.readers: dict[str, set[fx.Node]] = {}
        for graph in captured.graphs:
            for node in graph.nodes:
                self._note_reader(node)
        read = {**captured.parameters, **captured.buffers}
        tensors = {**self.parameters, **dict(model.named_buffers(remove_duplicate=False))}
        seen = {id(tensors.get(name)) for node, name in read.items() if node.users}
        self.unread = {name: tuple(tensor.shape) for name, tensor in tensors.items() if id(tensor) not in seen}
        uses = [use for mine in found.uses.values() for use in mine]
        self.products = {use.node: use for use in uses if self._is_whole(use)}

    def __iter__(self) -> Iterator[Hidden]:
        seen: set[fx.Node] = set()
        for start in self.products:
            if start not in seen:
                group = _Group(self)
                free = group.spread(start)
                seen |= group.nodes
                if free and group.readers and group.is_hidden():
                    yield group.hidden()

    def _note_reader(self, node: fx.Node) -> None:
        if op_name(node.target) in _READ_SIZES or isinstance(self.found.values.get(node), (StaticValue, tuple)):
            return
        for a in node.all_input_nodes:
            value = self.found.values.get(a)
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, StaticValue):
                    self.readers.setdefault(item.parameter, set()).add(node)

    def _is_whole(self, use: Use) -> bool:
        """Whether the product contracts the last dimension of an activation with a whole matrix that only it reads."""
        places = _PRODUCTS.get(op_name(use.node.target))
        if places is None or use.node.kwargs or len(use.node.args) <= places[1]:
            return False
        x, weight = use.node.args[places[0]], use.node.args[places[1]]
        matrix, parameter = use.product.matrix, self.parameters[use.parameter]
        return (
            isinstance(x, fx.Node)
            and not isinstance(self.found.values.get(x), StaticValue)
            and isinstance(self.found.values.get(weight), StaticValue)  # type: ignore[arg-type]
            and parameter.ndim == 2
            and len(matrix.out) == len(matrix.inp) == 1
            and matrix.numel == parameter.numel()
            and self.is_alone(use.parameter, use.node)
        )

    def is_alone(self, parameter: str, node: fx.Node) -> bool:
        """Whether only this node reads the parameter, and no hook sees what the layer does with it."""
        owner = self.modules[parameter.rpartition(".")[0]]
        return self.readers[parameter] == {node} and parameter not in self.ties and not _is_hooked(owner)

    def around(self, node: fx.Node) -> set[str]:
        """The modules that compute the node, where they are known."""
        return {path for path, _ in (node.meta.get("nn_module_stack") or {}).values()} & self.modules.keys()


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _Group:
    """The nodes that hold the same features, and the products around them."""

    def __init__(self, search: _Search) -> None:
        self.search = search
        self.nodes: set[fx.Node] = set()
        self.writers: list[Use] = []
        self.readers: list[Use] = []
        self.vectors: set[str] = set()
        self.size = 0

    def hidden(self) -> Hidden:
        writers = tuple((use.parameter, _dimension(use.product.matrix.out)) for use in self.writers)
        readers = tuple((use.parameter, _dimension(use.product.matrix.inp)) for use in self.readers)
        return Hidden(writers, readers, tuple(sorted(self.vectors)))

    def spread(self, start: fx.Node) -> bool:
        """Adds all that hangs on the outputs of a product; False where something else sees them."""
        self.size = self.search.products[start].product.matrix.out_features
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if node in self.nodes:
                continue
            self.nodes.add(node)
            more = self._sources(node)
            if more is None or not self._are_features(node):
                return False
            for user in node.users:
                name = op_name(user.target)
                product = self.search.products.get(user)
                if product is not None:
                    if user.args[_PRODUCTS[name][0]] is not node or sum(a is node for a in user.args) > 1:
                        return False
                    self.readers.append(product)
                elif _is_elementwise(name) or name in _KEEP_THE_LAST_DIMENSION:
                    more.append(user)
                elif name not in _READ_SIZES:
                    return False
            waiting += more
        return True

    def is_hidden(self) -> bool:
        """Whether no hook stands between the features, and nothing as long as they waits for another run."""
        search = self.search
        around = [search.around(node) for node in (*self.nodes, *(use.node for use in self.readers))]
        if any(_is_hooked(search.modules[path]) for path in set[str].union(*around) - set[str].intersection(*around)):
            return False
        owners = [use.parameter.split(".")[:-1] for use in (*self.writers, *self.readers)]
        levels = zip(*owners, strict=False)
        home = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)]
        return not any(
            name.split(".")[: len(home)] == home and self.size in shape for name, shape in search.unread.items()
        )

    def _sources(self, node: fx.Node) -> list[fx.Node] | None:
        """Nodes that the node has the features from; None where it has them from anything but products."""
        name = op_name(node.target)
        product = self.search.products.get(node)
        if product is not None:
            self.writers.append(product)
            added = _PRODUCTS[name][2]
            bias = node.args[added] if added is not None and len(node.args) > added else None
            return [] if bias is None or self._is_vector(bias, node) else None
        if name in _KEEP_THE_LAST_DIMENSION:
            return [node.args[0]] if isinstance(node.args[0], fx.Node) else None
        if node.op == "placeholder" or not _is_elementwise(name):
            return None
        return [a for a in node.all_input_nodes if not self._is_vector(a, node)]

    def _is_vector(self, a: object, node: fx.Node) -> bool:
        """Whether ``a`` is a vector of one number a feature, a parameter that only ``node`` reads; then it is noted."""
        value = self.search.found.values.get(a)  # type: ignore[call-overload]
        if not isinstance(value, StaticValue) or tuple(value.static.view.sizes) != (self.size,):
            return False
        parameter = self.search.parameters[value.parameter]
        if parameter.ndim != 1 or len(parameter) != self.size or not self.search.is_alone(value.parameter, node):
            return False
        self.vectors.add(value.parameter)
        return True

    def _are_features(self, node: fx.Node) -> bool:
        shape = getattr(value_of(node), "shape", None)
        return shape is not None and len(shape) > 0 and isinstance(shape[-1], int) and shape[-1] == self.size


def _is_elementwise(name: str) -> bool:
    return name.removesuffix("_") in _ELEMENTWISE
