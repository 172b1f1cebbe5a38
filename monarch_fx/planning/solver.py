"""The multiple-choice knapsack: one option per product, smallest sum of errors, their sizes within a limit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import scipy.optimize
import scipy.sparse

from monarch_fx.errors import MonarchWarning
from monarch_fx.planning.options import Option

Size = Callable[[Option], float]

RELATIVE_GAP = 1e-4  # of the sum of errors
TIME_LIMIT_S = 20.0
ALIKE = 0.02  # squared errors that differ by less count as equal
AS_LARGE = 0.04  # sizes that differ by less do; of a budget of a half 0.02 is left then, at most


def pareto(options: Sequence[Option], size: Size) -> list[Option]:
    """Without the options that another one beats in size and error; smallest first.

    Of options that are equal in both the fastest stays, and of equally fast ones the first.
    """
    front: list[Option] = []
    for option in sorted(options, key=lambda o: (size(o), o.error2, o.time_s)):
        if not front or option.error2 < front[-1].error2:
            front.append(option)
    return front


def solve(options: Sequence[Sequence[Option]], weights: Sequence[float], limit: float, size: Size) -> list[Option]:
    """Picks one option per product with the smallest ``sum(weight * error2)`` among those of at most ``limit``.

    Args:
        options: Of every product; at least one each, and the smallest ones together within ``limit``.
        weights: Of every product's error.
        limit: Of the sum of sizes.
        size: What is limited: parameters, or seconds.
    """
    fronts = [pareto(choices, size) for choices in options]
    smallest = [front[0] for front in fronts]
    largest = [front[-1] for front in fronts]
    if sum(map(size, largest)) <= limit:
        return largest
    cost, bounds, one_each, shares = _program(fronts, weights, limit, size)
    result = scipy.optimize.milp(
        cost / (cost.max() or 1.0),  # the solver's tolerances are absolute as well
        integrality=np.ones(len(cost)),
        bounds=bounds,
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(shares, -np.inf, 1),
        ],
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": TIME_LIMIT_S},
    )
    if result.x is None:
        warnings.warn(
            f"No plan was found in {TIME_LIMIT_S:.0f} s: the smallest one is taken.", MonarchWarning, stacklevel=2
        )
        return smallest
    if result.status == 1:
        warnings.warn(
            f"The plan is the best found in {TIME_LIMIT_S:.0f} s; its error is at most {result.mip_gap:.1%} above the "
            "smallest possible one.",
            MonarchWarning,
            stacklevel=2,
        )
    ends = np.cumsum([len(front) for front in fronts])[:-1]
    return [front[int(np.argmax(x))] for front, x in zip(fronts, np.split(result.x, ends), strict=True)]


def price(options: Sequence[Sequence[Option]], weights: Sequence[float], limit: float, size: Size) -> float:
    """What one more unit of ``limit`` would save in ``sum(weight * error2)``: the dual of the relaxed problem."""
    fronts = [pareto(choices, size) for choices in options]
    cost, bounds, one_each, shares = _program(fronts, weights, limit, size)
    scale = cost.max() or 1.0
    result = scipy.optimize.linprog(
        cost / scale,
        A_ub=shares,
        b_ub=[1],
        A_eq=one_each,
        b_eq=np.ones(len(fronts)),
        bounds=(bounds.lb[0], bounds.ub[0]),
    )
    return -float(result.ineqlin.marginals[0]) * scale / limit


def _program(
    fronts: Sequence[Sequence[Option]], weights: Sequence[float], limit: float, size: Size
) -> tuple[np.ndarray, scipy.optimize.Bounds, scipy.sparse.csr_array, scipy.sparse.csr_array]:
    """Costs and bounds of every option, rows that pick one of each product, and the row of their shares of the limit,
    which are about 1 in sum, for the solver's tolerances."""
    flat = [option for front in fronts for option in front]
    owner = np.repeat(np.arange(len(fronts)), [len(front) for front in fronts])
    cost = np.array([option.error2 for option in flat]) * np.asarray(weights, dtype=float)[owner]
    shares = scipy.sparse.csr_array(np.array([[size(option) for option in flat]]) / limit)
    ones, places = np.ones(len(flat)), np.arange(len(flat))
    one_each = scipy.sparse.csr_array((ones, (owner, places)), shape=(len(fronts), len(flat)))
    return cost, scipy.optimize.Bounds(np.zeros(len(flat)), ones), one_each, shares


def fastest_alike(
    options: Sequence[Sequence[Option]], chosen: Sequence[Option], size: Size, doubt: float
) -> list[Option]:
    """Of products that run together: the fastest options that are no larger than the chosen ones, have about their
    errors, and one grid if that can be; with the fewest parameters.

    Grids are often closer to each other than the estimate of the error is to what the model will lose. Where options
    are about as large, their squared errors count as equal within ``doubt``, too. A kernel cuts all of its products
    into the same tiles, which suit blocks of one size: times are predicted for such.
    """
    alike = [
        [option for option in every if _is_alike(option, one, size, doubt)]
        for every, one in zip(options, chosen, strict=True)
    ]
    same = []
    for grid in dict.fromkeys(option.grid for option in alike[0]):
        of_grid = [[option for option in every if option.grid == grid] for every in alike]
        if all(of_grid):
            same.append([_fastest(every) for every in of_grid])
    if not same:
        return [_fastest(every) for every in alike]
    return min(same, key=lambda found: tuple(sum(values) for values in zip(*map(_order, found), strict=True)))


def _is_alike(option: Option, chosen: Option, size: Size, doubt: float) -> bool:
    within = max(ALIKE, doubt) if size(option) >= (1 - AS_LARGE) * size(chosen) else ALIKE
    return size(option) <= size(chosen) and option.error2 <= (1 + within) * chosen.error2


def _fastest(options: Sequence[Option]) -> Option:
    return min(options, key=_order)


def _order(option: Option) -> tuple[float, float, float]:
    return option.time_s, option.params, option.error2
