"""What monarch_bmm means, as two batched products with a block transpose between; Inductor lowers it from here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None = None, *, out_features: int | None = None) -> Tensor:
    """See ``monarch_fx.kernels.op.monarch_bmm``."""
    if R.dim() == 5:
        return _batched(x, R, L, bias, out_features)
    n_in, n_out, rank, p = R.shape
    s = L.shape[-1]
    lead = x.shape[:-1]
    x = _padded(x, n_in * p).reshape(-1, n_in, p)
    t = torch.bmm(x.transpose(0, 1), R.flatten(1, 2).mT)  # (n_in, tokens, n_out * rank)
    t = t.unflatten(2, (n_out, rank)).permute(2, 1, 0, 3).flatten(2)  # (n_out, tokens, n_in * rank)
    y = torch.bmm(t, L.flatten(1, 2))  # (n_out, tokens, s)
    y = y.transpose(0, 1).reshape(*lead, n_out * s)
    return _finished(y, bias, out_features)


def _batched(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None, out_features: int | None) -> Tensor:
    batch, n_in, n_out, rank, p = R.shape
    s = L.shape[-1]
    tokens = x.shape[1]
    x = _padded(x, n_in * p).unflatten(2, (n_in, p)).transpose(1, 2).reshape(batch * n_in, tokens, p)
    t = torch.bmm(x, R.reshape(batch * n_in, n_out * rank, p).mT)
    t = t.reshape(batch, n_in, tokens, n_out, rank).permute(0, 3, 2, 1, 4).reshape(batch * n_out, tokens, n_in * rank)
    y = torch.bmm(t, L.reshape(batch * n_out, n_in * rank, s))
    y = y.reshape(batch, n_out, tokens, s).transpose(1, 2).reshape(batch, tokens, n_out * s)
    return _finished(y, bias, out_features)


def grouped_reference(x: Tensor, R: Tensor, L: Tensor, offs: Tensor, *, out_features: int | None = None) -> Tensor:
    """See ``monarch_fx.kernels.op.monarch_grouped_mm``."""
    rows = torch.arange(x.shape[0], device=x.device, dtype=offs.dtype)
    expert = torch.searchsorted(offs, rows, right=True).clamp_max(R.shape[0] - 1)
    return _batched(x.unsqueeze(1), R[expert], L[expert], None, out_features).squeeze(1)


def _padded(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _finished(y: Tensor, bias: Tensor | None, out_features: int | None) -> Tensor:
    y = y if out_features is None else y[..., :out_features]
    return y if bias is None else y + bias
