"""The ops' schemas, the checks of their arguments, and the tag that keeps compile caches honest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor, fx

from monarch_fx.errors import ConfigError, StructureError
from monarch_fx.kernels import autocast, eager, gpu, grouped, reference


def _product(
    x: Tensor,
    R: Tensor,
    L: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    recompute = recompute and gpu.recomputes(x, R, L, bias)
    if not (recompute or gpu.serves(x, R)):
        y = reference.monarch_bmm(x, R, L, bias, out_features=out_features)
        return reference.activated(y, gate, activation)
    rows = L.shape[0] * L.shape[3] if out_features is None else out_features
    if gpu.takes_epilogue(x) and (bias is None or bias.dim() == 1):
        bias = None if bias is None else bias.expand(rows)
        return gpu.products(x, R, L, bias, gate, activation, recompute, rows)
    y = reference.finished(gpu.products(x, R, L, None, None, "none", recompute, rows), bias, None)
    return reference.activated(y, gate, activation)


def _together(
    x: Tensor, R: list[Tensor], L: list[Tensor], bias: list[Tensor | None], *, gated: str | None = None
) -> list[Tensor]:
    """Products that read the same x, as ``gathering`` finds them; with ``gated`` one: ``gated(first) * second``."""
    if gpu.serves_together(x, R, L, bias):
        return gpu.products_together(x, R, L, bias, gated)
    if gated is None:
        return [_product(x, *operands) for operands in zip(R, L, bias, strict=True)]
    gate = _product(x, R[0], L[0], bias[0])
    return [_product(x, R[1], L[1], bias[1], activation=gated, gate=gate)]


# Composite: one node in traces and exports, while autograd, functorch, autocast and Inductor see the ATen ops inside.
_LIBRARY = torch.library.Library("monarch_fx", "FRAGMENT")
_LIBRARY.define(
    "monarch_bmm(Tensor x, Tensor R, Tensor L, Tensor? bias=None, *, SymInt? out_features=None, "
    'str activation="none", Tensor? gate=None, bool recompute=False) -> Tensor'
)
_LIBRARY.define("monarch_together(Tensor x, Tensor[] R, Tensor[] L, Tensor?[] bias, *, str? gated=None) -> Tensor[]")
_LIBRARY.define("monarch_grouped_mm(Tensor x, Tensor R, Tensor L, Tensor offs, *, SymInt? out_features=None) -> Tensor")
_LIBRARY.impl("monarch_bmm", _product, "CompositeImplicitAutograd")
_LIBRARY.impl("monarch_together", _together, "CompositeImplicitAutograd")
_LIBRARY.impl("monarch_grouped_mm", grouped.monarch_grouped_mm, "CompositeImplicitAutograd")
# vmap takes composites apart only where it is told to, and else runs them in a loop
_LIBRARY.impl("monarch_bmm", _product, "FuncTorchBatchedDecomposition")
_LIBRARY.impl("monarch_grouped_mm", grouped.monarch_grouped_mm, "FuncTorchBatchedDecomposition")


def _tag_compile_caches() -> None:
    """On-disk compile caches know an op by its name alone: tell them which body this is. The user's own tag is kept."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    tag = f"monarch_fx={digest[:16]}"
    if tag not in torch.compiler.config.cache_key_tag:
        torch.compiler.config.cache_key_tag = ";".join(filter(None, [torch.compiler.config.cache_key_tag, tag]))


_tag_compile_caches()


def monarch_bmm(
    x: Tensor,
    R: Tensor,
    L: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Multiplies rows with a Monarch matrix: ``y_j = sum_k L[j, k]^T R[j, k] x_k + bias_j``.

    The matrix is that of Dao et al. 2022, section 3.1, with free grid and rank; whole blocks are transposed between
    the products, where the paper interleaves single elements.

    Args:
        x: (*, in_features); with batched factors (B, tokens, in_features).
        R: (nblocks_in, nblocks_out, rank, p), or (B, nblocks_in, nblocks_out, rank, p).
        L: (nblocks_out, nblocks_in, rank, s), or with the same B in front.
        bias: (out_features,), or anything that broadcasts to the result.
        out_features: Rows of the matrix where the grid pads it; default ``nblocks_out * s``.
        activation: ``"none"``, ``"relu"``, ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``, applied to the result, or to
            ``gate`` where there is one. On a GPU in half precision it costs no pass of its own, and GELU is within 3e-6
            of the exact one before rounding. ``torch.compile`` finds activations behind a product by itself.
        gate: Like the result, which becomes ``activation(gate) * result``: the middle of a gated MLP.
        recompute: Whether the backward pass computes the intermediate anew, instead of keeping its ``tokens *
            nblocks_out * nblocks_in * rank`` numbers for the gradient of L. Batched or complex factors, and products
            under function transforms, keep theirs.

    Returns:
        (*, out_features).

    Raises:
        StructureError: The shapes or devices of the arguments disagree, or the dtypes that autocast leaves them with.
        ConfigError: There is no such activation.
    """
    if activation not in reference.ACTIVATIONS:
        raise ConfigError(
            f"activation must be one of {', '.join(map(repr, reference.ACTIVATIONS))}, got {activation!r}."
        )
    if activation == "none" and gate is None and not torch.compiler.is_compiling():
        y = eager.product(x, R, L, bias, out_features)
        if y is not None:
            return y
    if not _symbolic(x, R):
        _check(x, R, L, bias, out_features)
        if R.dim() == 5 and (x.dim() != 3 or x.shape[0] != R.shape[0]):
            raise StructureError(
                f"A batch of {R.shape[0]} matrices multiplies x of shape ({R.shape[0]}, tokens, in_features), "
                f"got {tuple(x.shape)}."
            )
        rows = L.shape[-4] * L.shape[-1] if out_features is None else out_features
        mixed = gate is not None and gate.dtype != x.dtype and not autocast.is_on(x.device)
        if gate is not None and (mixed or gate.device != x.device or gate.shape != (*x.shape[:-1], rows)):
            raise StructureError(
                f"The gate must be like the result, {(*x.shape[:-1], rows)} in {x.dtype} on {x.device}, got "
                f"{tuple(gate.shape)} in {gate.dtype} on {gate.device}."
            )
    options: dict[str, Any] = {} if activation == "none" and gate is None else {"activation": activation, "gate": gate}
    if recompute:
        options["recompute"] = True
    return torch.ops.monarch_fx.monarch_bmm(x, R, L, bias, out_features=out_features, **options)


def monarch_grouped_mm(x: Tensor, R: Tensor, L: Tensor, offs: Tensor, *, out_features: int | None = None) -> Tensor:
    """Rows sorted by expert times one Monarch matrix per expert.

    Args:
        x: (rows, in_features), sorted by expert.
        R: (E, nblocks_in, nblocks_out, rank, p).
        L: (E, nblocks_out, nblocks_in, rank, s).
        offs: (E,) int32, where each expert's rows end, as in ``torch.nn.functional.grouped_mm``. Rows past the last end
            give zeros.
        out_features: As for ``monarch_bmm``.

    Returns:
        (rows, out_features) in the factors' dtype.

    Raises:
        StructureError: As ``monarch_bmm``.
    """
    if not _symbolic(x, R):
        _check(x, R, L, None, out_features)
        if x.dim() != 2 or R.dim() != 5 or tuple(offs.shape) != (R.shape[0],):
            raise StructureError(
                f"Grouped products take x (rows, in_features), factors (E, ...) and offs (E,), got {tuple(x.shape)}, "
                f"{tuple(R.shape)} and {tuple(offs.shape)}."
            )
    return torch.ops.monarch_fx.monarch_grouped_mm(x, R, L, offs, out_features=out_features)


def _symbolic(*values: object) -> bool:
    """A symbolic trace has proxies where tensors will be: nothing to check yet."""
    return any(isinstance(value, fx.Proxy) for value in values)


def _check(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None, out_features: int | None) -> None:
    if R.dim() not in (4, 5) or L.dim() != R.dim() or L.shape[:-4] != R.shape[:-4]:
        raise StructureError(
            "R must be (nblocks_in, nblocks_out, rank, p) and L (nblocks_out, nblocks_in, rank, s), both or neither "
            f"with a batch dimension in front; got {tuple(R.shape)} and {tuple(L.shape)}."
        )
    n_in, n_out, rank, p = R.shape[-4:]
    if tuple(L.shape[-4:-1]) != (n_out, n_in, rank):
        raise StructureError(
            f"R {tuple(R.shape)} has a grid of {n_out}x{n_in} blocks of rank {rank}: "
            f"L must be ({n_out}, {n_in}, {rank}, s), got {tuple(L.shape)}."
        )
    if x.dim() == 0 or not n_in * (p - 1) < x.shape[-1] <= n_in * p:
        raise StructureError(
            f"R {tuple(R.shape)} takes {n_in * (p - 1) + 1} to {n_in * p} input features, "
            f"got x of shape {tuple(x.shape)}."
        )
    s = L.shape[-1]
    if out_features is not None and not n_out * (s - 1) < out_features <= n_out * s:
        raise StructureError(
            f"L {tuple(L.shape)} gives {n_out * (s - 1) + 1} to {n_out * s} output features, "
            f"got out_features={out_features}."
        )
    rows = n_out * s if out_features is None else out_features
    if bias is not None and bias.dim() > 0 and bias.shape[-1] not in (1, rows):
        raise StructureError(f"The bias must end in {rows} output features, got shape {tuple(bias.shape)}.")
    devices = {t.device for t in (x, R, L, bias) if t is not None and t.dim() > 0}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise StructureError(f"x, R, L and bias must be on one device, got {names}: move x or the model.")
    dtypes = {autocast.dtype(t) for t in (x, R, L, bias) if t is not None}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        where = "that autocast leaves alone" if autocast.is_on(x.device) else "outside autocast"
        raise StructureError(f"x, R, L and bias must have one dtype {where}, got {names}: cast x or the factors.")
