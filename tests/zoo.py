"""Small models with random weights, one per architecture, with inputs for a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import monarch_fx as mfx

Built = tuple[nn.Module, Any]

HALF_GRID = mfx.MonarchConfig(nblocks=2)

_TOKENS = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION = {**_SIZES, "image_size": 32, "patch_size": 8}


def _ids(tokens: int = 7) -> Tensor:
    return torch.randint(2, 99, (2, tokens))


def _images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


def mlp(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.LayerNorm(width))


def gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=4, **_TOKENS)), {"input_ids": _ids()}


def bert() -> Built:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_SIZES, **_TOKENS)), {"input_ids": _ids()}


def vit() -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_VISION)), {"pixel_values": _images()}


def swin() -> Built:
    """Windows: with symbolic height and width its export takes a minute."""
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    return SwinForImageClassification(SwinConfig(image_size=32, patch_size=4, **sizes)), {"pixel_values": _images()}


def llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2, **_TOKENS)), {"input_ids": _ids()}


def qwen3() -> Built:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=16, **_TOKENS)
    return Qwen3ForCausalLM(config), {"input_ids": _ids()}


def t5() -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0, pad_token_id=0
    )
    return T5ForConditionalGeneration(config), {"input_ids": _ids(), "decoder_input_ids": _ids(5)}


def _mixtral(implementation: str) -> Built:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=4, **_TOKENS)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation(implementation)
    return model, {"input_ids": _ids()}


def mixtral_loop() -> Built:
    """Experts one after the other, chosen by the data: export can't follow."""
    return _mixtral("eager")


def mixtral_batched() -> Built:
    """A copy of the expert's weight for every token."""
    return _mixtral("batched_mm")


def clip() -> Built:
    from transformers import CLIPConfig, CLIPModel

    text = {**_SIZES, **_TOKENS, "max_position_embeddings": 32, "projection_dim": 32}
    config = CLIPConfig(text_config=text, vision_config={**_VISION, "projection_dim": 32}, projection_dim=32)
    return CLIPModel(config), {"input_ids": _ids(), "pixel_values": _images()}


def whisper() -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=20,
        decoder_start_token_id=0,
        **_TOKENS,
    )
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": _ids(5)}
    return WhisperForConditionalGeneration(config), inputs


def timm_vit() -> Built:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=7)
    return model, (_images(),)


def timm_mixer() -> Built:
    from timm.models.mlp_mixer import MlpMixer

    model = MlpMixer(num_classes=7, img_size=32, patch_size=8, num_blocks=2, embed_dim=64)
    nn.init.normal_(model.head.weight)  # starts at zero, and would hide every error
    return model, (_images(),)


def timm_convnext() -> Built:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(num_classes=7, depths=(1, 1, 1, 1), dims=(32, 48, 64, 96)), (_images(64),)


def timm_swin() -> Built:
    from timm.models.swin_transformer import SwinTransformer

    settings = {"img_size": 56, "patch_size": 4, "embed_dim": 32, "depths": (1, 1), "num_heads": (2, 2)}
    return SwinTransformer(num_classes=7, window_size=7, **settings), (_images(56),)


def torch_transformer() -> Built:
    model = nn.Transformer(32, 4, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=64, batch_first=True)
    return model, (torch.randn(3, 5, 32), torch.randn(3, 6, 32))


def torch_encoder() -> Built:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (torch.randn(3, 5, 32),)


class Raw(nn.Module):
    """Products in every spelling, none of them a layer's own call, and a mask that is mostly not there."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) / dim**0.5)

        self.W = weight(dim, dim)
        self.qkv = weight(3 * dim, dim)
        self.heads_weight = weight(dim, 4, dim // 4)
        self.stack = weight(3, dim, dim)
        self.V = weight(dim, dim)
        self.U = weight(2 * dim, dim)
        self.left = weight(dim, dim)
        self.shared = nn.Linear(dim, dim)
        self.borrowed = nn.Linear(dim, dim)
        self.pointwise = nn.Conv1d(dim, dim, 1)
        self.bias = weight(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            x = x * mask
        dim = x.shape[-1]
        x = x @ self.W
        q, k, v = (F.linear(x, w) for w in self.qkv.chunk(3))
        x = torch.einsum("bsd,dhe->bshe", q, self.heads_weight).flatten(-2) + torch.tanh(k) * v
        x = torch.bmm(x, self.stack)
        x = torch.addmm(self.bias, x.reshape(-1, dim), self.V.t()).view_as(x)
        x = x + F.linear(x, self.U[:dim]) + torch.matmul(x, self.U[dim:].T)
        x = self.shared(torch.relu(self.shared(x)))
        x = F.linear(x, self.borrowed.weight, self.borrowed.bias)
        x = self.pointwise(x.mT)  # (batch, dim, tokens)
        return (self.left @ x).mT


def raw() -> Built:
    return Raw(), (torch.randn(3, 7, 32),)


TRANSFORMERS: tuple[Callable[[], Built], ...] = (
    gpt2,
    bert,
    vit,
    swin,
    llama,
    qwen3,
    t5,
    mixtral_loop,
    mixtral_batched,
    clip,
    whisper,
)
TIMM: tuple[Callable[[], Built], ...] = (timm_vit, timm_mixer, timm_convnext, timm_swin)
PLAIN: tuple[Callable[[], Built], ...] = (torch_transformer, torch_encoder, raw)


def run(model: nn.Module, inputs: Any) -> Tensor:
    """The main output of one run."""
    result = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        if hasattr(result, key):
            return getattr(result, key)
    assert isinstance(result, Tensor)
    return result


def as_double(inputs: Any) -> Any:
    def cast(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    return {k: cast(v) for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(cast(v) for v in inputs)
