"""Bad input gets a clear error before anything is changed."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from zoo import HALF_GRID, mlp

import monarch_fx as mfx
from monarch_fx import errors, factors


@pytest.mark.parametrize("budget", [0, -0.5, 1.5, "half", True])
def test_budget_outside_its_range(budget: object) -> None:
    with pytest.raises(errors.ConfigError, match=r"\(0, 1\]"):
        mfx.monarchify(mlp(), budget=budget)


def test_neither_budget_nor_structure() -> None:
    with pytest.raises(errors.ConfigError, match="Give a budget"):
        mfx.monarchify(mlp())


def test_a_config_of_another_kind() -> None:
    with pytest.raises(errors.ConfigError, match="config is a dict: give a MonarchConfig"):
        mfx.plan(mlp(), config={"nblocks": 2})


@pytest.mark.parametrize("dtype", ["bf16", torch.int8, torch.complex64, 16])
def test_a_dtype_that_no_costs_are_known_of(dtype: object) -> None:
    with pytest.raises(errors.ConfigError, match=r"dtype must be one of float64, float32.*, got "):
        mfx.plan(mlp(), budget=0.5, dtype=dtype)


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
    for example_inputs in (None, torch.randn(3, 64)):
        with pytest.raises(errors.NoEligibleProductError, match="already a Monarch matrix"):
            mfx.monarchify(rewritten, config=HALF_GRID, example_inputs=example_inputs)


def test_the_rest_of_a_rewritten_model_is_rewritten() -> None:
    model = mfx.monarchify(mlp(), config=HALF_GRID, exclude="2.*")
    again = mfx.monarchify(model, config=HALF_GRID)
    assert [d.candidate.name for d in mfx.report(again).plan.rewritten] == ["2.weight"]
    assert [d.name for d in mfx.report(again).plan.declined] == ["0.weight"]
    x = torch.randn(3, 64)
    torch.testing.assert_close(mfx.to_dense(again)(x), again(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["include", "exclude"])
def test_pattern_that_matches_nothing(which: str) -> None:
    with pytest.raises(errors.SelectionError, match="attention"):
        mfx.monarchify(mlp(), config=HALF_GRID, **{which: "*attention*"})


def test_products_of_the_linear_algebra_module() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W, self.V = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.randn(64, 64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.multi_dot([torch.linalg.matmul(x, self.W), self.V, x.mT])

    plan = mfx.plan(Model(), config=HALF_GRID, example_inputs=torch.randn(5, 64))
    assert [d.candidate.name for d in plan.decisions] == ["W"]
    assert [(d.name, d.reason) for d in plan.declined] == [("V", "multi_dot: write it as matmul")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 4] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(errors.WeightError, match=r"2\.weight.* 1 NaN or infinite"):
        mfx.monarchify(model, config=HALF_GRID, inplace=True)
    with pytest.raises(errors.WeightError, match=r"2\.weight.* 1 NaN or infinite"):
        mfx.calibrate(model, [torch.randn(3, 64)])
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


def test_lazy_modules() -> None:
    model, x = nn.Sequential(nn.LazyLinear(64), nn.Linear(64, 64)), torch.randn(3, 64)
    with pytest.raises(errors.WeightError, match=r"0\.weight.* no shape yet: run the model on a batch first"):
        mfx.monarchify(model, config=HALF_GRID, example_inputs=x)
    model(x)
    mfx.monarchify(model, config=HALF_GRID, example_inputs=x)


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
    with pytest.raises(errors.ConfigError, match="don't give workload, objective, device as well"):
        mfx.monarchify(mlp(), plan=plan, workload="training", objective="latency", device="h100")
    with pytest.raises(errors.PlanMismatchError, match=r"plan is a str: give a Plan; Plan\.from_json"):
        mfx.monarchify(mlp(), plan=plan.to_json())


def test_half_on_meta() -> None:
    model = mlp()
    model[0].to("meta")
    with pytest.raises(errors.MetaDeviceError, match=r"0\.weight"):
        mfx.monarchify(model, config=HALF_GRID)


def test_models_that_cannot_be_copied() -> None:
    model, x = mlp(), torch.randn(3, 64)
    model[0].lock = threading.Lock()
    for options in ({}, {"calibration": [x], "inplace": True}, {"anchor": [x], "inplace": True}):
        with pytest.raises(errors.MonarchError, match=r"can't be copied .*lock.* a __deepcopy__ .* needs no copy"):
            mfx.monarchify(model, config=HALF_GRID, example_inputs=x, **options)
    assert mfx.monarchify(model, config=HALF_GRID, example_inputs=x, inplace=True) is model


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
    project, done = factors.project, []

    def interrupted(*args: object) -> object:
        if done:
            raise KeyboardInterrupt
        done.append(True)
        return project(*args)

    monkeypatch.setattr(factors, "project", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mfx.monarchify(model, plan=plan, inplace=True)
    assert model(torch.randn(3, 64)).shape == (3, 64)
    assert [name for name, _ in mfx.report(model).errors] == ["0.weight"]


def test_report_of_a_model_that_has_none() -> None:
    with pytest.raises(errors.MonarchError, match="no report"):
        mfx.report(mlp())
