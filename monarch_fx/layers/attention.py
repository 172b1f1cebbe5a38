"""The core of ``nn.MultiheadAttention`` for weights that are not plain tensors.

``F.multi_head_attention_forward`` hands itself over to ``__torch_function__`` before it multiplies anything, so its
arithmetic is written here once more, with projections that go through ``F.linear``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As ``torch.nn.functional.multi_head_attention_forward``: (tokens, batch, embed_dim) or (tokens, embed_dim)."""
    batched = query.dim() == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if use_separate_proj_weight:
        projections = (q_proj_weight, k_proj_weight, v_proj_weight)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), projections, biases, strict=True))
    else:
        q, k, v = _packed_projection(query, key, value, in_proj_weight, in_proj_bias)

    tokens, batch, embed_dim = q.shape
    head_dim = embed_dim // num_heads
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.repeat(1, batch, 1)])
        v = torch.cat([v, bias_v.repeat(1, batch, 1)])
    q = q.reshape(tokens, batch, num_heads, head_dim).permute(1, 2, 0, 3)  # (batch, heads, tokens, head_dim)
    k = _heads(k, static_k, batch, num_heads, head_dim)
    v = _heads(v, static_v, batch, num_heads, head_dim)
    added = 0 if bias_k is None else 1
    if add_zero_attn:
        zeros = k.new_zeros(batch, num_heads, 1, head_dim)
        k, v, added = torch.cat([k, zeros], 2), torch.cat([v, zeros], 2), added + 1

    causal = is_causal and key_padding_mask is None and not need_weights  # hides added keys, too, as in PyTorch
    mask = None if causal else _mask(attn_mask, key_padding_mask, batch, num_heads, added, q.dtype)
    dropout_p = dropout_p if training else 0.0
    if need_weights:
        scores = (q / math.sqrt(head_dim)) @ k.mT
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights
        attended = weights @ v
    else:
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal)
    y = attended.permute(2, 0, 1, 3).reshape(tokens, batch, embed_dim)
    y = F.linear(y, out_proj_weight, out_proj_bias)
    if not need_weights:
        return (y if batched else y.squeeze(1)), None
    weights = weights.mean(dim=1) if average_attn_weights else weights
    return (y, weights) if batched else (y.squeeze(1), weights.squeeze(0))


def _packed_projection(query: Tensor, key: Tensor, value: Tensor, weight: Any, bias: Tensor | None) -> Any:
    """One product for self-attention, two where only the queries differ, else three: as PyTorch does it."""
    dim = query.size(-1)
    if key is value and query is key:
        return F.linear(query, weight, bias).chunk(3, dim=-1)
    if key is value:
        w_q, w_kv = weight.split([dim, 2 * dim])
        b_q, b_kv = (None, None) if bias is None else bias.split([dim, 2 * dim])
        return (F.linear(query, w_q, b_q), *F.linear(key, w_kv, b_kv).chunk(2, dim=-1))
    biases = (None, None, None) if bias is None else bias.chunk(3)
    inputs = (query, key, value)
    return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weight.chunk(3), biases, strict=True))


def _heads(x: Tensor, given: Tensor | None, batch: int, num_heads: int, head_dim: int) -> Tensor:
    """(tokens, batch, embed_dim), or the caller's (batch * heads, tokens, head_dim), as (batch, heads, tokens, -1)."""
    if given is not None:
        return given.reshape(batch, num_heads, -1, head_dim)
    return x.reshape(-1, batch, num_heads, head_dim).permute(1, 2, 0, 3)


def _mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, heads: int, added: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one float mask (batch or 1, heads or 1, tokens or 1, keys), open for the ``added`` keys."""
    masks = []
    if attn_mask is not None:
        per_head = attn_mask.dim() == 3
        masks.append(attn_mask.unflatten(0, (batch, heads)) if per_head else attn_mask[None, None])
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    total: Tensor | None = None
    for mask in masks:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
        total = mask if total is None else total + mask
    return total if total is None or not added else F.pad(total, (0, added))
