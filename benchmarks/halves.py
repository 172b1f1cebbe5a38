"""What a product on a GPU is made of, bfloat16: its time by rank, first halves, one kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gate import check_exact
from benchmarks.gpu import ROUNDING, graph_seconds
from benchmarks.registry import Table, benchmark
from benchmarks.unaligned import times
from monarch_fx.costs import monarch_seconds, resolve
from monarch_fx.kernels.halves import both_halves, first_half_by_rows, launchers, one_kernel_tokens
from monarch_fx.structure import Monarch, MonarchShape

TOKENS = 16384
RANKS = {  # in_features, out_features, nblocks_out, nblocks_in
    (1024, 4096, 2, 1): (304, 320, 336, 352, 368, 384),
    (768, 2304, 2, 1): (128, 144, 160, 176, 192),
    (768, 3072, 3, 1): (128, 144, 160, 176, 192),
    (1024, 1024, 2, 2): (96, 112, 128, 144, 160),
    (1024, 1024, 1, 1): (240, 256, 272, 288),
}
FIRST = (  # in_features, nblocks_out, nblocks_in, rank
    (768, 1, 2, 96),
    (1024, 1, 2, 128),
    (2304, 1, 2, 160),
    (3072, 1, 3, 160),
    (3072, 1, 2, 176),
    (4096, 1, 2, 336),
    (4096, 1, 4, 224),
    (4096, 1, 2, 672),
    (14336, 1, 4, 400),
    (1024, 2, 2, 128),
    (2048, 2, 2, 256),
    (4096, 2, 2, 336),
    (4096, 2, 2, 512),
    (4096, 4, 4, 256),
    (8192, 2, 2, 1024),
    (8192, 4, 4, 512),
    (14336, 2, 2, 512),
    (14336, 4, 4, 384),
    (2048, 2, 2, 168),
    (4096, 2, 2, 208),
    (4096, 2, 2, 304),
    (4096, 2, 2, 416),
    (4096, 2, 4, 216),
    (4096, 2, 8, 152),
    (8192, 2, 2, 672),
    (14336, 2, 2, 560),
    (3072, 3, 3, 112),
    (3072, 3, 3, 144),
    (4096, 4, 4, 160),
    (4096, 4, 4, 168),
    (8192, 4, 4, 336),
    (4096, 8, 2, 88),
)
SMALL = (  # features, nblocks in both directions, rank
    (768, 2, 64),
    (768, 2, 96),
    (768, 3, 48),
    (768, 3, 64),
    (1024, 2, 64),
    (1024, 2, 128),
)


@benchmark("ranks-gpu")
def by_rank() -> Iterator[Table]:
    """Times of products rank by rank: 16384 tokens, forward and in training, measured and predicted."""
    passes = {"inference": "forward", "training": "in training"}
    header = (f"{what}, {who} us" for what in passes.values() for who in ("dense", "ours", "predicted"))
    table = Table(("in -> out", "grid, rank", *header))
    profile = resolve("auto", "cuda")
    for sizes, ranks in RANKS.items():
        for rank in ranks:
            shape = MonarchShape(*sizes, rank)
            cells, raw = [], {}
            for workload in passes:
                seconds = times(TOKENS, shape, workload == "training")
                predicted = float(monarch_seconds(profile, TOKENS, shape, dtype="bfloat16", workload=workload))
                raw[workload] = {"seconds": seconds, "predicted_s": predicted}
                cells += [f"{s * 1e6:.1f}" for s in (seconds["dense"], seconds["ours"], predicted)]
            table.rows.append((f"{shape.in_features} -> {shape.out_features}", str(shape), *cells))
            table.raw[f"{shape.in_features} -> {shape.out_features}, {shape}"] = raw
            yield table


@benchmark("first-halves-gpu")
def first_halves() -> Iterator[Table]:
    """First halves: this library's kernel, and cuBLAS with a batched product for every row of blocks."""
    table = Table(("tokens", "in_features", "grid, rank", "ours us", "cuBLAS us", "ours over cuBLAS"))
    for tokens in (256, 512, 1024, 2048, 4096, 8192, TOKENS):
        for in_features, n_out, n_in, rank in FIRST:
            x = torch.randn(tokens, in_features, device="cuda").bfloat16()
            R = torch.randn(n_in, n_out, rank, in_features // n_in, device="cuda").bfloat16()
            blocks = x.unflatten(1, (n_in, -1)).transpose(0, 1)
            t = x.new_empty(n_out, tokens, n_in * rank)
            found = t.unflatten(2, (n_in, rank)).transpose(1, 2)

            def ours(operands: tuple[Tensor, ...] = (x, R, t)) -> None:
                launchers().launch.first_half(*operands)

            def library(x: Tensor = x, R: Tensor = R, t: Tensor = t) -> None:
                first_half_by_rows(x, R, out=t)

            exact = torch.stack([blocks.double() @ R[:, j].mT.double() for j in range(n_out)])
            seconds = {}
            racers: dict[str, Callable[[], None]] = {"ours": ours, "cuBLAS": library}
            for name, run in racers.items():
                t.fill_(torch.nan)
                run()
                check_exact(f"{name}, {tuple(R.shape)}", found, exact, ROUNDING)
                seconds[name] = graph_seconds([run] * 4)
            cells = *(f"{s * 1e6:.1f}" for s in seconds.values()), f"{seconds['ours'] / seconds['cuBLAS']:.2f}"
            table.rows.append((f"{tokens}", f"{in_features}", f"{n_out}x{n_in} r{rank}", *cells))
            table.raw[f"{tokens}, {in_features}, {n_out}x{n_in} r{rank}"] = seconds
        yield table


@benchmark("fused-gpu")
def one_kernel() -> Iterator[Table]:
    """Small products with a bias: dense, both halves, and the kernel that runs whole products."""
    rivals = "dense", "both halves", "one kernel"
    table = Table(("tokens", "features", "grid, rank", *(f"{rival} us" for rival in rivals), "taken"))
    launch = launchers().launch
    for tokens in (2048, 3072, 4096, 6144, 8192, TOKENS, 2 * TOKENS):
        for features, nblocks, rank in SMALL:
            shape = MonarchShape(features, features, nblocks, nblocks, rank)
            x = torch.randn(tokens, features, device="cuda").bfloat16()
            bias = torch.randn(features, device="cuda").bfloat16()
            weight = torch.randn(features, features, device="cuda").bfloat16() / 32
            R = torch.randn(nblocks, nblocks, rank, shape.p, device="cuda").bfloat16() / shape.p**0.5
            L = torch.randn(nblocks, nblocks, rank, shape.s, device="cuda").bfloat16() / (nblocks * rank) ** 0.5
            y = torch.empty_like(x)

            def halves(x: Tensor = x, R: Tensor = R, L: Tensor = L, y: Tensor = y, bias: Tensor = bias) -> None:
                both_halves(x, R, L, y, bias, None, "none")

            def whole(x: Tensor = x, R: Tensor = R, L: Tensor = L, y: Tensor = y, bias: Tensor = bias) -> None:
                launch.whole(x, R, L, y, bias, None, "none")

            exact = Monarch(R.double(), L.double())(x[:256].double()) + bias.double()
            for run in (halves, whole):
                y.fill_(torch.nan)
                run()
                check_exact(f"{run.__name__}, {shape}", y[:256], exact, ROUNDING)
            runs = functools.partial(F.linear, x, weight, bias), halves, whole
            seconds = dict(zip(rivals, (graph_seconds([run] * 4) for run in runs), strict=True))
            least = one_kernel_tokens(x.dtype, x.device, R.shape, L.shape)
            taken = rivals[1 + (tokens >= least)]
            cells = *(f"{s * 1e6:.1f}" for s in seconds.values()), taken
            table.rows.append((f"{tokens}", f"{features}", str(shape), *cells))
            table.raw[f"{tokens}, {features}, {shape}"] = seconds
        yield table
