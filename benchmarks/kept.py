"""Products whose times are kept in ``results``, read from each benchmark's raw samples."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu import column, shape_at
from benchmarks.layers import GRIDS
from benchmarks.registry import RESULTS
from monarch_fx.costs import DeviceProfile, dense_seconds, monarch_seconds
from monarch_fx.costs.predict import Surroundings
from monarch_fx.structure import MonarchShape


@dataclass(frozen=True)
class Timed:
    """A product and the dense one beside it, both timed; ``case``: what structures to choose from have in common."""

    case: str
    tokens: int
    shape: MonarchShape
    dense_s: float
    seconds: float
    options: dict[str, Any] = field(default_factory=lambda: {"dtype": "bfloat16"})  # of ``monarch_seconds``

    def sample(self, dense_s: float, seconds: float) -> list[Any]:
        """As ``layers-gpu`` keeps it: what it is, both times, and these predictions of both."""
        size = self.tokens, self.shape.in_features, self.shape.out_features
        return [self.case, *size, str(self.shape), self.shape.ratio, self.dense_s, self.seconds, dense_s, seconds]

    def predicted(self, profile: DeviceProfile) -> list[Any]:
        """The same with the predictions of a profile."""
        size = self.tokens, self.shape.in_features, self.shape.out_features
        dense = dense_seconds(profile, *size, **self.options)
        return self.sample(float(dense), float(monarch_seconds(profile, self.tokens, self.shape, **self.options)))


def single(result: str) -> Iterator[Timed]:
    """Of ``layers-gpu``."""
    for ratio, tokens, in_features, out_features, structure, _, dense_s, seconds, *_ in _raw(result)["samples"]:
        yield Timed(f"{ratio}", tokens, _shape(in_features, out_features, structure), dense_s, seconds)


def layers(result: str, workload: str, ending: str = "-") -> Iterator[Timed]:
    """Of ``layers-forward-*`` and ``layers-step-*``: those with that ending, which costs don't know in training."""
    around = Surroundings(bias=ending != "-", activated=ending != "-")
    for case, times in _raw(result).items():
        size, ratio, found = case.split(", ", 2)
        in_features, out_features = map(int, size.split(" -> "))
        for grid in GRIDS:
            shape = shape_at(float(ratio), in_features, out_features, grid)
            if found != ending or shape is None:
                continue
            for tokens, seconds in times[column(grid)].items():
                options = {"dtype": "bfloat16", "workload": workload, "around": around}
                yield Timed(case, int(tokens), shape, times["dense"][tokens], seconds, options)


def trained(result: str) -> Iterator[Timed]:
    """Of ``layers-train-gpu``: those whose intermediate is kept."""
    for case, found in _raw(result).items():
        tokens, in_features, out_features = map(int, re.findall(r"\d+", case))
        dense_s, *others = found["seconds"].items()
        for structure, seconds in others:
            if "recomputed" not in structure:
                shape = _shape(in_features, out_features, structure)
                options = {"dtype": "bfloat16", "workload": "training"}
                yield Timed("", tokens, shape, dense_s[1], seconds, options)


def feed_forward(result: str) -> Iterator[Timed]:
    """Of ``ffn-gpu``: with bias, and GELU where layers widen."""
    for case, times in _raw(result).items():
        tokens, in_features, out_features = map(int, re.findall(r"\d+", case))
        widens = in_features != out_features
        options = {"dtype": "bfloat16", "around": Surroundings(bias=True, activated=widens)}
        for name in times.keys() - {"dense", "default", "max-autotune"}:
            grid = (int(name[0]), int(name[2]))
            shape = shape_at(0.33 if widens else 0.5, in_features, out_features, grid)
            assert shape is not None
            yield Timed("", tokens, shape, times["dense"], times[name], options)


def by_workload(result: str, workload: str, dtype: str = "bfloat16") -> Iterator[Timed]:
    """Of ``tf32-gpu`` and ``unaligned-gpu``; dense is the faster one of what is timed, as compilers pad."""
    for case, found in _raw(result).items():
        if workload not in case:
            continue
        size = re.search(r"(\d+), (\d+) -> (\d+), (\S+ r\d+)", case)
        assert size is not None
        tokens, in_features, out_features = map(int, size.groups()[:3])
        times = found["seconds"]
        dense_s = min(seconds for name, seconds in times.items() if name.startswith("dense"))
        options = {"dtype": dtype, "workload": workload}
        yield Timed("", tokens, _shape(in_features, out_features, size[4]), dense_s, times["ours"], options)


def _raw(result: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{result}.json").read_text())["raw"]
    return found


def _shape(in_features: int, out_features: int, structure: str) -> MonarchShape:
    n_out, n_in, rank = map(int, re.findall(r"\d+", structure))
    return MonarchShape(in_features, out_features, n_out, n_in, rank)
