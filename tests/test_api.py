"""The public functions as a user calls them: what goes on working, and what is refused."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import monarch_fx as mfx
from monarch_fx import errors

HALF_GRID = mfx.MonarchConfig(nblocks=2)


def mlp(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.LayerNorm(width))


@pytest.fixture(scope="module")
def gpt2() -> tuple[nn.Module, nn.Module, Tensor]:
    """A dense model, the same rewritten, and token ids."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = zoo.gpt2()
    model.eval()
    return model, mfx.monarchify(model, config=HALF_GRID), inputs["input_ids"]


# --- the result is the model that it was


def test_generates_with_a_cache(gpt2: tuple) -> None:
    _, rewritten, ids = gpt2
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = rewritten.generate(ids, **settings)
    assert torch.equal(tokens, rewritten.generate(ids, use_cache=False, **settings))
    assert torch.equal(tokens, mfx.to_dense(rewritten).generate(ids, **settings))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_and_pickles(gpt2: tuple, clone) -> None:
    _, rewritten, ids = gpt2
    assert torch.equal(clone(rewritten)(ids).logits, rewritten(ids).logits)
    assert str(mfx.report(clone(rewritten))) == str(mfx.report(rewritten))


def test_state_dict_round_trip(gpt2: tuple) -> None:
    model, rewritten, ids = gpt2
    other = mfx.monarchify(model, plan=mfx.report(rewritten).plan, init="random")
    assert not torch.equal(other(ids).logits, rewritten(ids).logits)
    other.load_state_dict(rewritten.state_dict())
    assert torch.equal(other(ids).logits, rewritten(ids).logits)


def test_replay_gives_equal_bits_on_another_copy(gpt2: tuple) -> None:
    model, rewritten, _ids = gpt2
    plan = mfx.Plan.from_json(mfx.report(rewritten).plan.to_json())
    assert plan == mfx.report(rewritten).plan
    again = mfx.monarchify(copy.deepcopy(model), plan=plan)
    for (name, a), (_, b) in zip(again.named_parameters(), rewritten.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_trains_and_casts_without_touching_the_argument(gpt2: tuple) -> None:
    model, rewritten, ids = gpt2
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = copy.deepcopy(rewritten).train()
    trained.loss_type = "ForCausalLM"
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trained.parameters())
    optimizer.step()
    trained.bfloat16()
    assert trained(ids).logits.dtype == torch.bfloat16
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_factors_inherit_dtype_and_requires_grad() -> None:
    model = mlp().half()
    model[0].weight.requires_grad_(False)
    rewritten = mfx.monarchify(model, config=HALF_GRID, example_inputs=torch.randn(5, 64).half())
    assert not rewritten[0].weight.R.requires_grad
    assert rewritten[2].weight.L.requires_grad
    assert {p.dtype for p in rewritten.parameters()} == {torch.float16}


def test_a_rewritten_layer_is_the_layer_it_was() -> None:
    model = mlp()
    calls = []
    model[0].register_forward_hook(lambda module, args, output: calls.append(output.shape))
    rewritten = mfx.monarchify(model, config=HALF_GRID)
    calls.clear()
    rewritten(torch.randn(5, 64))
    assert calls == [(5, 256)]
    layer = rewritten[0]
    assert type(layer) is nn.Linear
    assert (layer.in_features, layer.out_features) == (64, 256)
    assert torch.equal(layer.bias, model[0].bias)
    assert layer.weight.shape == (256, 64)
    assert layer.weight.dtype == torch.float32
    assert "grid 2x2" in repr(layer)


def test_modes_survive() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32))
    model[1].eval()
    rewritten = mfx.monarchify(model, config=HALF_GRID, example_inputs=torch.randn(4, 32))
    assert model[0].training
    assert not model[1].training
    assert rewritten[0].training
    assert not rewritten[1].training


def test_inplace_is_the_argument_itself() -> None:
    model = mlp()
    x = torch.randn(5, 64)
    expected = mfx.monarchify(model, config=HALF_GRID)(x)
    assert mfx.monarchify(model, config=HALF_GRID, inplace=True) is model
    assert torch.equal(model(x), expected)


def test_to_dense_gives_plain_parameters_and_the_same_outputs() -> None:
    rewritten = mfx.monarchify(mlp().double(), config=HALF_GRID)
    dense = mfx.to_dense(rewritten)
    assert isinstance(dense[0].weight, nn.Parameter)
    assert set(dense.state_dict()) == set(mlp().state_dict())
    x = torch.randn(5, 64, dtype=torch.float64)
    torch.testing.assert_close(dense(x), rewritten(x), rtol=1e-12, atol=1e-12)


def test_ties_stay_ties(gpt2: tuple) -> None:
    _, rewritten, _ = gpt2
    assert rewritten.lm_head.weight is rewritten.transformer.wte.weight


def test_transformer_fast_path_does_not_run_dense() -> None:
    encoder, (x,) = zoo.torch_encoder()
    encoder.eval()
    rewritten = mfx.monarchify(encoder, config=HALF_GRID, example_inputs=x)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        with torch.autograd.profiler.profile() as profile:
            y = rewritten(x, src_key_padding_mask=padding)
        dense = mfx.to_dense(rewritten).train()  # the slow path, with its dropout off
        for module in dense.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        expected = dense(x, src_key_padding_mask=padding)
    assert sum(e.name == "monarch_fx::monarch_bmm" for e in profile.function_events) == 8
    torch.testing.assert_close(y[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("settings", [{}, {"kdim": 24, "vdim": 40}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(batch_first: bool, settings: dict, need_weights: bool) -> None:
    """Every form of attention against PyTorch's own arithmetic on the same weights."""
    attention = nn.MultiheadAttention(32, 4, batch_first=batch_first, **settings).double().eval()
    shape = (2, 5) if batch_first else (5, 2)
    q = torch.randn(*shape, 32, dtype=torch.float64)
    k = torch.randn(*shape, settings.get("kdim", 32), dtype=torch.float64)
    v = torch.randn(*shape, settings.get("vdim", 32), dtype=torch.float64)
    rewritten = mfx.monarchify(attention, config=HALF_GRID, example_inputs=(q, k, v))
    assert mfx.report(rewritten).plan.rewritten_share == 1.0
    dense = mfx.to_dense(rewritten)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 4] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": causal}, {"attn_mask": causal < 0}):
        y, weights = rewritten(q, k, v, need_weights=need_weights, **masks)
        expected, expected_weights = dense(q, k, v, need_weights=need_weights, **masks)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-10, atol=1e-12)


# --- torch's own tools


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


# --- the plain pass


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


# --- planning and selection


def test_plan_changes_nothing_and_is_replayed() -> None:
    model = nn.Sequential(*[mlp(256) for _ in range(4)])
    before = copy.deepcopy(model.state_dict())
    plan = mfx.plan(model, budget=0.5, tokens=4096, device="cpu")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert abs(plan.reached - 0.5) <= 0.02
    rewritten = mfx.monarchify(model, plan=plan)
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in rewritten.parameters())
    assert saved == plan.eligible_params - plan.kept_params


def test_plan_is_edited() -> None:
    model = mlp()
    plan = mfx.plan(model, config=HALF_GRID)
    plan = plan.with_shape("0.weight").with_shape("2.weight", nblocks_out=4, nblocks_in=1, rank=8)
    rewritten = mfx.monarchify(model, plan=plan)
    assert isinstance(rewritten[0].weight, nn.Parameter)
    assert str(rewritten[2].weight.monarch().shape) == "4x1 r8"


def test_one_structure_everywhere() -> None:
    config = mfx.MonarchConfig(nblocks_out=4, nblocks_in=1, rank=8)
    rewritten = mfx.monarchify(mlp(), config=config)
    shapes = {str(d.shape) for d in mfx.report(rewritten).plan.rewritten}
    assert shapes == {"4x1 r8"}


def test_include_and_exclude(gpt2: tuple) -> None:
    model, _, _ = gpt2

    def names(**patterns: object) -> set[str]:
        plan = mfx.plan(model, config=HALF_GRID, **patterns)
        return {d.candidate.name for d in plan.decisions}

    assert names(include="*.mlp.c_fc") == {f"transformer.h.{i}.mlp.c_fc.weight" for i in range(2)}
    assert names(include=re.compile(r"h\.0\.")) == {n for n in names() if ".h.0." in n}
    assert names(include=lambda name, owner: owner.nf == 256) == names(include="*.mlp.c_fc")
    assert names(include=["*c_fc*", "*c_attn*"], exclude="*h.1*") == {
        "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.attn.c_attn.weight",
    }


def test_heads_stay_dense_by_default_and_say_so() -> None:
    pytest.importorskip("transformers")
    model, _inputs = zoo.llama()
    plan = mfx.plan(model, config=HALF_GRID)
    reasons = {d.name: d.reason for d in plan.declined}
    assert "output head" in reasons["lm_head.weight"]
    assert "lm_head.weight" in {d.candidate.name for d in mfx.plan(model, config=HALF_GRID, include="*").decisions}


def test_tokens_are_scaled_from_the_inputs() -> None:
    pytest.importorskip("transformers")
    model, _ = zoo.t5()
    plan = mfx.plan(model, config=HALF_GRID)
    assert plan.tokens == ((4096, 1.0),)
    assert "default" in plan.tokens_source
    inputs = {"input_ids": torch.ones(2, 16, dtype=torch.long), "decoder_input_ids": torch.ones(2, 8, dtype=torch.long)}
    plan = mfx.plan(model, config=HALF_GRID, example_inputs=inputs)
    counts = {d.candidate.name: d.candidate.calls[0].count for d in plan.decisions}
    assert counts["encoder.block.0.layer.0.SelfAttention.q.weight"] == 32
    assert counts["decoder.block.0.layer.0.SelfAttention.q.weight"] == 16


def test_computed_weights_are_declined() -> None:
    model = mlp(32)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    plan = mfx.plan(model, config=HALF_GRID, example_inputs=torch.randn(4, 32))
    assert [d.candidate.name for d in plan.decisions] == ["2.weight"]
    assert "computed at run time" in plan.declined[0].reason


def test_meta_model_is_planned_only() -> None:
    with torch.device("meta"):
        model = mlp(1024)
    plan = mfx.plan(model, budget=0.5, tokens=8192, device="cpu")
    assert len(plan.rewritten) == 2
    assert "prior" in plan.error_source
    with pytest.raises(errors.MetaDeviceError, match="meta device"):
        mfx.monarchify(model, budget=0.5)


def test_print_graph_names_the_weights(gpt2: tuple, capsys: pytest.CaptureFixture) -> None:
    _, rewritten, ids = gpt2
    mfx.print_graph(rewritten, {"input_ids": ids})
    lines = [line for line in capsys.readouterr().out.splitlines() if "= monarch_bmm(" in line]
    assert len(lines) == 8
    assert "transformer.h.0.attn.c_attn.weight" in lines[0]
    assert "64 -> 192, grid 2x2, rank 16, 12,288 -> 8,192 parameters" in lines[0]


def test_random_factors_keep_the_scale() -> None:
    model = nn.Sequential(nn.Linear(512, 512))
    rewritten = mfx.monarchify(model, config=mfx.MonarchConfig(nblocks=4), init="random")
    dense = rewritten[0].weight.to_dense().detach()
    # the standard deviation of 2^18 entries made of 2^16 factors is known to about a percent
    assert float(dense.std() / model[0].weight.detach().std()) == pytest.approx(1.0, rel=0.03)


# --- what is refused


@pytest.mark.parametrize("budget", [0, -0.5, 1.5, "half", True])
def test_budget_outside_its_range(budget: object) -> None:
    with pytest.raises(errors.ConfigError, match=r"\(0, 1\]"):
        mfx.monarchify(mlp(), budget=budget)


def test_neither_budget_nor_structure() -> None:
    with pytest.raises(errors.ConfigError, match="Give a budget"):
        mfx.monarchify(mlp())


def test_not_a_module() -> None:
    with pytest.raises(errors.NotAModuleError, match="function"):
        mfx.monarchify(lambda x: x, budget=0.5)


def test_wrapped_models_say_what_to_pass() -> None:
    with pytest.raises(errors.WrappedModelError, match="_orig_mod"):
        mfx.monarchify(torch.compile(mlp()), budget=0.5)
    with pytest.raises(errors.WrappedModelError, match=r"model\.module"):
        mfx.monarchify(nn.DataParallel(mlp()), budget=0.5)


def test_nothing_eligible() -> None:
    with pytest.raises(errors.NoEligibleProductError):
        mfx.monarchify(nn.Sequential(nn.ReLU()), budget=0.5, example_inputs=torch.randn(3))
    rewritten = mfx.monarchify(mlp(), config=HALF_GRID)
    with pytest.raises(errors.NoEligibleProductError, match="already a Monarch matrix"):
        mfx.monarchify(rewritten, config=HALF_GRID, example_inputs=torch.randn(3, 64))


@pytest.mark.parametrize("which", ["include", "exclude"])
def test_pattern_that_matches_nothing(which: str) -> None:
    with pytest.raises(errors.SelectionError, match="attention"):
        mfx.monarchify(mlp(), config=HALF_GRID, **{which: "*attention*"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 4] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(errors.WeightError, match=r"2\.weight.* 1 NaN or infinite"):
        mfx.monarchify(model, config=HALF_GRID, inplace=True)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name != "2.weight")


def test_weights_of_unsupported_kinds() -> None:
    with pytest.raises(errors.WeightError, match="complex64"):
        mfx.monarchify(nn.Sequential(nn.Linear(8, 8, dtype=torch.complex64)), config=HALF_GRID)
    model = mlp(8)
    model[0].weight = nn.Parameter(torch.ones(32, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(errors.WeightError, match="int8"):
        mfx.monarchify(model, config=HALF_GRID)
    model[0].weight = nn.Parameter(torch.eye(32, 8).to_sparse())
    with pytest.raises(errors.WeightError, match="sparse"):
        mfx.monarchify(model, config=HALF_GRID)


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(errors.ExampleInputsError, match="forward"):
        mfx.monarchify(mlp(), config=HALF_GRID, example_inputs={"pixels": torch.randn(3, 64)})
    with pytest.raises(errors.ExampleInputsError, match="can't run on example_inputs"):
        mfx.monarchify(mlp(), config=HALF_GRID, example_inputs=torch.randn(3, 63))
    with pytest.raises(errors.ExampleInputsError, match="int"):
        mfx.monarchify(mlp(), config=HALF_GRID, example_inputs=3)


def test_plan_for_another_architecture() -> None:
    plan = mfx.plan(mlp(), config=HALF_GRID)
    with pytest.raises(errors.PlanMismatchError, match=r"0\.weight"):
        mfx.monarchify(mlp(32), plan=plan)
    deeper = nn.Sequential(*mlp(), nn.Linear(64, 64))
    with pytest.raises(errors.PlanMismatchError, match="fingerprint"):
        mfx.monarchify(deeper, plan=plan)
    with pytest.raises(errors.PlanMismatchError, match="not a plan"):
        mfx.Plan.from_json("[1, 2]")
    with pytest.raises(errors.ConfigError, match="budget"):
        mfx.monarchify(mlp(), budget=0.5, plan=plan)


def test_half_on_meta() -> None:
    model = mlp()
    model[0].to("meta")
    with pytest.raises(errors.MetaDeviceError, match=r"0\.weight"):
        mfx.monarchify(model, config=HALF_GRID)


def test_a_failure_leaves_the_argument_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    plan = mfx.plan(model, config=HALF_GRID)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("monarch_fx.passes.rewrite.copy_without", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mfx.monarchify(model, plan=plan)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_interrupted_inplace_run_leaves_a_valid_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    plan = mfx.plan(model, config=HALF_GRID)
    project, done = mfx.api.project, []

    def interrupted(*args: object) -> object:
        if done:
            raise KeyboardInterrupt
        done.append(True)
        return project(*args)

    monkeypatch.setattr("monarch_fx.api.project", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mfx.monarchify(model, plan=plan, inplace=True)
    assert model(torch.randn(3, 64)).shape == (3, 64)
    assert [name for name, _ in mfx.report(model).errors] == ["0.weight"]


def test_report_of_a_model_that_has_none() -> None:
    with pytest.raises(errors.MonarchError, match="no report"):
        mfx.report(mlp())


# --- the weight that stands for a parameter


def test_other_operations_get_the_dense_values_with_a_warning() -> None:
    layer = mfx.MonarchLinear(16, 8, nblocks=2)
    with pytest.warns(errors.DenseFallbackWarning, match="norm"):
        norm = torch.norm(layer.weight)
    torch.testing.assert_close(norm, layer.weight.to_dense().norm())


def test_writing_into_a_weight_is_refused() -> None:
    layer = mfx.MonarchLinear(16, 8, nblocks=2)
    with pytest.raises(errors.StructureError, match="factors R and L"):
        nn.init.zeros_(layer.weight)
    with pytest.raises(errors.StructureError, match="factors R and L"):
        layer.weight.data.zero_()


def test_reading_a_weight_in_another_dtype_does_not_cast_it() -> None:
    layer = mfx.MonarchLinear(16, 8, nblocks=2)
    x = torch.randn(3, 16, dtype=torch.float64)
    y = torch.nn.functional.linear(x, layer.weight.double())
    assert layer.weight.R.dtype == torch.float32
    torch.testing.assert_close(y, x @ layer.weight.to_dense().double().T)


def test_views_reach_the_same_factors() -> None:
    layer = mfx.MonarchLinear(16, 8, nblocks=2, bias=False).double()
    x, z = torch.randn(3, 16, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    dense = layer.weight.to_dense()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(x @ layer.weight.T, x @ dense.T)
        torch.testing.assert_close(z @ layer.weight, z @ dense)
        torch.testing.assert_close(layer.weight @ x.T, dense @ x.T)
        torch.testing.assert_close(torch.einsum("ti,oi->to", x, layer.weight), x @ dense.T)


@pytest.mark.parametrize(("in_features", "out_features"), [(64, 64), (101, 67), (30, 90)])
@pytest.mark.parametrize("nblocks", [1, 2, 4, (4, 1), (3, 5)])
def test_monarch_linear(in_features: int, out_features: int, nblocks: int | tuple[int, int]) -> None:
    layer = mfx.MonarchLinear(in_features, out_features, nblocks=nblocks).double()
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    expected = x @ layer.weight.to_dense().T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0], rtol=1e-12, atol=1e-12)
