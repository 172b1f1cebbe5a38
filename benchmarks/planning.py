"""How long planning and projecting take, and how much memory."""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

import monarch_fx as mfx
from benchmarks.gpu_models import DEVICE, build_llama
from benchmarks.registry import Table, benchmark

SECONDS, GIBIBYTES = 60, 4
PROJECTION_SECONDS, PROJECTION_MEMORY = 600, 1.25  # of a Llama-8B shape; the memory in sizes of the model


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


@benchmark("projection-gpu")
def projection() -> Iterator[Table]:
    """A Llama-8B shape with random bfloat16 weights, planned and projected in place at budget 0.5, on a GPU."""
    table = Table(("step", "seconds", "memory before, GiB", "at most", "after"))
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)  # a float32 model would leave its memory behind
        model = build_llama()
        torch.set_default_dtype(torch.float32)
    size = _allocated()
    plan, took = yield from _step(table, "plan", lambda: mfx.plan(model, budget=0.5, tokens=4096))
    table.raw["plan"] = str(plan)
    _, took_projecting = yield from _step(table, "project", lambda: mfx.monarchify(model, plan=plan, inplace=True))
    most = max(step["memory"][1] for step in table.raw["steps"].values())
    table.target(f"{PROJECTION_SECONDS} s over its time", PROJECTION_SECONDS / (took + took_projecting), 1)
    table.target(f"{PROJECTION_MEMORY} models over its memory", PROJECTION_MEMORY * size / most, 1)


def _step(table: Table, name: str, run: Callable[[], Any]) -> Generator[Table, None, tuple[Any, float]]:
    before = _allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    memory = [before, torch.cuda.max_memory_allocated() / 2**30, _allocated()]
    table.raw.setdefault("steps", {})[name] = {"seconds": seconds, "memory": memory}
    table.rows.append((name, f"{seconds:.1f}", *(f"{gib:.2f}" for gib in memory)))
    yield table
    return result, seconds


def _allocated() -> float:
    """Of the GPU's memory, GiB."""
    return torch.cuda.memory_allocated() / 2**30


def _measure(name: str) -> tuple[int, float, float]:
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


MODELS = {"BERT-base": _bert_base, "GPT-2-XL (meta)": _gpt2_xl, "Llama-8B shape (meta)": build_llama}
