"""Single layers beside all that they compete with: dense, the authors' layer, low rank as two layers, and ours.

Forward, and forward with backward; plain, and with bias and GELU. bfloat16 in CUDA graphs, with few tokens over as many
copies of the weights as a cache can't hold. What a compiler can fuse is compiled, for any number of tokens but one;
dense also by max-autotune, for some numbers of tokens, since that takes long. Ours is called as it is where a compiled
graph runs the same kernels.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import monarch_fx as mfx
from benchmarks.gate import check_exact
from benchmarks.gpu import (
    CACHE_BYTES,
    RATIOS,
    ROUNDING,
    SIZES,
    TOKENS,
    column,
    factors,
    graph_seconds,
    least_seconds,
    published,
    shape_at,
)
from benchmarks.registry import Table, benchmark
from monarch_fx.costs import resolve
from monarch_fx.structure import MonarchShape

Operands = tuple[Tensor, ...]
Layer = Callable[..., Tensor]  # of x and operands
Times = dict[int, float]  # seconds, by tokens

SMALL = [size for size in SIZES if min(size) <= 1024]
LARGE = [size for size in SIZES if min(size) > 1024]
GRIDS = ((1, 1), (2, 2), (4, 4))
AUTHORS = 4  # blocks, as they published it
TUNED = (16, 4096)  # tokens by max-autotune
CHECKED = 64  # rows of a forward pass
RIVALS = "max-autotune", "authors, eager", "authors, compiled", "low rank, two layers", *map(column, GRIDS)
HEADER = "in -> out", "ratio", "with", "tokens", "dense us", *RIVALS, "bound us", "share of it"


class Racer(NamedTuple):
    """A layer's column, its formula, how its operands are drawn, and in which mode it is compiled, None: not at all."""

    name: str
    layer: Layer
    draw: Callable[[], Operands]
    mode: str | None = None

    def run(self) -> Layer:
        torch._dynamo.reset()
        return self.layer if self.mode is None else torch.compile(self.layer, mode=self.mode)

    def copies(self) -> list[Operands]:
        """As many as a cache can't hold."""
        first = self.draw()
        count = math.ceil(CACHE_BYTES / sum(operand.nbytes for operand in first))
        return [first, *(self.draw() for _ in range(max(1, min(63, count - 1))))]


def linear(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
    return F.linear(x, weight, *bias)


def two_linear(x: Tensor, R: Tensor, L: Tensor, *bias: Tensor) -> Tensor:
    return F.linear(F.linear(x, R), L, *bias)


def authors(x: Tensor, w1: Tensor, w2: Tensor, *bias: Tensor) -> Tensor:
    y = published(x, w1, w2)
    return y + bias[0] if bias else y


def with_gelu(layer: Layer) -> Layer:
    return lambda *operands: F.gelu(layer(*operands))


@benchmark("layers-forward-small-gpu")
def forward_small() -> Iterator[Table]:
    """Layers of up to 1024 features on one side, forward, beside all that they compete with."""
    return _race(SMALL, forward_seconds, trained=False)


@benchmark("layers-forward-large-gpu")
def forward_large() -> Iterator[Table]:
    """Layers of at least 2048 features, forward, beside all that they compete with."""
    return _race(LARGE, forward_seconds, trained=False)


@benchmark("layers-step-small-gpu")
def step_small() -> Iterator[Table]:
    """Layers of up to 1024 features on one side, forward and backward, beside all that they compete with."""
    return _race(SMALL, step_seconds, trained=True)


@benchmark("layers-step-large-gpu")
def step_large() -> Iterator[Table]:
    """Layers of at least 2048 features, forward and backward, beside all that they compete with."""
    return _race(LARGE, step_seconds, trained=True)


def _race(
    sizes: Iterable[tuple[int, int]], seconds: Callable[[Racer, dict[int, Tensor]], Times], trained: bool
) -> Iterator[Table]:
    """A row for each size, epilogue, ratio and number of tokens; the table is given after every size.

    With gradients bias and GELU come at one ratio: they are compiled for every structure, which takes long.
    """
    table, profile = Table(HEADER), resolve("auto", "cuda")
    for in_features, out_features in sizes:
        name = f"{in_features} -> {out_features}"
        xs = {tokens: torch.randn(tokens, in_features, device="cuda").bfloat16() for tokens in TOKENS}
        for tokens in TOKENS[1:]:
            torch._dynamo.mark_dynamic(xs[tokens], 0)
        for activated in (False, True):
            dense, *others = _of_any_ratio(in_features, out_features, activated)
            times = {racer.name: seconds(racer, xs) for racer in (dense, *others)}
            if not trained:
                tuned = dense._replace(name="max-autotune", mode="max-autotune-no-cudagraphs")
                times[tuned.name] = forward_seconds(tuned, {tokens: xs[tokens].clone() for tokens in TUNED})
            for ratio in RATIOS[:1] if trained and activated else RATIOS:
                racers = _at_ratio(ratio, in_features, out_features, activated, trained)
                at_ratio = {racer.name: seconds(racer, xs) for racer in racers}
                start = name, f"{ratio}", "bias, GELU" if activated else "-"
                table.raw[", ".join(start)] = {**times, **at_ratio}
                shapes = {column(grid): shape_at(ratio, in_features, out_features, grid) for grid in GRIDS[1:]}
                bounds = {
                    grid: {tokens: least_seconds(profile, tokens, shape, trained) for tokens in TOKENS}
                    for grid, shape in shapes.items()
                    if shape is not None
                }
                table.rows += _rows(start, {**times, **at_ratio}, bounds)
        table.targets = _summary(table)
        yield table


def _of_any_ratio(in_features: int, out_features: int, activated: bool) -> list[Racer]:
    """Dense, and the authors' layer, whose parameters follow from its blocks."""
    p, s = in_features // AUTHORS, out_features // AUTHORS
    bias = [(out_features,)] if activated else []
    weight = functools.partial(_drawn, [(out_features, in_features), *bias])
    blocks = functools.partial(_drawn, [(AUTHORS, min(p, s), p), (AUTHORS, s, min(p, s)), *bias])
    dense, theirs = (with_gelu(layer) if activated else layer for layer in (linear, authors))
    return [
        Racer("dense", dense, weight, "default" if activated else None),
        Racer("authors, eager", theirs, blocks),
        Racer("authors, compiled", theirs, blocks, "default"),
    ]


def _at_ratio(ratio: float, in_features: int, out_features: int, activated: bool, trained: bool) -> list[Racer]:
    """Low rank as two layers, and ours; each with the same share of the parameters."""
    racers: list[Racer] = []
    bias = [(out_features,)] if activated else []
    ours: Layer = mfx.monarch_bmm
    if activated:  # in a compiled forward pass it is found behind the product
        ours = with_gelu(ours) if trained else functools.partial(ours, activation="gelu")
    for grid in GRIDS:
        shape = shape_at(ratio, in_features, out_features, grid)
        if shape is None:
            continue
        if grid == (1, 1):
            layer = with_gelu(two_linear) if activated else two_linear
            sizes = [(shape.rank, in_features), (out_features, shape.rank), *bias]
            draw = functools.partial(_drawn, sizes)
            racers.append(Racer("low rank, two layers", layer, draw, "default" if activated else None))
        mode = "default" if activated and trained else None
        racers.append(Racer(column(grid), ours, functools.partial(_factors, shape, bias), mode))
    return racers


def _factors(shape: MonarchShape, bias: Iterable[tuple[int, ...]]) -> Operands:
    return *factors(shape), *_drawn(bias)


def _drawn(sizes: Iterable[tuple[int, ...]]) -> Operands:
    """Matrices that keep the magnitude of what they multiply, and biases of that magnitude."""
    scales = (size[-1] ** 0.5 if len(size) > 1 else 1.0 for size in sizes)
    return tuple(torch.randn(size, device="cuda").bfloat16() / scale for size, scale in zip(sizes, scales, strict=True))


def forward_seconds(racer: Racer, xs: dict[int, Tensor]) -> Times:
    """By tokens; the first rows are compared with float64 before."""
    copies, run, times = racer.copies(), racer.run(), Times()
    with torch.no_grad(), _only_marked_sizes_vary():
        for tokens, x in xs.items():
            exact = racer.layer(x[:CHECKED].double(), *(operand.double() for operand in copies[0]))
            check_exact(f"{racer.name}, {tokens} tokens", run(x, *copies[0])[:CHECKED], exact, ROUNDING)
            used = copies if tokens <= 1024 else copies[:2]
            times[tokens] = graph_seconds([functools.partial(run, x, *operands) for operands in used])
    return times


def step_seconds(racer: Racer, xs: dict[int, Tensor]) -> Times:
    """The same, forward and backward, all gradients; these are compared with float32's. Not one token's, compiled."""
    copies, run, times = racer.copies(), racer.run(), Times()
    with _only_marked_sizes_vary():
        for tokens, x in xs.items():
            if racer.mode is not None and tokens == 1:
                continue
            leaves = [[leaf.requires_grad_() for leaf in (x, *operands)] for operands in copies]
            grad = torch.randn_like(run(*leaves[0]))
            steps: list[Callable[[], Any]] = [functools.partial(_step, run, each, grad) for each in leaves]
            exactly = [leaf.detach().float().requires_grad_() for leaf in leaves[0]]
            for found, exact in zip(steps[0](), _step(racer.layer, exactly, grad.float()), strict=True):
                check_exact(f"a gradient of {racer.name}, {tokens} tokens", found, exact.double(), ROUNDING)
            del exactly, exact, found
            times[tokens] = graph_seconds(steps if tokens <= 1024 else steps[:2])
    return times


def _step(run: Layer, leaves: list[Tensor], grad: Tensor) -> Operands:
    return torch.autograd.grad(run(*leaves), leaves, grad)


def _only_marked_sizes_vary() -> Any:
    """Compiled layers hold for any number of tokens, where these are marked, and for no other size than theirs."""
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False)


def _rows(start: tuple[str, ...], times: dict[str, Times], bounds: dict[str, Times]) -> Iterator[tuple[str, ...]]:
    """Speeds against dense; the bound is that of the fastest grid."""
    for tokens, dense in times["dense"].items():
        seconds = {name: times.get(name, {}).get(tokens) for name in RIVALS}
        cells = [f"{dense / found:.2f}x" if found is not None else "-" for found in seconds.values()]
        best = min((name for name in bounds if seconds[name] is not None), key=lambda name: times[name][tokens])
        bound = bounds[best][tokens]
        share = f"{bound / times[best][tokens]:.0%}"
        yield (*start, str(tokens), f"{dense * 1e6:.1f}", *cells, f"{bound * 1e6:.1f}", share)


def _summary(table: Table) -> list[str]:
    """What the columns say of each other."""
    times = list(itertools.chain.from_iterable(_by_tokens(one) for one in table.raw.values()))

    def speeds(name: str, *others: str) -> str:
        found = [min(one[other] for other in others if other in one) / one[name] for one in times if name in one]
        return f"{min(found):.2f}x to {max(found):.2f}x" if found else "not timed"

    return [
        f"dense by max-autotune against its default: {speeds('max-autotune', 'dense')}",
        f"ours, low rank, against two layers: {speeds('low rank', 'low rank, two layers')}",
        f"ours, 4x4, against the authors' layer: {speeds('4x4', 'authors, eager', 'authors, compiled')}",
    ]


def _by_tokens(times: dict[str, Times]) -> Iterator[dict[str, float]]:
    for tokens in TOKENS:
        yield {name: seconds[tokens] for name, seconds in times.items() if tokens in seconds}
