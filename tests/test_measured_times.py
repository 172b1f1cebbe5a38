"""Plans by measured times: a stopwatch that lies shows what they go by, and a real one what it times."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import monarch_fx as mfx
from monarch_fx.costs import Stopwatch, Surroundings, dense_seconds, monarch_seconds
from monarch_fx.costs.shipped import SHIPPED
from monarch_fx.errors import ConfigError, DeviceProfileError
from monarch_fx.planning import decide, grids
from monarch_fx.planning.options import shapes
from monarch_fx.records import Candidate, Decision
from monarch_fx.structure import MonarchShape
from tests.test_planning import candidate, tails

CPU = SHIPPED["cpu"]
TOKENS = 1024
Choice = MonarchShape | None
Factor = Callable[[int, Choice], float]


class Watch:
    """As long as predicted, times a factor of the call's number and the structure; remembers what it was asked."""

    def __init__(self, factor: Factor, slowed: int | None = None) -> None:
        self.factor = factor
        self.slowed = slowed  # in_features of products whose structures take a hundred times as long
        self.asked: list[tuple[int, int, Choice]] = []

    def __call__(self, tokens: int, n_in: int, n_out: int, shape: Choice, **setting: Any) -> float:
        self.asked.append((n_in, n_out, shape))
        slow = 100 if shape is not None and n_in == self.slowed else 1
        return slow * self.factor(len(self.asked), shape) * predicted(tokens, n_in, n_out, shape)


def predicted(tokens: int, n_in: int, n_out: int, shape: Choice) -> float:
    if shape is None:
        return float(dense_seconds(CPU, tokens, n_in, n_out))
    return float(monarch_seconds(CPU, tokens, shape))


def decided(candidates: list[Candidate], watch: Watch, **options: Any) -> list[Decision]:
    choices: dict[str, Any] = {"budget": 0.5, "config": mfx.MonarchConfig()} | options
    choices = {"errors": tails(candidates, choices["config"])} | choices
    return list(decide(candidates, stopwatch=watch, profile=CPU, tokens={TOKENS: 1.0}, **choices))


def block() -> list[Candidate]:
    return [
        candidate("q", 256, 256),
        candidate("o", 256, 256),
        candidate("up", 256, 1024),
        candidate("down", 1024, 256),
    ]


@pytest.mark.parametrize("objective", ["params", "latency"])
def test_everything_that_a_plan_says_was_measured(objective: str) -> None:
    watch = Watch(lambda n, shape: 1.0 if shape is None else 0.8 + 0.01 * (hash(shape) % 40))
    decisions = decided(block(), watch, objective=objective)
    assert any(d.shape is not None for d in decisions)
    for d in decisions:
        size = d.candidate.in_features, d.candidate.out_features
        assert {(*size, None), (*size, d.shape)} <= set(watch.asked)
        assert d.dense_s == pytest.approx(predicted(TOKENS, *size, None))
        assert d.time_s == pytest.approx(watch.factor(0, d.shape) * predicted(TOKENS, *size, d.shape))
    # products of one kind are timed together: q and o are alike, and everything is timed once more in the end
    in_plan = {(256, 256, shape) for shape in (None, *(d.shape for d in decisions[:2]))}
    assert all(watch.asked.count(asked) == 2 for asked in in_plan)
    assert {watch.asked.count(asked) for asked in watch.asked} <= {1, 2}


def test_what_is_measured_slower_than_dense_stays_dense() -> None:
    watch = Watch(lambda n, shape: 1.0, slowed=512)
    products = [candidate("slow", 512, 256), candidate("fast", 256, 1024)]
    slow, fast = decided(products, watch, config=mfx.MonarchConfig(nblocks=1))
    assert slow.shape is None
    assert "measured clearly faster at 1,024 tokens" in slow.reason
    assert slow.time_s == slow.dense_s
    assert fast.shape is not None
    assert fast.time_s < 0.98 * fast.dense_s


@pytest.mark.filterwarnings("ignore::monarch_fx.errors.BudgetWarning")
@pytest.mark.parametrize(("ratio", "rewritten"), [(0.96, True), (0.99, False)])
def test_measured_times_need_less_of_a_margin(ratio: float, rewritten: bool) -> None:
    """By prediction a structure at 0.96 of the dense time stays dense; once timed it needn't."""
    product, config = candidate("weight", 256, 256), mfx.MonarchConfig(nblocks=1)
    of_dense = {
        shape: ratio * predicted(TOKENS, 256, 256, None) / predicted(TOKENS, 256, 256, shape)
        for shape in shapes(product, config, 0.9)
    }
    (decision,) = decided([product], Watch(lambda n, shape: of_dense.get(shape, 1.0)), budget=0.9, config=config)
    assert (decision.shape is not None) == rewritten


def test_the_fastest_of_what_is_alike_is_found_though_predicted_slower() -> None:
    """Of structures with about the same error plans take the fastest; they hope for 10 % less than predicted."""
    product = candidate("weight", 512, 512)
    sizes = {grid: MonarchShape(512, 512, *grid, rank=1) for grid in grids(product, mfx.MonarchConfig())}
    alike = {
        "weight": {
            grid: [1 - rank * one.params / 512**2 / 2 for rank in range(min(one.p, one.s) + 1)]
            for grid, one in sizes.items()
        }
    }
    first = decided([product], Watch(lambda n, shape: 1.0), errors=alike)[0]
    others = decided([product], Watch(lambda n, shape: 1.0 if shape in (None, first.shape) else 0.92), errors=alike)
    assert first.shape is not None
    assert others[0].shape not in (None, first.shape)
    assert others[0].time_s < first.time_s


def test_a_busy_moment_is_found_out() -> None:
    """The first time of the dense product is three times too long; all is timed once more before a plan is made."""
    (decision,) = decided([candidate("weight", 256, 256)], Watch(lambda n, shape: 3.0 if n == 1 else 1.0))
    assert decision.dense_s == pytest.approx(predicted(TOKENS, 256, 256, None))


def test_forced_structures_are_timed() -> None:
    watch = Watch(lambda n, shape: 2.0)
    (decision,) = decided([candidate("weight", 256, 256)], watch, budget=None, config=mfx.MonarchConfig(nblocks=4))
    assert decision.shape == MonarchShape(256, 256, 4, 4, 16)
    assert decision.time_s == pytest.approx(2 * predicted(TOKENS, 256, 256, decision.shape))


def test_measured_errors_are_kept_while_times_are() -> None:
    """Grids are projected once, however often the problem is solved anew."""
    projected = []

    def error2(shape: MonarchShape) -> float:
        projected.append(shape)
        return 0.2 + 0.001 * shape.nblocks_out

    product = candidate("weight", 512, 512)
    watch = Watch(lambda n, shape: 1.0 if shape is None else 0.8 + 0.01 * (hash(shape) % 40))
    decided([product], watch, measure={"weight": error2})
    assert projected
    assert len(set(projected)) == len(projected)


def test_ranges_that_pay_hold_the_tokens_that_were_timed() -> None:
    """A structure that is predicted slower than dense, and was measured faster, pays where it was measured."""
    config = mfx.MonarchConfig(nblocks=4, rank=32, require_speedup=False)
    watch = Watch(lambda n, shape: 1.0 if shape is None else 0.2)
    (decision,) = decided([candidate("weight", 256, 256)], watch, budget=None, config=config)
    assert decision.time_s < decision.dense_s
    assert any(first <= TOKENS and (last is None or last >= TOKENS) for first, last in decision.pays)


def test_plans_are_measured_on_this_machine() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256))
    torch.manual_seed(3)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    plan = mfx.plan(model, 0.5, tokens=2048, times="measured")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert plan.times == "measured"
    assert "\nmeasured " in str(plan)
    assert "predicted " not in str(plan)
    for d in plan.decisions:
        # a machine of any speed from a hundredth to a hundred times that of the profile's
        ratio = d.dense_s / predicted(2048, d.candidate.in_features, d.candidate.out_features, None)
        assert 0.01 < ratio < 100
        assert ratio != 1
        assert d.shape is None or d.time_s < 0.98 * d.dense_s
    assert mfx.Plan.from_json(plan.to_json()) == plan
    rewritten = mfx.monarchify(model, 0.5, tokens=2048, times="measured")
    assert mfx.report(rewritten).plan.times == "measured"


def test_plans_of_before_were_predicted() -> None:
    plan = mfx.plan(torch.nn.Linear(256, 256), 0.5)
    assert plan.times == "predicted"
    text = plan.to_json().replace(',\n "times": "predicted"', "")
    assert "times" not in text
    assert mfx.Plan.from_json(text) == plan


def test_nothing_is_timed_for_another_device() -> None:
    with pytest.raises(DeviceProfileError, match=r"'h100' here, only for cpu .*times=\"predicted\""):
        mfx.plan(torch.nn.Linear(256, 256), 0.5, device="h100", times="measured")
    with pytest.raises(ConfigError, match="'guessed'"):
        mfx.plan(torch.nn.Linear(256, 256), 0.5, times="guessed")


KINDS = [
    {},
    {"dtype": "bfloat16"},
    {"dtype": "float64"},
    {"batch": 3},
    {"workload": "training"},
    {"workload": "training", "around": Surroundings(bias=True, activated=True, recomputed=True)},
    {"around": Surroundings(bias=True, activated=True, beside=(22,))},
    {"batch": 2, "around": Surroundings(bias=True)},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [None, MonarchShape(30, 22, 4, 4, 3), MonarchShape(30, 22, 1, 2, 5)], ids=str)
def test_products_of_all_kinds_are_timed(shape: Choice, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once, however often they are timed; 30 and 22 are padded to 32 and 24 in four blocks."""
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiled.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda graph, dynamic: compile_(graph, dynamic=dynamic, backend=backend))
    watch = Stopwatch(torch.device("cpu"))
    with torch.no_grad():
        times = [watch(5, 30, 22, shape, **kind) for _ in range(2)]
    assert all(0 < seconds < math.inf for seconds in times)
    assert len(compiled) == 1
    products = [node for node in compiled[0].graph.nodes if "monarch_bmm" in str(node.target)]
    around = kind.get("around", Surroundings())
    assert len(products) == (0 if shape is None else 1 + len(around.beside))
    gelu = [node for node in compiled[0].graph.nodes if "gelu" in str(node.target)]
    assert len(gelu) == (1 + len(around.beside) if around.activated and kind.get("workload") != "training" else 0)


def test_many_sizes_are_compiled_each_by_itself() -> None:
    """Dynamo gives up on code that it compiled for too many sizes."""
    watch = Stopwatch(torch.device("cpu"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for n in range(1, 12):
            assert watch(4, 8 * n, 8, None) > 0


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        raise RuntimeError("no compiler here")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda graph, dynamic: compile_(graph, dynamic=dynamic, backend=broken))
    with pytest.raises(
        DeviceProfileError, match=r"(?s)256 -> 128, dense, at 7 tokens .*no compiler here.*\"predicted\""
    ):
        Stopwatch(torch.device("cpu"))(7, 256, 128, None)


def test_interrupted_planning_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def interrupted(self: Stopwatch, *args: Any, **setting: Any) -> float:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return 1e-3

    monkeypatch.setattr(Stopwatch, "__call__", interrupted)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 256))
    with pytest.raises(KeyboardInterrupt):
        mfx.monarchify(model, 0.5, times="measured", inplace=True)
    assert all(isinstance(layer.weight, torch.nn.Parameter) for layer in model)
