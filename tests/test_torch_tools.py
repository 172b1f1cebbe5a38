"""PyTorch's compiler, export and function transforms on rewritten models."""

from __future__ import annotations

import torch
import zoo
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from zoo import HALF_GRID, mlp

import monarch_fx as mfx


def compiled_once(model: nn.Module, *sizes: int) -> None:
    """Compiles without a graph break, agrees, and doesn't compile again for another token count."""
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for tokens in sizes:
        x = torch.randn(3, tokens, 32)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1


def test_compiles_layers_and_raw_products_in_one_graph() -> None:
    model, inputs = zoo.raw()
    compiled_once(mfx.monarchify(model, config=HALF_GRID, example_inputs=inputs), 7, 9, 4)


def test_compiles_attention_in_one_graph() -> None:
    encoder, inputs = zoo.torch_encoder()
    compiled_once(mfx.monarchify(encoder.eval(), config=HALF_GRID, example_inputs=inputs), 5, 8)


def test_compiles_gpt2_with_inductor(gpt2: tuple) -> None:
    _, rewritten, ids = gpt2
    compiled = torch.compile(rewritten, fullgraph=True)
    with torch.no_grad():
        # float32 through four layers, whose sums are ordered differently by the compiler
        torch.testing.assert_close(compiled(ids).logits, rewritten(ids).logits, rtol=1e-4, atol=1e-5)


def test_exports_with_one_node_a_product(gpt2: tuple) -> None:
    _, rewritten, ids = gpt2
    free = {"input_ids": dict.fromkeys((0, 1), torch.export.Dim.AUTO), "use_cache": None}
    inputs = {"input_ids": ids, "use_cache": False}
    program = torch.export.export(rewritten, (), inputs, dynamic_shapes=free, strict=False)
    nodes = [n for n in program.graph.nodes if "monarch_bmm" in str(n.target)]
    assert len(nodes) == mfx.report(rewritten).plan.monarch_calls
    longer = torch.cat([ids, ids], dim=1)
    torch.testing.assert_close(program.module()(input_ids=longer, use_cache=False).logits, rewritten(longer).logits)


def test_function_transforms() -> None:
    model = mfx.monarchify(mlp().double(), config=HALF_GRID)
    parameters = dict(model.named_parameters())
    x = torch.randn(4, 64, dtype=torch.float64)

    def loss(parameters: dict, row: Tensor) -> Tensor:
        return functional_call(model, parameters, (row,)).square().sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), p.grad)
    _, tangent = jvp(lambda row: loss(parameters, row), (x[0],), (x[1],))
    torch.testing.assert_close(tangent, (grad(loss, argnums=1)(parameters, x[0]) * x[1]).sum())


def test_symbolic_trace_of_a_rewritten_model() -> None:
    rewritten = mfx.monarchify(mlp(), config=HALF_GRID)
    x = torch.randn(5, 64)
    assert torch.equal(torch.fx.symbolic_trace(rewritten)(x), rewritten(x))
