"""measure_device: a profile fitted to this machine, kept in the user's cache directory."""

from __future__ import annotations

import functools
import itertools
import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
import scipy.optimize
import torch
from torch import Tensor
from tqdm.auto import tqdm

from monarch_fx.costs.predict import dense_seconds, monarch_seconds
from monarch_fx.costs.profile import DTYPE_BYTES, DeviceProfile
from monarch_fx.errors import DeviceProfileError, MonarchWarning
from monarch_fx.structure import MonarchShape

GRIDS = ((1, 1), (2, 2), (4, 4), (4, 1), (1, 4))  # (nblocks_out, nblocks_in), each with half the dense parameters
SLICE_S = 0.02  # seconds for one case in one round
ROUNDS = 3  # the smallest time of all rounds counts: whatever else the machine does only adds to it


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
        peak_size=8192,
        pool_bytes=512 * 2**20,
        tile=64,
    ),
}


def measure_device(device: str | torch.device | None = None, *, force: bool = False) -> DeviceProfile:
    """Fits a profile to a device of this machine in well under a minute.

    Times dense products and Monarch products (two ``bmm`` and block transposes) of several sizes, and fits the
    constants of the cost formulas by least squares on the logarithms of the times. The profile is kept in the user's
    cache directory for this device, PyTorch version and number of threads; ``device="auto"`` finds it there.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; default the GPU where there is one, else the CPU.
        force: Measure again, whatever is stored.

    Raises:
        DeviceProfileError: The device can't be measured.
    """
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DeviceProfileError(f"Can't measure the device {device!r}: {error}") from error
    if target.type not in WORKBENCHES:
        raise DeviceProfileError(f"Can't measure the device {str(target)!r}: only CPUs and CUDA devices.")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise DeviceProfileError(f"Can't measure the device {str(target)!r}: PyTorch sees no GPU here.")
    stored = None if force else cached_profile(target)
    if stored is not None:
        return stored
    profile = _measure(target)
    try:
        _store(target, profile)
    except OSError as error:
        warnings.warn(f"The profile can't be kept for the next time: {error}.", MonarchWarning, stacklevel=2)
    return profile


def cached_profile(device: torch.device) -> DeviceProfile | None:
    """What ``measure_device`` has stored for ``device``; None where there is nothing, or nothing that can be read."""
    if device.type not in WORKBENCHES:
        return None
    try:
        return DeviceProfile.from_json(_cache_file(device).read_text())
    except (OSError, UnicodeDecodeError, DeviceProfileError):
        return None


def _cache_file(device: torch.device) -> Path:
    key = f"{_description(device)} torch {torch.__version__}"
    return Path(platformdirs.user_cache_dir("monarch_fx")) / f"{re.sub(r'[^a-z0-9.+]+', '-', key.lower())}.json"


def _store(device: torch.device, profile: DeviceProfile) -> None:
    path = _cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(profile.to_json())
    os.replace(file.name, path)  # at once, so that no other process reads half a profile


def _description(device: torch.device) -> str:
    """The device as a plan names it: 'cpu AMD EPYC, 2 threads'."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"cpu {_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True)
class _Case:
    tokens: int
    in_features: int
    out_features: int
    shape: MonarchShape | None  # None: dense

    def predicted(self, profile: DeviceProfile, dtype: str) -> float:
        if self.shape is None:
            return float(dense_seconds(profile, self.tokens, self.in_features, self.out_features, dtype=dtype))
        return float(monarch_seconds(profile, self.tokens, self.shape, dtype=dtype))


@torch.no_grad()
def _measure(device: torch.device) -> DeviceProfile:
    bench = WORKBENCHES[device.type]
    dtype = getattr(torch, bench.dtype)
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    pool = torch.randn(bench.pool_bytes // dtype.itemsize, device=device, dtype=dtype)
    cases = _cases(bench)
    times = np.full(len(cases), np.inf)
    for _, i in tqdm(
        list(itertools.product(range(ROUNDS), range(len(cases)))), desc="measure", unit="product", leave=False
    ):
        times[i] = min(times[i], clock(_runs(cases[i], pool)))
    del pool
    peaks = _relative_peaks(device, bench, clock)
    return _fit(device, bench, cases, times, peaks)


def _cases(bench: Workbench) -> list[_Case]:
    cases = []
    for tokens, (n_in, n_out) in itertools.product(bench.tokens, bench.sizes):
        cases.append(_Case(tokens, n_in, n_out, None))
        for nblocks_out, nblocks_in in GRIDS:
            one = MonarchShape(n_in, n_out, nblocks_out, nblocks_in, rank=1)
            rank = max(1, n_in * n_out // 2 // one.params // 16 * 16)
            cases.append(_Case(tokens, n_in, n_out, MonarchShape(n_in, n_out, nblocks_out, nblocks_in, rank)))
    return cases


def _runs(case: _Case, pool: Tensor) -> list[Callable[[], object]]:
    """The product of a case with several different weights, all with the same activations and results."""
    x = pool.new_ones(case.tokens, case.in_features)
    y = pool.new_empty(case.tokens, case.out_features)
    if case.shape is None:
        size = case.in_features * case.out_features
        weights = [w.view(case.out_features, case.in_features) for w in _slices(pool, size)]
        return [functools.partial(torch.mm, x, w.mT, out=y) for w in weights]
    shape = case.shape
    n_out, n_in, rank, p, s = shape.nblocks_out, shape.nblocks_in, shape.rank, shape.p, shape.s
    runs: list[Callable[[], object]] = []
    run = _two_bmm(x, y, shape)
    for factors in _slices(pool, shape.params):
        R = factors[: n_in * n_out * rank * p].view(n_in, n_out * rank, p)
        L = factors[n_in * n_out * rank * p :].view(n_out, n_in * rank, s)
        runs.append(functools.partial(run, R, L))
    return runs


def _slices(pool: Tensor, size: int) -> list[Tensor]:
    count = min(64, pool.numel() // size)
    return [pool[i * size : (i + 1) * size] for i in range(count)]


def _two_bmm(x: Tensor, y: Tensor, shape: MonarchShape) -> Callable[[Tensor, Tensor], Tensor]:
    """The reference lowering of a Monarch product, into buffers that are allocated once.

    Compiled models reuse their buffers; fresh ones would add the page faults of the allocator to every time.
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


def _relative_peaks(
    device: torch.device, bench: Workbench, clock: Callable[[Sequence[Callable[[], object]]], float]
) -> dict[str, float]:
    """How fast large dense products run in each dtype, compared with the dtype of the workbench."""
    times = {}
    for name in DTYPE_BYTES:
        x = torch.ones(bench.peak_size, bench.peak_size, device=device, dtype=getattr(torch, name))
        y = torch.empty_like(x)
        times[name] = min(clock([functools.partial(torch.mm, x, x, out=y)]) for _ in range(ROUNDS))
    return {name: times[bench.dtype] / seconds for name, seconds in times.items()}


def _fit(
    device: torch.device, bench: Workbench, cases: list[_Case], times: np.ndarray, peaks: dict[str, float]
) -> DeviceProfile:
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1

    def profile(logs: np.ndarray, source: str = "") -> DeviceProfile:
        peak, bandwidth, launch_s, fill = np.exp(logs[:4]).tolist()
        return DeviceProfile(
            name=_description(device),
            source=source,
            peak_flops={dtype: peak * share for dtype, share in peaks.items()},
            bandwidth_bytes_per_s=bandwidth,
            launch_s=launch_s,
            overlap=float(logs[4]),
            tile=bench.tile,
            units=units,
            fill=fill,
        )

    def residuals(logs: np.ndarray) -> np.ndarray:
        made = profile(logs)
        return np.log([case.predicted(made, bench.dtype) for case in cases]) - np.log(times)

    fastest = max(
        2 * c.tokens * c.in_features * c.out_features / t for c, t in zip(cases, times, strict=True) if not c.shape
    )
    start = [np.log(fastest), np.log(fastest / 10), np.log(times.min() / 2), np.log(10.0), 0.5]
    lower = [-np.inf, -np.inf, -np.inf, np.log(0.01), 0.0]
    upper = [np.inf, np.inf, np.inf, np.log(1000.0), 1.0]
    # soft_l1: a few products that a library runs unusually badly don't bend the rest
    fitted = scipy.optimize.least_squares(residuals, start, bounds=(lower, upper), loss="soft_l1", f_scale=0.1)
    error = float(np.median(np.abs(np.expm1(residuals(fitted.x)))))
    if not np.isfinite(error):
        raise DeviceProfileError(f"The times measured on {_description(device)} can't be fitted: {times.tolist()}.")
    source = f"measured: {len(cases)} products in {bench.dtype}, PyTorch {torch.__version__}, median error {error:.0%}"
    return profile(fitted.x, source)


def _cpu_seconds(runs: Sequence[Callable[[], object]]) -> float:
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


def _cuda_seconds(runs: Sequence[Callable[[], object]]) -> float:
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
