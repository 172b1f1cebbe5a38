"""What today's cost model predicts for products whose times are kept in ``results``; on any machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from benchmarks import kept
from benchmarks.gpu import accuracy, choices
from benchmarks.kept import Timed
from benchmarks.registry import Table, benchmark
from monarch_fx.costs import resolve

SINGLE = {"layers-gpu": "h100", "layers-gpu-h200": "h200"}  # by the profile of the card
AGAIN = "layers-gpu", "layers-gpu-again"  # two runs on the same kind of card
TOKENS = {"1 token": (1,), "4 and 16 tokens": (4, 16), "64 tokens and more": (64, 256, 1024, 4096, 16384)}
FORWARD = [f"layers-forward-{width}-gpu-h200" for width in ("768", "1024", "large")]
UNCHANGED = 1, 4096, 16384  # tokens that today's kernels were timed with on an H100
STEP = [f"layers-step-{width}-gpu-h200" for width in ("768", "1024", "large")]


@benchmark("predictions")
def predictions() -> Table:
    """How well the shipped profiles predict kept times of products, and choose among them."""
    table = Table(("result", "predicted by", "what predictions are worth"))
    for result, name in SINGLE.items():
        samples = _samples(name, kept.single(result))
        table.rows += [(result, f"profile {name}", line) for line in (*accuracy(samples), *_by_tokens(samples))]
    for result, other in (AGAIN, AGAIN[::-1]):  # how far times of one run hold for another
        times = {(one.case, one.tokens, one.shape): (one.dense_s, one.seconds) for one in kept.single(other)}
        measured = [one.sample(*times[one.case, one.tokens, one.shape]) for one in kept.single(result)]
        table.rows += [(result, f"times of {other}", line) for line in (*accuracy(measured), *_by_tokens(measured))]
    for what, name, timed in _rivals():
        table.rows += [(what, f"profile {name}", line) for line in accuracy(_samples(name, timed))]
    for what, name, timed in _others():
        table.rows.append((what, f"profile {name}", accuracy(_samples(name, timed))[0]))
    return table


def _rivals() -> Iterable[tuple[str, str, Iterable[Timed]]]:
    """Results, the profile of the card, and products, among which a plan would choose."""
    for what, ending in (("layers-forward", "-"), ("layers-forward, bias and GELU", "bias, GELU")):
        each = (kept.layers(result, "inference", ending) for result in FORWARD)
        yield what, "h200", itertools.chain.from_iterable(each)
        on_h100 = kept.layers("layers-forward-large-gpu", "inference", ending)
        yield f"{what}, from 2048 features on", "h100", (one for one in on_h100 if one.tokens in UNCHANGED)
    yield "layers-step", "h200", itertools.chain.from_iterable(kept.layers(result, "training") for result in STEP)
    yield "layers-step", "h100", kept.layers("layers-step-1024-gpu", "training")
    for name, run in (("h100", ""), ("h200", "-h200")):
        yield "layers-train-gpu", name, kept.trained(f"layers-train-gpu{run}")
        yield "ffn-gpu", name, kept.feed_forward(f"ffn-gpu{run}")


def _others() -> Iterable[tuple[str, str, Iterable[Timed]]]:
    """The same of products with different shares of the parameters."""
    for name, run in (("h100", ""), ("h200", "-h200")):
        for workload in ("inference", "training"):
            yield f"unaligned-gpu, {workload}", name, kept.by_workload(f"unaligned-gpu{run}", workload)
    for workload in ("inference", "training"):
        yield f"tf32-gpu, {workload}", "h100", kept.by_workload("tf32-gpu", workload, "tf32")


def _samples(name: str, timed: Iterable[Timed]) -> list[list[Any]]:
    profile = resolve(name, "cpu")
    return [one.predicted(profile) for one in timed]


def _by_tokens(samples: list[list[Any]]) -> list[str]:
    return [f"at {name}: {choices([s for s in samples if s[1] in counts])[0]}" for name, counts in TOKENS.items()]
