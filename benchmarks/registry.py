"""Benchmarks by name. Each returns a Table and records its raw samples in it.

A long one yields its table after every row instead, so that a run that is cut off leaves what it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass
class Table:
    """One benchmark's result: rows for people, samples for machines, targets met or missed."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)

    def target(self, what: str, reached: float, wanted: float) -> None:
        verdict = "met" if reached >= wanted else "missed"
        self.targets.append(f"{what}: {reached:.2f}x, target {wanted:.2f}x: {verdict}")


Run = Callable[[], Table | Iterator[Table]]


@dataclass(frozen=True)
class Benchmark:
    name: str
    summary: str
    run: Run


BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(name: str) -> Callable[[Run], Run]:
    """Registers a function under ``name``; the first line of its docstring is what ``list`` shows."""

    def register(run: Run) -> Run:
        BENCHMARKS[name] = Benchmark(name, (run.__doc__ or "").splitlines()[0], run)
        return run

    return register
