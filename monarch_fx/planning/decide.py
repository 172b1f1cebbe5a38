"""One decision per product: dense, or the structure that keeps the model's estimated error smallest."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from monarch_fx.config import MonarchConfig
from monarch_fx.costs import DeviceProfile, Stopwatch
from monarch_fx.errors import BudgetError, BudgetWarning, ConfigError
from monarch_fx.kernels import choice
from monarch_fx.planning.options import Option, is_forced, shapes
from monarch_fx.planning.refine import Measure, Refined, choose
from monarch_fx.planning.solver import Size, pareto
from monarch_fx.planning.timed import Times
from monarch_fx.planning.workload import Run
from monarch_fx.records import Candidate, Decision

Errors = Mapping[str, Mapping[tuple[int, int], Sequence[float]]]
# Of the dense product's time: a prediction errs by 5 % in the median, two measured times differ by less than 2 %.
SURELY_FASTER = {"predicted": 0.95, "measured": 0.98}
# What a budget limits.
OBJECTIVES: Mapping[str, Size] = {"params": attrgetter("params"), "latency": attrgetter("time_s")}
NAMED = 5  # products that a message lists before it says how many more there are


@dataclass(frozen=True)
class Menu:
    """What may be done with one candidate, and why it is no more than that."""

    candidate: Candidate
    dense: Option
    options: tuple[Option, ...]  # dense among them, unless the structure is forced
    refusal: str  # why no structure is among them; empty where there is one


def decide(
    candidates: Sequence[Candidate],
    errors: Errors,
    *,
    doubt: float = 0.0,
    losses: Mapping[str, float] | None = None,
    measure: Mapping[str, Measure] | None = None,
    stopwatch: Stopwatch | None = None,
    budget: float | None,
    objective: str = "params",
    config: MonarchConfig,
    profile: DeviceProfile,
    tokens: Mapping[int, float],
    workload: str = "inference",
    dtype: str = "float32",
    strict: bool = False,
) -> tuple[Decision, ...]:
    """Chooses dense or one structure for every candidate.

    The sum of relative squared errors, each weighted by what losing its product would cost (``losses``; else by its
    parameters times calls, its share of the work), is made smallest under the budget; of structures with about the same
    error the fastest is taken, and none that is not predicted (or was not measured) clearly faster than dense, where
    ``config.require_speedup``. A structure that the user forces (a grid with a rank, or without a budget) is taken
    whatever it costs.

    Args:
        candidates: The eligible products.
        errors: ``errors[name][nblocks_out, nblocks_in][rank]`` is the relative squared error of that structure, for the
            grids that ``grids`` names and all ranks up to ``min(s, p)``.
        doubt: By how much, as a share, the ratio of two such errors may be wrong, of structures about as large.
        losses: ``losses[name]`` is the increase of the model's loss where the product gives nothing. What is not among
            them weighs per parameter and call what the median of those weighs.
        measure: ``measure[name]`` projects a product whose ``errors`` are rough for grids of several blocks, and gives
            the error that it really has; asked for the few structures that come into question.
        stopwatch: Times the dense products and those structures that are chosen; None to go by predictions.
        budget: Share of the candidates' parameters, or of their dense time, that may be kept, in (0, 1]; None with a
            forced grid.
        objective: ``"params"`` or ``"latency"``: what ``budget`` limits.
        config: Further choices.
        profile: The device that is planned for.
        tokens: Main token counts and their weights; times are weighted means.
        workload: ``"inference"`` or ``"training"``.
        dtype: Of the planned run.
        strict: Raise where the budget can't be reached.

    Raises:
        ConfigError: As ``check_choices``.
        BudgetError: ``strict``, and the budget can't be reached, or no product has room for the grid that is forced;
            else that is a ``BudgetWarning``.
        DeviceProfileError: The profile doesn't know ``dtype``, or the stopwatch can't time a product.
    """
    check_choices(budget, workload, objective, config)
    times = Times(Run(profile, tokens, workload, dtype), stopwatch)
    dense = [(candidate, None) for candidate in candidates]
    times.measure(dense)
    products = [Refined((measure or {}).get(candidate.name)) for candidate in candidates]
    groups = _together(candidates, times.run)
    while True:
        menus = [_menu(candidate, errors.get(candidate.name, {}), config, budget, times) for candidate in candidates]
        for menu, product in zip(menus, products, strict=True):
            product.offer(menu.options)
        shortfall = ""
        if budget is None or is_forced(config, budget):
            chosen, why = [product.measured(product.options[0]) for product in products], "forced by config"
            if config.grid is not None and all(option.shape is None for option in chosen):
                n_out, n_in = config.grid
                shortfall = (
                    f"A grid of {n_out}x{n_in} blocks fits none of the {len(candidates)} products, which have fewer "
                    "rows or columns: they stay dense. Use fewer blocks."
                )
        else:
            weights = _weights(candidates, losses)
            chosen, why, shortfall = _within(budget, objective, menus, products, weights, doubt, groups)
        choices = [(menu.candidate, option.shape) for menu, option in zip(menus, chosen, strict=True)]
        if not times.measure(choices) and not times.confirm([*dense, *choices]):
            break
    if shortfall and strict:
        raise BudgetError(shortfall)
    if shortfall:
        warnings.warn(shortfall, BudgetWarning, stacklevel=3)
    known = losses or {}
    return tuple(
        _decision(menu, option, why, times, known.get(menu.candidate.name))
        for menu, option in zip(menus, chosen, strict=True)
    )


def check_choices(budget: Any, workload: Any, objective: Any, config: Any, times: Any = "predicted") -> None:
    """Whether these, as of ``monarch_fx.plan``, have a meaning.

    Raises:
        ConfigError: One has none.
    """
    if not isinstance(config, MonarchConfig):
        raise ConfigError(f"config is a {type(config).__name__}: give a MonarchConfig.")
    if budget is None and config.grid is None:
        raise ConfigError("Give a budget in (0, 1], or a config that forces a grid, such as MonarchConfig(nblocks=4).")
    number = isinstance(budget, numbers.Real) and not isinstance(budget, bool)
    if budget is not None and not (number and 0 < budget <= 1):
        raise ConfigError(
            f"budget must be in (0, 1], the share of parameters (or time) that may be kept; got {budget!r}."
        )
    if objective not in OBJECTIVES:
        raise ConfigError(f'objective must be "params" or "latency", what the budget limits; got {objective!r}.')
    if workload not in ("inference", "training"):
        raise ConfigError(f'workload must be "inference" or "training", got {workload!r}.')
    if times not in SURELY_FASTER:
        raise ConfigError(f'times must be "predicted" or "measured", got {times!r}.')


def _menu(
    candidate: Candidate,
    errors: Mapping[tuple[int, int], Sequence[float]],
    config: MonarchConfig,
    budget: float | None,
    times: Times,
) -> Menu:
    dense = Option(None, 0.0, times.seconds(candidate, None), candidate.params)
    found = [
        Option(
            shape,
            error2=max(0.0, float(errors[shape.grid][shape.rank])),
            time_s=times.seconds(candidate, shape),
            params=candidate.batch * shape.params,
        )
        for shape in shapes(candidate, config, budget, times.run.terms(candidate))
    ]
    if not found:
        return Menu(candidate, dense, (dense,), _too_small(candidate, config))
    if is_forced(config, budget):
        return Menu(candidate, dense, tuple(found), "")
    most = SURELY_FASTER[times.source] * dense.time_s
    allowed = [option for option in found if option.time_s <= most or not config.require_speedup]
    tokens = _token_text(times.run.rows(candidate))
    verdict = {"predicted": "is predicted", "measured": "in question was measured"}[times.source]
    refusal = "" if allowed else f"no structure {verdict} clearly faster at {tokens}"
    return Menu(candidate, dense, (dense, *allowed), refusal)


def _weights(candidates: Sequence[Candidate], losses: Mapping[str, float] | None) -> list[float]:
    """Of every candidate's relative squared error; the median stands for what is not known."""
    work = [float(len(c.calls) * c.params) for c in candidates]
    if losses is None:
        return work
    known = [losses[c.name] / w for c, w in zip(candidates, work, strict=True) if c.name in losses]
    usual = float(np.median(known))
    return [losses.get(c.name, usual * w) for c, w in zip(candidates, work, strict=True)]


def _together(candidates: Sequence[Candidate], run: Run) -> list[list[int]]:
    """Places of candidates whose kernels run together in the planned run, up to ``TOGETHER``; others stand alone."""
    groups: list[list[int]] = []
    readers: dict[int | None, list[int]] = {}
    for i, candidate in enumerate(candidates):
        group = readers.get(candidate.activation, [])
        if not run.beside(candidate) or not 0 < len(group) < choice.TOGETHER:
            groups.append(group := [])
            readers[candidate.activation] = group
        group.append(i)
    return groups


def _within(
    budget: float,
    objective: str,
    menus: Sequence[Menu],
    products: Sequence[Refined],
    weights: Sequence[float],
    doubt: float,
    groups: Sequence[Sequence[int]],
) -> tuple[list[Option], str, str]:
    """The best choice under the budget, and why; or the smallest one, why, and what is in the budget's way."""
    size = OBJECTIVES[objective]
    dense = sum(size(menu.dense) for menu in menus)
    smallest = [pareto(menu.options, size)[0] for menu in menus]
    reached = sum(map(size, smallest))
    if reached <= budget * dense:
        chosen = choose(products, weights, budget * dense, size, doubt, groups)
        return chosen, "smallest error under the budget", ""
    shortfall = (
        f"The budget {budget:g} can't be reached, {reached / dense:.3f} is the closest. In the way: "
        f"{_in_the_way(budget, size, menus, smallest)}."
    )
    what = {"params": "fewest parameters", "latency": "least time"}[objective]
    smallest = [product.measured(option) for product, option in zip(products, smallest, strict=True)]
    return smallest, f"{what}, the budget can't be reached", shortfall


def _in_the_way(budget: float, size: Size, menus: Sequence[Menu], smallest: Sequence[Option]) -> str:
    """The products that can't be cut to the budget, those with most too much first."""
    excess = [size(option) - budget * size(menu.dense) for menu, option in zip(menus, smallest, strict=True)]
    order = sorted((i for i in range(len(menus)) if excess[i] > 0), key=lambda i: -excess[i])
    named = []
    for i in order[:NAMED]:
        menu = menus[i]
        why = menu.refusal or f"keeps at least {size(smallest[i]) / size(menu.dense):.2f}"
        named.append(f"{menu.candidate.name} ({why})")
    more = [f"{len(order) - NAMED} more"] if len(order) > NAMED else []
    return ", ".join(named + more)


def _decision(menu: Menu, option: Option, why: str, times: Times, loss: float | None) -> Decision:
    shape = option.shape
    ranges = () if shape is None else times.pays(menu.candidate, shape, option.time_s / menu.dense.time_s)
    planned = times.run.rows(menu.candidate)
    pays = tuple(
        (first, last) for first, last in ranges if last is None or any(first <= count <= last for count in planned)
    )
    return Decision(
        candidate=menu.candidate,
        shape=shape,
        reason=menu.refusal or why,
        error=option.error2**0.5,
        dense_s=menu.dense.time_s,
        time_s=option.time_s,
        pays=pays,
        loss=None if loss is None else loss * option.error2,
    )


def _too_small(candidate: Candidate, config: MonarchConfig) -> str:
    size = f"{candidate.out_features} x {candidate.in_features}"
    if config.grid is not None and (config.grid[0] > candidate.out_features or config.grid[1] > candidate.in_features):
        return f"a grid of {config.grid[0]}x{config.grid[1]} blocks doesn't fit {size} weights"
    return f"no structure of rank {config.rank_multiple} has fewer parameters than {size} weights"


def _token_text(rows: dict[int, float]) -> str:
    counts = [f"{count:,}" for count in sorted(rows)]
    return " and ".join([", ".join(counts[:-1]), counts[-1]] if len(counts) > 1 else counts) + " tokens"
