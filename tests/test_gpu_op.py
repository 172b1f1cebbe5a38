"""The ops behind monarch_bmm on a GPU. Their calls of torch run anywhere: here on the CPU, in float64."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

import monarch_fx as mfx
from monarch_fx.errors import MonarchWarning
from monarch_fx.kernels import gpu, halves, padding
from monarch_fx.kernels.reference import ACTIVATIONS

SHAPES = [(5, 2, 3, 4, 6, 7), (4, 1, 3, 5, 8, 6), (6, 3, 1, 2, 5, 9), (5, 1, 1, 3, 6, 8)]


def operands(tokens: int, n_in: int, n_out: int, rank: int, p: int, s: int) -> tuple[torch.Tensor, ...]:
    shapes = (tokens, n_in * p), (n_in, n_out, rank, p), (n_out, n_in, rank, s)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_intermediate(shape: tuple[int, ...]) -> None:
    x, R, L = (operand.detach() for operand in operands(*shape))
    y, t = gpu.product_and_intermediate(x, R, L, None)
    torch.testing.assert_close(y, mfx.Monarch(R, L)(x), rtol=1e-12, atol=1e-12)
    exact = torch.einsum("kjrp,tkp->jtkr", R, x.unflatten(1, (R.shape[0], -1))).flatten(2)
    torch.testing.assert_close(t, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_first_and_second_order(shape: tuple[int, ...]) -> None:
    x, R, L = operands(*shape)
    bias = torch.randn(L.shape[0] * L.shape[3], dtype=torch.float64, requires_grad=True)

    def product(*args: torch.Tensor) -> torch.Tensor:
        return gpu.products(*args, None, "none")

    inputs = (x, R, L, bias)
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)
    for i in range(len(inputs)):
        frozen = tuple(operand.detach() if i == j else operand for j, operand in enumerate(inputs))
        assert torch.autograd.gradgradcheck(product, frozen)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_graph_of_gradients_counts_no_path_twice(recompute: bool) -> None:
    """Where x depends on the factors: the outer backward pass adds that path up by itself, and calls hooks once."""
    x, R, L = operands(5, 2, 2, 3, 4, 4)
    doubled: list[torch.Tensor] = []
    R.register_hook(lambda grad: doubled.append(grad) or 2 * grad)

    def gradients(product: Callable, create_graph: bool) -> tuple[torch.Tensor, ...]:
        y = product(torch.tanh(product(x)))
        return torch.autograd.grad(y.square().sum(), (x, R, L), create_graph=create_graph)

    exact = gradients(lambda x: mfx.Monarch(R, L)(x), False)
    for create_graph in (False, True):
        doubled.clear()
        found = gradients(lambda x: gpu.products(x, R, L, None, None, "none", recompute), create_graph)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        assert len(doubled) == 1


def test_frozen_factors_keep_no_activations() -> None:
    x, R, L = (operand.requires_grad_(i == 0) for i, operand in enumerate(o.detach() for o in operands(*SHAPES[0])))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = gpu.products(x, R, L, None, None, "none")
    assert {tensor.data_ptr() for tensor in kept} == {R.data_ptr(), L.data_ptr()}
    exact = torch.ones_like(y) @ mfx.Monarch(R, L).to_dense()
    for create_graph in (False, True):
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=create_graph, retain_graph=True)
        torch.testing.assert_close(grad, exact, rtol=1e-12, atol=1e-12)


def test_complex_factors_have_the_same_gradients_with_recompute() -> None:
    x, R, L = (operand.detach().to(torch.complex128).requires_grad_() for operand in operands(*SHAPES[0]))
    with torch.no_grad():
        for operand in (x, R, L):
            operand += 1j * torch.randn_like(operand)
    found, exact = (
        torch.autograd.grad(mfx.monarch_bmm(x, R, L, recompute=again).abs().square().sum(), (x, R, L))
        for again in (True, False)
    )
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_recomputed_intermediate_is_not_kept(shape: tuple[int, ...]) -> None:
    inputs = operands(*shape)

    def product(*args: torch.Tensor) -> torch.Tensor:
        return mfx.monarch_bmm(*args, recompute=True)

    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = product(*inputs)
    assert {tensor.data_ptr() for tensor in kept} == {operand.data_ptr() for operand in inputs}
    torch.testing.assert_close(y, mfx.monarch_bmm(*inputs), rtol=1e-12, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):  # backward outside, as in any training step
        narrow = product(*(operand.float() for operand in inputs))
    assert narrow.dtype == torch.bfloat16
    narrow.sum().backward()
    assert all(operand.grad is not None for operand in inputs)


def test_function_transforms_keep_the_intermediate() -> None:
    x, R, L = (operand.detach() for operand in operands(*SHAPES[0]))
    found, exact = (
        torch.func.grad(lambda L, again=again: mfx.monarch_bmm(x, R, L, recompute=again).square().sum())(L)
        for again in (True, False)
    )
    torch.testing.assert_close(found, exact, rtol=0, atol=0)


def test_a_compiled_backward_pass_recomputes() -> None:
    x, R, L = operands(*SHAPES[0])
    graphs = []

    def keep(module: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(" ".join(str(node.target) for node in module.graph.nodes))
        return make_boxed_func(module)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    y = torch.compile(functools.partial(mfx.monarch_bmm, recompute=True), backend=backend, fullgraph=True)(x, R, L)
    y.square().sum().backward()
    forward, backward = graphs
    assert "intermediate" not in forward
    assert "bmm" not in forward
    assert "left_gradient" in backward
    found = [operand.grad for operand in (x, R, L)]
    leaves = [operand.detach().requires_grad_() for operand in (x, R, L)]
    mfx.monarch_bmm(*leaves).square().sum().backward()
    torch.testing.assert_close(found, [leaf.grad for leaf in leaves], rtol=1e-12, atol=1e-12)


def test_a_compiled_backward_pass_runs_the_op_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "serves", lambda x, R: True)
    x, R, L = operands(*SHAPES[0])
    graphs = []

    def keep(module: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append([str(node.target) for node in module.graph.nodes])
        return make_boxed_func(module)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    y = torch.compile(mfx.monarch_bmm, backend=backend, fullgraph=True)(x, R, L)
    y.square().sum().backward()
    assert [sum("product_and_intermediate" in target for target in graph) for graph in graphs] == [1, 1]
    leaf = x.detach().requires_grad_()
    mfx.Monarch(R.detach(), L.detach())(leaf).square().sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-12, atol=1e-12)


def seen_by_compilers(compute: Callable, *arguments: object, dynamic: bool = False) -> tuple[torch.Tensor, list]:
    """The result, and the targets of the graphs' nodes: of the forward pass, and of the backward pass once that ran."""
    graphs: list[list[str]] = []

    def keep(module: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append([str(node.target) for node in module.graph.nodes])
        return make_boxed_func(module)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    return torch.compile(compute, backend=backend, dynamic=dynamic, fullgraph=True)(*arguments), graphs


def test_compilers_see_the_products_of_low_rank_with_gradients() -> None:
    x, R, L = operands(*SHAPES[3])
    y, graphs = seen_by_compilers(lambda *operands: gpu.products(*operands, None, None, "none"), x, R, L)
    y.square().sum().backward()
    assert [sum(target == "aten.mm.default" for target in graph) for graph in graphs] == [2, 4]
    assert not any("monarch" in target for graph in graphs for target in graph)
    leaves = [operand.detach().requires_grad_() for operand in (x, R, L)]
    mfx.monarch_bmm(*leaves).square().sum().backward()
    found = [operand.grad for operand in (x, R, L)]
    torch.testing.assert_close(found, [leaf.grad for leaf in leaves], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("tokens", "shape", "activation", "dynamic", "are_seen"),
    [
        (2049, (1, 1, 16, 12, 8), "none", False, True),
        (2048, (1, 1, 16, 12, 8), "none", False, False),  # kernels that start early
        (2049, (1, 1, 16, 12, 8), "gelu", False, False),  # an epilogue
        (2049, (1, 1, 12, 12, 8), "none", False, False),  # a rank that is padded
        (2049, (2, 1, 16, 12, 8), "none", False, False),  # a transpose between the halves
        (2049, (1, 1, 16, 12, 8), "none", True, False),  # any number of tokens
    ],
)
def test_what_compilers_see_without_gradients(
    tokens: int, shape: tuple[int, ...], activation: str, dynamic: bool, are_seen: bool
) -> None:
    x, R, L = (operand.detach() for operand in operands(tokens, *shape))

    def compute(x: torch.Tensor, R: torch.Tensor, L: torch.Tensor) -> torch.Tensor:
        return gpu.products(x, R, L, None, None, activation)

    y, (graph,) = seen_by_compilers(compute, x, R, L, dynamic=dynamic)
    assert any("monarch" in target for target in graph) != are_seen
    torch.testing.assert_close(y, mfx.monarch_bmm(x, R, L, activation=activation), rtol=1e-12, atol=1e-12)


def test_many_products_of_the_same_rows_are_seen_one_by_one() -> None:
    x, R, L = (operand.detach() for operand in operands(65, 1, 1, 16, 12, 8))
    bias = torch.randn(8, dtype=torch.float64)

    def compute(x: torch.Tensor, R: torch.Tensor, L: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
        pair = [R, R + 1], [L, L - 1], [bias, None]
        return [*gpu.products_together(x, *pair, None), *gpu.products_together(x, *pair, "silu")]

    results, (graph,) = seen_by_compilers(compute, x, R, L, bias)
    assert not any("together" in target for target in graph)
    one, other = mfx.monarch_bmm(x, R, L, bias), mfx.monarch_bmm(x, R + 1, L - 1)
    torch.testing.assert_close(results, [one, other, F.silu(one) * other], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck(shape: tuple[int, ...]) -> None:
    x, R, L = operands(*shape)
    rows = L.shape[0] * L.shape[3]
    bias, gate = torch.randn(rows, dtype=torch.float64), torch.randn(len(x), rows, dtype=torch.float64)
    values = (x.detach(), R.detach(), L.detach(), bias)
    torch.library.opcheck(gpu.product_and_intermediate, values)
    torch.library.opcheck(gpu.product, (*values, gate, "silu"))
    torch.library.opcheck(gpu.left_gradient, (x.detach(), R.detach(), gate))


def test_rows_that_lie_apart_and_no_rows() -> None:
    x, R, L = (operand.detach() for operand in operands(*SHAPES[0]))
    wide = torch.cat([x, x], 1)[:, : x.shape[1]]
    exact = mfx.Monarch(R, L)(x)
    for rows in (wide, x.T.contiguous().T):
        for y in (gpu.product_and_intermediate(rows, R, L, None)[0], gpu.product(rows, R, L, None, None, "none")):
            torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
    assert gpu.product(x[:0], R, L, None, None, "gelu").shape == (0, L.shape[0] * L.shape[3])
    assert gpu.product_and_intermediate(x[:0], R, L, None)[0].shape == (0, L.shape[0] * L.shape[3])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_epilogues(shape: tuple[int, ...], activation: str) -> None:
    x, R, L = (operand.detach() for operand in operands(*shape))
    plain = mfx.Monarch(R, L)(x)
    bias, gate = torch.randn_like(plain[0]), torch.randn_like(plain)
    act = ACTIVATIONS[activation]
    for y, exact in (
        (gpu.product(x, R, L, bias, None, activation), act(plain + bias)),
        (gpu.product(x, R, L, None, gate, activation), act(gate) * plain),
    ):
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)


def test_float32_has_its_bias_and_activation_behind_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a compiler sees them: in TF32 no kernel takes them."""
    monkeypatch.setattr(gpu, "serves", lambda x, R: True)
    seen = []
    inner = gpu.product
    monkeypatch.setattr(gpu, "product", lambda *operands: seen.append(operands[3:]) or inner(*operands))
    for shape in SHAPES:
        x, R, L = (operand.detach().float() for operand in operands(*shape))
        bias = torch.randn(L.shape[0] * L.shape[3])
        with torch.no_grad():
            y = mfx.monarch_bmm(x, R, L, bias, activation="silu")
        exact = F.silu(mfx.Monarch(R.double(), L.double())(x.double()) + bias.double())
        torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
    assert seen == [(None, None, "none")] * len(SHAPES)


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, ["gcc"]), PermissionError("cache")])
def test_what_compilers_raise_is_said_once(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    x, *factors = on_a_gpu(monkeypatch, raising=error)
    with pytest.warns(MonarchWarning, match=rf"both halves .* failed on .*{type(error).__name__}"):
        assert not halves.ran("both halves", "few.product", x, *factors)
    assert not halves.ran("both halves", "few.product", x, *factors)  # without another warning, which would be an error
    other = SimpleNamespace(**{**vars(x), "dtype": torch.bfloat16})
    with pytest.warns(MonarchWarning, match="bfloat16"):
        assert not halves.ran("both halves", "few.product", other, *factors)


def test_running_out_of_memory_is_no_failure_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x, *factors = on_a_gpu(monkeypatch, raising=torch.OutOfMemoryError("Tried to allocate"))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            halves.ran("both halves", "few.product", x, *factors)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, raising: Exception) -> tuple:
    """x and factors as on a GPU whose kernels fail."""

    def fails(*operands: object) -> None:
        raise raising

    monkeypatch.setattr(halves, "launchers", lambda: SimpleNamespace(few=SimpleNamespace(product=fails)))
    monkeypatch.setattr(halves, "_failed", set())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    x = {"is_cuda": True, "dtype": torch.float16, "device": "cuda:0", "shape": (8, 16), "get_device": lambda: 0}
    return SimpleNamespace(**x), torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8)


def test_no_kernel_runs_where_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recomputed intermediate takes this way, too, whatever the GPU has."""
    monkeypatch.setattr(halves, "launchers", lambda: None)
    x = SimpleNamespace(is_cuda=True, dtype=torch.float16)
    assert not halves.ran("the first half", "first_half", x, x)


GROUP = [(2, 3, 4, 7), (1, 1, 5, 21), (4, 1, 2, 9)]  # n_in, n_out, rank, s of products of 12 features


def group(tokens: int, count: int) -> tuple:
    """x, and lists of R, L, and a bias for each product but the second."""
    made = [operands(tokens, n_in, n_out, rank, 12 // n_in, s) for n_in, n_out, rank, s in GROUP[:count]]
    R, L = [R for _, R, _ in made], [L for *_, L in made]
    biases = [torch.randn(factor.shape[0] * factor.shape[3], dtype=torch.float64) for factor in L]
    return made[0][0], R, L, [None if i == 1 else bias for i, bias in enumerate(biases)]


def one_by_one(x: torch.Tensor, R: list, L: list, biases: list) -> list[torch.Tensor]:
    return [mfx.monarch_bmm(x, *factors) for factors in zip(R, L, biases, strict=True)]


@pytest.mark.parametrize("tokens", [0, 1, 63, 65])
def test_products_together(tokens: int) -> None:
    x, R, L, biases = group(tokens, 3)
    with torch.no_grad():
        exact = one_by_one(x, R, L, biases)
        together = torch.ops.monarch_fx.monarch_together(x[None], R, L, biases)
        torch.testing.assert_close([y[0] for y in together], exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gpu.together(x, R, L, biases, None), exact, rtol=1e-12, atol=1e-12)
        (gated,) = gpu.together(x, R[:2], L[:2], biases[:2], "silu")
        torch.testing.assert_close(gated, F.silu(exact[0]) * exact[1], rtol=1e-12, atol=1e-12)
        (same,) = torch.ops.monarch_fx.monarch_together(x, R[:2], L[:2], biases[:2], gated="silu")
        torch.testing.assert_close(same, gated, rtol=1e-12, atol=1e-12)


def test_gradients_of_products_together() -> None:
    x, R, L, biases = group(5, 2)

    def plain(x: torch.Tensor, *factors: torch.Tensor) -> list[torch.Tensor]:
        return torch.ops.monarch_fx.monarch_together(x, factors[:2], factors[2:], biases)

    def gated(x: torch.Tensor, *factors: torch.Tensor) -> list[torch.Tensor]:
        return torch.ops.monarch_fx.monarch_together(x, factors[:2], factors[2:], biases, gated="silu")

    for products in (plain, gated):
        assert torch.autograd.gradcheck(products, (x, *R, *L))
    tangents = [torch.randn_like(operand) for operand in (x, *R, *L)]
    _, slope = torch.func.jvp(gated, (x, *R, *L), tuple(tangents))
    (leaves := [operand.detach().requires_grad_() for operand in (x, *R, *L)])
    (y,) = gated(*leaves)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    expected = sum((grad * tangent).sum() for grad, tangent in zip(grads, tangents, strict=True))
    torch.testing.assert_close(slope[0].sum(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gated", [None, "gelu"])
def test_opcheck_of_products_together(gated: str | None) -> None:
    x, R, L, biases = (value if value is None or isinstance(value, list) else value.detach() for value in group(5, 2))
    R, L = [factor.detach() for factor in R], [factor.detach() for factor in L]
    torch.library.opcheck(gpu.together, (x, R, L, biases, gated))


def test_products_together_compile_for_all_numbers_of_tokens() -> None:
    x, R, L, biases = group(70, 2)
    x = x.detach()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda x: gpu.together(x, R, L, biases, None), backend=counter, dynamic=True)
    with torch.no_grad():
        for tokens in (17, 64, 70):
            exact = one_by_one(x[:tokens], R, L, biases)
            torch.testing.assert_close(compiled(x[:tokens]), exact, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_flops_are_counted() -> None:
    x, R, L = operands(*SHAPES[0])
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        gpu.product_and_intermediate(x, R, L, None)
        gpu.product(x, R, L, None, None, "none")
        gpu.left_gradient(x, R, torch.ones(len(x), L.shape[0] * L.shape[3], dtype=torch.float64))
    assert counter.get_total_flops() == 3 * 2 * len(x) * (R.numel() + L.numel())
    x, R, L, biases = group(3, 3)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        gpu.together(x, R, L, biases, None)
    assert counter.get_total_flops() == 2 * len(x) * sum(factor.numel() for factor in (*R, *L))


# n_in, n_out, rank, p, s; rank, p and s that are computed with, without gradients and with them
PADDED = [
    ((2, 3, 5, 7, 10), (8, 7, 10), (8, 16, 16)),
    ((2, 2, 24, 12, 20), (24, 12, 20), (24, 16, 32)),
    ((1, 4, 16, 8, 9), (16, 8, 9), (16, 8, 16)),
    ((4, 1, 17, 9, 8), (24, 9, 8), (24, 16, 8)),
    ((1, 1, 5, 9, 6), (8, 9, 6), (8, 16, 8)),
    ((1, 1, 24, 12, 1000), (24, 12, 1000), (24, 12, 1000)),
    ((2, 3, 16, 8, 24), (16, 8, 24), (16, 8, 24)),
    ((2, 2, 130, 9, 7), (136, 16, 16), (136, 16, 16)),
    ((3, 2, 90, 10, 7), (96, 10, 16), (96, 16, 16)),
    ((2, 3, 90, 7, 10), (96, 16, 10), (96, 16, 16)),
    ((1, 1, 256, 9, 12), (256, 16, 12), (256, 16, 12)),
]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rank, p and s of every product that is computed."""
    seen = []
    first, second, differentiable = halves.first_half, halves.second_half_by_library, gpu._differentiable

    def watched_differentiable(
        x: torch.Tensor, R: torch.Tensor, L: torch.Tensor, *rest: object, **options: object
    ) -> torch.Tensor:
        before, y = len(seen), differentiable(x, R, L, *rest, **options)
        if len(seen) == before:  # low rank has no halves there
            seen.append((*R.shape[2:], L.shape[3]))
        return y

    def watched_first(x: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(R.shape[2:]))
        return first(x, R)

    def watched_second(t: torch.Tensor, L: torch.Tensor, *rest: object) -> None:
        seen[-1] += (L.shape[3],)
        second(t, L, *rest)

    monkeypatch.setattr(gpu, "_differentiable", watched_differentiable)
    monkeypatch.setattr(halves, "first_half", watched_first)
    monkeypatch.setattr(halves, "second_half_by_library", watched_second)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "untrained", "trained"), PADDED, ids=str)
def test_unaligned_sizes_are_padded(
    shape: tuple[int, ...],
    untrained: tuple[int, ...],
    trained: tuple[int, ...],
    bias: bool,
    sizes: list[tuple[int, ...]],
) -> None:
    for tokens, is_padded in ((padding.PADDED_TOKENS - 1, False), (padding.PADDED_TOKENS, True)):
        x, R, L = operands(tokens, *shape)
        inputs = [x, R, L, torch.randn(L.shape[0] * L.shape[3], dtype=torch.float64, requires_grad=True)][: 3 + bias]
        y = mfx.monarch_bmm(*inputs)
        sizes.clear()
        found = gpu.products(*inputs, *[None] * (1 - bias), None, "gelu")
        assert sizes == [trained if is_padded else shape[2:]]
        assert found.is_contiguous()
        with torch.no_grad():
            inferred = gpu.products(*inputs, *[None] * (1 - bias), None, "gelu")
        assert sizes[1:] == [untrained if is_padded else shape[2:]]
        torch.testing.assert_close((found, inferred), (F.gelu(y), F.gelu(y)), rtol=1e-12, atol=1e-12)
        grad = torch.randn_like(y)
        ours, right = torch.autograd.grad(found, inputs, grad), torch.autograd.grad(F.gelu(y), inputs, grad)
        # float64, sums of up to 512 terms of about 10
        torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("features", "computed"), [((42, 21), (14, 7)), ((40, 21), (16, 7)), ((42, 20), (14, 16)), ((40, 20), (16, 16))]
)
def test_blocks_are_aligned_where_the_grid_pads_anyway(
    features: tuple[int, int], computed: tuple[int, int], sizes: list[tuple[int, ...]]
) -> None:
    _, R, L = operands(1, 3, 3, 8, 14, 7)
    bias = torch.randn(features[1], dtype=torch.float64)
    for tokens in (padding.PADDED_TOKENS - 1, padding.PADDED_TOKENS):
        x = torch.randn(tokens, features[0], dtype=torch.float64)
        sizes.clear()
        with torch.no_grad():
            found = gpu.products(x, R, L, bias, None, "gelu", out_features=features[1])
        assert sizes == [(8, *(computed if tokens == padding.PADDED_TOKENS else (14, 7)))]
        exact = F.gelu(mfx.Monarch(R, L, *features)(x) + bias)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        assert found.is_contiguous()


def test_padded_gradients_of_first_and_second_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "PADDED_TOKENS", 1)

    def product(*args: torch.Tensor) -> torch.Tensor:
        return gpu.products(*args, None, "none")

    for shape in ((3, 2, 1, 2, 3, 3), (3, 1, 1, 2, 3, 5)):
        x, R, L = operands(*shape)
        bias = torch.randn(L.shape[0] * L.shape[3], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(product, (x, R, L, bias))
        assert torch.autograd.gradgradcheck(product, (x, R, L, bias))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("out_features", "grid", "rank"), [(19, (3, 2), 130), (9, (8, 2), 5), (7, (1, 2), 130)])
def test_padded_sizes_compile_once_for_all_numbers_of_tokens(
    out_features: int, grid: tuple[int, int], rank: int, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes that the grid doesn't divide, as well: 13 features in two blocks, 19 in three, 9 in eight, some empty."""
    monkeypatch.setattr(gpu, "serves", lambda x, R: True)
    layer = mfx.MonarchLinear(13, out_features, grid, rank, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, dynamic=True, fullgraph=True)
    for tokens in (3, 600, 1000):
        x = torch.randn(tokens, 13, dtype=torch.float64)
        exact = mfx.Monarch(layer.weight.R, layer.weight.L, 13, out_features)(x) + layer.bias
        with torch.set_grad_enabled(trained):
            found = compiled(x)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
        assert found.is_contiguous()
        if trained:
            leaves, grad = tuple(layer.parameters()), torch.randn_like(exact)
            ours, right = (torch.autograd.grad(y, leaves, grad) for y in (found, exact))
            torch.testing.assert_close(ours, right, rtol=1e-11, atol=1e-11)  # sums of up to 1000 terms
    assert counter.frame_count == 1


def test_flops_of_padded_products() -> None:
    """Zeros around a product are counted; those that a kernel adds by itself are not."""
    x, R, L = operands(600, *PADDED[0][0])
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        gpu.products(x, R, L, None, None, "none")
    n_in, n_out = R.shape[:2]
    assert counter.get_total_flops() == 2 * 600 * n_in * n_out * 8 * (16 + 16)
    with torch.no_grad(), torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        gpu.products(x, R, L, None, None, "none")
    assert counter.get_total_flops() == 2 * 600 * (R.numel() + L.numel())
