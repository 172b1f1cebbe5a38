"""What a product on a GPU is made of, bfloat16: its time by rank, and first halves of single rows of blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.gate import check_exact
from benchmarks.gpu import ROUNDING, graph_seconds
from benchmarks.registry import Table, benchmark
from benchmarks.unaligned import times
from monarch_fx.costs import monarch_seconds, resolve
from monarch_fx.kernels import gpu
from monarch_fx.structure import MonarchShape

TOKENS = 16384
RANKS = {  # in_features, out_features, nblocks_out, nblocks_in
    (1024, 4096, 2, 1): (304, 320, 336, 352, 368, 384),
    (768, 2304, 2, 1): (128, 144, 160, 176, 192),
    (768, 3072, 3, 1): (128, 144, 160, 176, 192),
    (1024, 1024, 2, 2): (96, 112, 128, 144, 160),
    (1024, 1024, 1, 1): (240, 256, 272, 288),
}
SINGLE_ROWS = (  # in_features, nblocks_in, rank
    (768, 2, 96),
    (1024, 2, 128),
    (2304, 2, 160),
    (3072, 3, 160),
    (3072, 2, 176),
    (4096, 2, 336),
    (4096, 4, 224),
    (4096, 2, 672),
    (14336, 4, 400),
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
def single_rows() -> Iterator[Table]:
    """First halves with one row of blocks: this library's kernel, and a batched product of cuBLAS."""
    table = Table(("tokens", "in_features", "nblocks_in, rank", "ours us", "cuBLAS us", "ours over cuBLAS"))
    for tokens in (256, 512, 2048, 4096, TOKENS):
        for in_features, n_in, rank in SINGLE_ROWS:
            x = torch.randn(tokens, in_features, device="cuda").bfloat16()
            R = torch.randn(n_in, 1, rank, in_features // n_in, device="cuda").bfloat16()
            blocks = x.unflatten(1, (n_in, -1)).transpose(0, 1)
            t = x.new_empty(1, tokens, n_in * rank)
            found = t[0].unflatten(1, (n_in, rank)).transpose(0, 1)

            def ours(operands: tuple[torch.Tensor, ...] = (x, R, t)) -> None:
                gpu._triton().first_half(*operands)

            def library(blocks: torch.Tensor = blocks, R: torch.Tensor = R, found: torch.Tensor = found) -> None:
                torch.bmm(blocks, R[:, 0].mT, out=found)

            exact = blocks.double() @ R[:, 0].mT.double()
            seconds = {}
            racers: dict[str, Callable[[], None]] = {"ours": ours, "cuBLAS": library}
            for name, run in racers.items():
                t.fill_(torch.nan)
                run()
                check_exact(f"{name}, {tuple(R.shape)}", found, exact, ROUNDING)
                seconds[name] = graph_seconds([run] * 4)
            cells = *(f"{s * 1e6:.1f}" for s in seconds.values()), f"{seconds['ours'] / seconds['cuBLAS']:.2f}"
            table.rows.append((f"{tokens}", f"{in_features}", f"{n_in}, {rank}", *cells))
            table.raw[f"{tokens}, {in_features}, {n_in}, {rank}"] = seconds
        yield table
