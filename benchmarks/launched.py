"""What the host takes where the kernels of a model are launched one by one, and how long the GPU waits for it."""

from __future__ import annotations

import collections
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_models import WORKS, Step, ready, rewritten, started
from benchmarks.registry import Table, benchmark
from benchmarks.timing import time_alternating

LAUNCHED = "bert-large-infer", "gpt2-small-train", "llama-decode-1"
STEPS = 20


class Kernel(NamedTuple):
    """What a GPU ran, and when, in microseconds."""

    name: str
    start: float
    end: float


@benchmark("launched-gpu")
def launched() -> Iterator[Table]:
    """Steps of whole models as CUDA graphs and launched: what the host takes, and what the GPU waits, profiled."""
    times = "ms as a CUDA graph", "ms launched", "of the host", "ms of many in a row"
    table = Table(("model", "variant", *times, "kernels", "ms busy", "ms of gaps", "most before"))
    for work in (work for work in WORKS if work.name in LAUNCHED):
        _, inputs, dense = started(work)
        plan = work.plan()
        for name in ("dense", "mixed plan"):
            racers = dense if name == "dense" else ready(work, name, rewritten(work, plan), inputs)
            samples = time_alternating(racers, {}, STEPS)
            step = racers[f"{name}, launched"]
            with torch.no_grad():
                samples["host"] = _host_seconds(step)
                samples["in a row"] = [_in_a_row(step)]
                kernels = _profiled(step)
            gaps = collections.Counter[str]()
            for before, after in itertools.pairwise(kernels):
                gaps[after.name] += max(0.0, after.start - before.end)
            busy = sum(kernel.end - kernel.start for kernel in kernels)
            cells = (f"{statistics.median(seconds) * 1e3:.2f}" for seconds in samples.values())
            waited = f"{busy / 1e3:.2f}", f"{gaps.total() / 1e3:.2f}", gaps.most_common(1)[0][0][:40]
            table.rows.append((work.name, name, *cells, str(len(kernels)), *waited))
            counts = collections.Counter(kernel.name for kernel in kernels)
            raw = {"seconds": samples, "kernels": dict(counts), "gaps_us": dict(gaps)}  # asdict can't copy a Counter
            table.raw[f"{work.name}, {name}"] = raw
            yield table


def _host_seconds(step: Step) -> list[float]:
    """Until a step returns, begun on an idle GPU."""
    samples = []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        samples.append(time.perf_counter() - start)
    return samples


def _in_a_row(step: Step) -> float:
    """Of a step that follows others at once."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS


def _profiled(step: Step) -> list[Kernel]:
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    on_gpu = (event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    kernels = (Kernel(event.name, event.time_range.start, event.time_range.end) for event in on_gpu)
    return sorted(kernels, key=lambda kernel: kernel.start)
