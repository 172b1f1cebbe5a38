"""How the Triton kernels are launched: which tile, tensor descriptors where they can be had, early launches.

What a launch needs besides addresses follows from sizes, and is worked out once for each.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from monarch_fx.kernels import fused, persistent, split, tiles
from monarch_fx.kernels.choice import (
    FEW_TOKENS,
    FUSED_TOKENS,
    STRIDED_FLOPS,
    TF32,
    Tile,
    first_tile,
    fused_large_tokens,
    fused_ranks,
    fused_stages,
    second_tile,
    splits,
    tf32_tokens,
)

INTERPRETED = triton.knobs.runtime.interpret
FUSED_N, FUSED_K = 64, 64
TOTAL_M, TOTAL_N = 16, 64  # of a program that adds up parts of sums; twice the columns
TOTAL_LARGE = 2**18  # from so many sums on
ALIGNED = 16  # bytes, of whatever a tensor descriptor describes, and of what Triton compiles wide loads for
REMEMBERED = 4096  # launches, of all layers' sizes and numbers of tokens
MOST_PROGRAMS = 65535  # of a grid's second and third axis

Strides = Sequence[int]
Layout = tuple[list[int], list[int], list[int]]  # shape, strides and block of a tensor descriptor


class Memory(NamedTuple):
    """What a tensor descriptor needs to know of a tensor; holds none alive."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class Launch:
    """A kernel with all that it is called with but the tensors.

    Triton looks at every argument of every call again, which takes longer than many of these kernels run. Here the
    compiled kernel is kept, and its launcher called by itself, with addresses: about a tensor Triton asks the driver
    each time.

    Args:
        kernel: Whose first parameters are tensors, then numbers, then constants.
        grid: Programs, up to three axes.
        layouts: How descriptors see tensors, by their place; of the others the kernel takes the address.
        numbers: What follows the tensors.
        options: The kernel's constants, and Triton's own options.
        aligned: Whether all tensors of all calls start at multiples of ``ALIGNED``; else Triton looks at each call.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        layouts: dict[int, Layout],
        numbers: Sequence[int],
        options: dict[str, Any],
        aligned: bool,
    ) -> None:
        self.kernel = kernel
        self.grid = (*grid, 1, 1)[:3]
        self.layouts = layouts
        self.numbers = numbers
        self.options = options
        self.aligned = aligned
        self.run: Any = None
        self.handles: tuple[Any, ...] = ()  # what stands before the tensors in its calls
        self.rest: tuple[Any, ...] = ()  # and behind them
        self.descriptors: dict[tuple[int, int], TensorDescriptor] = {}  # by place and address

    def __call__(self, tensors: Sequence[Tensor], addresses: Sequence[int]) -> None:
        """``addresses`` are those of the tensors, which are on the current device."""
        if self.run is None:
            self._first_call(tensors)
            return
        operands: list[Any] = [*addresses]
        for place in self.layouts:
            operands[place] = self._descriptor(place, addresses[place], tensors[0].dtype)
        stream = driver.active.get_current_stream(tensors[0].get_device())
        self.run(*self.grid, stream, *self.handles, *operands, *self.rest)

    def _first_call(self, tensors: Sequence[Tensor]) -> None:
        """Compiles the kernel, unless it is known, and runs it."""
        operands: list[Any] = [*tensors]
        for place, layout in self.layouts.items():
            operands[place] = TensorDescriptor(tensors[place], *layout)
        compiled = self.kernel[self.grid](*operands, *self.numbers, **self.options)
        if self.aligned and compiled is not None:  # the interpreter compiles nothing
            constants = [self.options[name] for name in self.kernel.arg_names if name in self.options]
            self.rest = (*self.numbers, *constants)
            self.handles = compiled.function, compiled.packed_metadata, None, None, None  # without a profiler's hooks
            self.run = compiled.run

    def _descriptor(self, place: int, address: int, dtype: torch.dtype) -> TensorDescriptor:
        """Kept, since Triton checks a new one for longer than its kernel takes; memory comes back to its addresses."""
        found = self.descriptors.get((place, address))
        if found is None:
            if len(self.descriptors) >= REMEMBERED:
                self.descriptors.clear()
            found = TensorDescriptor(Memory(address, dtype), *self.layouts[place])
            self.descriptors[place, address] = found
        return found


class SplitLaunch(NamedTuple):
    """A first half in two launches: parts of sums, and their total; called as a ``Launch`` is.

    Attributes:
        some: x and R into ``numbers`` of float32.
        total: These into the intermediate.
    """

    some: Launch
    total: Launch
    numbers: int

    @property
    def run(self) -> Any:
        """None before both kernels are compiled."""
        return self.some.run and self.total.run

    def __call__(self, tensors: Sequence[Tensor], addresses: Sequence[int]) -> None:
        """x, R and the intermediate."""
        x, R, t = tensors[:3]
        x_at, R_at, t_at = addresses
        sums = x.new_empty(self.numbers, dtype=torch.float32)
        at = sums.data_ptr()
        self.some((x, R, sums), (x_at, R_at, at))
        self.total((sums, t), (at, t_at))


def first_half(x: Tensor, R: Tensor, t: Tensor) -> bool:
    """x (tokens, n_in * p) with R (n_in, n_out, rank, p) into t (n_out, tokens, n_in * rank).

    Returns:
        Whether there is a kernel that does so well; so do the others.
    """
    return _launched(first_launch, (x, R, t), x.shape[0], x.stride(0), R.shape, t.stride())


def second_half(t: Tensor, L: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str) -> bool:
    """t (n_out, tokens, n_in * rank) with L (n_out, n_in, rank, s) into y (tokens, n_out * s)."""
    extra, kinds = epilogue(y, bias, gate, activation)
    strides = t.stride(), y.stride(0), extra[1].stride(0)
    return _launched(second_launch, (t, L, y, *extra), t.shape[1], L.shape, strides, kinds)


def whole(
    x: Tensor, R: Tensor, L: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str
) -> bool:
    """x (tokens, n_in * p) with both factors into y (tokens, n_out * s), by one kernel."""
    extra, kinds = epilogue(y, bias, gate, activation)
    strides = x.stride(0), y.stride(0), extra[1].stride(0)
    return _launched(whole_launch, (x, R, R, L, L, y, *extra), x.shape[0], R.shape, L.shape[3], strides, kinds)


@functools.lru_cache(REMEMBERED)
def first_launch(
    tokens: int,
    stride_x: int,
    factor: Sequence[int],
    strides_t: Strides,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> Launch | SplitLaunch | None:
    n_in, n_out, rank, p = factor
    width = n_out * rank
    described = aligned and _describable(dtype, device, stride_x, p)
    if 2 * tokens * n_in * width * p >= STRIDED_FLOPS and not described:  # cuBLAS is faster than plain tiles
        return None
    are_many, count = tokens > FEW_TOKENS, 1
    if are_many and dtype == torch.float32:
        if not described or tokens < tf32_tokens(width, n_in, units(device)):
            return None
        tile = TF32
    else:
        tile = first_tile(tokens, width, n_in, p, units(device), described=described and are_many)
        count = splits(tile, tokens, width, n_in, p, units(device))
        tile = tile.holding(dtype.itemsize)
    strides = strides_t[1], strides_t[0]
    t_row, written = in_parts(dtype, width, rank, *strides)
    options = tile_options(tile, device)
    if tile.per_unit:
        most = tile.per_unit * units(device)  # a constant: one that went with the tokens would compile anew for each
        layouts = {
            0: ([tokens, n_in * p], [stride_x, 1], [tile.M, tile.K]),
            1: ([n_in, width, p], [width * p, p, 1], [1, tile.N, tile.K]),
        }
        options |= {"N_IN": n_in, "UNITS": most, "ROW": t_row}
        walkers = (min(tile.count(tokens, width, n_in * count), most),)
        if count == 1:
            return Launch(persistent.first, walkers, layouts, (tokens, p, *written), options, aligned)
        options["SPLITS"] = count
        some = Launch(split.described, walkers, layouts, (tokens, p, written[0]), options, aligned)
    else:
        grid = triton.cdiv(width, tile.N), n_in * count, triton.cdiv(tokens, tile.M)
        row, read = in_parts(dtype, p, stride_x)
        options |= {"EVEN": p % tile.K == 0 and width % tile.N == 0, "ROW": row, "T_ROW": t_row}
        if not _is_launchable(grid):
            return None
        if count == 1:
            return Launch(tiles.first, grid, {}, (tokens, *read, *written), options, aligned)
        options["SPLITS"] = count
        some = Launch(split.first, grid, {}, (tokens, *read, written[0]), options, aligned)
    N = TOTAL_N if tokens * width * n_in < TOTAL_LARGE else 2 * TOTAL_N
    options = {"M": TOTAL_M, "N": N, "SPLITS": count, "ROW": t_row, **early(device)}
    grid = triton.cdiv(width, N), n_in, triton.cdiv(tokens, TOTAL_M)
    total = Launch(split.total, grid, {}, (tokens, *written), options, aligned)
    return SplitLaunch(some, total, n_in * count * tokens * width)


@functools.lru_cache(REMEMBERED)
def second_launch(
    tokens: int,
    factor: Sequence[int],
    strides: tuple[Strides, int, int],
    kinds: tuple[bool, str, bool],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> Launch | None:
    n_out, n_in, rank, s = factor
    strides_t, stride_y, stride_gate = strides
    _, activation, gated = kinds
    depth = n_in * rank
    described = tokens > FEW_TOKENS and aligned and _describable(dtype, device, *strides_t[:2], s, stride_y)
    activated = activation != "none"
    tile = second_tile(tokens, s, depth, n_out, units(device), described=described, activated=activated, gated=gated)
    tile = tile.holding(dtype.itemsize)
    options = {**tile_options(tile, device), **constants(kinds)}
    if tile.per_unit:
        most = tile.per_unit * units(device)
        layouts = {
            0: ([n_out, tokens, depth], list(strides_t), [1, tile.M, tile.K]),
            1: ([n_out, depth, s], [depth * s, s, 1], [1, tile.K, tile.N]),
            2: ([tokens, n_out * s], [stride_y, 1], [tile.M, tile.N]),
        }
        options |= {"N_OUT": n_out, "UNITS": most}
        walkers = min(tile.count(tokens, s, n_out), most)
        return Launch(persistent.second, (walkers,), layouts, (tokens, depth, s, stride_gate), options, aligned)
    grid = triton.cdiv(s, tile.N), n_out, triton.cdiv(tokens, tile.M)
    if not _is_launchable(grid):
        return None
    options["EVEN"] = depth % tile.K == 0 and s % tile.N == 0
    row, parts = in_parts(dtype, depth, s, strides_t[1], strides_t[0], stride_y, stride_gate)
    return Launch(tiles.second, grid, {}, (tokens, *parts), {**options, "ROW": row}, aligned)


@functools.lru_cache(REMEMBERED)
def whole_launch(
    tokens: int,
    factor: Sequence[int],
    s: int,
    strides: tuple[int, int, int],
    kinds: tuple[bool, str, bool],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> Launch | None:
    n_in, n_out, rank, p = factor
    stride_x, stride_y, stride_gate = strides
    if s < FUSED_N or not (aligned and _describable(dtype, device, stride_x, p, s, stride_y)):
        return None
    held = fused_ranks(rank)
    is_large = tokens >= fused_large_tokens(n_in, n_out, sum(held), units(device))
    rows = 2 * FUSED_TOKENS if is_large else FUSED_TOKENS
    grid = n_out, triton.cdiv(tokens, rows)
    if not _is_launchable(grid):
        return None
    R = [n_in, n_out, rank, p], [n_out * rank * p, rank * p, p, 1]
    L = [n_out, n_in, rank, s], [n_in * rank * s, rank * s, s, 1]
    layouts = {
        0: ([tokens, n_in * p], [stride_x, 1], [rows, FUSED_K]),
        **{1 + i: (*R, [1, 1, part or held[0], FUSED_K]) for i, part in enumerate(held)},
        **{3 + i: (*L, [1, 1, part or held[0], FUSED_N]) for i, part in enumerate(held)},
        5: ([tokens, n_out * s], [stride_y, 1], [rows, FUSED_N]),
    }
    options = {"N_IN": n_in, "N_OUT": n_out, "RANK": held[0], "REST": held[1], **early(device), **constants(kinds)}
    options |= {"M": rows, "N": FUSED_N, "K": FUSED_K, "STAGES": fused_stages(sum(held), rows), "num_warps": 4}
    return Launch(fused.product, grid, layouts, (tokens, p, s, stride_gate), options, aligned)


def _launched(find: Callable[..., Launch | SplitLaunch | None], operands: Sequence[Tensor], *sizes: Any) -> bool:
    """Launches what ``find`` has for such sizes; False where it has nothing."""
    x, addresses = operands[0], [operand.data_ptr() for operand in operands]
    launch = find(*sizes, x.dtype, x.device, functools.reduce(operator.or_, addresses) % ALIGNED == 0)
    if launch is None:
        return False
    launch(operands, addresses)
    return True


@functools.cache
def has_hopper_features(device: torch.device) -> bool:
    """Tensor descriptors that the copy engine reads, and launches before the kernel before has ended."""
    is_nvidia = _is_there(device) and torch.version.hip is None
    return INTERPRETED or (is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0))


@functools.cache
def units(device: torch.device) -> int:
    """Multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if _is_there(device) else 4


def _is_there(device: torch.device) -> bool:
    """Not where fake tensors are on a GPU that this machine doesn't have."""
    return device.type == "cuda" and torch.cuda.is_available()


def _describable(dtype: torch.dtype, device: torch.device, *strides: int) -> bool:
    """Whether tensors with these strides, the last ones aside, can have descriptors."""
    steps = all(stride > 0 and stride * dtype.itemsize % ALIGNED == 0 for stride in strides)
    return steps and has_hopper_features(device)


def _is_launchable(grid: Sequence[int]) -> bool:
    return all(programs <= MOST_PROGRAMS for programs in grid[1:])


def in_parts(dtype: torch.dtype, *sizes: int) -> tuple[int, list[int]]:
    """A kernel's ``ROW``, and the sizes in parts of it: as many numbers as divide them all, up to ``ALIGNED`` bytes."""
    row = math.gcd(ALIGNED // dtype.itemsize, *sizes)
    return row, [size // row for size in sizes]


def tile_options(tile: Tile, device: torch.device) -> dict[str, Any]:
    launch = {} if INTERPRETED else {"num_warps": tile.warps, "num_stages": tile.stages}
    return {"M": tile.M, "N": tile.N, "K": tile.K, **launch, **early(device)}


def early(device: torch.device) -> dict[str, Any]:
    """Programmatic dependent launch: a kernel starts while the one before it ends, and waits for its results."""
    if INTERPRETED or not has_hopper_features(device):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def epilogue(
    y: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str
) -> tuple[tuple[Tensor, Tensor], tuple[bool, str, bool]]:
    """The operands of ``epilogue.finished`` (anything where there is none), and its kinds."""
    extra = y if bias is None else bias, y if gate is None else gate
    return extra, (bias is not None, activation, gate is not None)


def constants(kinds: tuple[bool, str, bool]) -> dict[str, Any]:
    has_bias, activation, gated = kinds
    return {"BIAS": has_bias, "ACT": activation, "GATED": gated, "FAST": not INTERPRETED}
