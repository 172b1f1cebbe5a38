"""The pass that moves activations into the products before them."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import monarch_fx as mfx
from monarch_fx.errors import ConfigError, StructureError
from monarch_fx.kernels.fusion import FuseActivations
from monarch_fx.kernels.reference import ACTIVATIONS

X = torch.randn(3, 5, 32)


class Model(nn.Module):
    def __init__(self, compute: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = (mfx.MonarchLinear(32, 32, 2, 4) for _ in range(2))
        self.compute = compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self, x)


def fused(compute: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> fx.Graph:
    """The graph after the pass; it gives what the model gives, in eager mode and compiled by Inductor with the pass."""
    graphs = []

    def backend(module: fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        FuseActivations()(module.graph)
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
    graph = fused(lambda model, x: order(F.silu(model.a(x)), model.b(x)))
    gate, product = products(graph)
    assert product.kwargs["activation"] == "silu"
    assert product.kwargs["gate"] is gate
    assert gate.kwargs.get("activation", "none") == "none"
    assert calls(graph) == 2


@pytest.mark.parametrize(
    "compute",
    [
        lambda model, x: F.gelu(y := model.a(x)) + y,  # read twice
        lambda model, x: torch.tanh(model.a(x)),  # no kernel has it
        lambda model, x: F.gelu(x) * model.a(x)[0],  # the product is not what is multiplied
        lambda model, x: F.gelu(x[:1]) * model.a(x),  # the gate would have to be broadcast
        lambda model, x: F.relu(model.a(x), inplace=True) + 1,
    ],
)
def test_what_stays_as_it_is(compute: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
    graph = fused(compute)
    assert all(node.kwargs.get("activation", "none") == "none" for node in products(graph))


def test_a_gate_that_changes_in_between_is_not_read_later() -> None:
    def compute(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        gate = x.clone()
        active = F.silu(gate)
        gate.add_(1)
        return active * model.a(x) + gate

    assert any(node.target in (operator.mul, torch.mul) for node in fused(compute).nodes)


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
    with pytest.raises(StructureError, match=r"in torch.float32, got \(7, 48\) in torch.float64"):
        mfx.monarch_bmm(x, *factors, gate=torch.randn(7, 48, dtype=torch.float64))
