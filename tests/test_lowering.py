"""The operators in graphs that Inductor compiles: what it emits, on the CPU, and its launches in the interpreter."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from monarch_fx.kernels import choice, gpu, halves

pytest.importorskip("triton")
emitted = pytest.importorskip("monarch_fx.kernels.emitted")
lowering = pytest.importorskip("monarch_fx.kernels.lowering")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float16).eps
EMITTED = f"extern_kernels.{lowering.FEW_CALL}("
HALVES = f"extern_kernels.{lowering.HALF_CALL}("
# n_in, n_out, rank, s of products that read the same 96 features
ONE, OTHER, THIRD = (2, 3, 8, 24), (1, 1, 20, 33), (4, 2, 16, 40)
# of each product whether it has a bias
GROUPS = [((ONE, OTHER), (False, True)), ((THIRD, ONE, OTHER), (True, False, True))]
PAIRS = [((ONE, (1, 3, 20, 24)), (True, False)), ((ONE, ONE), (False, True))]


@pytest.fixture(autouse=True)
def registered() -> None:
    lowering.register()


def operands(tokens: int, shapes: tuple, biased: tuple[bool, ...], device: str = "cpu") -> tuple:
    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.float16, device=device)

    R = [random(n_in, n_out, rank, 96 // n_in) / (96 // n_in) ** 0.5 for n_in, n_out, rank, _ in shapes]
    L = [random(n_out, n_in, rank, s) / (n_in * rank) ** 0.5 for n_in, n_out, rank, s in shapes]
    biases = [random(shape[1] * shape[3]) if has_one else None for shape, has_one in zip(shapes, biased, strict=True)]
    return random(tokens, 96), R, L, biases


def exact(compute: Callable, *arguments: object) -> object:
    """In float64."""

    def widened(argument: object) -> object:
        if isinstance(argument, list):
            return [widened(inner) for inner in argument]
        return argument.double() if isinstance(argument, Tensor) else argument

    return compute(*map(widened, arguments))


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for a rounding of the intermediate, one of the result, and those of what is computed with it."""
    torch.testing.assert_close(found.double(), expected, rtol=4 * EPS, atol=4 * EPS * expected.abs().max().item())


def compiled(compute: Callable, *arguments: object, dynamic: bool = False) -> tuple[object, str]:
    """The result, and the code that Inductor wrote."""
    torch._dynamo.reset()
    with torch.no_grad():
        return_value, (code,) = run_and_get_code(torch.compile(compute, fullgraph=True, dynamic=dynamic), *arguments)
    return return_value, code


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize(("activation", "gated"), [("none", False), ("gelu", False), ("silu", True)])
def test_a_product(tokens: int, activation: str, gated: bool) -> None:
    x, (R,), (L,), (bias,) = operands(tokens, (ONE,), (True,))
    gate = torch.randn(tokens, 72, dtype=torch.float16) if gated else None

    def compute(x: Tensor, R: Tensor, L: Tensor, bias: Tensor, gate: Tensor | None) -> tuple[Tensor, ...]:
        y = gpu.product(x + 1, R, L, bias, gate, activation)
        return y, y.relu() - 1

    results, code = compiled(compute, x, R, L, bias, gate)
    assert code.count(EMITTED) == 1
    for found, expected in zip(results, exact(compute, x, R, L, bias, gate), strict=True):
        close(found, expected)


@pytest.mark.parametrize(("shapes", "biased"), GROUPS)
def test_products_together(shapes: tuple, biased: tuple[bool, ...]) -> None:
    def compute(x: Tensor, R: list[Tensor], L: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
        first, *others = gpu.together(x * 2, R, L, biases, None)
        return [first.relu(), *others]  # computed with, and given as it is

    arguments = operands(3, shapes, biased)
    results, code = compiled(compute, *arguments)
    assert code.count(EMITTED) == 1
    for found, expected in zip(results, exact(compute, *arguments), strict=True):
        close(found, expected)


@pytest.mark.parametrize(("shapes", "biased"), PAIRS)
def test_a_product_that_is_the_gate_of_another(shapes: tuple, biased: tuple[bool, ...]) -> None:
    def compute(x: Tensor, R: list[Tensor], L: list[Tensor], biases: list[Tensor | None]) -> Tensor:
        return gpu.together(x, R, L, biases, "silu")[0] + 1

    arguments = operands(3, shapes, biased)
    found, code = compiled(compute, *arguments)
    assert code.count(EMITTED) == 1
    close(found, exact(compute, *arguments))


def test_unknown_numbers_of_tokens_are_the_operators() -> None:
    def compute(x: Tensor, R: list[Tensor], L: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
        return [*gpu.together(x, R, L, biases, None), gpu.product(x, R[0], L[0], None, None, "relu")]

    arguments = operands(3, *GROUPS[0])
    results, code = compiled(compute, *arguments, dynamic=True)
    assert EMITTED not in code
    assert "monarch_fx_kernels.together" in code
    assert "monarch_fx_kernels.product" in code
    for found, expected in zip(results, exact(compute, *arguments), strict=True):
        close(found, expected)


# whether each half is a kernel: the first one of a column of blocks is a library's product where it fills the GPU,
# that of a row a batched one; of two rows two, where the rank is large. Short second ones are up to 2048 tokens, behind
# a library only where several blocks are a full wave
@pytest.mark.parametrize(
    ("tokens", "shape", "are_kernels"),
    [
        (65, ONE, (True, True)),
        (70, (1, 3, 16, 24), (True, True)),
        (300, (1, 3, 16, 24), (True, True)),
        (520, (1, 3, 16, 24), (False, False)),
        (384, (1, 2, 144, 24), (False, True)),
        (70, (1, 1, 272, 24), (False, False)),
        (70, (3, 1, 16, 24), (True, True)),
        (520, (3, 1, 16, 24), (False, False)),
        (2060, (3, 1, 16, 24), (False, False)),
        (2060, THIRD, (True, False)),
        (520, (3, 2, 272, 24), (False, False)),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_halves_of_many_tokens(
    tokens: int, shape: tuple, are_kernels: tuple[bool, bool], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "ROWS_FLOPS", 1e6)
    monkeypatch.setattr(halves, "units", lambda device: 8)
    x, (R,), (L,), (bias,) = operands(tokens, (shape,), (biased,))
    x = torch.cat([x, x])  # from the middle of which the product takes its rows

    def compute(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        rows = (x + 1)[7 : 7 + tokens]
        y, t = gpu.product_and_intermediate(rows, R, L, bias)
        return y, t, y.relu() - 1, gpu.product(rows * 2, R, L, bias, None, "none")

    results, code = compiled(compute, x, R, L, bias)
    assert "torch.ops.monarch_fx_kernels" not in code
    first, second = are_kernels
    assert code.count(HALVES) == 2 * (first + (second or (biased and shape[1] > 1)))
    for found, expected in zip(results, exact(compute, x, R, L, bias), strict=True):
        close(found, expected)
        assert found.stride() == expected.stride()


# of a view that is read before Inductor computes what it is of twice for its own products, too
@pytest.mark.parametrize(
    ("is_view", "other_reader"),
    [(False, "before"), (False, "behind"), (False, "backward"), (True, "behind"), (True, "backward")],
)
def test_what_computes_an_operand_runs_once(is_view: bool, other_reader: str) -> None:
    """Whatever else reads it, a sum for a bias' gradient or the backward pass."""
    x, (R,), (L,), _ = operands(65, (ONE,), (False,))

    def compute(x: Tensor, z: Tensor, R: Tensor, L: Tensor) -> tuple[Tensor, ...]:
        a = x * 3.125 + z.relu()
        a = a.view(5, 13, 96) if is_view else a
        L = L * a[1:].amax() if other_reader == "before" else L  # of fewer rows: no kernel computes both
        product, _ = gpu.product_and_intermediate(a.view(65, 96), R, L, None)
        return product, a.sum(0) if other_reader == "behind" else x, a if other_reader == "backward" else x

    _, code = compiled(compute, x, x.flip(0), R, L)
    assert code.count("3.125") == 1
    assert len(re.findall(r"empty_strided_(?:cpu|cuda)\(\((65|5, 13), 96\)", code)) == 1


@pytest.mark.parametrize("gated", [False, True])
def test_an_epilogue_of_many_tokens(gated: bool) -> None:
    x, (R,), (L,), (bias,) = operands(65, (ONE,), (True,))
    gate = torch.randn(65, 72, dtype=torch.float16) if gated else None

    def compute(x: Tensor, R: Tensor, L: Tensor, bias: Tensor, gate: Tensor | None) -> Tensor:
        return gpu.product(x, R, L, bias, gate, "silu")

    found, code = compiled(compute, x, R, L, bias, gate)
    assert code.count(HALVES) == 2
    close(found, exact(compute, x, R, L, bias, gate))


def test_unaligned_ranks_and_products_of_one_kernel_are_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (R, other), (L, another), _ = operands(512, ((2, 3, 20, 24), (1, 1, 64, 64)), (False, False))
    monkeypatch.setattr(halves, "one_kernel_tokens", lambda dtype, device, R, L: choice.fused_tokens(*R, L[3], units=2))

    def compute(x: Tensor, R: Tensor, L: Tensor, other: Tensor, another: Tensor) -> tuple[Tensor, ...]:
        small = gpu.product(x[:, :64], other[..., :64], another, None, None, "gelu")
        return gpu.product(x, R, L, None, None, "none"), small

    arguments = x, R, L, other, another
    results, code = compiled(compute, *arguments)
    assert HALVES not in code
    assert code.count(" = torch.ops.monarch_fx_kernels.product.default(") == 2
    for found, expected in zip(results, exact(compute, *arguments), strict=True):
        close(found, expected)


@pytest.mark.parametrize("tokens", [65, 130])
@pytest.mark.parametrize(("biased", "activation", "gated"), [(False, "silu", True), (True, "gelu", False)])
def test_launches_of_halves(tokens: int, biased: bool, activation: str, gated: bool) -> None:
    """In memory full of NaN."""
    x, (R,), (L,), (bias,) = operands(tokens, (ONE,), (biased,), DEVICE)
    gate = torch.randn(tokens, 72, dtype=torch.float16, device=DEVICE) if gated else None
    strides = tokens * 16, 16, 1
    first = emitted.Half(True, tokens, tuple(R.shape), strides, (False, "none", False), "float16", DEVICE)
    second = emitted.Half(False, tokens, tuple(L.shape), strides, (biased, activation, gated), "float16", DEVICE)
    t = torch.full((3, tokens, 16), float("nan"), dtype=torch.float16, device=DEVICE)
    y = torch.full((tokens, 72), float("nan"), dtype=torch.float16, device=DEVICE)
    extra = [operand for operand in (bias, gate) if operand is not None]
    for half, tensors in ((first, [x, R, t]), (second, [t, L, *extra, y])):
        launch, of_launch = emitted.prepared_half(repr(tuple(half)))
        launch(of_launch(tensors), of_launch([tensor.data_ptr() for tensor in tensors]))
    close(y, exact(gpu.product, x, R, L, bias, gate, activation))


def test_wrappers_in_another_language_are_the_operators() -> None:
    x, (R,), (L,), _ = operands(3, (ONE,), (False,))

    def compute(x: Tensor, R: Tensor, L: Tensor) -> Tensor:
        return gpu.product(x, R, L, None, None, "none")

    with torch._inductor.config.patch(cpp_wrapper=True):
        found, code = compiled(compute, x, R, L)
    assert EMITTED not in code
    close(found, exact(compute, x, R, L))


def test_rows_that_lie_apart() -> None:
    """The launches are for rows that follow each other."""
    x, (R,), (L,), _ = operands(3, (ONE,), (False,))
    x = torch.cat([x, x], 1)[:, 96:]

    def compute(x: Tensor, R: Tensor, L: Tensor) -> Tensor:
        return gpu.product(x, R, L, None, None, "none")

    found, code = compiled(compute, x, R, L)
    assert EMITTED in code
    close(found, exact(compute, x, R, L))


def launched(tokens: int, shapes: tuple, biased: tuple[bool, ...], together: bool, activation: str | None) -> None:
    """Runs the launches that the emitted call runs, in memory full of NaN."""
    x, R, L, biases = operands(tokens, shapes, biased, DEVICE)
    gate = torch.randn(tokens, L[0].shape[0] * L[0].shape[3], dtype=torch.float16, device=DEVICE)
    gate = gate if activation == "relu" else None
    known = emitted.Products(
        together,
        tokens,
        tuple(tuple(factor.shape) for factor in R),
        tuple(tuple(factor.shape) for factor in L),
        biased,
        gate is not None,
        activation,
        "float16",
        DEVICE,
    )
    memory = torch.full((known.starts[-1],), float("nan"), dtype=torch.float16, device=DEVICE)
    tensors = [operand for operand in (x, *R, *L, *biases, gate) if operand is not None]
    launches = emitted.prepared(repr(tuple(known)))
    assert launches is not None
    for _ in range(2):  # compiled, and called again
        memory.fill_(float("nan"))
        assert launches(tensors, memory)
        if together:
            expected = exact(gpu.together, x, R, L, biases, activation)
        else:
            expected = [exact(gpu.product, x, R[0], L[0], biases[0], gate, activation)]
        for start, rows, y in zip(known.starts, known.rows, expected, strict=False):
            close(memory[start : start + tokens * rows].view(tokens, rows), y)


@pytest.mark.parametrize("tokens", [1, 3, 63])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", ["none", "gelu", "relu"])
def test_launches_of_a_product(tokens: int, biased: bool, activation: str) -> None:
    launched(tokens, (ONE,), (biased,), False, activation)


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize(("shapes", "biased"), GROUPS)
def test_launches_of_products_together(tokens: int, shapes: tuple, biased: tuple[bool, ...]) -> None:
    launched(tokens, shapes, biased, True, None)


@pytest.mark.parametrize("tokens", [1, 63])
@pytest.mark.parametrize(("shapes", "biased"), PAIRS)
def test_launches_of_a_gated_pair(tokens: int, shapes: tuple, biased: tuple[bool, ...]) -> None:
    launched(tokens, shapes, biased, True, "silu")


def test_operands_that_are_not_aligned_are_left_to_the_operator() -> None:
    x, (R,), (L,), _ = operands(3, (ONE,), (False,), DEVICE)
    apart = torch.empty(R.numel() + 1, dtype=R.dtype, device=DEVICE)[1:].view_as(R).copy_(R)
    known = emitted.Products(False, 3, (tuple(R.shape),), (tuple(L.shape),), (False,), False, "none", "float16", DEVICE)
    memory = torch.full((known.starts[-1],), float("nan"), dtype=torch.float16, device=DEVICE)
    launches = emitted.prepared(repr(tuple(known)))
    assert not launches([x, apart, L], memory)
    assert memory.isnan().all()
    emitted.few_tokens(x, apart, L, products=repr(tuple(known)), out=memory)
    close(memory[: 3 * 72].view(3, 72), exact(gpu.product, x, R, L, None, None, "none"))
