"""Whether the cost model is right node by node: every product of a planned model by itself, compiled and timed."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import monarch_fx as mfx
from benchmarks.gpu import graph_seconds
from benchmarks.registry import Table, benchmark
from benchmarks.timing import time_alternating

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
ROUNDS = 40
HEADER = ("products", "in -> out", "structure", "dense us: predicted, measured", "ours", "gain")


@benchmark("nodes-gpu" if ON_GPU else "nodes-cpu")
def nodes() -> Iterator[Table]:
    """Predicted and measured time of every product of BERT: large, 32 x 512, on a GPU; base, 8 x 128, on a CPU."""
    from transformers import BertConfig, BertModel

    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        model = BertModel(BertConfig(**(large if ON_GPU else {}))).to(DTYPE).eval()
    tokens = 32 * 512 if ON_GPU else 8 * 128
    plan = mfx.plan(model, budget=0.5, tokens=tokens, device=mfx.measure_device())
    table = Table(HEADER)
    table.raw = {"plan": str(plan), "products": []}
    alike: dict[Any, list[Any]] = {}
    for decision in plan.decisions:
        candidate = decision.candidate
        if "pooler" not in candidate.name:  # which sees one token of each text
            alike.setdefault((candidate.in_features, candidate.out_features, decision.shape), []).append(decision)
    totals = np.zeros((2, 2))  # predicted and measured, of dense and of ours
    for (in_features, out_features, shape), decisions in alike.items():
        measured = _measure(in_features, out_features, shape, tokens)
        predicted = {"dense": decisions[0].dense_s, "ours": decisions[0].time_s}
        cells = [f"{predicted[name] * 1e6:.1f}, {measured[name] * 1e6:.1f}" for name in predicted]
        gain = f"{predicted['dense'] / predicted['ours']:.2f}x, {measured['dense'] / measured['ours']:.2f}x"
        table.rows.append(
            (str(len(decisions)), f"{in_features} -> {out_features}", str(shape or "dense"), *cells, gain)
        )
        table.raw["products"].append([len(decisions), in_features, out_features, str(shape), predicted, measured])
        totals += len(decisions) * np.array([list(predicted.values()), list(measured.values())])
        errors = [abs(p[4][n] / p[5][n] - 1) for p in table.raw["products"] for n in ("dense", "ours")]
        gains = totals[:, 0] / totals[:, 1]
        table.targets = [
            f"prediction error: median {np.median(errors):.0%} (target 15 %), 95th percentile "
            f"{np.percentile(errors, 95):.0%} (target 35 %), on {len(errors)} times",
            f"all products together: predicted {gains[0]:.2f}x, measured {gains[1]:.2f}x",
        ]
        yield table


def _measure(in_features: int, out_features: int, shape: mfx.MonarchShape | None, tokens: int) -> dict[str, float]:
    """Seconds of the compiled layer, dense and with the structure."""
    torch._dynamo.reset()
    x = torch.randn(tokens, in_features, device=DEVICE, dtype=DTYPE)
    dense: nn.Module = nn.Linear(in_features, out_features, device=DEVICE, dtype=DTYPE)
    ours = dense
    if shape is not None:
        grid = shape.nblocks_out, shape.nblocks_in
        ours = mfx.MonarchLinear(in_features, out_features, grid, shape.rank, device=DEVICE, dtype=DTYPE)
    racers: dict[str, Callable[..., Tensor]] = {"dense": torch.compile(dense), "ours": torch.compile(ours)}
    with torch.no_grad():
        for name, layer in (("dense", dense), ("ours", ours)):
            torch.testing.assert_close(racers[name](x), layer(x), rtol=2e-2, atol=1e-2)
        if ON_GPU:
            return {name: graph_seconds([functools.partial(racer, x)]) for name, racer in racers.items()}
    samples = time_alternating(racers, {"input": x}, ROUNDS)
    return {name: statistics.median(seconds) for name, seconds in samples.items()}
