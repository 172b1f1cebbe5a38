"""Attention of sequences without padding, which needs no mask."""

from __future__ import annotations

from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def unmasked() -> str:
    """What ``attn_implementation`` has to be.

    Compiled, encoders of some versions of transformers (5.17, not 5.23) make a mask that hides nothing; PyTorch has no
    fused kernel for it, and computes attention as products in float32.
    """
    AttentionInterface.register("unmasked", sdpa_attention_forward)
    return "unmasked"
