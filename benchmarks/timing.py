"""Times that can be compared: variants take turns in one run, medians are reported."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3


def time_alternating(
    variants: dict[str, Callable[..., Any]], inputs: dict[str, torch.Tensor], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every call, until a GPU has finished, too; a busy moment of the machine hits all variants alike.

    Odd rounds go backwards.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    with torch.no_grad():
        for function in variants.values():
            for _ in range(WARM_UP):
                function(**inputs)
        _finish()
        for i in range(rounds):
            for name in list(variants)[:: -1 if i % 2 else 1]:
                start = time.perf_counter()
                variants[name](**inputs)
                _finish()
                samples[name].append(time.perf_counter() - start)
    return samples


def graphed(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """``step`` as a CUDA graph, which writes its result to the same place every time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay(_alive: object = step) -> torch.Tensor:  # the graph reads the memory of the step's model
        graph.replay()
        return result

    return replay


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(samples: dict[str, list[float]], base: str = "dense") -> dict[str, float]:
    """Median time of ``base`` over that of each variant: above 1 is faster."""
    dense = statistics.median(samples[base])
    return {name: dense / statistics.median(times) for name, times in samples.items()}
