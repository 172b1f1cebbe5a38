"""Single products of float32 numbers in TF32 on a GPU, forward and in training, beside dense and low rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import monarch_fx as mfx
from benchmarks.gate import check_exact
from benchmarks.gpu import CACHE_BYTES, ROUNDING, graph_seconds, shape_at
from benchmarks.registry import Table, benchmark
from benchmarks.unaligned import Product, run_of
from monarch_fx.costs import dense_seconds, monarch_seconds, resolve
from monarch_fx.costs.timing import multiplying_float32_in
from monarch_fx.structure import MonarchShape

SIZES = (768, 768), (768, 3072), (1024, 4096), (4096, 1024), (4096, 4096), (4096, 14336)
GRIDS = (1, 1), (2, 2), (4, 4), (1, 4), (4, 1)
RATIOS = 0.5, 0.33


@benchmark("tf32-gpu")
def tf32() -> Iterator[Table]:
    """Products in TF32, forward and backward, at ratios 0.5 and 0.33, and how well the cost model predicts them."""
    names = ["low rank" if grid == (1, 1) else f"{grid[0]}x{grid[1]}" for grid in GRIDS]
    table = Table(("pass", "tokens", "in -> out", "ratio", "dense us", *names))
    profile = resolve("auto", "cuda")
    errors: dict[str, list[float]] = {"inference": [], "training": []}
    with multiplying_float32_in("tf32"):
        for workload, tokens in (("inference", 16), ("inference", 4096), ("inference", 16384), ("training", 16384)):
            for size in SIZES:
                _race(table, profile, workload, tokens, *size, errors[workload])
            table.targets = [
                f"{workload}, {profile.name}: prediction error: median {np.median(np.abs(found)):.0%}, 95th percentile "
                f"{np.percentile(np.abs(found), 95):.0%}, on {len(found)} times"
                for workload, found in errors.items()
                if found
            ]
            yield table


def _race(
    table: Table,
    profile: mfx.DeviceProfile,
    workload: str,
    tokens: int,
    in_features: int,
    out_features: int,
    errors: list[float],
) -> None:
    """Times dense and every structure of one size, few tokens over as many weights as a cache can't hold."""
    options: dict[str, Any] = {"dtype": "tf32", "workload": workload}
    x, grad = (torch.randn(tokens, features, device="cuda") for features in (in_features, out_features))
    copies = 2 if tokens > 64 else max(2, min(64, int(CACHE_BYTES / (4 * in_features * out_features))))

    def seconds(product: Product, *sizes: tuple[int, ...]) -> float:
        """Of a product with weights of these sizes; its results, or gradients, are checked before."""
        upstream = grad if workload == "training" else None
        drawn = [tuple(torch.randn(size, device="cuda") / 32 for size in sizes) for _ in range(copies)]
        runs = [run_of(product, (x, *weights), upstream) for weights in drawn]
        exact = run_of(
            product, tuple(leaf.double() for leaf in (x, *drawn[0])), None if upstream is None else grad.double()
        )
        for found, right in zip(runs[0](), exact(), strict=True):
            check_exact(f"{workload}, {tokens} tokens, {sizes}", found, right, ROUNDING)
        return graph_seconds(runs)

    dense = seconds(F.linear, (out_features, in_features))
    predicted = float(dense_seconds(profile, tokens, in_features, out_features, **options))
    errors.append(predicted / dense - 1)
    for ratio in RATIOS:
        row = [workload, f"{tokens}", f"{in_features} -> {out_features}", f"{ratio}", f"{dense * 1e6:.1f}"]
        for grid in GRIDS:
            shape = shape_at(ratio, in_features, out_features, grid)
            if shape is None:
                row.append("-")
                continue
            ours = seconds(mfx.monarch_bmm, _right(shape), _left(shape))
            predicted_ours = float(monarch_seconds(profile, tokens, shape, **options))
            errors.append(predicted_ours / ours - 1)
            row.append(f"{dense / ours:.2f}x")
            key = f"{workload}, {tokens}, {in_features} -> {out_features}, {shape}"
            times = {"dense": dense, "ours": ours}
            table.raw[key] = {"seconds": times, "predicted_s": {"dense": predicted, "ours": predicted_ours}}
        table.rows.append(tuple(row))


def _right(shape: MonarchShape) -> tuple[int, ...]:
    return shape.nblocks_in, shape.nblocks_out, shape.rank, shape.p


def _left(shape: MonarchShape) -> tuple[int, ...]:
    return shape.nblocks_out, shape.nblocks_in, shape.rank, shape.s
