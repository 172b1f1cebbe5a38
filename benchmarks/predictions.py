"""What today's cost model predicts for the products that ``layers-gpu`` has timed; on any machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.gpu import accuracy, choices
from benchmarks.registry import Table, benchmark
from monarch_fx.costs import DeviceProfile, dense_seconds, monarch_seconds, resolve
from monarch_fx.structure import MonarchShape

TIMED = {"layers-gpu": "h100", "layers-gpu-h200": "h200"}  # by the profile of the card
AGAIN = "layers-gpu", "layers-gpu-again"  # two runs on the same kind of card
TOKENS = {"1 token": (1,), "4 and 16 tokens": (4, 16), "64 tokens and more": (64, 256, 1024, 4096, 16384)}
RESULTS = Path(__file__).parent / "results"


@benchmark("predictions")
def predictions() -> Table:
    """How well the shipped profiles predict kept times of single products, and choose among them."""
    table = Table(("result", "predicted by", "what predictions are worth"))
    for result, name in TIMED.items():
        again = [_predicted(resolve(name, "cpu"), sample) for sample in _samples(result)]
        table.rows += [(result, f"profile {name}", line) for line in (*accuracy(again), *_by_tokens(again))]
    for result, other in (AGAIN, AGAIN[::-1]):  # how far times of one run hold for another
        times = {tuple(sample[:5]): sample[6:8] for sample in _samples(other)}
        measured = [[*sample[:8], *times[tuple(sample[:5])]] for sample in _samples(result)]
        table.rows += [(result, f"times of {other}", line) for line in (*accuracy(measured), *_by_tokens(measured))]
    return table


def _by_tokens(samples: list[list[Any]]) -> list[str]:
    return [f"at {name}: {choices([s for s in samples if s[1] in counts])[0]}" for name, counts in TOKENS.items()]


def _samples(result: str) -> list[list[Any]]:
    found: list[list[Any]] = json.loads((RESULTS / f"{result}.json").read_text())["raw"]["samples"]
    return found


def _predicted(profile: DeviceProfile, sample: list[Any]) -> list[Any]:
    """The sample with the predictions of ``profile`` in place of those of its own run."""
    _, tokens, in_features, out_features, structure, *_ = sample
    n_out, n_in, rank = map(int, re.findall(r"\d+", structure))
    shape = MonarchShape(in_features, out_features, n_out, n_in, rank)
    dense = dense_seconds(profile, tokens, in_features, out_features, dtype="bfloat16")
    return [*sample[:8], float(dense), float(monarch_seconds(profile, tokens, shape, dtype="bfloat16"))]
