"""How the Triton kernels are launched: which tile, tensor descriptors where they can be had, early launches.

What a launch needs besides addresses follows from sizes, and is worked out once for each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from monarch_fx.kernels import fused, persistent, tiles, together
from monarch_fx.kernels.choice import FEW_TOKENS, STRIDED_FLOPS, TOGETHER, Tile, first_tile, second_tile

INTERPRETED = triton.knobs.runtime.interpret
FUSED_M, FUSED_N, FUSED_K, FUSED_STAGES = 64, 64, 64, 4
ALIGNED = 16  # bytes, of whatever a tensor descriptor describes, and of what Triton compiles wide loads for
REMEMBERED = 4096  # launches, of all layers' sizes and numbers of tokens

Strides = Sequence[int]
Layout = tuple[list[int], list[int], list[int]]  # shape, strides and block of a tensor descriptor


class Launch:
    """A kernel with all that it is called with but the tensors.

    Triton looks at every argument of every call again, which takes longer than many of these kernels run. Here the
    compiled kernel is kept, and called by itself, with addresses: about a tensor Triton asks the driver each time.

    Args:
        kernel: Whose first parameters are tensors, then numbers, then constants.
        grid: Programs, up to three axes.
        layouts: For each tensor how a descriptor sees it; None: the kernel takes its address.
        numbers: What follows the tensors.
        options: The kernel's constants, and Triton's own options.
        aligned: Whether all tensors of all calls start at multiples of ``ALIGNED``; else Triton looks at each call.
    """

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        layouts: Sequence[Layout | None],
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
        self.compiled: Any = None
        self.rest: tuple[Any, ...] = ()  # what follows the tensors in its calls

    def __call__(self, *tensors: Tensor) -> None:
        if self.compiled is not None:
            self.compiled(*map(_address, tensors, self.layouts), *self.rest)
            return
        operands = [
            tensor if layout is None else TensorDescriptor(tensor, *layout)
            for tensor, layout in zip(tensors, self.layouts, strict=True)
        ]
        compiled = self.kernel[self.grid](*operands, *self.numbers, **self.options)
        if self.aligned and compiled is not None:  # the interpreter compiles nothing
            constants = [self.options[name] for name in self.kernel.arg_names if name in self.options]
            self.rest = (*self.numbers, *constants)
            self.compiled = compiled[self.grid]


def _address(tensor: Tensor, layout: Layout | None) -> Any:
    return tensor.data_ptr() if layout is None else TensorDescriptor(tensor, *layout)


def first_half(x: Tensor, R: Tensor, t: Tensor) -> bool:
    """x (tokens, n_in * p) with R (n_in, n_out, rank, p) into t (n_out, tokens, n_in * rank).

    Returns:
        Whether there is a kernel that does so well; so do the others.
    """
    launch = first_launch(len(x), x.stride(0), R.shape, t.stride(), x.dtype, x.device, _aligned(x, R, t))
    return launch is not None and _on_its_device(launch, x, R, t)


def second_half(t: Tensor, L: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str) -> bool:
    """t (n_out, tokens, n_in * rank) with L (n_out, n_in, rank, s) into y (tokens, n_out * s)."""
    extra, kinds, aligned = _epilogue(y, bias, gate, activation)
    aligned = aligned and _aligned(t, L, y)
    strides = t.stride(), y.stride(0), extra[1].stride(0)
    launch = second_launch(t.shape[1], L.shape, strides, kinds, t.dtype, t.device, aligned)
    return _on_its_device(launch, t, L, y, *extra)


def whole(
    x: Tensor, R: Tensor, L: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str
) -> bool:
    """x (tokens, n_in * p) with both factors into y (tokens, n_out * s), by one kernel."""
    extra, kinds, aligned = _epilogue(y, bias, gate, activation)
    aligned = aligned and _aligned(x, R, L, y)
    strides = x.stride(0), y.stride(0), extra[1].stride(0)
    launch = whole_launch(len(x), R.shape, L.shape[3], strides, kinds, x.dtype, x.device, aligned)
    return launch is not None and _on_its_device(launch, x, R, L, y, *extra)


def halves(
    x: Tensor,
    R: Sequence[Tensor],
    L: Sequence[Tensor],
    y: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gated: str | None,
) -> bool:
    """x (tokens, in_features) with up to ``TOGETHER`` matrices into their ``y``: a launch for each half of all.

    With ``gated``, an activation, the one result is ``gated(first product) * second product``.
    """
    tokens, dtype, device = len(x), x.dtype, x.device
    t = [x.new_empty(factor.shape[1], tokens, factor.shape[0] * factor.shape[2]) for factor in R]
    shapes = tuple(factor.shape for factor in R)
    launch = first_launch_together(tokens, x.stride(0), shapes, dtype, device, _aligned(x, *R, *t))
    _on_its_device(launch, x, *_filled(R), *_filled(t))
    extra = [y[-1] if bias is None else bias for bias in biases]
    kinds = tuple(bias is not None for bias in biases)
    shapes, aligned = tuple(factor.shape for factor in L), _aligned(*t, *L, *y, *extra)
    if gated is None:
        launch = second_launch_together(tokens, shapes, kinds, dtype, device, aligned)
        return _on_its_device(launch, *_filled(t), *_filled(L), *_filled(y), *_filled(extra))
    last = gated_launch(tokens, shapes, kinds, gated, dtype, device, aligned)
    if last is not None:
        return _on_its_device(last, *t, *L, *y, *extra)
    gate = torch.empty_like(y[0])
    second_half(t[0], L[0], gate, biases[0], None, "none")
    return second_half(t[1], L[1], y[0], biases[1], gate, gated)


@functools.lru_cache(REMEMBERED)
def first_launch(
    tokens: int,
    stride_x: int,
    factor: Sequence[int],
    strides_t: Strides,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> Launch | None:
    n_in, n_out, rank, p = factor
    width = n_out * rank
    described = p % 64 == 0 and aligned and _describable(dtype, device, stride_x, p)
    if 2 * tokens * n_in * width * p >= STRIDED_FLOPS and not described:  # cuBLAS is faster than plain tiles
        return None
    tile = first_tile(tokens, width, n_in, _units(device), described=described and tokens > FEW_TOKENS)
    numbers = tokens, p, width, rank
    strides = strides_t[1], strides_t[0]
    options = _options(tile, device)
    if tile.per_unit:
        most = tile.per_unit * _units(device)  # a constant: one that went with the tokens would compile anew for each
        layouts = (
            ([tokens, n_in * p], [stride_x, 1], [tile.M, tile.K]),
            ([n_in, width, p], [width * p, p, 1], [1, tile.N, tile.K]),
            None,
        )
        options |= {"N_IN": n_in, "UNITS": most}
        walkers = min(tile.count(tokens, width, n_in), most)
        return Launch(persistent.first, (walkers,), layouts, (*numbers, *strides), options, aligned)
    grid = triton.cdiv(width, tile.N), n_in, triton.cdiv(tokens, tile.M)
    options["EVEN"] = p % tile.K == 0 and width % tile.N == 0
    return Launch(tiles.first, grid, [None] * 3, (*numbers, stride_x, *strides), options, aligned)


@functools.lru_cache(REMEMBERED)
def second_launch(
    tokens: int,
    factor: Sequence[int],
    strides: tuple[Strides, int, int],
    kinds: tuple[bool, str, bool],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> Launch:
    n_out, n_in, rank, s = factor
    strides_t, stride_y, stride_gate = strides
    _, activation, gated = kinds
    depth = n_in * rank
    described = tokens > FEW_TOKENS and aligned and _describable(dtype, device, *strides_t[:2], s, stride_y)
    activated = activation != "none"
    tile = second_tile(tokens, s, depth, n_out, _units(device), described=described, activated=activated, gated=gated)
    options = {**_options(tile, device), **_constants(kinds)}
    if tile.per_unit:
        most = tile.per_unit * _units(device)
        layouts = (
            ([n_out, tokens, depth], list(strides_t), [1, tile.M, tile.K]),
            ([n_out, depth, s], [depth * s, s, 1], [1, tile.K, tile.N]),
            ([tokens, n_out * s], [stride_y, 1], [tile.M, tile.N]),
            None,
            None,
        )
        options |= {"N_OUT": n_out, "UNITS": most}
        walkers = min(tile.count(tokens, s, n_out), most)
        return Launch(persistent.second, (walkers,), layouts, (tokens, depth, s, stride_gate), options, aligned)
    grid = triton.cdiv(s, tile.N), n_out, triton.cdiv(tokens, tile.M)
    options["EVEN"] = depth % tile.K == 0 and s % tile.N == 0
    numbers = tokens, depth, s, strides_t[1], strides_t[0], stride_y, stride_gate
    return Launch(tiles.second, grid, [None] * 5, numbers, options, aligned)


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
    described = aligned and _describable(dtype, device, stride_x, p, s, stride_y)
    if not described or p % FUSED_K or s % FUSED_N:
        return None
    held = max(16, triton.next_power_of_2(rank))
    layouts = (
        ([tokens, n_in * p], [stride_x, 1], [FUSED_M, FUSED_K]),
        ([n_in, n_out, rank, p], [n_out * rank * p, rank * p, p, 1], [1, 1, held, FUSED_K]),
        ([n_out, n_in, rank, s], [n_in * rank * s, rank * s, s, 1], [1, 1, held, FUSED_N]),
        ([tokens, n_out * s], [stride_y, 1], [FUSED_M, FUSED_N]),
        None,
        None,
    )
    options = {"N_IN": n_in, "N_OUT": n_out, "RANK": held, **_early(device), **_constants(kinds)}
    options |= {"M": FUSED_M, "N": FUSED_N, "K": FUSED_K, "STAGES": FUSED_STAGES, "num_warps": 4}
    grid = n_out, triton.cdiv(tokens, FUSED_M)
    return Launch(fused.product, grid, layouts, (tokens, p, s, stride_gate), options, aligned)


@functools.lru_cache(REMEMBERED)
def first_launch_together(
    tokens: int,
    stride_x: int,
    factors: Sequence[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> Launch:
    n_in, n_out, rank, p = zip(*factors, strict=True)
    width = [a * b for a, b in zip(n_out, rank, strict=True)]
    columns = sum(a * b for a, b in zip(width, n_in, strict=True))
    tile = first_tile(tokens, columns, 1, _units(device), described=False)
    even = [a % tile.K == 0 and b % tile.N == 0 for a, b in zip(p, width, strict=True)]
    programs = sum(triton.cdiv(a, tile.N) * b for a, b in zip(width, n_in, strict=True))
    options = {**_options(tile, device), "COUNT": len(factors), "EVEN": _bits(even)}
    numbers = tokens, stride_x, *_filled(p), *_filled(width), *_filled(rank), *_filled(n_in)
    return Launch(together.first, (programs,), [None] * 7, numbers, options, aligned)


@functools.lru_cache(REMEMBERED)
def second_launch_together(
    tokens: int,
    factors: Sequence[Sequence[int]],
    biases: Sequence[bool],
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> Launch:
    n_out, n_in, rank, s = zip(*factors, strict=True)
    depth = [a * b for a, b in zip(n_in, rank, strict=True)]
    columns = sum(a * b for a, b in zip(s, n_out, strict=True))
    tile = second_tile(tokens, columns, max(depth), 1, _units(device), described=False, activated=False, gated=False)
    even = [a % tile.K == 0 and b % tile.N == 0 for a, b in zip(depth, s, strict=True)]
    programs = sum(triton.cdiv(a, tile.N) * b for a, b in zip(s, n_out, strict=True))
    options = {**_options(tile, device), "COUNT": len(factors), "EVEN": _bits(even)}
    options |= {"BIAS": _bits(biases), "FAST": not INTERPRETED}
    numbers = tokens, *_filled(depth), *_filled(s), *_filled(n_out)
    return Launch(together.second, (programs,), [None] * 12, numbers, options, aligned)


@functools.lru_cache(REMEMBERED)
def gated_launch(
    tokens: int,
    factors: Sequence[Sequence[int]],
    biases: Sequence[bool],
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
) -> Launch | None:
    """None where a tile of results would lie in several blocks of a factor."""
    n_out, n_in, rank, s = zip(*factors, strict=True)
    depth = [a * b for a, b in zip(n_in, rank, strict=True)]
    tile = second_tile(tokens, s[1], sum(depth), n_out[1], _units(device), described=False, activated=True, gated=True)
    if s[0] != s[1] and (s[0] % tile.N or s[1] % tile.N):
        return None
    even = [a % tile.K == 0 and b % tile.N == 0 for a, b in zip(depth, s, strict=True)]
    options = {**_options(tile, device), "EVEN": _bits(even), "BIAS": _bits(biases)}
    options |= {"ACT": activation, "FAST": not INTERPRETED}
    grid = triton.cdiv(s[1], tile.N), n_out[1]
    return Launch(together.gated, grid, [None] * 7, (tokens, *depth, *s, n_out[1]), options, aligned)


def _filled(values: Sequence[Any]) -> Sequence[Any]:
    """One for each place of a kernel that runs products together; what fills up is not looked at."""
    return (*values, *[values[-1]] * TOGETHER)[:TOGETHER]


def _bits(flags: Sequence[bool]) -> int:
    return sum(flag << i for i, flag in enumerate(flags))


def _on_its_device(launch: Launch, *tensors: Tensor) -> bool:
    """Triton launches on the current device, whatever the tensors are on."""
    index = tensors[0].get_device()
    if index < 0 or index == torch.cuda.current_device():
        launch(*tensors)
    else:
        with torch.cuda.device(index):
            launch(*tensors)
    return True


@functools.cache
def has_hopper_features(device: torch.device) -> bool:
    """Tensor descriptors that the copy engine reads, and launches before the kernel before has ended."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return INTERPRETED or (is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0))


@functools.cache
def _units(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _aligned(*tensors: Tensor) -> bool:
    return functools.reduce(int.__or__, [tensor.data_ptr() for tensor in tensors]) % ALIGNED == 0


def _describable(dtype: torch.dtype, device: torch.device, *strides: int) -> bool:
    """Whether tensors with these strides, the last ones aside, can have descriptors."""
    steps = all(stride > 0 and stride * dtype.itemsize % ALIGNED == 0 for stride in strides)
    return steps and has_hopper_features(device)


def _options(tile: Tile, device: torch.device) -> dict[str, Any]:
    launch = {} if INTERPRETED else {"num_warps": tile.warps, "num_stages": tile.stages}
    return {"M": tile.M, "N": tile.N, "K": tile.K, **launch, **_early(device)}


def _early(device: torch.device) -> dict[str, Any]:
    """Programmatic dependent launch: a kernel starts while the one before it ends, and waits for its results."""
    if INTERPRETED or not has_hopper_features(device):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def _epilogue(
    y: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str
) -> tuple[tuple[Tensor, Tensor], tuple[bool, str, bool], bool]:
    """The operands of ``epilogue.finished`` (anything where there is none), its kinds, and whether they are aligned."""
    extra = y if bias is None else bias, y if gate is None else gate
    return extra, (bias is not None, activation, gate is not None), _aligned(*extra)


def _constants(kinds: tuple[bool, str, bool]) -> dict[str, Any]:
    has_bias, activation, gated = kinds
    return {"BIAS": has_bias, "ACT": activation, "GATED": gated, "FAST": not INTERPRETED}
