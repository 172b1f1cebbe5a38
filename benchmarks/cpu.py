"""Rewritten layers and whole models against compiled dense ones on the CPU, float32, budget 0.5."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import monarch_fx as mfx
from benchmarks.gate import check_compiled, check_rewritten
from benchmarks.registry import Table, benchmark
from benchmarks.timing import ratios, time_alternating

BUDGET = 0.5
LINEAR_TARGET, BERT_TARGET, MINILM_TARGET = 1.85, 1.7, 1.6
OF_LOW_RANK = 0.95

# ranks in steps of 8, so that all of them come close to the budget
VARIANTS: dict[str, dict[str, Any]] = {
    "low rank": {"config": mfx.MonarchConfig(nblocks=1, rank_multiple=8)},
    "2x2": {"config": mfx.MonarchConfig(nblocks=2, rank_multiple=8)},
    "4x4": {"config": mfx.MonarchConfig(nblocks=4, rank_multiple=8)},
    "mixed plan": {},
}


@benchmark("linear-cpu")
def linear_layers() -> Table:
    """The linear layers of one block of BERT-base, one at a time, 8 x 128 tokens."""
    table = Table(("layer", *_columns()))
    layers = {(768, 768): 4, (768, 3072): 1, (3072, 768): 1}  # how often each stands in a block
    seconds = dict.fromkeys(("dense", *VARIANTS), 0.0)
    for (in_features, out_features), count in layers.items():
        layer = nn.Linear(in_features, out_features)
        inputs = {"input": torch.randn(8, 128, in_features)}
        name = f"{in_features} -> {out_features}"
        _race(table, name, layer, inputs, rounds=200)
        for variant, samples in table.raw[name]["seconds"].items():
            seconds[variant] += count * statistics.median(samples)
    gain = {variant: seconds["dense"] / time for variant, time in seconds.items()}
    block = f"a block: {', '.join(f'{n} of {i} -> {o}' for (i, o), n in layers.items())}"
    table.rows.append((block, f"{seconds['dense'] * 1e3:.2f}", *(f"{gain[v]:.2f}x" for v in VARIANTS)))
    table.target("a block, mixed plan", gain["mixed plan"], LINEAR_TARGET)
    for grid in ("2x2", "4x4"):
        table.target(f"a block, {grid} over low rank", gain[grid] / gain["low rank"], OF_LOW_RANK)
    return table


@benchmark("bert-base-cpu")
def bert_base() -> Table:
    """The whole BERT-base shape with random weights, 8 x 128 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig()
    return _whole_model("BERT-base shape", BertModel(config), config.vocab_size, (8, 128), BERT_TARGET)


@benchmark("gpt2-cpu")
def gpt2_small() -> Table:
    """GPT-2 small's shape without its head, random weights, 1 x 512 tokens."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(use_cache=False)
    return _whole_model("GPT-2 small shape", GPT2Model(config), config.vocab_size, (1, 512), None)


@benchmark("minilm-cpu")
def minilm() -> Table:
    """MiniLM-L6's shape with random weights, 32 x 64 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    return _whole_model("MiniLM-L6 shape", BertModel(config), config.vocab_size, (32, 64), MINILM_TARGET)


def _whole_model(name: str, model: nn.Module, vocabulary: int, size: tuple[int, int], target: float | None) -> Table:
    table = Table(("model", *_columns()))
    inputs = {"input_ids": torch.randint(vocabulary, size)}
    gain = _race(table, name, model.eval(), inputs, rounds=20)
    if target is not None:
        table.target(f"{name}, mixed plan", gain["mixed plan"], target)
    for grid in ("2x2", "4x4"):
        table.target(f"{name}, {grid} over low rank", gain[grid] / gain["low rank"], OF_LOW_RANK)
    return table


def _columns() -> tuple[str, ...]:
    return ("dense ms", *(f"{name}: x, kept" for name in VARIANTS))


def _race(table: Table, name: str, model: nn.Module, inputs: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """Rewrites, passes the gate, compiles and times every variant of ``model``; adds a row."""
    torch._dynamo.reset()
    kept = {}
    racers: dict[str, Callable[..., Any]] = {"dense": torch.compile(model)}
    for variant, options in VARIANTS.items():
        rewritten = mfx.monarchify(model, budget=BUDGET, example_inputs=inputs, **options)
        check_rewritten(rewritten, inputs)
        kept[variant] = mfx.report(rewritten).plan.reached
        racers[variant] = torch.compile(rewritten)
        check_compiled(racers[variant], rewritten, inputs)
    samples = time_alternating(racers, inputs, rounds)
    gain = ratios(samples)
    dense = statistics.median(samples["dense"])
    table.rows.append((name, f"{dense * 1e3:.2f}", *(f"{gain[v]:.2f}x, {kept[v]:.3f}" for v in VARIANTS)))
    table.raw[name] = {"seconds": samples, "kept": kept}
    return gain
