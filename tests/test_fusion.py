"""The pass that moves activations into the products before them, and puts products of the same rows together."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import monarch_fx as mfx
from monarch_fx.errors import ConfigError, StructureError
from monarch_fx.kernels.inductor import FuseProducts
from monarch_fx.kernels.reference import ACTIVATIONS

X = torch.randn(3, 5, 32)


class Model(nn.Module):
    def __init__(self, compute: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = (mfx.MonarchLinear(32, 32, 2, 4) for _ in range(2))
        self.c = mfx.MonarchLinear(32, 48, (3, 1), 8, bias=False)
        self.d, self.e = mfx.MonarchLinear(32, 16, 1, 8), mfx.MonarchLinear(32, 16, 4, 8, bias=False)
        self.padded = mfx.MonarchLinear(32, 32, 3, 4)
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self, x)


def fused(compute: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> fx.Graph:
    """The graph after the pass; it gives what the model gives, in eager mode and compiled by Inductor with the pass."""
    graphs = []

    def backend(module: fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        FuseProducts()(module.graph)
        module.graph.lint()
        module.recompile()
        graphs.append(module.graph)
        return torch._inductor.compile(module, inputs)

    model = Model(compute)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(X), model(X))
    (graph,) = graphs
    return graph


def products(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if "monarch_bmm" in str(node.target)]


def calls(graph: fx.Graph) -> int:
    return sum(node.op in ("call_function", "call_method") for node in graph.nodes)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("relu", nn.ReLU()),
        ("silu", nn.SiLU()),
        ("gelu", nn.GELU()),
        ("gelu_tanh", nn.GELU("tanh")),
        ("relu", torch.relu),
    ],
)
def test_an_activation_behind_a_product(name: str, module: Callable[[torch.Tensor], torch.Tensor]) -> None:
    graph = fused(lambda model, x: module(model.a(x)))
    (product,) = products(graph)
    assert product.kwargs["activation"] == name
    assert calls(graph) == 1


@pytest.mark.parametrize("order", [lambda a, b: a * b, lambda a, b: b * a])
def test_a_gated_mlp(order: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    graph = fused(lambda model, x: order(F.silu(model.a(-x)), model.b(x)))
    gate, product = products(graph)
    assert product.kwargs["activation"] == "silu"
    assert product.kwargs["gate"] is gate
    assert gate.kwargs.get("activation", "none") == "none"
    assert calls(graph) == 3


@pytest.mark.parametrize(
    "compute",
    [
        lambda model, x: F.gelu(y := model.a(x)) + y,  # read twice
        lambda model, x: torch.tanh(model.a(x)),  # no kernel has it
        lambda model, x: F.gelu(x) * model.a(x)[0],  # the product is not what is multiplied
        lambda model, x: F.gelu(x[:1]) * model.a(x),  # the gate would have to be broadcast
        lambda model, x: F.relu(model.a(x), inplace=True) + 1,
        lambda model, x: torch.mul(F.silu(x), model.a(x), out=torch.empty_like(x)) + 1,
    ],
)
def test_what_stays_as_it_is(compute: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
    graph = fused(compute)
    assert all(node.kwargs.get("activation", "none") == "none" for node in products(graph))


def add(tensor: torch.Tensor) -> None:
    tensor += 1


@pytest.mark.parametrize("change", [lambda gate: gate.add_(1), add, lambda gate: F.relu(gate, True)])
def test_a_gate_that_changes_in_between_is_not_read_later(change: Callable[[torch.Tensor], object]) -> None:
    def compute(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        gate = x.clone()
        active = F.silu(gate)
        change(gate)
        return active * model.a(x) + gate

    assert any(node.target in (operator.mul, torch.mul) for node in fused(compute).nodes)


def together(graph: fx.Graph) -> list[tuple[int, str | None]]:
    """How many products each node has that runs several, and the activation of the first one, where it is a gate."""
    nodes = [node for node in graph.nodes if "monarch_together" in str(node.target)]
    return [(len(node.args[1]), node.kwargs.get("gated")) for node in nodes]


def attention(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return model.a(x).unflatten(-1, (2, 16)).mT, model.c(x), model.d(x)


def gated_mlp(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.silu(model.a(x)) * model.b(x)


@pytest.mark.parametrize(
    ("compute", "groups", "alone"),
    [
        (attention, [(3, None)], 0),
        (gated_mlp, [(2, "silu")], 0),
        (lambda model, x: (*attention(model, x), gated_mlp(model, x)), [(3, None), (2, "silu")], 0),
        (lambda model, x: (model.c(x), model.d(x), gated_mlp(model, x)), [(2, None), (2, "silu")], 0),
        (lambda model, x: (model.e(x), gated_mlp(model, x)), [(2, "silu")], 1),
        (lambda model, x: (*attention(model, x), model.e(x)), [(3, None)], 1),
        (lambda model, x: (model.a(x), model.b(x) + model.c(-x)[..., :32], model.d(x), model.e(x)), [(2, None)] * 2, 1),
        (lambda model, x: (F.silu(y := model.a(x)) * model.b(x), y), [], 2),
        (lambda model, x: (model.a(x), model.b(-x)), [], 2),
        (lambda model, x: model.b(model.a(x)), [], 2),
        (lambda model, x: (model.a(x), F.gelu(model.b(x))), [], 2),
        (lambda model, x: (model.a(x), model.padded(x)), [], 2),
        (lambda model, x: (model.a(x), mfx.monarch_bmm(x, 2 * model.b.weight.R, model.b.weight.L)), [], 2),
    ],
)
def test_products_of_the_same_rows(compute: Callable, groups: list[tuple[int, str | None]], alone: int) -> None:
    graph = fused(compute)
    assert together(graph) == groups
    assert len(products(graph)) == alone


def changed(change: Callable[[torch.Tensor], object]) -> fx.Graph:
    def compute(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = x.clone()
        y = model.a(x)
        change(x)
        return y, model.b(x)

    return fused(compute)


def test_rows_that_change_in_between() -> None:
    def assign(x: torch.Tensor) -> None:
        x[0] = 0

    for change in (lambda x: x.mul_(2), add, assign, lambda x: F.relu(x, True), lambda x: torch.relu_(x)):
        assert together(changed(change)) == []
        torch._dynamo.reset()
    assert together(changed(lambda x: x.add(1))) == [(2, None)]


def test_products_stay_in_their_autocast_region() -> None:
    graphs = []

    def backend(module: fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        FuseProducts()(module.graph)
        module.recompile()
        graphs.append(module.graph)
        return module

    def compute(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = model.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            return y, model.b(x), model.c(x)

    model = Model(compute)
    torch.testing.assert_close(torch.compile(model, backend=backend)(X), model(X))
    assert [together(graph) for graph in graphs] == [[(2, None)]]


def test_factors_that_are_attributes_of_the_graph() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.R, self.L = (nn.ParameterList(torch.randn(2, 2, 4, 16) for _ in range(2)) for _ in range(2))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [mfx.monarch_bmm(x, self.R[i], self.L[i]) for i in range(2)]

    model = Plain()
    traced = fx.symbolic_trace(model)
    FuseProducts()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    assert together(traced.graph) == [(2, None)]
    torch.testing.assert_close(traced(X), model(X))


def test_a_compiled_model_trains_with_products_together() -> None:
    groups = []

    class Recorder(FuseProducts):
        def __call__(self, graph: fx.Graph) -> None:
            super().__call__(graph)
            groups.extend(together(graph))

    model = Model(lambda model, x: (*attention(model, x), gated_mlp(model, x)))
    wanted = [p for name, p in model.named_parameters() if name[0] in "abcd"]

    def grads(results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(sum(y.square().sum() for y in results), wanted)

    with torch._inductor.config.patch(pre_grad_custom_pass=Recorder()):
        # float32 sums in another order
        torch.testing.assert_close(
            grads(torch.compile(model, fullgraph=True)(X)), grads(model(X)), rtol=1e-4, atol=1e-4
        )
    assert groups == [(3, None), (2, "silu")]


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_the_operator_itself(activation: str) -> None:
    layer = mfx.MonarchLinear(32, 48, 2, 4)
    x, gate = torch.randn(7, 32), torch.randn(7, 48)
    act, y = ACTIVATIONS[activation], layer(x)
    factors = (layer.weight.R, layer.weight.L, layer.bias)
    torch.testing.assert_close(mfx.monarch_bmm(x, *factors, activation=activation), act(y))
    torch.testing.assert_close(mfx.monarch_bmm(x, *factors, activation=activation, gate=gate), act(gate) * y)


def test_errors_of_the_operator() -> None:
    layer = mfx.MonarchLinear(32, 48, 2, 4)
    x, factors = torch.randn(7, 32), (layer.weight.R, layer.weight.L)
    with pytest.raises(ConfigError, match=r"activation must be one of .*'gelu_tanh', got 'selu'"):
        mfx.monarch_bmm(x, *factors, activation="selu")
    with pytest.raises(StructureError, match=r"gate must be like the result, \(7, 48\) in .*, got \(48,\) in"):
        mfx.monarch_bmm(x, *factors, gate=torch.randn(48))
    with pytest.raises(StructureError, match=r"in torch.float32 on cpu, got \(7, 48\) in torch.float64 on cpu"):
        mfx.monarch_bmm(x, *factors, gate=torch.randn(7, 48, dtype=torch.float64))
