"""The same on a GPU, where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import zoo

import monarch_fx as mfx
from monarch_fx.errors import MonarchWarning, StructureError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_planned_projected_and_compiled_on_the_device() -> None:
    pytest.importorskip("transformers")
    model, inputs = zoo.gpt2()
    model.cuda().eval()
    ids = inputs["input_ids"].cuda()
    rewritten = mfx.monarchify(model, config=mfx.MonarchConfig(nblocks=2))
    assert {p.device.type for p in rewritten.parameters()} == {"cuda"}
    with torch.no_grad():
        eager = rewritten(ids).logits
        # float32 through eight products, summed in another order
        torch.testing.assert_close(mfx.to_dense(rewritten)(ids).logits, eager, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.compile(rewritten, fullgraph=True)(ids).logits, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_op_on_the_device(dtype: torch.dtype) -> None:
    layer = mfx.MonarchLinear(256, 512, nblocks=4, device="cuda", dtype=dtype)
    x = torch.randn(3, 50, 256, device="cuda", dtype=dtype)
    R, L = (factor.double() for factor in (layer.weight.R, layer.weight.L))
    exact = mfx.Monarch(R, L)(x.double()) + layer.bias.double()
    # intermediate, result and sum with the bias are rounded, and cuBLAS may add partial sums in the factors' dtype
    scale = mfx.Monarch(R.abs(), L.abs())(x.double().abs()) + layer.bias.double().abs()
    assert ((layer(x).double() - exact).abs() <= 4 * torch.finfo(dtype).eps * scale).all()


@pytest.fixture
def in_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 500, 4096])
@pytest.mark.parametrize(
    "shape", [(2, 2, 128, 256, 256), (4, 1, 64, 128, 512), (1, 3, 48, 256, 64), (2, 2, 20, 33, 50)]
)
def test_tf32_with_gradients(shape: tuple[int, ...], tokens: int, recompute: bool, in_tf32: None) -> None:
    n_in, n_out, rank, p, s = shape
    x = torch.randn(tokens, n_in * p, device="cuda")
    R = torch.randn(n_in, n_out, rank, p, device="cuda") / p**0.5
    L = torch.randn(n_out, n_in, rank, s, device="cuda") / (n_in * rank) ** 0.5
    leaves = [leaf.requires_grad_() for leaf in (x, R, L, torch.randn(n_out * s, device="cuda"))]
    grad = torch.randn(tokens, n_out * s, device="cuda")
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y, right = mfx.monarch_bmm(*leaves, recompute=recompute), mfx.monarch_bmm(*exact)
    found, wanted = torch.autograd.grad(y, leaves, grad), torch.autograd.grad(right, exact, grad.double())
    for ours, true in zip((y, *found), (right, *wanted), strict=True):
        # of four operands all but ten bits behind the leading one are cut off: at most 2^-11 of each on average
        assert (ours.double() - true).norm() <= 4 * 2.0**-11 * true.norm()


def test_tf32_is_not_used_unasked() -> None:
    layer = mfx.MonarchLinear(256, 512, nblocks=2, device="cuda")
    for tokens in (3, 4096):
        x = torch.randn(tokens, 256, device="cuda")
        for recompute in (False, True):
            mfx.recompute_intermediates(layer, recompute)
            exact = mfx.Monarch(layer.weight.R.double(), layer.weight.L.double())(x.double()) + layer.bias.double()
            assert (layer(x).double() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_recomputed_intermediates_take_no_memory(mode: str | None) -> None:
    layers = [mfx.MonarchLinear(1024, 1024, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    model = torch.nn.Sequential(*layers)
    x = torch.randn(8192, 1024, device="cuda", dtype=torch.bfloat16)
    kept, gradients = [], []
    for recompute in (False, True):
        torch._dynamo.reset()
        run = torch.compile(mfx.recompute_intermediates(model, recompute), mode=mode)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            model.zero_grad()
            before = torch.cuda.memory_allocated()
            y = run(x)
            kept.append(torch.cuda.memory_allocated() - before)
            y.square().sum().backward()
            del y
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for ours, right in zip(*gradients, strict=True):
        assert (ours - right).norm() <= 2.0**-7 * right.norm()  # sums of another order, rounded to bfloat16
    if mode is None:  # a graph's memory is its pool's
        assert kept[2] - kept[5] == 4 * 2 * 8192 * 16 * 64


def test_device_profile_is_found_and_measured() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4096, 4096)).cuda()
    profile = mfx.measure_device("cuda")
    assert mfx.plan(model, budget=0.5).device == profile.name


def test_plans_by_times_measured_on_the_card() -> None:
    """Few and many tokens, and training; the profile's own device is found, wherever the model is."""
    model = torch.nn.Sequential(torch.nn.Linear(4096, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 4096))
    for device, tokens, workload in (("cpu", 4, "inference"), ("cuda", 8192, "inference"), ("cuda", 8192, "training")):
        options = {"tokens": tokens, "workload": workload, "dtype": torch.bfloat16}
        plan = mfx.plan(model.to(device), 0.5, device=mfx.measure_device("cuda"), times="measured", **options)
        assert plan.rewritten
        assert all(decision.time_s < 0.98 * decision.dense_s for decision in plan.rewritten)


SHAPES = [(256, 512, 2, 4, 48), (256, 512, 4, 1, 32), (300, 500, 1, 4, 40), (250, 333, 4, 3, 20)]
SHAPES += [(49, 98, 2, 2, 10), (251, 333, 1, 1, 21), (500, 252, 2, 2, 24), (1000, 1010, 3, 3, 88)]  # padded from 512 on
SHAPES += [(208, 264, 3, 2, 24)]  # blocks that 8 divides, but not 64


def exact_and_scale(x: torch.Tensor, layer: mfx.MonarchLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 result, and the sum of the magnitudes that were added up."""
    size = {"in_features": layer.in_features, "out_features": layer.out_features}
    R, L, bias = layer.weight.R.double(), layer.weight.L.double(), layer.bias.double()
    return mfx.Monarch(R, L, **size)(x) + bias, mfx.Monarch(R.abs(), L.abs(), **size)(x.abs()) + bias.abs()


@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 63, 200, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_for_every_number_of_tokens(shape: tuple[int, ...], tokens: int) -> None:
    n_in, n_out, *grid, rank = shape
    layer = mfx.MonarchLinear(n_in, n_out, tuple(grid), rank, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, n_in, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        inferred = layer(x)
    exact, scale = exact_and_scale(x.double(), layer)
    for result in (y, inferred):
        assert ((result.double() - exact).abs() <= 4 * torch.finfo(torch.bfloat16).eps * scale).all()

    wide = mfx.MonarchLinear(n_in, n_out, tuple(grid), rank, device="cuda", dtype=torch.float64)
    wide.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    grad = torch.randn_like(y)
    y.backward(grad)
    leaf = x.detach().double().requires_grad_()
    wide(leaf).backward(grad.double())
    pairs = [(x.grad, leaf.grad), (layer.weight.R.grad, wide.weight.R.grad), (layer.weight.L.grad, wide.weight.L.grad)]
    for ours, right in pairs:  # a few roundings to 8 bits, averaged over the tensor
        assert (ours.double() - right).norm() <= 4 * torch.finfo(torch.bfloat16).eps * right.norm()


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_compiled_once_for_all_numbers_of_tokens() -> None:
    layer = mfx.MonarchLinear(256, 512, nblocks=4, device="cuda", dtype=torch.bfloat16)
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(module)
        return torch._inductor.compile(module, inputs)

    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=backend)
    with torch.no_grad():
        for tokens in (2, 40, 400, 3000):
            x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
            exact, scale = exact_and_scale(x.double(), layer)
            assert ((compiled(x).double() - exact).abs() <= 4 * torch.finfo(torch.bfloat16).eps * scale).all()
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_padded_sizes_compiled_once_with_gradients() -> None:
    layer = mfx.MonarchLinear(250, 333, (4, 3), 20, device="cuda", dtype=torch.bfloat16)
    wide = mfx.MonarchLinear(250, 333, (4, 3), 20, device="cuda", dtype=torch.float64)
    wide.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(module)
        return torch._inductor.compile(module, inputs)

    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend=backend)
    for tokens in (200, 600, 3000):
        x = torch.randn(tokens, 250, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        leaf = x.detach().double().requires_grad_()
        y, right = compiled(x), wide(leaf)
        grad = torch.randn_like(y)
        found = torch.autograd.grad(y, [x, *layer.parameters()], grad)
        exact = torch.autograd.grad(right, [leaf, *wide.parameters()], grad.double())
        for ours, theirs in zip((y, *found), (right, *exact), strict=True):  # a few roundings to 8 bits, averaged
            assert (ours.double() - theirs).norm() <= 4 * torch.finfo(torch.bfloat16).eps * theirs.norm()
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("tokens", [300, 1111, 4096])  # whole, of no even parts, in sixteen
def test_gradients_added_up_in_parts(dtype: torch.dtype, tokens: int) -> None:
    wide = torch.promote_types(dtype, torch.float64)
    shapes = (tokens, 64), (8, 8, 1, 8), (8, 8, 1, 8), (tokens, 64)
    *arguments, grad = (torch.randn(shape, device="cuda", dtype=wide) for shape in shapes)

    def gradients(kind: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = [t.to(kind).requires_grad_() for t in arguments]
        return torch.autograd.grad(mfx.monarch_bmm(*leaves), leaves, grad.to(kind))

    for ours, right in zip(
        gradients(dtype), gradients(wide), strict=True
    ):  # rounded sums of independent terms, averaged over the tensor
        assert (ours.to(wide) - right).norm() <= 4 * tokens**0.5 * torch.finfo(dtype).eps * right.norm()


def test_autocast_and_second_order() -> None:
    layer = mfx.MonarchLinear(128, 128, nblocks=2, device="cuda")
    x = torch.randn(300, 128, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    exact, scale = exact_and_scale(x.double(), layer)
    assert ((y.double() - exact).abs() <= 8 * torch.finfo(torch.bfloat16).eps * scale).all()
    (first,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_the_same_bits_twice() -> None:
    layer = mfx.MonarchLinear(1024, 1024, nblocks=4, device="cuda", dtype=torch.bfloat16)
    for tokens in (1, 200, 8192):
        x = torch.randn(tokens, 1024, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("grid", [4, (1, 4), (4, 1), 1])
@pytest.mark.parametrize("tokens", [1, 16, 40, 200, 4096])
def test_eager_products_have_the_bits_of_the_operator(tokens: int, grid: int | tuple[int, int]) -> None:
    """Which a profiler makes eager mode call."""
    layer = mfx.MonarchLinear(1024, 512, grid, 64, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, tokens, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = layer(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
            operator = layer(x)
        again = layer(x.repeat(1, 1, 2)[..., :1024])
    assert "monarch_fx::monarch_bmm" in [event.key for event in profile.key_averages()]
    assert torch.equal(y, operator)
    assert torch.equal(y, again)


def test_factors_on_another_device_are_refused() -> None:
    layer = mfx.MonarchLinear(256, 512, 2, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
    layer(x)
    with pytest.raises(StructureError, match="must be on one device, got cpu, cuda:0: move x or the model"):
        layer.cpu()(x)
    with pytest.raises(StructureError, match="must be on one device, got cpu, cuda:0: move x or the model"):
        layer.cuda()(x.cpu())


@pytest.mark.parametrize(
    ("n_in", "n_out", "grid", "rank"), [(768, 768, 3, 64), (1024, 1024, 2, 128), (768, 768, 2, 96)]
)
def test_one_kernel_for_small_products(n_in: int, n_out: int, grid: int, rank: int) -> None:
    layer = mfx.MonarchLinear(n_in, n_out, grid, rank, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(5000, n_in, device="cuda", dtype=torch.bfloat16)
    exact, scale = exact_and_scale(x.double(), layer)
    with torch.no_grad():
        assert ((layer(x).double() - exact).abs() <= 4 * torch.finfo(torch.bfloat16).eps * scale).all()


@pytest.mark.parametrize("tokens", [3, 300])
def test_biases_that_lie_apart(tokens: int) -> None:
    layer = mfx.MonarchLinear(256, 512, 2, 32, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
    factors = (layer.weight.R.detach(), layer.weight.L.detach())
    plain = mfx.Monarch(*(factor.double() for factor in factors))(x.double())
    for bias in (torch.randn(1024, device="cuda").bfloat16()[::2], torch.randn(1, device="cuda").bfloat16()):
        y = mfx.monarch_bmm(x, *factors, bias)
        assert (y.double() - plain - bias.double()).norm() <= 4 * torch.finfo(torch.bfloat16).eps * plain.norm()


class GatedMLP(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shapes = ((256, 512), (256, 512), (512, 256))
        make = {"nblocks": 2, "rank": 32, "device": "cuda", "dtype": torch.bfloat16}
        self.gate, self.up, self.down = (mfx.MonarchLinear(*shape, **make) for shape in shapes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.silu(self.gate(x)) * self.up(x)
        return torch.nn.functional.gelu(self.down(hidden))


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # a first one, that PyTorch captures for itself
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("tokens", [1, 300, 3000])
def test_compiled_activations_in_the_epilogue(mode: str | None, tokens: int) -> None:
    model = GatedMLP()
    wide = GatedMLP().double()
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    compiled = torch.compile(model, mode=mode)
    with torch.no_grad():
        for _ in range(4):  # warm-up, recording and replay
            x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
            exact = wide(x.double())
            with torch.profiler.profile(acc_events=True) as profile:
                y = compiled(x)
            # a rounding after each of six kernels, each error passed on by the rest about as it is
            assert (y.double() - exact).norm() <= 6 * torch.finfo(torch.bfloat16).eps * exact.norm()
    names = {event.key for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA}
    assert not any("silu" in name or "gelu" in name for name in names), names


class Projections(torch.nn.Module):
    """Queries, keys and values: three grids, two biases; all read the same rows."""

    def __init__(self) -> None:
        super().__init__()
        make = {"device": "cuda", "dtype": torch.bfloat16}
        self.q = mfx.MonarchLinear(256, 512, (2, 4), 48, **make)
        self.k = mfx.MonarchLinear(256, 128, 2, 24, bias=False, **make)
        self.v = mfx.MonarchLinear(256, 128, 1, 80, **make)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_products_of_the_same_rows_together() -> None:
    """Two kernels up to 64 tokens, one graph for all numbers of tokens, the same bits twice."""
    model, graphs = Projections(), []

    def backend(module: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(module)
        return torch._inductor.compile(module, inputs)

    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=backend)
    wide = Projections().double()
    wide.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    with torch.no_grad():
        for tokens in (2, 3, 63, 64, 65, 300):
            x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
            results = compiled(x)
            with torch.profiler.profile(acc_events=True) as profile:
                again = compiled(x)
            for y, same, exact in zip(results, again, wide(x.double()), strict=True):
                # three roundings, averaged over the tensor
                assert (y.double() - exact).norm() <= 3 * torch.finfo(torch.bfloat16).eps * exact.norm()
                assert torch.equal(y, same)
            kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            assert tokens > 64 or (kernels.count("first"), kernels.count("second")) == (1, 1), kernels
    assert len(graphs) == 1


@pytest.mark.parametrize("tokens", [1, 4])
def test_factors_that_the_kernel_in_front_wrote(tokens: int) -> None:
    """Kernels start before the one in front has ended."""
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    factors = [torch.randn(2, 2, 512, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    pairs = [(factors[0], factors[1]), (factors[2], factors[3])]
    R, L = (torch.empty_like(factor) for factor in pairs[0])
    with torch.no_grad():
        right = [mfx.monarch_bmm(x, *pair) for pair in pairs]
        for i in range(200):
            copied = list(zip((R, L), pairs[i % 2], strict=True))
            for to, factor in copied if i % 3 else reversed(copied):
                to.copy_(factor)
            assert torch.equal(mfx.monarch_bmm(x, R, L), right[i % 2])


@pytest.mark.parametrize("grids", [(2, 2), (4, 2), (16, 2)])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64])
def test_a_gate_in_the_same_launch(tokens: int, grids: tuple[int, int]) -> None:
    """Blocks of equal sizes, of sizes that a tile divides, and of others."""
    layers = [mfx.MonarchLinear(384, 768, grid, 16, device="cuda", dtype=torch.bfloat16) for grid in grids]
    x = torch.randn(tokens, 384, device="cuda", dtype=torch.bfloat16)
    factors = [[layer.weight.R for layer in layers], [layer.weight.L for layer in layers]]
    biases = [layer.bias for layer in layers]
    with torch.no_grad():
        (y,) = torch.ops.monarch_fx.monarch_together(x, *factors, biases, gated="silu")
        (again,) = torch.ops.monarch_fx.monarch_together(x, *factors, biases, gated="silu")
        gate, up = (exact_and_scale(x.double(), layer)[0] for layer in layers)
    exact = torch.nn.functional.silu(gate) * up
    # two roundings in each product, and that of the result
    assert (y.double() - exact).norm() <= 5 * torch.finfo(torch.bfloat16).eps * exact.norm()
    assert torch.equal(y, again)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    layer = mfx.MonarchLinear(256, 512, (2, 4), 48, device="cuda:1", dtype=torch.bfloat16)
    assert torch.cuda.current_device() == 0
    for tokens in (1, 200):
        x = torch.randn(tokens, 256, device="cuda:1", dtype=torch.bfloat16, requires_grad=True)
        exact, scale = exact_and_scale(x.double(), layer)
        with torch.no_grad():
            assert ((layer(x).double() - exact).abs() <= 4 * torch.finfo(torch.bfloat16).eps * scale).all()
        layer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.device == x.device
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(
    ("launcher", "tokens", "what"), [("few.product", 40, "both halves"), ("launch.first_half", 100, "first half")]
)
def test_a_kernel_that_fails_says_so_once(
    launcher: str, tokens: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.errors import TritonError

    from monarch_fx.kernels import halves

    def fails(*operands: object) -> None:
        raise TritonError("out of shared memory")

    monkeypatch.setattr(f"monarch_fx.kernels.{launcher}", fails)
    monkeypatch.setattr(halves, "_failed", set())
    layer = mfx.MonarchLinear(96, 96, 2, 16, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(tokens, 96, device="cuda", dtype=torch.bfloat16)
    exact, scale = exact_and_scale(x.double(), layer)
    with torch.no_grad():
        with pytest.warns(MonarchWarning, match=rf"{what} .* failed on \({tokens}, 96\).*out of shared memory"):
            y = layer(x)
        assert torch.equal(layer(x), y)  # without another warning, which would be an error
    assert ((y.double() - exact).abs() <= 4 * torch.finfo(torch.bfloat16).eps * scale).all()


def test_products_together_that_fail_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from monarch_fx.kernels import few, halves

    def fails(*operands: object) -> None:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(few, "products", fails)
    monkeypatch.setattr(halves, "_failed", set())
    layer = mfx.MonarchLinear(96, 96, 2, 16, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4, 96, device="cuda", dtype=torch.bfloat16)
    operands = (x, [layer.weight.R] * 2, [layer.weight.L] * 2, [layer.bias, None])
    with torch.no_grad():
        with pytest.warns(MonarchWarning, match=r"several products .* failed on \(4, 96\).*out of shared memory"):
            y, _ = torch.ops.monarch_fx.monarch_together(*operands)
        assert torch.equal(y, layer(x))
        torch.ops.monarch_fx.monarch_together(*operands)  # without another warning, which would be an error


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_a_compiled_product_whose_kernel_fails_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.errors import TritonError

    from monarch_fx.kernels import emitted, halves, launch

    def fails(*operands: object) -> None:
        raise TritonError("out of shared memory")

    layer = mfx.MonarchLinear(96, 96, 2, 16, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(5, 96, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = compiled(x)
        monkeypatch.setattr(launch.Launch, "__call__", fails)
        monkeypatch.setattr(halves, "_failed", set())
        monkeypatch.setattr(emitted, "_failed", set())
        with pytest.warns(MonarchWarning, match=r"failed on .*out of shared memory"):
            y = compiled(x)
        assert torch.equal(compiled(x), y)  # without another warning, which would be an error
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)  # two roundings of numbers of order one
