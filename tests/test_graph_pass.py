"""GraphModule and ExportedProgram in, the same out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, fx, nn
from zoo import HALF_GRID, mlp

import monarch_fx as mfx
from monarch_fx import errors


def exported_raw() -> tuple[torch.export.ExportedProgram, Tensor]:
    model, (x,) = zoo.raw()
    free = dict.fromkeys((1,), torch.export.Dim.AUTO)
    return torch.export.export(model.eval(), (x,), dynamic_shapes=(free,), strict=False), x


def test_graph_module_in_graph_module_out() -> None:
    program, _x = exported_raw()
    module = program.module()
    before = str(module.graph)
    rewritten = mfx.monarchify(module, config=HALF_GRID)
    assert isinstance(rewritten, torch.fx.GraphModule)
    assert str(module.graph) == before
    nodes = [n for n in rewritten.graph.nodes if "monarch_bmm" in str(n.target)]
    assert len(nodes) == mfx.report(rewritten).plan.monarch_calls == 14
    assert all("val" in n.meta for n in rewritten.graph.nodes if n.op == "call_function")
    longer = torch.randn(3, 11, 32)
    torch.testing.assert_close(rewritten(longer), mfx.to_dense(rewritten_eager(program))(longer), rtol=1e-4, atol=1e-5)
    dense = mfx.to_dense(rewritten)
    assert not any("monarch" in str(n.target) for n in dense.graph.nodes)
    assert dense.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(dense(longer), rewritten(longer), rtol=1e-4, atol=1e-5)


def rewritten_eager(program: torch.export.ExportedProgram) -> nn.Module:
    """The same weights through the eager model."""
    model = zoo.Raw()
    model.load_state_dict(program.state_dict)
    return mfx.monarchify(model.eval(), config=HALF_GRID, example_inputs=torch.randn(3, 7, 32))


def test_exported_program_in_exported_program_out() -> None:
    program, _x = exported_raw()
    rewritten = mfx.monarchify(program, config=HALF_GRID)
    assert isinstance(rewritten, torch.export.ExportedProgram)
    assert sum("monarch_bmm" in str(n.target) for n in rewritten.graph.nodes) == 14
    assert mfx.report(rewritten).plan.monarch_calls == 14
    longer = torch.randn(3, 11, 32)
    torch.testing.assert_close(rewritten.module()(longer), rewritten_eager(program)(longer), rtol=1e-4, atol=1e-5)


def test_symbolically_traced_module() -> None:
    module = torch.fx.symbolic_trace(mlp())
    rewritten = mfx.monarchify(module, config=HALF_GRID, example_inputs=torch.randn(5, 64))
    assert isinstance(rewritten, torch.fx.GraphModule)
    assert mfx.report(rewritten).plan.monarch_calls == 2


class LeftProduct(nn.Module):
    """What ``W @ x`` means depends on the dimensions of x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.weight, x)


class EinsumProduct(LeftProduct):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsd,ed->bse", x, self.weight)


class Cast(LeftProduct):
    """Of its weight, which is read without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(torch.float32).detach().T + x @ self.weight.double().float().T


class CastLike(LeftProduct):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x.device, x.dtype).T


@pytest.mark.parametrize(
    "trace", [lambda m, x: torch.export.export(m, (x,)).module(), lambda m, x: fx.symbolic_trace(m)]
)
def test_casts_and_detached_weights(trace: Callable) -> None:
    x = torch.randn(5, 64)
    rewritten = mfx.monarchify(trace(Cast(), x), config=HALF_GRID, example_inputs=x)
    assert mfx.report(rewritten).plan.monarch_calls == 2
    dense = mfx.to_dense(rewritten)
    torch.testing.assert_close(dense(x), rewritten(x), rtol=1e-4, atol=1e-4)
    dense(x).sum().backward()
    assert dense.weight.grad is not None
    torch.testing.assert_close(dense.weight.grad, x.sum(0).expand(32, 64))  # of the second product alone


class Sized(LeftProduct):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).view(-1, self.weight.size(0)) * self.weight.shape[1]


def test_what_a_traced_graph_asks_of_a_weight() -> None:
    x = torch.randn(5, 64, dtype=torch.float64)
    rewritten = mfx.monarchify(fx.symbolic_trace(Sized().double()), config=HALF_GRID, example_inputs=x)
    assert sum("monarch_bmm" in str(n.target) for n in rewritten.graph.nodes) == 1
    torch.testing.assert_close(mfx.to_dense(rewritten)(x), rewritten(x))


def test_casts_to_what_only_a_run_tells() -> None:
    x = torch.randn(5, 64)
    rewritten = mfx.monarchify(torch.export.export(CastLike(), (x,)).module(), config=HALF_GRID)
    torch.testing.assert_close(mfx.to_dense(rewritten)(x), rewritten(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(errors.ExampleInputsError, match=r"which dtype 'to' gives its weight .* export the model"):
        mfx.monarchify(fx.symbolic_trace(CastLike()), config=HALF_GRID, example_inputs=x)


class OwnFactors(nn.Module):
    """A model that calls the operator itself, beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.R = nn.Parameter(torch.randn(2, 2, 4, 32))
        self.L = nn.Parameter(torch.randn(2, 2, 4, 32))
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(mfx.monarch_bmm(x, self.R, self.L))


def test_calls_of_the_operator_that_are_the_users_stay() -> None:
    x = torch.randn(5, 64)
    module = torch.export.export(OwnFactors(), (x,), strict=False).module()
    rewritten = mfx.monarchify(module, config=HALF_GRID)
    dense = mfx.to_dense(rewritten)
    counts = [sum("monarch_bmm" in str(n.target) for n in m.graph.nodes) for m in (module, rewritten, dense)]
    assert counts == [1, 2, 1]
    torch.testing.assert_close(dense(x), rewritten(x), rtol=1e-4, atol=1e-4)


def test_monarch_linear_becomes_linear() -> None:
    layer = mfx.MonarchLinear(48, 64, nblocks=4)
    dense = mfx.to_dense(nn.Sequential(layer))[0]
    assert type(dense) is nn.Linear
    assert type(layer) is mfx.MonarchLinear
    x = torch.randn(5, 48)
    torch.testing.assert_close(dense(x), layer(x))


def test_products_that_need_shapes_are_declined_without_them() -> None:
    module = torch.fx.symbolic_trace(LeftProduct())
    x = torch.randn(3, 64, 5)
    with pytest.raises(errors.NoEligibleProductError, match="shape is not known"):
        mfx.monarchify(module, config=HALF_GRID)
    rewritten = mfx.monarchify(module, config=HALF_GRID, example_inputs=x)
    assert sum("monarch_bmm" in str(n.target) for n in rewritten.graph.nodes) == 1
    torch.testing.assert_close(mfx.to_dense(rewritten)(x), rewritten(x), rtol=1e-4, atol=1e-4)
    plan = mfx.report(rewritten).plan
    with pytest.raises(errors.ExampleInputsError, match=r"matmul.*give example_inputs"):
        mfx.monarchify(module, plan=plan)


def test_einsum_in_a_graph_without_shapes() -> None:
    module = torch.fx.symbolic_trace(EinsumProduct())
    rewritten = mfx.monarchify(module, config=HALF_GRID)
    assert [n.op for n in rewritten.graph.nodes].count("call_function") == 1  # monarch_bmm alone, no reshaping
    x = torch.randn(3, 5, 64)
    torch.testing.assert_close(mfx.to_dense(rewritten)(x), rewritten(x), rtol=1e-4, atol=1e-4)
