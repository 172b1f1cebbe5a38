"""The multiple-choice knapsack: one option per product, smallest sum of errors, parameters within a limit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse

from monarch_fx.errors import MonarchWarning
from monarch_fx.planning.options import Option

RELATIVE_GAP = 1e-4  # of the sum of errors
TIME_LIMIT_S = 20.0
ALIKE = 0.02  # squared errors that differ by less count as equal


def pareto(options: Sequence[Option]) -> list[Option]:
    """Without the options that another one beats in parameters and error; fewest parameters first.

    Of options that are equal in both the fastest stays, and of equally fast ones the first.
    """
    front: list[Option] = []
    for option in sorted(options, key=lambda o: (o.params, o.error2, o.time_s)):
        if not front or option.error2 < front[-1].error2:
            front.append(option)
    return front


def solve(options: Sequence[Sequence[Option]], weights: Sequence[float], most_params: int) -> list[Option]:
    """Picks one option per product with the smallest ``sum(weight * error2)`` among those of at most ``most_params``.

    Args:
        options: Of every product; at least one each, and the smallest ones together within ``most_params``.
        weights: Of every product's error.
        most_params: Limit of the sum of parameters.
    """
    fronts = [pareto(choices) for choices in options]
    smallest = [front[0] for front in fronts]
    largest = [front[-1] for front in fronts]
    if sum(option.params for option in largest) <= most_params:
        return largest
    flat = [option for front in fronts for option in front]
    owner = np.repeat(np.arange(len(fronts)), [len(front) for front in fronts])
    cost = np.array([option.error2 for option in flat]) * np.asarray(weights, dtype=float)[owner]
    share = np.array([option.params for option in flat]) / most_params  # about 1 in sum, for the solver's tolerances
    ones = np.ones(len(flat))
    one_each = scipy.sparse.csr_array((ones, (owner, np.arange(len(flat)))), shape=(len(fronts), len(flat)))
    result = scipy.optimize.milp(
        cost,
        integrality=ones,
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(share[None, :], -np.inf, 1),
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


def fastest_alike(options: Sequence[Option], chosen: Option) -> Option:
    """The fastest option with no more parameters than ``chosen`` and about its error.

    Grids are often closer to each other than the estimate of the error is to what the model will lose.
    """
    alike = (o for o in options if o.params <= chosen.params and o.error2 <= (1 + ALIKE) * chosen.error2)
    return min(alike, key=lambda o: (o.time_s, o.error2))
