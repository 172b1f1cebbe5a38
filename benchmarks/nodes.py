"""Whether the cost model is right node by node: products of planned models by themselves, compiled and timed.

Each has its bias, and in inference the activation behind it. In training biases get no gradients and there is no
activation: both are the same passes for dense and ours, and no part of what is predicted.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import monarch_fx as mfx
from benchmarks.gate import check_exact
from benchmarks.gpu import graph_seconds
from benchmarks.gpu_models import BERT_LARGE, bert, gpt2, vit
from benchmarks.registry import Table, benchmark
from benchmarks.timing import time_alternating
from monarch_fx.records import Decision

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
ROUNDS = 40
ROUNDING = 2e-2  # of bfloat16, four times: relative error in Frobenius norm that a result or gradient may have
KINDS_EACH = 5  # of products that are timed for each model, the most frequent ones
HEADER = ("model", "products", "in -> out", "structure", "dense us: predicted, measured", "ours", "gain")

Seconds = dict[str, float]


@dataclass(frozen=True)
class Setting:
    """A model, and what its products are planned and timed for."""

    name: str
    build: Callable[[], nn.Module]
    tokens: int
    budget: float
    workload: str


BERT = functools.partial(bert, False, **BERT_LARGE)
SETTINGS = (
    Setting("ViT-B/16, training", vit, 128 * 197, 0.5, "training"),
    Setting("GPT-2 small, training", gpt2, 16 * 1024, 0.35, "training"),
    Setting("ViT-B/16, inference", vit, 128 * 197, 0.5, "inference"),
    Setting("BERT-large, training", BERT, 32 * 512, 0.5, "training"),
    Setting("BERT-large, inference", BERT, 32 * 512, 0.5, "inference"),
)
ON_CPU = (Setting("BERT-base, inference", functools.partial(bert, False), 8 * 128, 0.5, "inference"),)


@benchmark("nodes-gpu" if ON_GPU else "nodes-cpu")
def nodes() -> Iterator[Table]:
    """Predicted and measured time of products of ViT, GPT-2 and BERT on a GPU, of BERT-base on a CPU."""
    table = Table(HEADER)
    table.raw = {"plans": {}, "products": []}
    errors: list[float] = []
    totals: dict[str, np.ndarray] = {}  # predicted and measured, of dense and of ours
    for setting in SETTINGS if ON_GPU else ON_CPU:
        plan = _plan(setting)
        table.raw["plans"][setting.name] = str(plan)
        for decisions in _alike(plan):
            decision, times = decisions[0], len(decisions)
            measured = _measure(decision, setting)
            predicted = {"dense": decision.dense_s, "ours": decision.time_s}
            cells = [f"{predicted[name] * 1e6:.1f}, {measured[name] * 1e6:.1f}" for name in predicted]
            gain = f"{predicted['dense'] / predicted['ours']:.2f}x, {measured['dense'] / measured['ours']:.2f}x"
            size = f"{decision.candidate.in_features} -> {decision.candidate.out_features}"
            structure = str(decision.shape or "dense").split(" (")[0]
            table.rows.append((setting.name, str(times), size, structure, *cells, gain))
            table.raw["products"].append([setting.name, times, size, structure, predicted, measured])
            errors += [abs(predicted[name] / measured[name] - 1) for name in predicted]
            both = times * np.array([[seconds["dense"], seconds["ours"]] for seconds in (predicted, measured)])
            totals[setting.name] = totals.get(setting.name, 0) + both
            table.targets = [_accuracy(errors), *(_gain(name, total) for name, total in totals.items())]
            yield table


def _plan(setting: Setting) -> mfx.Plan:
    with torch.device("meta"):
        model = setting.build().to(DTYPE)
    device = "auto" if ON_GPU else mfx.measure_device()
    return mfx.plan(model, setting.budget, tokens=setting.tokens, workload=setting.workload, device=device)


def _alike(plan: mfx.Plan) -> list[list[Decision]]:
    """Decisions on products of equal sizes, surroundings and structures, the most frequent ones first."""
    groups: dict[Any, list[Decision]] = {}
    for decision in plan.decisions:
        c = decision.candidate
        if "pooler" not in c.name:  # which sees one token of each text
            groups.setdefault((c.in_features, c.out_features, c.activated, decision.shape), []).append(decision)
    return sorted(groups.values(), key=len, reverse=True)[:KINDS_EACH]


def _accuracy(errors: list[float]) -> str:
    return (
        f"prediction error: median {np.median(errors):.0%} (target 15 %), 95th percentile "
        f"{np.percentile(errors, 95):.0%} (target 35 %), on {len(errors)} times"
    )


def _gain(name: str, total: np.ndarray) -> str:
    predicted, measured = total[:, 0] / total[:, 1]
    return f"{name}, these products together: predicted {predicted:.2f}x, measured {measured:.2f}x"


def _measure(decision: Decision, setting: Setting) -> Seconds:
    """Seconds of the compiled layer, dense and with the structure; of both gradients, too, in training."""
    torch._dynamo.reset()
    candidate, shape = decision.candidate, decision.shape
    size = candidate.in_features, candidate.out_features
    x = torch.randn(setting.tokens, size[0], device=DEVICE, dtype=DTYPE)
    layers: dict[str, nn.Module] = {"dense": nn.Linear(*size, device=DEVICE, dtype=DTYPE)}
    if shape is not None:
        grid = shape.nblocks_out, shape.nblocks_in
        layers["ours"] = mfx.MonarchLinear(*size, grid, shape.rank, device=DEVICE, dtype=DTYPE)
    training = setting.workload == "training"
    if candidate.activated and not training:
        layers = {name: _Activated(layer) for name, layer in layers.items()}
    runs = {name: _run(layer, x, training) for name, layer in layers.items()}
    if ON_GPU:
        seconds = {name: graph_seconds([run]) for name, run in runs.items()}
    else:
        samples = time_alternating(runs, {}, ROUNDS)
        seconds = {name: statistics.median(times) for name, times in samples.items()}
    return {"ours": seconds["dense"], **seconds}


class _Activated(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer(x))


def _run(layer: nn.Module, x: Tensor, training: bool) -> Callable[[], Any]:
    """The compiled layer on x, with gradients of x and weights in training; its results have been checked."""
    compiled = torch.compile(layer)
    gradients = torch.randn(len(x), layer(x[:1]).shape[1], device=x.device, dtype=x.dtype) if training else None
    run = functools.partial(_results, compiled, layer, x, gradients)
    exact = copy.deepcopy(layer).double()
    rows = None if training else 64  # sums over tokens need all of them
    if gradients is not None:
        gradients = gradients.double()
    wanted = _results(exact, exact, x[:rows].double(), gradients)
    for result, right in zip(run(), wanted, strict=True):
        check_exact(f"The compiled {layer}", result[: len(right)], right, ROUNDING)
    return run


def _results(function: Callable[..., Tensor], layer: nn.Module, x: Tensor, grad: Tensor | None) -> tuple[Tensor, ...]:
    """The layer's result, or gradients of x and of all matrices."""
    if grad is None:
        with torch.no_grad():
            return (function(x),)
    x = x.detach().requires_grad_()
    for parameter in layer.parameters():
        parameter.requires_grad_(parameter.ndim > 1)
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.ndim > 1)]
    with torch.enable_grad():
        return torch.autograd.grad(function(x), leaves, grad)
