"""The plan by measured errors: grids whose estimates are rough are projected before they are chosen.

Block spectra know nothing of what blocks do to each other. Under a plan's price of a parameter few grids of each
product come into question: one rank of each is measured, which corrects the estimates of its other ranks, and the
problem is solved anew until everything that it picks was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tqdm.auto import tqdm

from monarch_fx.planning.options import Option
from monarch_fx.planning.solver import Size, fastest_alike, price, solve
from monarch_fx.structure import MonarchShape

CONTENDERS = 3  # grids of a product that are measured before the problem is solved
# Until a grid is measured its estimate is taken times nblocks ** -COUPLING: measured over estimated errors of six
# products of SmolLM2-135M and 13 grids at half of the parameters have exponents of 0.1 to 0.5, most about this one.
COUPLING = 0.22

Grid = tuple[int, int]
Measure = Callable[[MonarchShape], float]  # the relative squared error of a product in this structure


class Refined:
    """The options of one product; what was measured of a grid corrects the estimates of its ranks.

    Args:
        measure: None where the estimates are exact.
    """

    def __init__(self, measure: Measure | None) -> None:
        self.measure = measure
        self.estimates: dict[MonarchShape | None, Option] = {}
        self.found: dict[MonarchShape, float] = {}
        self.factors: dict[Grid, float] = {}

    def offer(self, options: Sequence[Option]) -> None:
        """What may be chosen, with estimated errors; what was measured before stays known."""
        self.estimates = {option.shape: option for option in options}

    @property
    def options(self) -> list[Option]:
        return [dataclasses.replace(option, error2=self._error2(option)) for option in self.estimates.values()]

    def _error2(self, option: Option) -> float:
        shape = option.shape
        if shape is None:
            return option.error2
        nblocks = shape.nblocks_out * shape.nblocks_in
        usual = 1.0 if self.measure is None else nblocks**-COUPLING
        return self.found.get(shape, option.error2 * self.factors.get(shape.grid, usual))

    def is_rough(self, option: Option) -> bool:
        """Whether the option's error is an estimate that measuring would change."""
        shape = option.shape
        return self.measure is not None and shape is not None and shape.grid != (1, 1) and shape not in self.found

    def measured(self, option: Option) -> Option:
        """The option with its error as measured, where it is rough."""
        shape = option.shape
        if self.measure is None or shape is None or not self.is_rough(option):
            return option
        self.found[shape] = self.measure(shape)
        estimate = self.estimates[shape].error2
        if estimate > 0:
            self.factors[shape.grid] = self.found[shape] / estimate
        return dataclasses.replace(option, error2=self.found[shape])

    def contenders(self, weight: float, price_of_one: float, size: Size) -> list[Option]:
        """The best rank of each of the grids that are nearest to being chosen, at this price."""

        def cost(option: Option) -> float:
            return weight * option.error2 + price_of_one * size(option)

        best: dict[Grid, Option] = {}
        for option in sorted(filter(self.is_rough, self.options), key=cost):
            assert option.shape is not None
            best.setdefault(option.shape.grid, option)
        return list(best.values())[:CONTENDERS]


def choose(
    products: Sequence[Refined],
    weights: Sequence[float],
    limit: float,
    size: Size,
    doubt: float,
    groups: Sequence[Sequence[int]],
) -> list[Option]:
    """One option of each product, the best under the limit by errors that were measured where estimates are rough.

    ``doubt`` as of ``fastest_alike``; ``groups``: places of products that run together, each in one of them.
    """

    def solved() -> list[Option]:
        options = [product.options for product in products]
        best = solve(options, weights, limit, size)
        for group in groups:
            found = fastest_alike([options[i] for i in group], [best[i] for i in group], size, doubt)
            for i, option in zip(group, found, strict=True):
                best[i] = option
        return best

    rough: list[tuple[Refined, Option]] = []
    if any(product.measure is not None for product in products):
        at = price([product.options for product in products], weights, limit, size)
        rough = [(p, o) for p, weight in zip(products, weights, strict=True) for o in p.contenders(weight, at, size)]
    with tqdm(total=len(rough), desc="projections", unit="grid", leave=False, disable=not rough) as bar:
        while True:
            for product, option in rough:
                product.measured(option)
                bar.update()
            chosen = solved()
            rough = [(p, option) for p, option in zip(products, chosen, strict=True) if p.is_rough(option)]
            if not rough:
                return chosen
            bar.total += len(rough)
