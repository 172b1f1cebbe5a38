"""How long planning takes, and how much memory: each model in a fresh process."""

from __future__ import annotations

import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.registry import Table, benchmark

SECONDS, GIBIBYTES = 60, 4


@benchmark("planning")
def planning() -> Table:
    """Planning at budget 0.5: BERT-base with weights, GPT-2-XL and a Llama-8B shape on the meta device."""
    table = Table(("model", "products", "seconds", "peak memory, GiB"))
    for name in MODELS:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            products, seconds, memory = fresh.submit(_measure, name).result()
        table.rows.append((name, str(products), f"{seconds:.1f}", f"{memory:.2f}"))
        table.raw[name] = {"products": products, "seconds": seconds, "peak_gib": memory}
        if "meta" in name:
            table.target(f"{name}, {SECONDS} s over its time", SECONDS / seconds, 1)
            table.target(f"{name}, {GIBIBYTES} GiB over its memory", GIBIBYTES / memory, 1)
    return table


def _measure(name: str) -> tuple[int, float, float]:
    import monarch_fx as mfx

    with torch.device("meta" if "meta" in name else "cpu"):
        model = MODELS[name]()
    start = time.perf_counter()
    plan = mfx.plan(model, budget=0.5)
    seconds = time.perf_counter() - start
    return len(plan.decisions), seconds, _peak_memory()


def _peak_memory() -> float:
    """Peak resident memory of this process in GiB, the libraries' own included (Linux)."""
    status = Path("/proc/self/status").read_text()
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kib) / 2**20


def _bert_base() -> torch.nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


def _gpt2_xl() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25))


def _llama_8b() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8
        )
    )


MODELS = {"BERT-base": _bert_base, "GPT-2-XL (meta)": _gpt2_xl, "Llama-8B shape (meta)": _llama_8b}
