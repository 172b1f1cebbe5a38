"""The plan by measured times: products are timed as plans choose them.

Until a structure of a grid was timed, the grid is taken to be faster than predicted; then its other ranks are corrected
by what was found. What a plan chooses is timed, and the problem solved anew, until all that is chosen was: so what was
left out could only be better where it is predicted too slow by more than this hope.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from tqdm.auto import tqdm

from monarch_fx.costs import Stopwatch, paying_tokens
from monarch_fx.planning.workload import Run
from monarch_fx.records import Candidate
from monarch_fx.structure import MonarchShape

HOPE = 0.9  # of its predicted time that a structure of a grid may take: predictions err by 5 % in the median
SETTLED = 0.95  # a second time that is lower than this share of the first tells of a busy machine

Choice = tuple[Candidate, "MonarchShape | None"]


class Times:
    """Seconds of all calls of a product in one run: predicted, and measured where there is a stopwatch."""

    def __init__(self, run: Run, stopwatch: Stopwatch | None) -> None:
        self.run = run
        self.stopwatch = stopwatch
        self.found: dict[Any, float] = {}  # by kind of product and structure
        self.factors: dict[Any, float] = {}  # measured over predicted time, by kind of product and grid
        self._predictions: dict[Any, float] = {}
        self._kinds: dict[str, Any] = {}

    @property
    def source(self) -> str:
        """Where the times come from, as plans name it."""
        return "predicted" if self.stopwatch is None else "measured"

    def seconds(self, candidate: Candidate, shape: MonarchShape | None) -> float:
        """As measured; else as predicted, by what is known of its grid."""
        predicted = self._predicted(candidate, shape)
        if self.stopwatch is None:
            return predicted
        kind = self._kind(candidate)
        return self.found.get((kind, shape), predicted * self.factors.get((kind, shape and shape.grid), HOPE))

    def measure(self, choices: Iterable[Choice]) -> bool:
        """Times what was not timed; whether there was anything."""
        return self._measure(choices, lambda key: key not in self.found)

    def confirm(self, choices: Iterable[Choice]) -> bool:
        """Times everything once more; whether a time was much too long."""
        before = dict(self.found)
        self._measure(choices, lambda key: True)
        return any(self.found[key] < SETTLED * before[key] for key in before)

    def _measure(self, choices: Iterable[Choice], wanted: Callable[[Any], bool]) -> bool:
        if self.stopwatch is None:
            return False
        kinds = {(self._kind(candidate), shape): candidate for candidate, shape in choices}
        new = {key: candidate for key, candidate in kinds.items() if wanted(key)}
        for key, candidate in tqdm(new.items(), desc="times", unit="product", leave=False, disable=not new):
            kind, shape = key
            size, setting = (candidate.in_features, candidate.out_features), self.run.setting(candidate)
            rows = self.run.rows(candidate).items()
            seconds = sum(weight * self.stopwatch(count, *size, shape, **setting) for count, weight in rows)
            self.found[key] = min(seconds, self.found.get(key, math.inf))
            self.factors[kind, shape and shape.grid] = self.found[key] / self._predicted(candidate, shape)
        return bool(new)

    def pays(self, candidate: Candidate, shape: MonarchShape, ratio: float) -> tuple[tuple[int, int | None], ...]:
        """As ``paying_tokens``; the ``ratio`` to dense is elsewhere as much off as at the tokens planned for."""
        off = ratio / (self._predicted(candidate, shape) / self._predicted(candidate, None))
        return paying_tokens(self.run.profile, shape, **self.run.setting(candidate), correction=off)

    def _predicted(self, candidate: Candidate, shape: MonarchShape | None) -> float:
        key = self._kind(candidate), shape
        if key not in self._predictions:
            self._predictions[key] = self.run.seconds(candidate, shape)
        return self._predictions[key]

    def _kind(self, candidate: Candidate) -> Any:
        """Products of one kind take the same time."""
        if candidate.name not in self._kinds:
            rows = tuple(self.run.rows(candidate).items())
            kind = candidate.in_features, candidate.out_features, rows, *self.run.setting(candidate).values()
            self._kinds[candidate.name] = kind
        return self._kinds[candidate.name]
