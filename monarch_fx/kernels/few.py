"""How the kernels for few tokens are launched, up to ``FEW_TOKENS``: of one product, or of several of the same rows.

Half by half: of one token with factors held in registers (``held``), of up to 16 loaded at once (``ahead``), else tile
by tile (``tiles``).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from monarch_fx.kernels import ahead, held, launch, together
from monarch_fx.kernels.choice import (
    AHEAD_TOKENS,
    TOGETHER,
    Held,
    Tile,
    ahead_tiles,
    first_tile,
    held_tiles,
    second_tile,
)
from monarch_fx.kernels.launch import (
    ALIGNED,
    INTERPRETED,
    REMEMBERED,
    Launch,
    SplitLaunch,
    Strides,
    constants,
    early,
    epilogue,
    in_parts,
    tile_options,
)


def product(
    x: Tensor, R: Tensor, L: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str
) -> bool:
    """x (tokens, n_in * p) with both factors into y (tokens, n_out * s), half by half; up to ``FEW_TOKENS`` tokens."""
    extra, kinds = epilogue(y, bias, gate, activation)
    R_at, L_at, x_at, y_at = R.data_ptr(), L.data_ptr(), x.data_ptr(), y.data_ptr()
    extra_at = extra[0].data_ptr(), extra[1].data_ptr()
    aligned = (R_at | L_at | x_at | y_at | extra_at[0] | extra_at[1]) % ALIGNED == 0
    strides = x.stride(0), y.stride(0), extra[1].stride(0)
    launches = launches_alone(x.shape[0], strides, R.shape, L.shape, kinds, x.dtype, x.device, aligned)
    if launches is None:
        return False
    size, first, second = launches
    t = x.new_empty(size)
    t_at = t.data_ptr()
    first((x, R, t), (x_at, R_at, t_at))
    second((t, L, y, *extra), (t_at, L_at, y_at, *extra_at))
    return True


def products(
    x: Tensor,
    R: Sequence[Tensor],
    L: Sequence[Tensor],
    y: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gated: str | None,
) -> bool:
    """x (tokens, in_features) with up to ``TOGETHER`` matrices into their ``y``: a launch for each half of all.

    With ``gated``, an activation, the one result is ``gated(first product) * second product``; False where no kernel
    does that.
    """
    extra = [y[-1] if bias is None else bias for bias in biases]
    read, written = [x, *filled(R)], [*L, *y, *extra] if gated else [*filled(L), *filled(y), *filled(extra)]
    read_at, written_at = [tensor.data_ptr() for tensor in read], [tensor.data_ptr() for tensor in written]
    launches = launches_together(
        x.shape[0],
        x.stride(0),
        tuple([factor.shape for factor in R]),
        tuple([factor.shape[3] for factor in L]),
        tuple([bias is not None for bias in biases]),
        gated,
        x.dtype,
        x.device,
        functools.reduce(operator.or_, written_at, functools.reduce(operator.or_, read_at)) % ALIGNED == 0,
    )
    if launches is None:
        return False
    sizes, offsets, first, second = launches
    memory = x.new_empty(sum(sizes))  # one allocation, since they take the host time
    at, is_new = memory.data_ptr(), first.run is None or second.run is None
    t = memory.split_with_sizes(sizes) if is_new else [memory] * len(sizes)  # addresses do afterwards
    t_at = [at + offset for offset in offsets]
    first([*read, *filled(t)], [*read_at, *filled(t_at)])
    second([*(t if gated else filled(t)), *written], [*(t_at if gated else filled(t_at)), *written_at])
    return True


@functools.lru_cache(REMEMBERED)
def launches_alone(
    tokens: int,
    strides: tuple[int, int, int],
    R: Sequence[int],
    L: Sequence[int],
    kinds: tuple[bool, str, bool],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> tuple[int, Launch | SplitLaunch, Launch] | None:
    """The size of the intermediate, and the halves; ``strides`` between rows of x, of the results and of the gate."""
    (n_in, n_out, rank, _), (stride_x, *others) = R, strides
    strides_t = (tokens * n_in * rank, n_in * rank, 1) if n_in > 1 else (rank, n_out * rank, 1)
    match tiles_at_once(tokens, [R], L[3:], False, dtype, device):
        case Held() as rows, Held() as columns:
            launches = held_launches(R, L, rows, columns, kinds, dtype, device, aligned)
            return n_in * n_out * rank, *launches
        case Tile() as rows, Tile() as columns:
            launches = ahead_launches(tokens, strides, R, L, strides_t, rows, columns, kinds, dtype, device, aligned)
            return tokens * n_in * n_out * rank, *launches
    first = launch.first_launch(tokens, stride_x, R, strides_t, dtype, device, aligned)
    second = launch.second_launch(tokens, L, (strides_t, *others), kinds, dtype, device, aligned)
    if first is None or second is None:
        return None
    return tokens * n_in * n_out * rank, first, second


@functools.lru_cache(REMEMBERED)
def launches_together(
    tokens: int,
    stride_x: int,
    R: Sequence[Sequence[int]],
    s: Sequence[int],
    biases: Sequence[bool],
    gated: str | None,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> tuple[list[int], list[int], Launch, Launch] | None:
    """Numbers of each intermediate, bytes before it, and the halves; every intermediate is ``ALIGNED``."""
    L = [(n_out, n_in, rank, rows) for (n_in, n_out, rank, _), rows in zip(R, s, strict=True)]
    rows, columns = tiles_at_once(tokens, R, s, gated is not None, dtype, device) or (None, None)
    second: Launch | None = (
        second_launch_together(tokens, L, columns, biases, dtype, device, aligned)
        if gated is None
        else gated_launch(tokens, L, columns, biases, gated, dtype, device, aligned)
    )
    if second is None:
        return None
    sizes = [-(-tokens * n_in * n_out * rank // ALIGNED) * ALIGNED for n_in, n_out, rank, _ in R]
    offsets = [sum(sizes[:i]) * dtype.itemsize for i in range(len(sizes))]
    return sizes, offsets, first_launch_together(tokens, stride_x, R, rows, dtype, device, aligned), second


def held_launches(
    R: Sequence[int],
    L: Sequence[int],
    rows: Held,
    columns: Held,
    kinds: tuple[bool, str, bool],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> tuple[Launch, Launch]:
    """Halves of one token whose programs hold their factors."""
    (n_in, n_out, rank, p), s = R, L[3]
    (row, read), (t_row, written) = in_parts(dtype, p), in_parts(dtype, n_out * rank, rank, n_in * rank)
    options = {**_held_options(rows, device), "ROW": row, "T_ROW": t_row}
    grid = triton.cdiv(n_out * rank, rows.N), n_in
    first = Launch(held.first, grid, {}, (*read, *written), options, aligned)
    row, parts = in_parts(dtype, n_in * rank, s)
    options = {**_held_options(columns, device), **constants(kinds), "ROW": row}
    grid = triton.cdiv(s, columns.N), n_out
    return first, Launch(held.second, grid, {}, parts, options, aligned)


def ahead_launches(
    tokens: int,
    strides: tuple[int, int, int],
    R: Sequence[int],
    L: Sequence[int],
    strides_t: Strides,
    rows: Tile,
    columns: Tile,
    kinds: tuple[bool, str, bool],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> tuple[Launch, Launch]:
    """Halves of up to ``AHEAD_TOKENS`` tokens whose programs load their factors at once."""
    (n_in, n_out, rank, p), s = R, L[3]
    stride_x, stride_y, stride_gate = strides
    width, between = n_out * rank, (strides_t[1], strides_t[0])
    (row, read), (t_row, written) = in_parts(dtype, p, stride_x), in_parts(dtype, width, rank, *between)
    options = {**tile_options(rows, device), "C": rows.chunks, "ROW": row, "T_ROW": t_row}
    grid = triton.cdiv(width, rows.N), n_in
    first = Launch(ahead.first, grid, {}, (tokens, *read, *written), options, aligned)
    row, parts = in_parts(dtype, n_in * rank, s, *between, stride_y, stride_gate)
    options = {**tile_options(columns, device), **constants(kinds), "C": columns.chunks, "ROW": row}
    grid = triton.cdiv(s, columns.N), n_out
    return first, Launch(ahead.second, grid, {}, (tokens, *parts), options, aligned)


def tiles_at_once(
    tokens: int,
    R: Sequence[Sequence[int]],
    s: Sequence[int],
    is_gated: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Held, Held] | tuple[Tile, Tile] | None:
    """Of both halves of products together, where programs get all they need of a factor at once; None: where not."""
    n_in, n_out, rank, p = zip(*R, strict=True)
    depth = max(a * b for a, b in zip(n_in, rank, strict=True))
    if tokens == 1:
        depth, last = (2 * depth, 1) if is_gated else (depth, 0)  # a program of a gated pair holds both
        return held_tiles(max(p), depth, s[last:], n_out[last:], launch.units(device), dtype.itemsize)
    are_wide = all(row * dtype.itemsize % ALIGNED == 0 for row in (*p, *s))
    if is_gated or not are_wide or tokens > AHEAD_TOKENS or dtype.itemsize != 2:
        return None
    width = [a * b for a, b in zip(n_out, rank, strict=True)]
    return ahead_tiles(max(p), width, n_in, depth, s, n_out, launch.units(device))


def first_launch_together(
    tokens: int,
    stride_x: int,
    factors: Sequence[Sequence[int]],
    at_once: Held | Tile | None,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> Launch:
    n_in, n_out, rank, p = zip(*factors, strict=True)
    width = [a * b for a, b in zip(n_out, rank, strict=True)]
    columns = sum(a * b for a, b in zip(width, n_in, strict=True))
    tile = at_once or first_tile(tokens, columns, 1, max(p), launch.units(device), described=False)
    even = [a % tile.K == 0 and b % tile.N == 0 for a, b in zip(p, width, strict=True)]
    programs = sum(triton.cdiv(a, tile.N) * b for a, b in zip(width, n_in, strict=True))
    row, parts = in_parts(dtype, stride_x, *filled(p), *filled(width), *filled(rank))
    options = {**_options_together(tile, device), "COUNT": len(factors), "EVEN": _bits(even), "ROW": row}
    return Launch(together.first, (programs,), {}, (tokens, *parts, *filled(n_in)), options, aligned)


def second_launch_together(
    tokens: int,
    factors: Sequence[Sequence[int]],
    at_once: Held | Tile | None,
    biases: Sequence[bool],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> Launch:
    n_out, n_in, rank, s = zip(*factors, strict=True)
    depth = [a * b for a, b in zip(n_in, rank, strict=True)]
    columns = sum(a * b for a, b in zip(s, n_out, strict=True))
    tile = at_once or second_tile(
        tokens, columns, max(depth), 1, launch.units(device), described=False, activated=False, gated=False
    )
    even = [a % tile.K == 0 and b % tile.N == 0 for a, b in zip(depth, s, strict=True)]
    programs = sum(triton.cdiv(a, tile.N) * b for a, b in zip(s, n_out, strict=True))
    row, parts = in_parts(dtype, *filled(depth), *filled(s))
    options = {**_options_together(tile, device), "COUNT": len(factors), "EVEN": _bits(even), "ROW": row}
    options |= {"BIAS": _bits(biases), "FAST": not INTERPRETED}
    return Launch(together.second, (programs,), {}, (tokens, *parts, *filled(n_out)), options, aligned)


def gated_launch(
    tokens: int,
    factors: Sequence[Sequence[int]],
    at_once: Held | Tile | None,
    biases: Sequence[bool],
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> Launch | None:
    """None where a tile of results would lie in several blocks of a factor."""
    n_out, n_in, rank, s = zip(*factors, strict=True)
    depth = [a * b for a, b in zip(n_in, rank, strict=True)]
    tile = at_once or second_tile(
        tokens, s[1], sum(depth), n_out[1], launch.units(device), described=False, activated=True, gated=True
    )
    if s[0] != s[1] and (s[0] % tile.N or s[1] % tile.N):
        return None
    even = [a % tile.K == 0 and b % tile.N == 0 for a, b in zip(depth, s, strict=True)]
    row, parts = in_parts(dtype, *depth, *s)
    options = {**_options_together(tile, device), "EVEN": _bits(even), "ROW": row, "BIAS": _bits(biases)}
    options |= {"ACT": activation, "FAST": not INTERPRETED}
    grid = triton.cdiv(s[1], tile.N), n_out[1]
    return Launch(together.gated, grid, {}, (tokens, *parts, n_out[1]), options, aligned)


def filled(values: Sequence[Any]) -> Sequence[Any]:
    """One for each place of a kernel that runs products together; what fills up is not looked at."""
    return values if len(values) == TOGETHER else [*values, *[values[-1]] * (TOGETHER - len(values))]


def _bits(flags: Sequence[bool]) -> int:
    return sum(flag << i for i, flag in enumerate(flags))


def _held_options(tile: Held, device: torch.device) -> dict[str, Any]:
    warps = {} if INTERPRETED else {"num_warps": tile.warps}
    return {"N": tile.N, "K": tile.K, "C": tile.chunks, **warps, **early(device)}


def _options_together(tile: Tile | Held, device: torch.device) -> dict[str, Any]:
    if isinstance(tile, Held):
        return {"M": 1, **_held_options(tile, device)}
    return {"C": tile.chunks, **tile_options(tile, device)}
