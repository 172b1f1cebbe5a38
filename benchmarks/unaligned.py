"""Products on a GPU with blocks or ranks that 64 doesn't divide, bfloat16, beside dense ones as they are and padded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import monarch_fx as mfx
from benchmarks.gate import check_exact
from benchmarks.gpu import ROUNDING, graph_seconds
from benchmarks.registry import Table, benchmark
from monarch_fx.costs import monarch_seconds, resolve
from monarch_fx.structure import MonarchShape

DEVICE = "cuda"
ROW = 8  # numbers in 16 bytes
CHECKED = 128  # rows of every result
MIXER_TOKENS = 128 * 768  # an MLP-Mixer's rows where it mixes 49 or 196 patches
SIZES = (  # tokens, in_features, out_features, and ranks by nblocks
    (MIXER_TOKENS, 49, 384, {4: (5,), 2: (10,), 1: (21,)}),
    (MIXER_TOKENS, 384, 49, {4: (5,), 2: (10,), 1: (21,)}),
    (MIXER_TOKENS, 196, 384, {4: (16,), 2: (32,), 1: (64,)}),
    (MIXER_TOKENS, 384, 196, {4: (16,), 2: (32,), 1: (64,)}),
    (4096, 1024, 1024, {4: (64, 60, 62, 63), 1: (256, 252, 254, 255)}),
    (4096, 1000, 1000, {1: (240,), 2: (112,), 4: (48,), 8: (16,)}),
    (4096, 1020, 1020, {1: (240,), 2: (112,), 4: (48,)}),
    (4096, 1001, 1001, {1: (240,), 7: (32,)}),
    (4096, 4098, 4098, {1: (1024,), 2: (512,)}),
    (4096, 4096, 4096, {4: (256, 252)}),
    (4096, 4104, 4104, {3: (384, 376)}),
    (16384, 576, 1536, {2: (96,), 4: (48,)}),
    (4096, 768, 50257, {1: (384,), 2: (192,)}),
)
CASES = [
    (tokens, MonarchShape(in_features, out_features, nblocks, nblocks, rank))
    for tokens, in_features, out_features, grids in SIZES
    for nblocks, ranks in grids.items()
    for rank in ranks
]

Product = Callable[..., Tensor]


@benchmark("unaligned-gpu")
def unaligned() -> Iterator[Table]:
    """Products of such sizes and ranks, forward and in training, beside dense ones as they are and padded."""
    header = ("tokens", "in -> out", "grid, rank", "pass", "dense us", "dense padded us", "ours us", "predicted us")
    table = Table((*header, "ours over the faster dense"))
    profile = resolve("auto", DEVICE)
    errors: dict[str, list[float]] = {"inference": [], "training": []}
    for tokens, shape in CASES:
        for workload, found in errors.items():
            seconds = times(tokens, shape, workload == "training")
            predicted = float(monarch_seconds(profile, tokens, shape, dtype="bfloat16", workload=workload))
            found.append(predicted / seconds["ours"] - 1)
            who = f"{tokens}", f"{shape.in_features} -> {shape.out_features}", str(shape), workload
            cells = (f"{s * 1e6:.1f}" for s in (*seconds.values(), predicted))
            fastest = min(seconds["dense"], seconds["dense padded"])
            table.rows.append((*who, *cells, f"{fastest / seconds['ours']:.2f}x"))
            table.raw[", ".join(who)] = {"seconds": seconds, "predicted_s": predicted}
        table.targets = [
            f"{workload}, {profile.name}: prediction error of ours: median {np.median(np.abs(found)):.0%}, 95th "
            f"percentile {np.percentile(np.abs(found), 95):.0%}, on {len(found)} times"
            for workload, found in errors.items()
        ]
        yield table


def times(tokens: int, shape: MonarchShape, training: bool) -> dict[str, float]:
    """Seconds of one product in a CUDA graph, by who computes it."""

    def drawn(*size: int, scale: int = 1) -> Tensor:
        return torch.randn(*size, device=DEVICE).bfloat16() / scale**0.5

    n_in, n_out, rank, out_features = shape.nblocks_in, shape.nblocks_out, shape.rank, shape.out_features
    x, grad = drawn(tokens, shape.in_features), drawn(tokens, out_features)
    weight = drawn(out_features, shape.in_features, scale=shape.in_features)
    R, L = drawn(n_in, n_out, rank, shape.p, scale=shape.p), drawn(n_out, n_in, rank, shape.s, scale=n_in * rank)
    ours: Product = functools.partial(mfx.monarch_bmm, out_features=out_features)
    right = mfx.Monarch(R.double(), L.double(), in_features=shape.in_features, out_features=out_features)
    with torch.no_grad():
        check_exact(str(shape), ours(x, R, L)[:CHECKED], right(x[:CHECKED].double()), ROUNDING)
    racers: dict[str, tuple[Product, tuple[Tensor, ...]]] = {
        "dense": (F.linear, (x, weight)),
        "dense padded": (_padded_linear, (x, weight)),
        "ours": (ours, (x, R, L)),
    }
    runs = {name: run_of(product, leaves, grad if training else None) for name, (product, leaves) in racers.items()}
    if training:
        wanted = run_of(ours, (x.float(), R.float(), L.float()), grad.float())()
        for found, exact in zip(runs["ours"](), wanted, strict=True):
            check_exact(f"a gradient of {shape}", found, exact.double(), ROUNDING)
    return {name: graph_seconds([run] * 4) for name, run in runs.items()}


def run_of(product: Product, leaves: tuple[Tensor, ...], grad: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
    """The product, or the gradients of all its leaves."""
    leaves = tuple(leaf.detach().requires_grad_(grad is not None) for leaf in leaves)

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(grad is not None):
            y = product(*leaves)
            return (y,) if grad is None else torch.autograd.grad(y, leaves, grad)

    return run


def _padded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """As Inductor may pad it."""
    rows, columns = (-size % ROW for size in weight.shape)
    return F.linear(F.pad(x, (0, columns)), F.pad(weight, (0, columns, 0, rows)))[:, : weight.shape[0]]
