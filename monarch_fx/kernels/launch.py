"""How the Triton kernels are launched: which tile, tensor descriptors where they can be had, early launches."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from monarch_fx.kernels import fused, persistent, tiles
from monarch_fx.kernels.choice import FEW_TOKENS, Tile, first_tile, second_tile

INTERPRETED = triton.knobs.runtime.interpret
FUSED_M, FUSED_N, FUSED_K, FUSED_STAGES = 64, 64, 64, 4
ALIGNED = 16  # bytes, of whatever a tensor descriptor describes


@functools.cache
def has_hopper_features(device: torch.device) -> bool:
    """Tensor descriptors that the copy engine reads, and launches before the kernel before has ended."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return INTERPRETED or (is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0))


@functools.cache
def _units(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def described(*tensors: Tensor) -> bool:
    """Whether descriptors of all these tensors can be had."""

    def aligned(tensor: Tensor) -> bool:
        size = tensor.element_size()
        outer = all(stride > 0 and stride * size % ALIGNED == 0 for stride in tensor.stride()[:-1])
        return tensor.stride(-1) == 1 and tensor.data_ptr() % ALIGNED == 0 and outer

    return has_hopper_features(tensors[0].device) and all(map(aligned, tensors))


def first_half(x: Tensor, R: Tensor, t: Tensor) -> None:
    """x (tokens, n_in * p) with R (n_in, n_out, rank, p) into t (n_out, tokens, n_in * rank)."""
    n_in, n_out, rank, p = R.shape
    tokens, width = len(x), n_out * rank
    can_describe = tokens > FEW_TOKENS and p % 64 == 0 and described(x, R)
    tile = first_tile(tokens, width, n_in, _units(x.device), described=can_describe)
    sizes = tokens, p, width, rank
    strides = t.stride(1), t.stride(0)
    options = _options(tile, x.device)
    if tile.per_unit:
        operands = _describe(x, tile.M, tile.K), _describe(R.flatten(1, 2), 1, tile.N, tile.K), t
        most = tile.per_unit * _units(x.device)  # a constant: one that went with the tokens would compile anew for each
        grid = (min(tile.count(tokens, width, n_in), most),)
        persistent.first[grid](*operands, *sizes, *strides, N_IN=n_in, UNITS=most, **options)
        return
    cut = (triton.cdiv(width, tile.N), n_in, triton.cdiv(tokens, tile.M))
    even = p % tile.K == 0 and width % tile.N == 0
    tiles.first[cut](x, R, t, *sizes, x.stride(0), *strides, EVEN=even, **options)


def second_half(t: Tensor, L: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str) -> None:
    """t (n_out, tokens, n_in * rank) with L (n_out, n_in, rank, s) into y (tokens, n_out * s)."""
    n_out, n_in, rank, s = L.shape
    tokens, depth = t.shape[1], n_in * rank
    extra, kinds = _epilogue(y, bias, gate, activation)
    tile = second_tile(
        tokens,
        s,
        depth,
        n_out,
        _units(t.device),
        described=tokens > FEW_TOKENS and described(t, L, y),
        activated=activation != "none",
        gated=gate is not None,
    )
    options = {**_options(tile, t.device), **kinds}
    if tile.per_unit:
        most = tile.per_unit * _units(t.device)
        grid = (min(tile.count(tokens, s, n_out), most),)
        factor = L.flatten(1, 2)
        operands = _describe(t, 1, tile.M, tile.K), _describe(factor, 1, tile.K, tile.N), _describe(y, tile.M, tile.N)
        sizes = tokens, depth, s, extra[1].stride(0)
        persistent.second[grid](*operands, *extra, *sizes, N_OUT=n_out, UNITS=most, **options)
        return
    cut = (triton.cdiv(s, tile.N), n_out, triton.cdiv(tokens, tile.M))
    even = depth % tile.K == 0 and s % tile.N == 0
    strides = t.stride(1), t.stride(0), y.stride(0), extra[1].stride(0)
    tiles.second[cut](t, L, y, *extra, tokens, depth, s, *strides, EVEN=even, **options)


def whole(
    x: Tensor, R: Tensor, L: Tensor, y: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str
) -> None:
    """x (tokens, n_in * p) with both factors into y (tokens, n_out * s), by one kernel."""
    n_in, n_out, rank, p = R.shape
    s, tokens = L.shape[3], len(x)
    extra, kinds = _epilogue(y, bias, gate, activation)
    held = max(16, triton.next_power_of_2(rank))
    operands = (
        _describe(x, FUSED_M, FUSED_K),
        _describe(R, 1, 1, held, FUSED_K),
        _describe(L, 1, 1, held, FUSED_N),
        _describe(y, FUSED_M, FUSED_N),
    )
    shape: dict[str, Any] = {"N_IN": n_in, "N_OUT": n_out, "RANK": held}
    tile = {"M": FUSED_M, "N": FUSED_N, "K": FUSED_K, "STAGES": FUSED_STAGES, "num_warps": 4}
    fused.product[(n_out, triton.cdiv(tokens, FUSED_M))](
        *operands, *extra, tokens, p, s, extra[1].stride(0), **shape, **tile, **_early(x.device), **kinds
    )


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
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """The operands of ``epilogue.finished`` (anything where there is none), and its constants."""
    kinds = {"BIAS": bias is not None, "ACT": activation, "GATED": gate is not None, "FAST": not INTERPRETED}
    return (y if bias is None else bias, y if gate is None else gate), kinds


def _describe(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block))
