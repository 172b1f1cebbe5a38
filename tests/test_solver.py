"""The knapsack against brute force, what it is given, and what its time limit does."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monarch_fx.errors import MonarchWarning
from monarch_fx.planning import OBJECTIVES, Option, solver
from monarch_fx.planning.solver import fastest_alike, pareto, solve
from monarch_fx.structure import MonarchShape

PARAMS = OBJECTIVES["params"]


class TestSolver:
    @staticmethod
    def options(pairs: Sequence[tuple[int, int]]) -> list[Option]:
        return [Option(None, error2=error / 64, time_s=1.0, params=params) for params, error in pairs]

    def test_pareto(self) -> None:
        options = self.options([(5, 3), (5, 2), (7, 2), (8, 1), (3, 9), (4, 9)])
        assert [(o.params, o.error2 * 64) for o in pareto(options, PARAMS)] == [(3, 9), (5, 2), (8, 1)]

    def test_of_equal_options_the_fastest_stays(self) -> None:
        slow, fast = Option(None, 0.5, 2.0, 10), Option(None, 0.5, 1.0, 10)
        assert pareto([slow, fast], PARAMS) == [fast]

    def test_of_options_with_about_the_same_error_the_fastest_is_taken(self) -> None:
        chosen = Option(None, 0.5, 2.0, 10)
        faster, bigger, worse = Option(None, 0.505, 1.0, 10), Option(None, 0.5, 0.5, 11), Option(None, 0.52, 0.5, 9)
        assert fastest_alike([[bigger, chosen, worse, faster]], [chosen], PARAMS, 0.0) == [faster]
        assert fastest_alike([[bigger, chosen, worse]], [chosen], PARAMS, 0.0) == [chosen]

    def test_doubt_is_in_errors_of_options_that_are_about_as_large(self) -> None:
        chosen, smaller = Option(None, 0.5, 2.0, 100), Option(None, 0.54, 0.5, 90)
        faster, fastest = Option(None, 0.54, 1.0, 97), Option(None, 0.56, 0.5, 99)
        for doubt, found in ((0.1, faster), (0.2, fastest), (0.0, chosen)):
            assert fastest_alike([[chosen, smaller, faster, fastest]], [chosen], PARAMS, doubt) == [found]

    def test_products_that_run_together_take_one_grid_where_they_may(self) -> None:
        def option(rows: int, grid: int, time_s: float, error2: float = 0.5) -> Option:
            return Option(MonarchShape(64, rows, grid, grid, 4), error2, time_s, 10)

        wide = [option(64, 1, 1.0), option(64, 2, 1.2), option(64, 4, 1.4)]
        narrow = [option(32, 4, 1.0), option(32, 2, 1.3), option(32, 1, 0.5, error2=0.6)]
        assert fastest_alike([wide, narrow], [wide[0], narrow[0]], PARAMS, 0.0) == [wide[2], narrow[0]]
        apart = fastest_alike([wide[:1], narrow], [wide[0], narrow[0]], PARAMS, 0.0)
        assert apart == [wide[0], narrow[0]]  # its grid would cost too much of the other one

    @settings(max_examples=150, deadline=None)
    @given(
        menus=st.lists(
            st.lists(st.tuples(st.integers(1, 40), st.integers(0, 64)), min_size=1, max_size=5), min_size=1, max_size=5
        ),
        room=st.floats(0, 1),
        data=st.data(),
    )
    def test_against_brute_force(self, menus: list[list[tuple[int, int]]], room: float, data: st.DataObject) -> None:
        options = [self.options(menu) for menu in menus]
        weights = data.draw(st.lists(st.integers(1, 3), min_size=len(menus), max_size=len(menus)))
        least = sum(min(o.params for o in menu) for menu in options)
        most = sum(max(o.params for o in menu) for menu in options)
        limit = int(least + room * (most - least))

        def cost(choice: Sequence[Option]) -> float:
            return sum(weight * option.error2 for weight, option in zip(weights, choice, strict=True))

        allowed = [c for c in itertools.product(*options) if sum(o.params for o in c) <= limit]
        chosen = solve(options, weights, limit, PARAMS)
        assert sum(o.params for o in chosen) <= limit
        assert cost(chosen) <= min(map(cost, allowed)) * (1 + solver.RELATIVE_GAP) + 1e-9

    def test_a_time_limit_that_hits_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(0)
        options = [self.options([(int(p), int(1e6 / p)) for p in rng.integers(1, 1000, 20)]) for _ in range(50)]
        least = sum(min(o.params for o in menu) for menu in options)
        monkeypatch.setattr(solver, "TIME_LIMIT_S", 1e-6)
        with pytest.warns(MonarchWarning, match=r"best found in|No plan was found"):
            chosen = solve(options, [1.0] * 50, 2 * least, PARAMS)
        assert sum(o.params for o in chosen) <= 2 * least
