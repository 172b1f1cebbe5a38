"""Products in eager mode past the dispatcher: here on the CPU, as if it were a GPU without Triton kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import monarch_fx as mfx
from monarch_fx.errors import StructureError
from monarch_fx.kernels import gpu
from monarch_fx.kernels.choice import SOME_TOKENS

OPERATOR = torch.ops.monarch_fx_kernels.product.default


@pytest.fixture(autouse=True)
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows and features of x in every body that ran past the dispatcher."""
    seen: list[tuple[int, ...]] = []
    served, body = gpu.serves, gpu._product

    def watched(x: Tensor, *others: Any) -> Tensor:
        seen.append(tuple(x.shape))
        return body(x, *others)

    monkeypatch.setattr(
        gpu, "serves", lambda x, R: served(x, R) or (x.is_cpu and R.dim() == 4 and not gpu._are_transformed())
    )
    monkeypatch.setattr(gpu, "_product", watched)  # the operator has the one of before
    return seen


def layer(*sizes: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> mfx.MonarchLinear:
    return mfx.MonarchLinear(*sizes, dtype=dtype, **options).requires_grad_(False)


def close(y: Tensor, x: Tensor, made: mfx.MonarchLinear) -> None:
    size = {"in_features": made.in_features, "out_features": made.out_features}
    R, L = made.weight.R.double(), made.weight.L.double()
    exact, scale = mfx.Monarch(R, L, **size)(x.double()), mfx.Monarch(R.abs(), L.abs(), **size)(x.double().abs())
    if made.bias is not None:
        exact, scale = exact + made.bias.double(), scale + made.bias.double().abs()
    # the intermediate, the product and its sum with the bias are rounded; sums may be kept in the dtype
    terms = made.weight.R.shape[3] + made.weight.L.shape[1] * made.weight.R.shape[2]
    assert y.dtype == x.dtype
    assert ((y.double() - exact).abs() <= (3 + terms) * torch.finfo(x.dtype).eps / 2 * scale).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 1), (2, 3), (0,), (600,), (2049,), ()])
@pytest.mark.parametrize("grid", [(2, 3), (1, 4), (4, 1), (1, 1)])
def test_results(
    grid: tuple[int, int], shape: tuple[int, ...], bias: bool, dtype: torch.dtype, bodies: list[tuple[int, ...]]
) -> None:
    made = layer(48, 24, grid, 8, bias=bias, dtype=dtype)
    x = torch.randn(*shape, 48, dtype=dtype)
    y = made(x)
    close(y, x, made)
    assert y.shape == (*shape, 24)
    tokens = x.numel() // 48
    open_ = grid == (1, 1) and tokens > SOME_TOKENS  # PyTorch calls a library's two products
    assert bodies == ([] if open_ else [(tokens, 48)])


def test_rows_that_lie_apart(bodies: list[tuple[int, ...]]) -> None:
    made = layer(48, 24, 2, 8)
    for x in (torch.randn(48, 7).bfloat16().T, torch.randn(3, 5, 96).bfloat16()[..., ::2]):
        close(made(x), x, made)
    assert bodies == [(7, 48), (15, 48)]


def test_padded_products_go_by_the_operator(bodies: list[tuple[int, ...]]) -> None:
    for sizes, tokens in (((47, 24), 3), ((48, 23), 3)):
        made, x = layer(*sizes, 2, 8), torch.randn(tokens, sizes[0]).bfloat16()
        close(made(x), x, made)
    made, x = layer(50, 50, 2, 160, bias=False), torch.randn(600, 50).bfloat16()  # blocks of 25, long sums
    close(made(x), x, made)
    assert bodies == []


class Seeing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Hearing(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    pass


def test_whoever_looks_on_sees_the_operator(bodies: list[tuple[int, ...]]) -> None:
    made, x = layer(48, 24, 2, 8, bias=False), torch.randn(5, 48).bfloat16()
    R, L = made.weight.R, made.weight.L
    with Seeing() as seeing:
        made(x)
    assert OPERATOR in seeing.seen
    with Hearing() as hearing:
        mfx.monarch_bmm(x, R, L)
    assert "monarch_fx.monarch_bmm" in [str(function) for function in hearing.seen]
    with FlopCounterMode(display=False) as counter:
        made(x)
    assert counter.get_total_flops() == 2 * 5 * (R.numel() + L.numel())
    graph = make_fx(lambda x: mfx.monarch_bmm(x, R, L))(x).graph
    assert OPERATOR in [node.target for node in graph.nodes]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        made(x)
    assert "monarch_fx::monarch_bmm" in [event.key for event in profile.key_averages()]
    assert type(mfx.monarch_bmm(x.as_subclass(Own), R, L)) is Own
    assert bodies == []
    made(x)
    assert bodies == [(5, 48)]


def test_gradients_and_transforms_are_those_of_the_operator(bodies: list[tuple[int, ...]]) -> None:
    made, x = layer(48, 24, 2, 8, bias=False), torch.randn(5, 48).bfloat16()
    R, L = made.weight.R, made.weight.L
    learned = R.detach().clone().requires_grad_()
    mfx.monarch_bmm(x, learned, L).sum().backward()
    assert learned.grad is not None
    y, tangent = torch.func.jvp(lambda x: mfx.monarch_bmm(x, R, L), (x,), (x,))
    torch.testing.assert_close(y, tangent)
    torch.testing.assert_close(torch.func.vmap(made)(torch.stack([x, 2 * x])), torch.stack([y, 2 * y]))
    with torch.autocast("cpu", torch.bfloat16):
        assert mfx.monarch_bmm(x.float(), R.float(), L.float()).dtype == torch.bfloat16
    assert bodies == []
    with torch.no_grad():
        frozen = mfx.monarch_bmm(x, learned, L)
    assert not frozen.requires_grad
    assert bodies == [(5, 48)]
    with torch.inference_mode():
        assert mfx.monarch_bmm(x, learned, L).is_inference()


def test_compiled_graphs_have_the_operator(bodies: list[tuple[int, ...]]) -> None:
    made, x = layer(48, 24, 2, 8), torch.randn(5, 48).bfloat16()
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    torch.compile(made, backend=backend, fullgraph=True)(x)
    assert [str(target) for target in seen] == ["monarch_fx.monarch_bmm"]


@pytest.mark.parametrize(
    ("x", "R", "L", "bias", "said"),
    [
        ((5, 47), (2, 2, 8, 24), (2, 2, 8, 12), None, None),
        ((5, 49), (2, 2, 8, 24), (2, 2, 8, 12), None, "takes 47 to 48 input features"),
        ((5, 48), (2, 2, 8, 24), (2, 2, 4, 12), None, "L must be"),
        ((5, 48), (2, 2, 8, 24), (2, 2, 8, 12), (23,), "bias must end in 24"),
        ((), (2, 2, 8, 24), (2, 2, 8, 12), None, "input features"),
        ((5, 48), (2, 8, 24), (2, 8, 12), None, "R must be"),
    ],
)
def test_sizes_that_disagree_are_refused(
    x: tuple[int, ...], R: tuple[int, ...], L: tuple[int, ...], bias: tuple[int, ...] | None, said: str | None
) -> None:
    operands = [None if size is None else torch.randn(size).bfloat16() for size in (x, R, L, bias)]
    for _ in range(2):  # what was found is remembered
        with contextlib.nullcontext() if said is None else pytest.raises(StructureError, match=said):
            mfx.monarch_bmm(*operands)


def test_dtypes_and_devices_that_disagree_are_refused() -> None:
    made, x = layer(48, 24, 2, 8), torch.randn(5, 48).bfloat16()
    made(x)
    R, L = made.weight.R, made.weight.L
    with pytest.raises(StructureError, match="must have one dtype"):
        mfx.monarch_bmm(x, R.half(), L)
    with pytest.raises(StructureError, match="must be on one device, got cpu, meta: move"):
        mfx.monarch_bmm(x, R, L.to("meta"))
    with pytest.raises(StructureError, match=r"The gate must be like the result, .* on cpu, got .* on meta"):
        mfx.monarch_bmm(x, R, L, activation="silu", gate=torch.empty(5, 24, device="meta", dtype=torch.bfloat16))
    with pytest.raises(StructureError, match="on one device"):
        nn.Sequential(made)(x.to("meta"))
