"""What it is worth to time products while a plan is made: choices and plans, by prediction and by measured times."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gpu import CACHE_BYTES, GRIDS, calls, graph_seconds, shape_at
from benchmarks.gpu_models import WORKS, against, rewritten, started
from benchmarks.registry import Table, benchmark
from monarch_fx.costs import Stopwatch, resolve
from monarch_fx.planning.decide import SURELY_FASTER
from monarch_fx.planning.timed import Times
from monarch_fx.planning.workload import Run
from monarch_fx.records import Call, Candidate
from monarch_fx.structure import MonarchShape
from monarch_fx.views import StridedView

SIZES = ((768, 768), (1024, 1024), (3072, 768), (1024, 4096), (4096, 4096), (4096, 14336))
TOKENS = (16, 256, 1024, 4096, 16384)
RATIO = 0.5
PLANNED = ("bert-large-infer", "vit-train", "gpt2-small-train")
SLOWER = 0.98  # of the dense product's speed

Choice = MonarchShape | None


@benchmark("choices-gpu")
def choices() -> Iterator[Table]:
    """Single products at half the parameters: how a plan chooses by prediction, and by times that it measures."""
    over = "over the best"
    header = (
        "tokens",
        "in -> out",
        "best in hindsight",
        "by prediction",
        over,
        "by measured times",
        over,
        "timed",
        "s",
    )
    table = Table(header)
    lost: dict[str, list[float]] = {"predicted": [], "measured": []}
    slower = dict.fromkeys(lost, 0)
    for tokens in TOKENS:
        for size in SIZES:
            shapes = [shape for shape in (shape_at(RATIO, *size, grid) for grid in GRIDS) if shape is not None]
            predicted, _ = _choose(tokens, size, shapes, None)
            start = time.perf_counter()
            measured, timed = _choose(tokens, size, shapes, Stopwatch(torch.device("cuda")))
            took = time.perf_counter() - start
            seconds = _hindsight(tokens, size, shapes)
            best = min(seconds, key=lambda shape: seconds[shape])
            row = [str(tokens), f"{size[0]} -> {size[1]}", _text(best)]
            for name, choice in (("predicted", predicted), ("measured", measured)):
                lost[name].append(seconds[choice] / seconds[best] - 1)
                slower[name] += seconds[choice] * SLOWER > seconds[None]
                row += [_text(choice), f"{lost[name][-1]:.1%}"]
            table.rows.append((*row, str(timed), f"{took:.1f}"))
            table.raw[f"{tokens} tokens, {size[0]} -> {size[1]}"] = {_text(shape): s for shape, s in seconds.items()}
            table.targets = [
                f"choices by {name} times cost {np.mean(more):.1%} (mean), {np.percentile(more, 95):.1%} (95th "
                f"percentile) more than the best in hindsight (target 5 %); slower than {SLOWER} of dense: "
                f"{slower[name]} of {len(more)}"
                for name, more in lost.items()
            ]
            yield table


@benchmark("measured-plans-gpu")
def plans() -> Iterator[Table]:
    """Whole models, planned by prediction and by measured times, each beside compiled dense, as CUDA graphs."""
    table = Table(("model", "times", "s to plan", "ms in its products", "gain there", "ms dense, ours", "gain"))
    for work in (work for work in WORKS if work.name in PLANNED):
        _, inputs, dense = started(work)
        for times in SURELY_FASTER:
            start = time.perf_counter()
            plan = work.plan(times=times)
            took = time.perf_counter() - start
            samples = against(dense, work, times, functools.partial(rewritten, work, plan), inputs)
            dense_s, ours_s = (statistics.median(samples[name]) for name in ("dense", times))
            within = sum(d.dense_s for d in plan.decisions), sum(d.time_s for d in plan.decisions)
            products = f"{within[0] * 1e3:.2f} -> {within[1] * 1e3:.2f}", f"{within[0] / within[1]:.2f}x"
            whole = f"{dense_s * 1e3:.2f}, {ours_s * 1e3:.2f}", f"{dense_s / ours_s:.2f}x"
            table.rows.append((work.name, times, f"{took:.1f}", *products, *whole))
            table.raw[f"{work.name}, {times}"] = {"seconds": samples, "plan": str(plan)}
            yield table


def _choose(
    tokens: int, size: tuple[int, int], shapes: list[MonarchShape], stopwatch: Stopwatch | None
) -> tuple[Choice, int]:
    """The fastest of the structures where it is surely faster than dense, as plans decide; and how many were timed."""
    view = StridedView.whole(size[::-1]).matrix(out=[0], inp=[1])
    candidate = Candidate("weight", "weight", size[::-1], view, "linear", (Call("tokens", tokens),), "bfloat16")
    times = Times(Run(resolve("auto", "cuda"), {tokens: 1.0}, "inference", "bfloat16"), stopwatch)
    times.measure([(candidate, None)])
    while True:
        choice: Choice = min(shapes, key=lambda shape: times.seconds(candidate, shape))
        if times.seconds(candidate, choice) > SURELY_FASTER[times.source] * times.seconds(candidate, None):
            choice = None
        choices = [(candidate, choice)]
        if not times.measure(choices) and not times.confirm([(candidate, None), *choices]):
            return choice, len(times.found)


def _hindsight(tokens: int, size: tuple[int, int], shapes: list[MonarchShape]) -> dict[Choice, float]:
    """Seconds of dense and of all structures, as ``layers-gpu`` takes them."""
    x = torch.randn(tokens, size[0], device="cuda", dtype=torch.bfloat16)
    copies = 2 if tokens > 1024 else max(2, min(64, math.ceil(CACHE_BYTES / (2 * size[0] * size[1]))))
    weights = [torch.randn(size[::-1], device="cuda").bfloat16() / 64 for _ in range(copies)]
    seconds: dict[Choice, float] = {None: graph_seconds([functools.partial(F.linear, x, weight) for weight in weights])}
    return seconds | {shape: graph_seconds(calls(x, shape, copies)) for shape in shapes}


def _text(choice: Choice) -> str:
    return "dense" if choice is None else str(choice).split(" (")[0]
