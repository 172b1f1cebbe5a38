"""Times of dense and Monarch products on a device of this machine."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from monarch_fx.costs.profile import DTYPE_BYTES
from monarch_fx.kernels import gpu
from monarch_fx.structure import MonarchShape

Run = Callable[[], object]

GRIDS = ((1, 1), (2, 2), (4, 4), (4, 1), (1, 4))  # (nblocks_out, nblocks_in)
SLICE_S = 0.02  # seconds for one case in one round
LIMIT_S = 30.0  # after which no further round begins


@dataclass(frozen=True)
class Workbench:
    """What is timed on a kind of device."""

    dtype: str
    sizes: tuple[tuple[int, int], ...]  # (in_features, out_features)
    tokens: tuple[int, ...]
    peak_size: int  # n of the n x n x n product that compares the dtypes
    pool_bytes: int  # weights are taken from here in turn, so that they don't stay in a cache
    tile: int


WORKBENCHES = {
    "cpu": Workbench(
        dtype="float32",
        sizes=((256, 256), (768, 768), (384, 1536), (3072, 768)),
        tokens=(1, 16, 64, 256, 1024),
        peak_size=512,
        pool_bytes=96 * 2**20,
        tile=1,
    ),
    "cuda": Workbench(
        dtype="bfloat16",
        sizes=((768, 768), (768, 3072), (4096, 4096), (4096, 14336)),
        tokens=(1, 16, 256, 2048, 8192),
        peak_size=4096,  # TF32 has the share of bfloat16's speed that it has in most products; 8192 throttle
        pool_bytes=512 * 2**20,
        tile=64,
    ),
}


@dataclass(frozen=True)
class Case:
    """One product that is timed; dense where it has no shape."""

    tokens: int
    in_features: int
    out_features: int
    shape: MonarchShape | None


@torch.no_grad()
def time_products(device: torch.device) -> tuple[list[Case], NDArray[np.float64]]:
    """The products of the device's workbench, and the smallest time of each, in seconds.

    Whatever else the machine does only adds to a time: rounds over all products follow each other until one brings few
    smaller times.
    """
    bench = WORKBENCHES[device.type]
    dtype = getattr(torch, bench.dtype)
    pool = torch.randn(bench.pool_bytes // dtype.itemsize, device=device, dtype=dtype)
    cases = products(bench)
    times = np.full(len(cases), np.inf)
    stop = time.perf_counter() + LIMIT_S
    while True:
        before = times.copy()
        for i in tqdm(range(len(cases)), desc="measure", unit="product", leave=False):
            times[i] = min(times[i], seconds_of(_runs(cases[i], pool), device))
        if np.mean(times < 0.95 * before) < 0.05 or time.perf_counter() > stop:
            return cases, times


@torch.no_grad()
def relative_peaks(device: torch.device) -> dict[str, float]:
    """How fast a large dense product runs in each dtype, compared with the dtype of the workbench."""
    bench = WORKBENCHES[device.type]
    times = {}
    for name in DTYPE_BYTES:
        if name == "tf32" and device.type == "cpu":
            continue
        x = torch.randn(bench.peak_size, bench.peak_size, device=device)
        x = x if name == "tf32" else x.to(getattr(torch, name))
        run = functools.partial(torch.mm, x, x, out=torch.empty_like(x))
        with multiplying_float32_in("tf32" if name == "tf32" else "ieee"):
            times[name] = min(seconds_of([run], device) for _ in range(3))
    return {name: times[bench.dtype] / seconds for name, seconds in times.items()}


@torch.no_grad()
def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written per second by a copy of a large matrix that transposes 4 x 4 blocks."""
    bench = WORKBENCHES[device.type]
    x = torch.empty(4, bench.peak_size, 4, bench.peak_size // 16, device=device, dtype=getattr(torch, bench.dtype))
    blocks = x.permute(2, 1, 0, 3)
    run = functools.partial(x.new_empty(blocks.shape).copy_, blocks)
    return 2 * x.nbytes / min(seconds_of([run], device) for _ in range(3))


@contextlib.contextmanager
def multiplying_float32_in(precision: str) -> Iterator[None]:
    """As GPUs multiply float32 matrices inside: in ``"tf32"`` or ``"ieee"``."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def products(bench: Workbench) -> list[Case]:
    """Every size at every number of tokens: dense, and every grid with about half the parameters."""
    cases = []
    for tokens, (n_in, n_out) in itertools.product(bench.tokens, bench.sizes):
        cases.append(Case(tokens, n_in, n_out, None))
        for nblocks_out, nblocks_in in GRIDS:
            one = MonarchShape(n_in, n_out, nblocks_out, nblocks_in, rank=1)
            rank = max(1, n_in * n_out // 2 // one.params // 16 * 16)
            shape = MonarchShape(n_in, n_out, nblocks_out, nblocks_in, rank)
            cases.append(Case(tokens, n_in, n_out, shape))
    return cases


def _runs(case: Case, pool: Tensor) -> list[Run]:
    """The product of a case with several different weights, all with the same activations and results.

    On a GPU by this library's kernels, else two ``bmm`` and copies.
    """
    x = pool.new_empty(case.tokens, case.in_features).normal_()  # zeros and ones would run cooler, and faster
    y = pool.new_empty(case.tokens, case.out_features)
    if case.shape is None:
        size = case.in_features * case.out_features
        weights = [w.view(case.out_features, case.in_features) for w in _slices(pool, size)]
        return [functools.partial(torch.mm, x, w.mT, out=y) for w in weights]
    shape = case.shape
    n_out, n_in, rank, p, s = shape.nblocks_out, shape.nblocks_in, shape.rank, shape.p, shape.s
    run = two_bmm(x, y, shape)
    runs: list[Run] = []
    for factors in _slices(pool, shape.params):
        R = factors[: n_in * n_out * rank * p].view(n_in, n_out, rank, p)
        L = factors[n_in * n_out * rank * p :].view(n_out, n_in, rank, s)
        if pool.is_cuda:
            runs.append(functools.partial(gpu.product, x, R, L, None, None, "none"))
        else:
            runs.append(functools.partial(run, R.flatten(1, 2), L.flatten(1, 2)))
    return runs


def _slices(pool: Tensor, size: int) -> list[Tensor]:
    count = min(64, pool.numel() // size)
    return [pool[i * size : (i + 1) * size] for i in range(count)]


def two_bmm(x: Tensor, y: Tensor, shape: MonarchShape) -> Callable[[Tensor, Tensor], Tensor]:
    """The reference lowering of a Monarch product into ``y``, with buffers that are allocated once.

    Compiled models reuse their buffers; fresh ones would add the page faults of the allocator to every time.

    Args:
        x: (tokens, in_features).
        y: (tokens, out_features).
        shape: A structure without padding.

    Returns:
        A function of R (nblocks_in, nblocks_out * rank, p) and L (nblocks_out, nblocks_in * rank, s); it returns ``y``.
    """
    tokens, n_out, n_in, rank = len(x), shape.nblocks_out, shape.nblocks_in, shape.rank
    first = x.new_empty(n_in, tokens, n_out * rank)
    blocks = first.view(n_in, tokens, n_out, rank).permute(2, 1, 0, 3)
    middle = blocks.flatten(2) if n_in == 1 else x.new_empty(n_out, tokens, n_in * rank)
    last = y.view(1, tokens, -1) if n_out == 1 else x.new_empty(n_out, tokens, shape.s)

    def run(R: Tensor, L: Tensor) -> Tensor:
        torch.bmm(x.view(tokens, n_in, -1).transpose(0, 1), R.mT, out=first)
        if n_in > 1:
            middle.view(n_out, tokens, n_in, rank).copy_(blocks)
        torch.bmm(middle, L, out=last)
        if n_out > 1:
            y.view(tokens, n_out, -1).copy_(last.transpose(0, 1))
        return y

    return run


def seconds_of(runs: Sequence[Run], device: torch.device) -> float:
    """Seconds of one run; on a GPU in a CUDA graph of all of them."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _cuda_seconds(runs)
    return _cpu_seconds(runs)


def _cpu_seconds(runs: Sequence[Run]) -> float:
    """The smallest time of one run."""
    best, stop = np.inf, time.perf_counter() + SLICE_S
    runs[0]()
    for run in itertools.cycle(runs):
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > stop:
            return best
    raise AssertionError("there is always a run")


def _cuda_seconds(runs: Sequence[Run]) -> float:
    """The mean time of a run in a CUDA graph of all of them, smallest of several replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up outside the graph
        for run in runs[:2]:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    repeats = max(1, 16 // len(runs))
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for run in runs:
                run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = np.inf
    for _ in range(5):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best / (repeats * len(runs))
