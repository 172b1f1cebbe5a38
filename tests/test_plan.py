"""What is planned, for which products, and how a plan is replayed."""

from __future__ import annotations

import copy
import dataclasses
import re

import pytest
import torch
import zoo
from torch import nn
from zoo import HALF_GRID, mlp

import monarch_fx as mfx
from monarch_fx import errors
from monarch_fx.costs.shipped import SHIPPED


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


def test_edits_that_no_matrix_has_room_for_are_refused() -> None:
    plan = mfx.plan(mlp(), config=HALF_GRID)
    with pytest.raises(errors.StructureError, match=r"in a grid of 2x2, which are exact at rank \d+, got rank=1000000"):
        plan.with_shape("0.weight", nblocks_out=2, nblocks_in=2, rank=10**6)
    with pytest.raises(errors.ConfigError, match=r"2x2 blocks for '0\.weight' needs a rank"):
        plan.with_shape("0.weight", nblocks_out=2, nblocks_in=2)
    with pytest.raises(KeyError, match=r"no product 'none'. Its products: 0\.weight, 2\.weight\W+$"):
        plan.with_shape("none", rank=8)
    model, text = mlp(), plan.to_json()
    before = copy.deepcopy(model.state_dict())
    forged = mfx.Plan.from_json(re.sub(r'"rank": \d+', '"rank": 1000000', text))
    with pytest.raises(errors.PlanMismatchError, match="rank 1000000: at"):
        mfx.monarchify(model, plan=forged, inplace=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_grid_that_fits_nowhere_is_said() -> None:
    config = mfx.MonarchConfig(nblocks=1000)
    with pytest.warns(errors.BudgetWarning, match="1000x1000 blocks fits none of the 2 products"):
        assert not mfx.plan(mlp(), config=config).rewritten
    with pytest.raises(errors.BudgetError, match="Use fewer blocks"):
        mfx.plan(mlp(), config=config, strict=True)


@pytest.mark.parametrize("pattern", [nn.Linear, nn.Linear(2, 2)])
def test_a_class_or_a_module_is_no_pattern(pattern: object) -> None:
    with pytest.raises(errors.ConfigError, match=r"lambda name, owner: isinstance\(owner, nn\.Linear\), got .*Linear"):
        mfx.plan(mlp(), config=HALF_GRID, include=pattern)


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.V, self.W = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64))
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.V @ self.W * self.scale


@pytest.mark.parametrize("include", ["0.V", "0.W", "*"])
def test_parameters_keep_their_order_through_rewriting(include: str) -> None:
    """Optimizers' states know parameters by their places."""
    model = nn.Sequential(Raw(), nn.Linear(64, 64), mfx.MonarchLinear(64, 64))
    made = mfx.monarchify(model, config=HALF_GRID, example_inputs=torch.randn(2, 64), include=include)
    names = [name for name, _ in mfx.to_dense(made).named_parameters()]
    assert names == ["0.V", "0.W", "0.scale", "1.weight", "1.bias", "2.weight", "2.bias"]


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


def test_float32_is_planned_as_pytorch_multiplies_it() -> None:
    """In TF32 a dense product is eight times as fast, and a Monarch one gains less."""
    model, where = nn.Linear(4096, 4096), {"tokens": 8192, "config": HALF_GRID}
    assert mfx.plan(model, device="h100", **where).dtype == "float32"
    old = dataclasses.replace(SHIPPED["h100"], peak_flops={"float32": 1e13, "bfloat16": 1e14})
    torch.set_float32_matmul_precision("high")
    try:
        fast = mfx.plan(model, device="h100", **where)
        assert fast.dtype == mfx.plan(model, device="h100", dtype=torch.float32, **where).dtype == "tf32"
        assert mfx.plan(model, device="cpu", **where).dtype == "float32"
        assert mfx.plan(model, device="h100", dtype="bfloat16", **where).dtype == "bfloat16"
        with pytest.raises(errors.DeviceProfileError, match="no peak_flops for dtype 'tf32'"):
            mfx.plan(model, device=old, **where)
    finally:
        torch.set_float32_matmul_precision("highest")
    slow = mfx.plan(model, device="h100", **where)
    assert fast.decisions == mfx.plan(model, device="h100", dtype="tf32", **where).decisions
    assert fast.decisions[0].dense_s < slow.decisions[0].dense_s / 6
    assert fast.decisions[0].dense_s / fast.decisions[0].time_s < slow.decisions[0].dense_s / slow.decisions[0].time_s
    assert "tf32" in str(fast)
    assert mfx.Plan.from_json(fast.to_json()) == fast


def test_the_dtype_of_the_run_is_the_weights_own_or_chosen() -> None:
    with torch.device("meta"):
        model, half = mlp(1024), mlp(1024).to(torch.bfloat16)
    own, cast = (mfx.plan(model, budget=0.5, tokens=8192, device="h100", dtype=d) for d in (None, torch.bfloat16))
    assert (own.dtype, cast.dtype) == ("float32", "bfloat16")
    as_stored = mfx.plan(half, budget=0.5, tokens=8192, device="h100")
    assert [d.dense_s for d in cast.decisions] == [d.dense_s for d in as_stored.decisions]
    assert all(c.dense_s < o.dense_s for c, o in zip(cast.decisions, own.decisions, strict=True))
    rewritten = mfx.monarchify(mlp(), config=HALF_GRID, dtype="bfloat16")
    assert {p.dtype for p in rewritten.parameters()} == {torch.float32}
    assert mfx.report(rewritten).plan.dtype == "bfloat16"


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
    assert "prior by shape (the model has no values), within 10%" in " ".join(str(plan).split())
    with pytest.raises(errors.MetaDeviceError, match="meta device"):
        mfx.monarchify(model, budget=0.5)


def test_without_values_speed_decides_what_the_prior_cannot() -> None:
    """A plan of all grids is no slower than one that may take a single grid, and near its error."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 14336), nn.GELU(), nn.Linear(14336, 4096)).bfloat16()

    def planned(**grid: int) -> tuple[float, float]:
        plan = mfx.plan(model, 0.5, tokens=16, device="h200", config=mfx.MonarchConfig(**grid))
        return sum(d.time_s for d in plan.decisions), sum(d.error**2 for d in plan.decisions)

    seconds, error2 = planned()
    for nblocks in (1, 2, 4):
        alone_s, alone_error2 = planned(nblocks=nblocks)
        assert seconds <= alone_s
        assert error2 <= 1.1 * alone_error2


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
