"""Single layers beside all that they compete with: dense, the authors' layer, low rank as two layers, and ours.

Forward, and forward with backward; plain, and with bias and GELU. bfloat16 in CUDA graphs, with few tokens over as many
copies of the weights as a cache can't hold. What a compiler can fuse is compiled, for every number of tokens anew:
code for any number is made for the first one that it meets, and can be ten times slower with others. Dense is timed
by max-autotune, too, without epilogue and for two numbers of tokens, since that takes half a minute a size. Ours is
called as it is where a compiled graph runs the same kernels.
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
    shape_at,
)
from benchmarks.registry import Table, benchmark
from monarch_fx.costs import resolve
from monarch_fx.structure import MonarchShape

Operands = tuple[Tensor, ...]
Layer = Callable[..., Tensor]  # of x and operands
Times = dict[int, float]  # seconds, by tokens

GRIDS = ((1, 1), (2, 2), (4, 4))
AUTHORS = 4  # blocks, as they published it
TUNED = (16, 4096)  # tokens by max-autotune
CHECKED = 64  # rows of a forward pass
RIVALS = "max-autotune", "authors, eager", "authors, compiled", "low rank, two layers", *map(column, GRIDS)
HEADER = "in -> out", "ratio", "with", "tokens", "dense us", *RIVALS, "bound us", "share of it"


class Racer(NamedTuple):
    """A layer's column, its formula, how its operands are drawn, and what is timed: the formula, as users run it."""

    name: str
    layer: Layer
    draw: Callable[[], Operands]
    run: Layer

    def copies(self) -> list[Operands]:
        """As many as a cache can't hold."""
        first = self.draw()
        count = math.ceil(CACHE_BYTES / sum(operand.nbytes for operand in first))
        return [first, *(self.draw() for _ in range(max(1, min(63, count - 1))))]


def published(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The authors' layer, written anew: x (tokens, k * p), w1 (k, q, p), w2 (l, s, r) with ``k * q == l * r``."""
    t = torch.bmm(x.unflatten(1, (len(w1), -1)).transpose(0, 1), w1.mT)  # (k, tokens, q)
    t = t.transpose(0, 1).flatten(1).unflatten(1, (-1, len(w2))).permute(2, 0, 1)  # single elements are interleaved
    return torch.bmm(t, w2.mT).permute(1, 2, 0).flatten(1)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def two_linear(x: Tensor, R: Tensor, L: Tensor) -> Tensor:
    return F.linear(F.linear(x, R), L)


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(y + bias)


def ending(layer: Layer, epilogue: Layer) -> Layer:
    """The layer, whose output goes through the epilogue with the last operand."""
    return lambda x, *operands: epilogue(layer(x, *operands[:-1]), operands[-1])


@benchmark("layers-forward-768-gpu")
def forward_768() -> Iterator[Table]:
    """Layers whose narrower side has 768 features, forward, beside all that they compete with."""
    return _race(768, trained=False)


@benchmark("layers-forward-1024-gpu")
def forward_1024() -> Iterator[Table]:
    """Layers whose narrower side has 1024 features, forward, beside all that they compete with."""
    return _race(1024, trained=False)


@benchmark("layers-forward-large-gpu")
def forward_large() -> Iterator[Table]:
    """Layers of at least 2048 features, forward, beside all that they compete with."""
    return _race(2048, trained=False)


@benchmark("layers-step-768-gpu")
def step_768() -> Iterator[Table]:
    """Layers whose narrower side has 768 features, forward and backward, beside all that they compete with."""
    return _race(768, trained=True)


@benchmark("layers-step-1024-gpu")
def step_1024() -> Iterator[Table]:
    """Layers whose narrower side has 1024 features, forward and backward, beside all that they compete with."""
    return _race(1024, trained=True)


@benchmark("layers-step-large-gpu")
def step_large() -> Iterator[Table]:
    """Layers of at least 2048 features, forward and backward, beside all that they compete with."""
    return _race(2048, trained=True)


def _race(width: int, *, trained: bool) -> Iterator[Table]:
    """A row for each size, epilogue, ratio and number of tokens; the table is given after every size.

    ``width`` is the narrower side of the sizes: 2048 for all that are as wide or wider.
    """
    table, profile = Table(HEADER), resolve("auto", "cuda")
    seconds = step_seconds if trained else forward_seconds
    alike: list[dict[str, Times]] = []  # where ours has about as many parameters as the authors' layer
    for in_features, out_features in (size for size in SIZES if min(2048, *size) == width):
        torch._dynamo.reset()
        name = f"{in_features} -> {out_features}"
        xs = {tokens: torch.randn(tokens, in_features, device="cuda").bfloat16() for tokens in TOKENS}
        for activated in (False, True):
            times = {racer.name: seconds(racer, xs) for racer in _of_any_ratio(in_features, out_features, activated)}
            if not trained and not activated:
                times["max-autotune"] = forward_seconds(_tuned(in_features, out_features), {t: xs[t] for t in TUNED})
            for ratio in RATIOS:
                racers = _at_ratio(ratio, in_features, out_features, activated, trained)
                at_ratio = {racer.name: seconds(racer, xs) for racer in racers}
                start = name, f"{ratio}", "bias, GELU" if activated else "-"
                table.raw[", ".join(start)] = {**times, **at_ratio}
                if ratio == _authors_ratio(in_features, out_features):
                    alike.append({**times, **at_ratio})
                shapes = {column(grid): shape_at(ratio, in_features, out_features, grid) for grid in GRIDS[1:]}
                bounds = {
                    grid: {tokens: least_seconds(profile, tokens, shape, trained) for tokens in TOKENS}
                    for grid, shape in shapes.items()
                    if shape is not None
                }
                table.rows += _rows(start, {**times, **at_ratio}, bounds)
        table.targets = _summary(table.raw.values(), alike)
        yield table


def _of_any_ratio(in_features: int, out_features: int, activated: bool) -> list[Racer]:
    """Dense, and the authors' layer, whose parameters follow from its blocks."""
    p, s = in_features // AUTHORS, out_features // AUTHORS
    bias = [(out_features,)] if activated else []
    weight = functools.partial(_drawn, [(out_features, in_features), *bias])
    blocks = functools.partial(_drawn, [(AUTHORS, min(p, s), p), (AUTHORS, s, min(p, s)), *bias])
    _check_published(in_features, *blocks()[:2])
    dense, theirs = (linear_gelu, ending(published, bias_gelu)) if activated else (F.linear, published)
    return [
        Racer("dense", dense, weight, _compiled(dense) if activated else dense),
        Racer("authors, eager", theirs, blocks, theirs),
        Racer("authors, compiled", theirs, blocks, _compiled(theirs)),
    ]


def _check_published(in_features: int, w1: Tensor, w2: Tensor) -> None:
    """Against the product that the authors' weights stand for; a few tokens in float64."""
    x = torch.randn(3, in_features, device="cuda", dtype=torch.float64)
    with torch.no_grad():
        exact = mfx.Monarch.from_blockdiag_butterfly(w1.double(), w2.double())(x)
        check_exact("the authors' layer", published(x, w1.double(), w2.double()), exact, 1e-10)


def _tuned(in_features: int, out_features: int) -> Racer:
    """Dense, by the kernel that Inductor finds fastest."""
    tuned = torch.compile(F.linear, dynamic=False, mode="max-autotune-no-cudagraphs")
    return Racer("max-autotune", F.linear, functools.partial(_drawn, [(out_features, in_features)]), tuned)


def _at_ratio(ratio: float, in_features: int, out_features: int, activated: bool, trained: bool) -> list[Racer]:
    """Low rank as two layers, and ours; each with the same share of the parameters.

    Bias and GELU behind them are compiled once for all of a size, which takes the time of a layer compiled as a whole.
    """
    racers: list[Racer] = []
    bias = [(out_features,)] if activated else []
    for grid in GRIDS:
        shape = shape_at(ratio, in_features, out_features, grid)
        if shape is None:
            continue
        if grid == (1, 1):
            draw = functools.partial(_drawn, [(shape.rank, in_features), (out_features, shape.rank), *bias])
            racers.append(_ending("low rank, two layers", two_linear, draw, activated))
        draw = functools.partial(_factors, shape, bias)
        if activated and not trained:
            fused = functools.partial(mfx.monarch_bmm, activation="gelu")
            racers.append(Racer(column(grid), fused, draw, fused))
        else:
            racers.append(_ending(column(grid), mfx.monarch_bmm, draw, activated))
    return racers


def _ending(name: str, layer: Layer, draw: Callable[[], Operands], activated: bool) -> Racer:
    if activated:
        return Racer(name, ending(layer, bias_gelu), draw, ending(layer, _compiled(bias_gelu)))
    return Racer(name, layer, draw, layer)


def _compiled(layer: Layer) -> Layer:
    return torch.compile(layer, dynamic=False)


def _factors(shape: MonarchShape, bias: Iterable[tuple[int, ...]]) -> Operands:
    return *factors(shape), *_drawn(bias)


def _drawn(sizes: Iterable[tuple[int, ...]]) -> Operands:
    """Matrices that keep the magnitude of what they multiply, and biases of that magnitude."""
    scales = (size[-1] ** 0.5 if len(size) > 1 else 1.0 for size in sizes)
    return tuple(torch.randn(size, device="cuda").bfloat16() / scale for size, scale in zip(sizes, scales, strict=True))


def forward_seconds(racer: Racer, xs: dict[int, Tensor]) -> Times:
    """By tokens; the first rows are compared with float64 before."""
    copies, times = racer.copies(), Times()
    with torch.no_grad(), _every_size_compiled():
        for tokens, x in xs.items():
            exact = racer.layer(x[:CHECKED].double(), *(operand.double() for operand in copies[0]))
            check_exact(f"{racer.name}, {tokens} tokens", racer.run(x, *copies[0])[:CHECKED], exact, ROUNDING)
            used = copies if tokens <= 1024 else copies[:2]
            times[tokens] = graph_seconds([functools.partial(racer.run, x, *operands) for operands in used])
    return times


def step_seconds(racer: Racer, xs: dict[int, Tensor]) -> Times:
    """The same, forward and backward, all gradients; these are compared with float32's."""
    copies, times = racer.copies(), Times()
    with _every_size_compiled():
        for tokens, x in xs.items():
            leaves = [[leaf.requires_grad_() for leaf in (x, *operands)] for operands in copies]
            grad = torch.randn_like(racer.run(*leaves[0]))
            steps: list[Callable[[], Any]] = [functools.partial(_step, racer.run, each, grad) for each in leaves]
            exactly = [leaf.detach().float().requires_grad_() for leaf in leaves[0]]
            for found, exact in zip(steps[0](), _step(racer.layer, exactly, grad.float()), strict=True):
                check_exact(f"a gradient of {racer.name}, {tokens} tokens", found, exact.double(), ROUNDING)
            del exactly, exact, found
            times[tokens] = graph_seconds(steps if tokens <= 1024 else steps[:2])
    return times


def _step(run: Layer, leaves: list[Tensor], grad: Tensor) -> Operands:
    return torch.autograd.grad(run(*leaves), leaves, grad)


def _every_size_compiled() -> Any:
    """However many sizes there are: past a limit layers would run as they are."""
    return torch._dynamo.config.patch(
        recompile_limit=1024, accumulated_recompile_limit=1024, fail_on_recompile_limit_hit=True
    )


def _rows(start: tuple[str, ...], times: dict[str, Times], bounds: dict[str, Times]) -> Iterator[tuple[str, ...]]:
    """Speeds against dense; the bound is that of the fastest grid's product alone."""
    for tokens, dense in times["dense"].items():
        seconds = {name: times.get(name, {}).get(tokens) for name in RIVALS}
        cells = [f"{dense / found:.2f}x" if found is not None else "-" for found in seconds.values()]
        best = min((name for name in bounds if seconds[name] is not None), key=lambda name: times[name][tokens])
        bound = bounds[best][tokens]
        share = f"{bound / times[best][tokens]:.0%}"
        yield (*start, str(tokens), f"{dense * 1e6:.1f}", *cells, f"{bound * 1e6:.1f}", share)


def _authors_ratio(in_features: int, out_features: int) -> float:
    """That of ours which is nearest to theirs."""
    p, s = in_features // AUTHORS, out_features // AUTHORS
    theirs = AUTHORS * min(p, s) * (p + s) / (in_features * out_features)
    return min(RATIOS, key=lambda ratio: abs(ratio - theirs))


def _summary(every: Iterable[dict[str, Times]], alike: Iterable[dict[str, Times]]) -> list[str]:
    """What the columns say of each other."""

    def speeds(rows: Iterable[dict[str, Times]], name: str, *others: str) -> str:
        times = itertools.chain.from_iterable(_by_tokens(one) for one in rows)
        found = [min(one[other] for other in others if other in one) / one[name] for one in times if name in one]
        return f"{min(found):.2f}x to {max(found):.2f}x" if found else "not timed"

    return [
        f"dense by max-autotune against its default: {speeds(every, 'max-autotune', 'dense')}",
        f"ours, low rank, against two layers: {speeds(every, 'low rank', 'low rank, two layers')}",
        "ours, 4x4, against the authors' layer at the ratio nearest to theirs: "
        f"{speeds(alike, '4x4', 'authors, eager', 'authors, compiled')}",
    ]


def _by_tokens(times: dict[str, Times]) -> Iterator[dict[str, float]]:
    for tokens in TOKENS:
        yield {name: seconds[tokens] for name, seconds in times.items() if tokens in seconds}
