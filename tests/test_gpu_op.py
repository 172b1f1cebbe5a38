"""The op behind monarch_bmm on a GPU. Its calls of torch run anywhere: here on the CPU, in float64."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import monarch_fx as mfx
from monarch_fx.kernels import gpu

SHAPES = [(5, 2, 3, 4, 6, 7), (4, 1, 3, 5, 8, 6), (6, 3, 1, 2, 5, 9)]


@pytest.fixture(autouse=True)
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CUBLAS_FLOPS", 0)
    monkeypatch.setattr(gpu, "FEW_TOKENS", 0)


def operands(tokens: int, n_in: int, n_out: int, rank: int, p: int, s: int) -> tuple[torch.Tensor, ...]:
    shapes = (tokens, n_in * p), (n_in, n_out, rank, p), (n_out, n_in, rank, s)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_intermediate(shape: tuple[int, ...]) -> None:
    x, R, L = operands(*shape)
    y, t = gpu.two_products(x, R, L)
    torch.testing.assert_close(y, mfx.Monarch(R, L)(x), rtol=1e-12, atol=1e-12)
    exact = torch.einsum("kjrp,tkp->jtkr", R, x.unflatten(1, (R.shape[0], -1))).flatten(2)
    torch.testing.assert_close(t, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_first_and_second_order(shape: tuple[int, ...]) -> None:
    x, R, L = operands(*shape)

    def product(*args: torch.Tensor) -> torch.Tensor:
        return gpu.two_products(*args)[0]

    assert torch.autograd.gradcheck(product, (x, R, L))
    assert torch.autograd.gradgradcheck(product, (x, R, L))
    for frozen in ((x.detach(), R, L), (x, R.detach(), L), (x, R, L.detach())):
        assert torch.autograd.gradgradcheck(product, frozen)


def test_a_compiled_backward_pass_runs_the_op_again() -> None:
    x, R, L = operands(*SHAPES[0])
    graphs = []

    def keep(module: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append([str(node.target) for node in module.graph.nodes])
        return make_boxed_func(module)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    y = torch.compile(lambda x, R, L: gpu.two_products(x, R, L)[0], backend=backend, fullgraph=True)(x, R, L)
    y.square().sum().backward()
    assert [sum("two_products" in target for target in graph) for graph in graphs] == [1, 1]
    leaf = x.detach().requires_grad_()
    mfx.Monarch(R.detach(), L.detach())(leaf).square().sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-12, atol=1e-12)


# PyTorch 2.14: opcheck reads .grad of what it made
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(torch.ops.monarch_fx_kernels.two_products.default, operands(*shape))


def test_rows_that_lie_apart_and_no_rows() -> None:
    x, R, L = operands(*SHAPES[0])
    wide = torch.cat([x, x], 1)[:, : x.shape[1]]
    torch.testing.assert_close(gpu.two_products(wide, R, L)[0], mfx.Monarch(R, L)(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gpu.two_products(x.T.contiguous().T, R, L)[0], mfx.Monarch(R, L)(x))
    assert gpu.two_products(x[:0], R, L)[0].shape == (0, L.shape[0] * L.shape[3])


def test_flops_are_counted() -> None:
    x, R, L = operands(*SHAPES[0])
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        gpu.two_products(x, R, L)
    assert counter.get_total_flops() == 2 * len(x) * (R.numel() + L.numel())
