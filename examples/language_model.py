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

import monarch_fx as mfx
from examples.corpus import Size, load_corpus
from examples.training import Curve, Figures, Settings, arguments, print_table, save_curves, train, write_json

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
    settings = Settings(options.out, steps, size.lr, seed=options.seed, full=options.full)

    def batch(step: int) -> Tensor:
        return corpus.batch(step, size.batch, size.length, options.seed).to(settings.device)

    def evaluate(model: nn.Module) -> Figures:
        return {"test loss": statistics.mean(loss(model, ids.to(settings.device)).item() for ids in test)}

    curves: dict[str, Curve] = {}
    params: dict[str, str] = {}
    for name, densify_at in (
        ("dense", None),
        ("monarch", None),
        ("sparse to dense", round((1 - DENSE_SHARE) * steps)),
    ):
        torch.manual_seed(options.seed)
        model = gpt2(size, corpus.vocabulary)
        if name != "dense":
            model = mfx.monarchify(
                model, config=mfx.MonarchConfig(nblocks=4), init="random", tokens=size.batch * size.length
            )
            if name == "monarch":
                print(mfx.training_summary(model), flush=True)
        before = count(model)
        curves[name] = train(name, model, loss, batch, settings.until(densify_at), evaluate)
        params[name] = before if count(model) == before else f"{before} -> {count(model)}"
    save_curves(options.out, curves, "test loss", vars(options))
    report(curves, params, options.out)
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


def report(curves: dict[str, Curve], params: dict[str, str], out: Path) -> None:
    """One row a run: at equal tokens, and at the time that the fastest took for them."""
    fastest = min(curve.seconds(curve.evaluated[-1]) for curve in curves.values())
    header = ("run", "parameters", "loss", "perplexity", f"loss at {fastest:.0f} s", "ms a step", "in the paper")
    rows, figures = [], {}
    for name, curve in curves.items():
        final, at_time, step_s = curve.last("test loss"), curve.at_time("test loss", fastest), curve.step_seconds()
        figures[name] = {"parameters": params[name], "loss": final, "loss at equal time": at_time, "step_s": step_s}
        row = (params[name], f"{final:.3f}", f"{math.exp(final):.1f}", f"{at_time:.3f}", f"{step_s * 1e3:.1f}")
        rows.append((name, *row, dict(PAPER)[name]))
    print_table(header, rows)
    write_json(out / "figures.json", figures)


if __name__ == "__main__":
    sys.exit(main())
