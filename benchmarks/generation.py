"""Text by transformers' own ``generate``, as anyone calls it: with a static cache it compiles itself on a GPU."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import monarch_fx as mfx
from benchmarks.gate import check_bfloat16
from benchmarks.gpu_models import DEVICE, LLAMA_8B, llama
from benchmarks.registry import Table, benchmark
from benchmarks.timing import ratios, time_alternating

SIZES = {**LLAMA_8B, "num_hidden_layers": 8, "vocab_size": 32064}  # a quarter of the layers, and of the head
PROMPT, NEW, ROUNDS = 128, 128, 5
WAYS = {"compiled": {"cache_implementation": "static"}, "eager": {}}


@benchmark("generate-gpu")
def generate() -> Iterator[Table]:
    """Text of one sequence by transformers' generate, compiled and eager, a quarter of Llama-8B's shape, budget 0.5."""
    table = Table(("generate", "dense, tokens/s", "mixed plan, tokens/s", "against dense", "kept"))
    models = {"dense": _model(DEVICE)}
    plan = mfx.plan(_model("meta"), budget=0.5, tokens=1)
    models["mixed plan"] = rewritten = mfx.monarchify(models["dense"], plan=plan, init="random")
    prompt = torch.randint(SIZES["vocab_size"], (1, PROMPT), device=DEVICE)
    with torch.no_grad():
        leaves = sum(not any(module.children()) for module in rewritten.modules())
        expected = mfx.to_dense(rewritten)(prompt).logits
        check_bfloat16("eager", rewritten(prompt).logits, expected, leaves + 2 * len(plan.rewritten))
    for way, options in WAYS.items():
        racers = {name: functools.partial(_text, model, prompt, options) for name, model in models.items()}
        samples = time_alternating(racers, {}, ROUNDS)
        speeds = (f"{NEW / statistics.median(seconds):.0f}" for seconds in samples.values())
        table.rows.append((way, *speeds, f"{ratios(samples)['mixed plan']:.2f}x", f"{plan.reached:.3f}"))
        table.raw[way] = {"seconds": samples}
        yield table


def _model(device: str) -> Any:
    with torch.device(device):
        return llama(max_position_embeddings=PROMPT + NEW, **SIZES).bfloat16().eval()


def _text(model: Any, prompt: Tensor, options: dict[str, Any]) -> Tensor:
    text: Tensor = model.generate(
        prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True, pad_token_id=0, **options
    )
    return text
