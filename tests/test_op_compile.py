"""monarch_bmm in graphs: one node in traces and exports, one compilation for all token counts, fused by Inductor."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from monarch_fx import monarch_bmm
from monarch_fx.kernels.op import monarch_grouped_mm


class Layer(nn.Module):
    """48 -> 35 on a grid of 2x3 blocks, followed by a GELU."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.R = nn.Parameter(torch.randn(3, 2, 4, 16, dtype=dtype) / 4)
        self.L = nn.Parameter(torch.randn(2, 3, 4, 18, dtype=dtype) / 4)
        self.bias = nn.Parameter(torch.randn(35, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(monarch_bmm(x, self.R, self.L, self.bias, out_features=35))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.R = nn.Parameter(torch.randn(4, 2, 2, 3, 8, dtype=torch.float64))
        self.L = nn.Parameter(torch.randn(4, 2, 2, 3, 6, dtype=torch.float64))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return monarch_grouped_mm(x, self.R, self.L, offs)


OFFS = torch.tensor([2, 2, 5, 9], dtype=torch.int32)


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "monarch_fx" in str(node.target)]


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the order of sums of at most 48 terms of order one."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_fake_tensors_have_the_shape_and_dtype() -> None:
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16, torch.complex64):
            y = monarch_bmm(torch.empty(5, 7, 47, dtype=dtype), *(t.to(dtype) for t in (Layer().R, Layer().L)))
            assert (y.shape, y.dtype, y.is_contiguous()) == ((5, 7, 36), dtype, True)
        y = Experts()(torch.empty(10, 16, dtype=torch.float64), torch.empty(4, dtype=torch.int32))
        assert (y.shape, y.dtype) == ((10, 12), torch.float64)


def test_meta_device() -> None:
    layer = Layer().to("meta")
    assert layer(torch.empty(5, 48, device="meta")).shape == (5, 35)


def test_symbolic_trace_gives_one_node() -> None:
    traced = fx.symbolic_trace(Layer())
    assert targets(traced.graph) == ["monarch_fx.monarch_bmm"]
    x = torch.randn(5, 48)
    close(traced(x), Layer.forward(traced, x))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # PyTorch 2.13 copies its own tree specs
def test_export_keeps_one_node_for_all_token_counts() -> None:
    layer = Layer()
    tokens = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    exported = torch.export.export(layer, (torch.randn(3, 5, 48),), dynamic_shapes=({**tokens},))
    assert targets(exported.graph) == ["monarch_fx.monarch_bmm.default"]
    for lead in ((3, 5), (4, 7), (1, 1)):
        x = torch.randn(*lead, 48)
        close(exported.module()(x), layer(x))
    opened = exported.run_decompositions()
    assert targets(opened.graph) == []
    x = torch.randn(2, 9, 48)
    close(opened.module()(x), layer(x))


def test_export_of_experts() -> None:
    experts = Experts()
    arguments = torch.randn(10, 16, dtype=torch.float64), OFFS
    exported = torch.export.export(experts, arguments, dynamic_shapes=({0: torch.export.Dim("rows")}, None))
    assert targets(exported.graph) == ["monarch_fx.monarch_grouped_mm.default"]
    x = torch.randn(13, 16, dtype=torch.float64)
    offs = torch.tensor([1, 8, 8, 13], dtype=torch.int32)
    torch.testing.assert_close(exported.module()(x, offs), experts(x, offs))


def test_one_compilation_serves_all_token_counts() -> None:
    counter = CompileCounter()
    layer = Layer()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for lead in ((3, 5), (4, 7), (6, 2)):
        x = torch.randn(*lead, 48)
        close(compiled(x), layer(x))
    assert counter.frame_count == 1
    assert counter.op_count == 2  # the product and the GELU


def test_marked_dynamic_tokens_are_not_specialised() -> None:
    counter = CompileCounter()
    compiled = torch.compile(Layer(), backend=counter, fullgraph=True)
    for tokens in (5, 8, 64):
        x = torch.randn(tokens, 48)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
    assert counter.frame_count == 1


def test_inductor_fuses_bias_and_activation_into_the_last_transpose() -> None:
    layer = Layer()
    x = torch.randn(3, 5, 48)
    with torch.no_grad():
        y, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
    close(y, layer(x))
    kernels = [line for line in code.splitlines() if " = async_compile.cpp" in line]
    assert code.count("extern_kernels.bmm(") == 2
    assert len(kernels) == 2, kernels  # the transpose of blocks, and transpose + bias + GELU
    assert sum("gelu" in kernel for kernel in kernels) == 1


def test_inductor_compiles_low_rank_to_two_linears() -> None:
    R, L, bias = torch.randn(1, 1, 4, 16), torch.randn(1, 1, 4, 12), torch.randn(12)
    x = torch.randn(5, 16)
    y, (code,) = run_and_get_code(torch.compile(monarch_bmm, fullgraph=True), x, R, L, bias)
    close(y, monarch_bmm(x, R, L, bias))
    assert "async_compile.cpp" not in code
    assert "bmm" not in code.replace("monarch_bmm", "")
    assert code.count("extern_kernels.mm(") == code.count("extern_kernels.addmm(") == 1


def test_inductor_trains() -> None:
    layer = Layer(torch.float64)
    x = torch.randn(4, 48, dtype=torch.float64)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    got = torch.autograd.grad(torch.compile(layer, fullgraph=True)(x).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(got, expected)


def test_inductor_compiles_experts() -> None:
    experts = Experts()
    compiled = torch.compile(experts, fullgraph=True)
    x = torch.randn(10, 16, dtype=torch.float64)
    torch.testing.assert_close(compiled(x, OFFS), experts(x, OFFS))
    expected = torch.autograd.grad(experts(x, OFFS).square().sum(), list(experts.parameters()))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, OFFS).square().sum(), list(experts.parameters())), expected
    )


@pytest.mark.parametrize("own", ["", "mine"])
def test_compile_caches_know_the_body_of_the_op(own: str) -> None:
    code = """
import torch.compiler.config as config
config.cache_key_tag = {own!r}
from monarch_fx.kernels import op
first = config.cache_key_tag
op._tag_compile_caches()
assert config.cache_key_tag == first
print(first)
"""
    done = subprocess.run([sys.executable, "-c", code.format(own=own)], capture_output=True, text=True, check=True)
    assert done.stdout.strip().rpartition("=")[0] == ";".join(filter(None, [own, "monarch_fx"]))
