"""A GPT-2 language model from scratch: dense, with Monarch weights, and with Monarch weights that become dense.

The structure is the authors' (4 blocks, rank min(in, out) / 16, all products of attention and MLP), and so is the
switch after 90 % of the steps (Dao et al. 2022, sections 5.1 and 5.2). All three see the same tokens.

    python -m examples.language_model --out results/language_model
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from examples.corpus import Size, load_corpus
from examples.curves import Curve, milliseconds, print_table, save_curves, spread, write_json
from examples.training import Figures, Settings, arguments, seeds, train, with_factors

PAPER = (  # Dao et al. 2022, tables 2 and 6: perplexity, time of training
    ("dense", "GPT-2 small, WikiText-103: 20.6, 1x"),
    ("monarch", "GPT-2 small, WikiText-103: 20.7, 1.8x faster"),
    ("sparse to dense", "GPT-2 medium, OpenWebText: 18.0 and dense 18.0, 2x faster"),
)
DENSE_SHARE = 0.1  # of the steps, at the end


SMALL = Size(1024, 64, 256, 3, 4, 8, 200, 1e-3, 20)
FULL = Size(8192, 1024, 768, 12, 12, 16, 1200, 6e-4, 10)  # GPT-2 small


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="a text file; by default articles of the package gensim")
    options = parser.parse_args()
    size = FULL if options.full else SMALL
    steps = options.steps or size.steps
    corpus = load_corpus(options.data, size.vocabulary)
    test = corpus.test_batches(size.batch, size.length, size.test_batches)

    def build() -> nn.Module:
        return gpt2(size, corpus.vocabulary)

    def evaluate(model: nn.Module) -> Figures:
        return {"test loss": statistics.mean(loss(model, ids).item() for ids in test)}

    runs: dict[str, list[Curve]] = {name: [] for name, _ in PAPER}
    params: dict[str, str] = {}
    saved_s = 0.0
    for seed in seeds(options):
        settings = Settings(options.out, steps, size.lr, seed=seed, full=options.full)

        def batch(step: int, seed: int = seed) -> Tensor:
            return corpus.batch(step, size.batch, size.length, seed)

        for name, densify_at in (
            ("dense", None),
            ("monarch", None),
            ("sparse to dense", round((1 - DENSE_SHARE) * steps)),
        ):
            torch.manual_seed(seed)
            if name == "dense":
                model = build()
            else:
                model, saved_s = with_factors(build, full=options.full, tokens=size.batch * size.length)
            before = count(model)
            curve = train(f"{name}, seed {seed}", model, loss, batch, settings.until(densify_at), evaluate)
            runs[name].append(curve)
            params[name] = before if count(model) == before else f"{before} -> {count(model)}"
            save_curves(options.out, runs, "test loss", vars(options))
        report(runs, params, saved_s, options.out)
    return 0


def gpt2(size: Size, vocabulary: int) -> nn.Module:
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=size.length,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log likelihood of the next token, in nats."""
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def count(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()):,}"


def report(runs: dict[str, list[Curve]], params: dict[str, str], saved_s: float, out: Path) -> None:
    """One row a run: at equal tokens, and at the time that the fastest took for them, both without compilation."""
    fastest = min(curve.seconds(curve.evaluated[-1]) for curves in runs.values() for curve in curves)
    header = ("run", "parameters", "loss", "perplexity", f"loss at {fastest:.0f} s", "ms a step", "predicted")
    rows, figures = [], {}
    dense_s = statistics.fmean(curve.step_seconds() for curve in runs["dense"])
    for name, curves in runs.items():
        final = [curve.last("test loss") for curve in curves]
        at_time = [curve.at_time("test loss", fastest) for curve in curves]
        steps = [statistics.fmean(times) for times in zip(*(curve.phases() for curve in curves), strict=True)]
        predicted = dense_s if name == "dense" else dense_s - saved_s
        figures[name] = {"parameters": params[name], "loss": final, "loss at equal time": at_time, "step_s": steps}
        figures[name] |= {"predicted_step_s": predicted, "left_out_s": [curve.left_out_s for curve in curves]}
        perplexity = math.exp(statistics.fmean(final))
        row = (params[name], spread(final, ".3f"), f"{perplexity:.1f}", spread(at_time, ".3f"), milliseconds(steps))
        rows.append((name, *row, f"{predicted * 1e3:.1f}", dict(PAPER)[name]))
    print_table((*header, "in the paper"), rows)
    write_json(out / "figures.json", figures)


if __name__ == "__main__":
    sys.exit(main())
