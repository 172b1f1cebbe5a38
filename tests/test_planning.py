"""Which structures are considered, and the decisions of a plan; of its knapsack see ``test_solver.py``."""

import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import monarch_fx as mfx
from monarch_fx.config import MonarchConfig
from monarch_fx.costs import DeviceProfile, dense_seconds, monarch_seconds
from monarch_fx.costs.shipped import SHIPPED
from monarch_fx.errors import BudgetError, BudgetWarning, ConfigError
from monarch_fx.planning import OBJECTIVES, decide, grids, solver
from monarch_fx.planning.options import shapes
from monarch_fx.projection import PRIOR_DOUBT, prior_tail
from monarch_fx.records import Call, Candidate, Decision
from monarch_fx.structure import MonarchShape
from monarch_fx.views import MatrixView

PARAMS = OBJECTIVES["params"]
Tails = dict[str, dict[tuple[int, int], Sequence[float]]]


def candidate(
    name: str, n_in: int, n_out: int, *, shares: Sequence[float] = (1.0,), experts: int | None = None
) -> Candidate:
    batch = () if experts is None else ((experts, n_in * n_out),)
    view = MatrixView(batch, ((n_out, n_in),), ((n_in, 1),))
    calls = tuple(Call("tokens", 0, share) for share in shares)
    return Candidate(name, name, (n_out, n_in), view, "linear", calls, "float32")


def tails(
    candidates: Sequence[Candidate], config: MonarchConfig, decay: Callable[[str], float] = lambda _: 1.0
) -> Tails:
    """Errors of blocks whose singular values fall like ``i**-decay``."""
    errors: Tails = {}
    for c in candidates:
        errors[c.name] = {}
        for grid in grids(c, config):
            shape = MonarchShape(c.in_features, c.out_features, *grid)
            energy = np.arange(1.0, min(shape.p, shape.s) + 1) ** (-2 * decay(c.name))
            errors[c.name][grid] = np.append(np.cumsum(energy[::-1])[::-1], 0.0) / energy.sum()
    return errors


def decided(
    candidates: Sequence[Candidate],
    budget: float | None = 0.5,
    config: MonarchConfig | None = None,
    *,
    errors: Tails | None = None,
    profile: str | DeviceProfile = "cpu",
    tokens: dict[int, float] | None = None,
    dtype: str = "float32",
    workload: str = "inference",
    strict: bool = False,
    **options: Any,
) -> dict[str, Decision]:
    config = config or MonarchConfig()
    decisions = decide(
        candidates,
        tails(candidates, config) if errors is None else errors,
        budget=budget,
        config=config,
        profile=SHIPPED[profile] if isinstance(profile, str) else profile,
        tokens=tokens or {1024: 1.0},
        workload=workload,
        dtype=dtype,
        strict=strict,
        **options,
    )
    assert [d.candidate for d in decisions] == list(candidates)
    return {d.candidate.name: d for d in decisions}


def kept(decisions: dict[str, Decision]) -> float:
    return sum(d.params for d in decisions.values()) / sum(d.candidate.params for d in decisions.values())


BLOCK = [
    (f"block.{part}", *sizes)
    for part, sizes in {
        "q": (256, 256),
        "k": (256, 256),
        "v": (256, 256),
        "o": (256, 256),
        "up": (256, 1024),
        "down": (1024, 256),
    }.items()
]


@pytest.fixture
def block() -> list[Candidate]:
    return [candidate(*part) for part in BLOCK]


class TestOptions:
    def test_grids_divide_and_leave_blocks_of_some_size(self) -> None:
        counts = {(o, i) for o in (1, 2, 3, 4, 8) for i in (1, 2, 3, 4, 8)}
        assert set(grids(candidate("w", 768, 768), MonarchConfig())) == counts
        assert set(grids(candidate("w", 36, 768), MonarchConfig())) == {(o, i) for o in (1, 2, 3, 4, 8) for i in (1, 2)}
        assert set(grids(candidate("w", 768, 12), MonarchConfig(nblocks_choices=(2, 3)))) == {(1, 1)}

    def test_sizes_that_no_count_divides_are_padded(self) -> None:
        assert set(grids(candidate("w", 64, 101), MonarchConfig(nblocks_choices=(1, 2, 4)))) == {
            (o, i) for o in (1, 2, 4) for i in (1, 2, 4)
        }

    def test_low_rank_is_always_there(self) -> None:
        assert (1, 1) in grids(candidate("w", 64, 64), MonarchConfig(nblocks_choices=(4,)))

    @settings(max_examples=100, deadline=None)
    @given(
        n_in=st.integers(1, 3000),
        n_out=st.integers(1, 3000),
        multiple=st.sampled_from([1, 8, 16]),
        budget=st.floats(0.01, 1.0),
        terms=st.sampled_from([1, 64]),
    )
    def test_ranks(self, n_in: int, n_out: int, multiple: int, budget: float, terms: int) -> None:
        config = MonarchConfig(rank_multiple=multiple)
        found = shapes(candidate("w", n_in, n_out), config, budget, terms)
        others = shapes(candidate("w", n_in, n_out), config, budget)
        assert {(s.nblocks_out, s.nblocks_in) for s in found} == {(s.nblocks_out, s.nblocks_in) for s in others}
        assert len(set(found)) == len(found)
        for grid, of_grid in itertools.groupby(found, key=lambda shape: (shape.nblocks_out, shape.nblocks_in)):
            group = list(of_grid)
            assert grid in grids(candidate("w", n_in, n_out), config)
            assert len(group) <= 17
            for shape in group:
                assert shape.rank % multiple == 0
                assert shape.rank <= min(shape.p, shape.s)
                assert shape.params < n_in * n_out

    @pytest.mark.parametrize(("tokens", "dtype"), [(4096, "bfloat16"), (64, "bfloat16"), (4096, "float32")])
    def test_ranks_fill_the_kernels_of_a_gpu(self, tokens: int, dtype: str) -> None:
        """Many tokens in half precision: sums over ranks, in gradients too, are multiples of 64."""
        candidates = [candidate(str(n), 768 + 256 * n, 1024) for n in range(1, 9)]
        config, where = MonarchConfig(require_speedup=False), {"tokens": {tokens: 1.0}, "dtype": dtype}
        found = decided(candidates, 0.4, config, profile="h100", **where).values()
        sums = [n * d.shape.rank % 64 for d in found if d.shape for n in (d.shape.nblocks_out, d.shape.nblocks_in)]
        assert sums
        assert any(sums) == ((tokens, dtype) != (4096, "bfloat16"))

    def test_ratios_are_dense_and_meet_the_budget(self) -> None:
        low_rank = [
            s.ratio
            for s in shapes(candidate("w", 4096, 4096), MonarchConfig(), 0.37)
            if s.nblocks_out == s.nblocks_in == 1
        ]
        assert min(low_rank) < 0.05
        assert max(low_rank) > 0.95
        assert max(np.diff(low_rank)) < 0.08
        one_rank = 16 * 2 / 4096
        assert min(abs(ratio - 0.37) for ratio in low_rank) <= one_rank

    def test_small_products_have_none(self) -> None:
        router = candidate("router", 768, 8)
        assert shapes(router, MonarchConfig(), 0.5) == ()
        assert shapes(candidate("w", 1, 1), MonarchConfig(), 0.5) == ()


class TestDecide:
    @pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
    def test_reaches_the_budget(self, block: list[Candidate], budget: float) -> None:
        decisions = decided(block, budget)
        assert budget - 0.02 <= kept(decisions) <= budget

    def test_one_product_reaches_the_budget(self) -> None:
        assert 0.48 <= kept(decided([candidate("w", 768, 768)], 0.5)) <= 0.5

    def test_budget_one_keeps_all_dense(self, block: list[Candidate]) -> None:
        decisions = decided(block, 1.0)
        assert all(d.shape is None and d.error == 0 and d.time_s == d.dense_s for d in decisions.values())
        assert {d.reason for d in decisions.values()} == {"smallest error under the budget"}

    def test_errors_decide_who_is_cut(self, block: list[Candidate]) -> None:
        errors = tails(block, MonarchConfig(), decay=lambda name: 2.0 if name == "block.up" else 0.2)
        decisions = decided(block, 0.7, errors=errors)
        ratios = {name: d.params / d.candidate.params for name, d in decisions.items()}
        assert ratios["block.up"] == min(ratios.values())
        shape = decisions["block.up"].shape
        assert shape is not None
        expected = errors["block.up"][shape.nblocks_out, shape.nblocks_in][shape.rank]
        assert decisions["block.up"].error == pytest.approx(math.sqrt(expected), rel=1e-12)

    @pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
    def test_a_budget_of_time(self, block: list[Candidate], budget: float) -> None:
        errors = tails(block, MonarchConfig(), decay=lambda name: 2.0 if name == "block.up" else 0.2)
        decisions = decided(block, budget, errors=errors, objective="latency")
        shares = sum(d.time_s for d in decisions.values()) / sum(d.dense_s for d in decisions.values())
        assert budget - 0.05 <= shares <= budget
        ratios = {name: d.time_s / d.dense_s for name, d in decisions.items()}
        assert ratios["block.up"] == min(ratios.values())

    def test_a_budget_of_time_that_cannot_be_reached(self, block: list[Candidate]) -> None:
        with pytest.warns(BudgetWarning, match=r"0\.001 can't be reached, 0\.1\d+ is the closest"):
            decisions = decided(block, 0.001, objective="latency")
        assert {d.reason for d in decisions.values()} == {"least time, the budget can't be reached"}

    def test_measured_errors_decide(self, block: list[Candidate]) -> None:
        """Spectra say that all grids are alike; in truth one of them is far better than all others."""
        rough = tails(block, MonarchConfig(require_speedup=False), decay=lambda _: 0.5)
        asked: list[MonarchShape] = []

        def measure(shape: MonarchShape) -> float:
            asked.append(shape)
            estimate = rough["block.up"][shape.nblocks_out, shape.nblocks_in][shape.rank]
            return float(estimate * (0.1 if (shape.nblocks_out, shape.nblocks_in) == (2, 2) else 3.0))

        options: dict[str, Any] = {"errors": rough, "config": MonarchConfig(require_speedup=False)}
        assert decided(block, 0.5, **options)["block.up"].shape != (2, 2)
        up = decided(block, 0.5, measure={"block.up": measure}, **options)["block.up"]
        assert up.shape is not None
        assert (up.shape.nblocks_out, up.shape.nblocks_in) == (2, 2)
        assert up.error == pytest.approx(math.sqrt(measure(up.shape)), rel=1e-12)
        asked.pop()
        assert up.shape in asked
        assert len(set(asked)) == len(asked)  # nothing is projected twice
        assert (1, 1) not in {(shape.nblocks_out, shape.nblocks_in) for shape in asked}  # that is exact

    def test_small_losses_are_weighed_like_large_ones(self, block: list[Candidate]) -> None:
        config = MonarchConfig(require_speedup=False)
        errors = tails(block, config, lambda name: 0.5 if name.endswith("o") else 1.0)
        losses = {c.name: 1.0 + i for i, c in enumerate(block)}
        plans = [
            decided(block, 0.5, config, errors=errors, losses={name: scale * loss for name, loss in losses.items()})
            for scale in (1.0, 1e-9)
        ]
        large, small = (sum(losses[name] * d.error**2 for name, d in plan.items()) for plan in plans)
        assert small == pytest.approx(large, rel=solver.ALIKE + solver.RELATIVE_GAP)

    def test_a_repeated_call_weighs_as_often(self) -> None:
        once, often = candidate("once", 256, 256), candidate("often", 256, 256, shares=[1.0] * 5)
        decisions = decided([once, often], 0.6)
        assert decisions["often"].params > decisions["once"].params

    def test_times_are_those_of_the_cost_model(self, block: list[Candidate]) -> None:
        cpu = SHIPPED["cpu"]
        tokens = {64: 3.0, 2048: 1.0}
        for d in decided(block, tokens=tokens).values():
            size = d.candidate.in_features, d.candidate.out_features
            dense = sum(w / 4 * dense_seconds(cpu, t, *size) for t, w in tokens.items())
            assert d.dense_s == pytest.approx(dense, rel=1e-12)
            if d.shape is not None:
                monarch = sum(w / 4 * monarch_seconds(cpu, t, d.shape) for t, w in tokens.items())
                assert d.time_s == pytest.approx(monarch, rel=1e-12)
                assert d.pays == ((d.pays[0][0], None),)
                assert monarch_seconds(cpu, d.pays[0][0], d.shape) < dense_seconds(cpu, d.pays[0][0], *size)

    def test_where_a_structure_pays_the_tokens_planned_for_are_in(self) -> None:
        """A product that shares launches with two others pays at few tokens and at many ones, and not between them."""
        product = dataclasses.replace(candidate("k", 4096, 1024), activation=0, beside=(4096, 1024))
        few, many = (
            decided([product], profile="h100", dtype="bfloat16", tokens={tokens: 1.0})["k"] for tokens in (1, 4096)
        )
        (first, last), (again, end) = few.pays
        assert (first, end) == (1, None)
        assert last is not None
        assert last < again
        ((start, end),) = many.pays
        assert start <= 4096
        assert end is None

    def test_products_that_run_together_take_one_grid(self) -> None:
        """Of few tokens; with many, and where they read something else, each takes its own."""
        sizes = {"q": 4096, "k": 1024, "v": 1024}

        def chosen(tokens: int, apart: bool) -> list[MonarchShape | None]:
            products = [candidate(name, 4096, rows) for name, rows in sizes.items()]
            if not apart:
                products = [
                    dataclasses.replace(p, activation=0, beside=tuple(n for name, n in sizes.items() if name != p.name))
                    for p in products
                ]
            errors = {
                p.name: {grid: prior_tail(p.out_features, 4096, grid).numpy() for grid in grids(p, MonarchConfig())}
                for p in products
            }
            options: dict[str, Any] = {"profile": "h200", "dtype": "bfloat16", "doubt": PRIOR_DOUBT}
            return [d.shape for d in decided(products, errors=errors, tokens={tokens: 1.0}, **options).values()]

        assert len({shape.grid for shape in chosen(4, apart=False) if shape is not None}) == 1
        assert len({shape.grid for shape in chosen(4, apart=True) if shape is not None}) > 1
        assert chosen(4096, apart=False) == chosen(4096, apart=True)

    def test_times_add_up_over_calls(self) -> None:
        twice = decided([candidate("w", 256, 256, shares=[1.0, 0.25])], 1.0)["w"]
        expected = sum(dense_seconds(SHIPPED["cpu"], t, 256, 256) for t in (1024, 256))
        assert twice.dense_s == pytest.approx(expected, rel=1e-12)

    @settings(max_examples=25, deadline=None)
    @given(
        tokens=st.dictionaries(st.integers(1, 8192), st.floats(0.1, 10), min_size=1, max_size=3),
        profile=st.sampled_from(list(SHIPPED)),
        workload=st.sampled_from(["inference", "training"]),
        budget=st.floats(0.05, 1.0),
    )
    def test_never_predicted_slower_than_dense(
        self, tokens: dict[int, float], profile: str, workload: str, budget: float
    ) -> None:
        candidates = [candidate(*part) for part in BLOCK]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)
            decisions = decided(candidates, budget, profile=profile, tokens=tokens, workload=workload, dtype="bfloat16")
        for d in decisions.values():
            assert d.time_s <= d.dense_s
            if d.shape is not None:
                assert d.params < d.candidate.params

    @pytest.mark.parametrize(
        ("profile", "tokens", "sizes", "rewritten"),
        [
            ("cpu", 1024, (768, 3072), True),
            ("cpu", 32, (768, 8), False),  # too small for rank 16
            ("cpu", 32, (32, 32), False),  # a second launch costs more
            ("h100", 8192, (4096, 4096), True),
            ("h100", 2, (256, 256), False),  # launches
            ("h100", 1, (4096, 14336), True),  # decode reads fewer weights
        ],
    )
    def test_verdicts(self, profile: str, tokens: int, sizes: tuple[int, int], rewritten: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BudgetWarning)
            d = decided([candidate("w", *sizes)], profile=profile, tokens={tokens: 1.0}, dtype="bfloat16")["w"]
        assert (d.shape is not None) == rewritten
        assert d.reason

    def test_reasons_say_why_a_product_stays_dense(self) -> None:
        with pytest.warns(BudgetWarning):
            decisions = decided(
                [candidate("router", 768, 8), candidate("w", 256, 256)],
                tokens={2: 1.0, 8: 1.0},
                profile="h100",
                dtype="bfloat16",
            )
        assert decisions["router"].reason == "no structure of rank 16 has fewer parameters than 8 x 768 weights"
        assert decisions["w"].reason == "no structure is predicted clearly faster at 2 and 8 tokens"

    def test_without_the_time_rule_slower_structures_are_allowed(self) -> None:
        config = MonarchConfig(require_speedup=False)
        d = decided([candidate("w", 768, 768)], config=config, tokens={1: 1.0}, profile="h100")["w"]
        assert d.shape is not None
        assert d.time_s > d.dense_s

    def test_batched_matrices_count_all_their_parameters(self) -> None:
        d = decided([candidate("experts", 256, 512, experts=4)])["experts"]
        assert d.shape is not None
        assert d.params == 4 * d.shape.params
        assert d.dense_s == pytest.approx(dense_seconds(SHIPPED["cpu"], 1024, 256, 512, batch=4), rel=1e-12)

    def test_equal_input_gives_equal_output(self, block: list[Candidate]) -> None:
        twins = [candidate(f"{i}.{c.name}", c.in_features, c.out_features) for c in block for i in range(3)]
        assert decided(twins) == decided(twins)


class TestBudgetOutOfReach:
    @pytest.fixture
    def crowd(self) -> list[Candidate]:
        routers = [candidate(f"router.{i}", 768, 8 + i) for i in range(7)]
        return [*routers, candidate("w", 256, 256)]

    def test_the_closest_point_is_taken_and_those_in_the_way_are_named(self, crowd: list[Candidate]) -> None:
        with pytest.warns(BudgetWarning) as caught:
            decisions = decided(crowd, 0.2)
        assert decisions["w"].shape is not None
        assert decisions["w"].params == min(s.params for s in shapes(crowd[-1], MonarchConfig(), 0.2))
        message = str(caught[0].message)
        assert f"The budget 0.2 can't be reached, {kept(decisions):.3f} is the closest" in message
        assert "router.6 (no structure of rank 16 has fewer parameters than 14 x 768 weights)" in message
        assert message.endswith("2 more.")
        assert "w (" not in message

    def test_structures_that_are_too_large_are_named_too(self) -> None:
        with pytest.warns(BudgetWarning, match=r"w \(keeps at least 0\.12\)"):
            decided([candidate("w", 256, 256)], 0.01)

    def test_strict_raises(self, crowd: list[Candidate]) -> None:
        with pytest.raises(BudgetError, match=r"0\.2 can't be reached.*router\.6"):
            decided(crowd, 0.2, strict=True)


class TestForced:
    def test_grid_and_rank_override_budget_and_time(self, block: list[Candidate]) -> None:
        config = MonarchConfig(nblocks_out=2, nblocks_in=4, rank=1000)
        decisions = decided(block, 0.1, config, tokens={1: 1.0}, profile="h100", strict=True)
        for d in decisions.values():
            n_in, n_out = d.candidate.in_features, d.candidate.out_features
            assert d.shape == MonarchShape(n_in, n_out, 2, 4, rank=min(n_in // 4, n_out // 2))  # exact
            assert d.error == 0
            assert d.reason == "forced by config"
            assert d.params >= d.candidate.params

    @pytest.mark.parametrize(
        ("config", "rank"),
        [
            (MonarchConfig(nblocks=4), 16),
            (MonarchConfig(nblocks_out=8, nblocks_in=1), 32),
            (MonarchConfig(nblocks=32), 1),
        ],
        ids=["4x4", "8x1", "32x32"],
    )
    def test_a_grid_without_budget_has_the_authors_rank(self, config: MonarchConfig, rank: int) -> None:
        d = decided([candidate("w", 256, 1024)], None, config)["w"]
        assert d.shape is not None
        assert (d.shape.nblocks_out, d.shape.nblocks_in) == config.grid
        assert d.shape.rank == rank

    def test_a_grid_with_a_budget_leaves_the_rank_to_it(self, block: list[Candidate]) -> None:
        decisions = decided(block, 0.5, MonarchConfig(nblocks=2))
        assert {str(d.shape).split()[0] for d in decisions.values()} <= {"2x2", "None"}
        assert 0.48 <= kept(decisions) <= 0.5

    def test_products_that_the_grid_does_not_fit_stay_dense(self) -> None:
        decisions = decided([candidate("gate", 768, 3), candidate("w", 256, 256)], None, MonarchConfig(nblocks=4))
        assert decisions["gate"].shape is None
        assert decisions["gate"].reason == "a grid of 4x4 blocks doesn't fit 3 x 768 weights"
        assert decisions["w"].shape is not None

    def test_padding_is_allowed(self) -> None:
        d = decided([candidate("w", 101, 67)], None, MonarchConfig(nblocks=4, rank=3))["w"]
        assert d.shape is not None
        assert d.shape.padded

    def test_neither_budget_nor_grid(self, block: list[Candidate]) -> None:
        with pytest.raises(ConfigError, match="Give a budget"):
            decided(block, None)


def test_two_hundred_products_take_seconds() -> None:
    rng = np.random.default_rng(0)
    sizes = [(768, 768), (768, 768), (768, 768), (768, 768), (768, 3072), (3072, 768)]
    candidates = [candidate(str(i), *sizes[i % 6]) for i in range(200)]
    decay = {c.name: rng.uniform(0.2, 1.5) for c in candidates}
    errors = tails(candidates, MonarchConfig(), decay=decay.__getitem__)
    start = time.process_time()
    decisions = decided(candidates, 0.4, errors=errors)
    assert time.process_time() - start < 15  # 2 s on an idle core
    assert 0.38 <= kept(decisions) <= 0.4


def test_products_of_all_sizes_share_the_cut() -> None:
    """Errors weigh as much as the product's parameters: a large product is not cut to nothing to spare small ones."""
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"large": torch.nn.Linear(1024, 1024), "small": torch.nn.Linear(256, 256)})
    plan = mfx.plan(model, budget=0.5, tokens=4096, device="cpu", config=MonarchConfig(require_speedup=False))
    for decision in plan.decisions:
        assert decision.params / decision.candidate.params == pytest.approx(0.5, abs=0.1)


def test_an_edited_latency_plan_does_not_know_what_it_reaches() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128))
    x = torch.randn(4, 128)
    plan = mfx.plan(model, 0.9, example_inputs=x, objective="latency", tokens=4096, device="cpu")
    edited = mfx.Plan.from_json(plan.with_shape("0.weight", nblocks_out=2, nblocks_in=2, rank=8).to_json())
    assert edited.objective == "latency"
    assert math.isnan(edited.reached)
    assert "asked 0.9, reached ? of the dense time" in str(edited)
