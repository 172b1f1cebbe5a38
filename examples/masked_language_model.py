"""BERT pre-training, dense and sparse to dense: training time to the same loss.

Monarch weights (4 blocks, the authors' rank) for the first 70 % of the steps, dense weights for the rest, as in Dao et
al. 2022, section 5.2. Both runs see the same tokens and the same masks.

    python -m examples.masked_language_model --out results/masked_language_model
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import monarch_fx as mfx
from examples.corpus import Size, load_corpus
from examples.training import (
    Curve,
    Figures,
    Settings,
    arguments,
    print_table,
    save_curves,
    train,
    write_json,
)

PAPER = {  # Dao et al. 2022, table 7: BERT-large, 8 A100
    "dense": "30.2 h (Nvidia, MLPerf 1.1)",
    "sparse to dense": "23.8 h",
}
SPARSE_SHARE = 0.7  # of the steps, at the start
MASKED = 0.15  # of the tokens; of them 80 % become the mask, 10 % another token (Devlin et al. 2018)
MASK = 0  # its id: the tokeniser's first byte, "!", is given up
IGNORED = -100


SMALL = Size(1024, 64, 256, 3, 4, 8, 250, 1e-3, 20)
FULL = Size(8192, 512, 768, 12, 12, 32, 1500, 3e-4, 8)  # BERT-base


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="a text file; by default articles of the package gensim")
    options = parser.parse_args()
    size = FULL if options.full else SMALL
    steps = options.steps or size.steps
    settings = Settings(options.out, steps, size.lr, seed=options.seed, full=options.full)
    corpus = load_corpus(options.data, size.vocabulary)
    pieces = corpus.test_batches(size.batch, size.length, size.test_batches)
    test = [masked(ids, corpus.vocabulary, i).to(settings.device) for i, ids in enumerate(pieces)]

    def batch(step: int) -> Tensor:
        ids = corpus.batch(step, size.batch, size.length, options.seed)
        return masked(ids, corpus.vocabulary, step).to(settings.device)

    def evaluate(model: nn.Module) -> Figures:
        return {"test loss": statistics.mean(loss(model, pair).item() for pair in test)}

    curves: dict[str, Curve] = {}
    for name in PAPER:
        torch.manual_seed(options.seed)
        model, densify_at = bert(size, corpus.vocabulary), None
        if name != "dense":
            config = mfx.MonarchConfig(nblocks=4)
            model = mfx.monarchify(model, config=config, init="random", tokens=size.batch * size.length)
            print(mfx.training_summary(model), flush=True)
            densify_at = round(SPARSE_SHARE * steps)
        curves[name] = train(name, model, loss, batch, settings.until(densify_at), evaluate)
    save_curves(options.out, curves, "test loss", vars(options))
    report(curves, options.out)
    return 0


def bert(size: Size, vocabulary: int) -> nn.Module:
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        max_position_embeddings=size.length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def masked(ids: Tensor, vocabulary: int, seed: int) -> Tensor:
    """What the model sees, and what it is asked for (``IGNORED`` where nothing); (2, size, length)."""
    generator = torch.Generator().manual_seed(seed)
    asked = torch.rand(ids.shape, generator=generator) < MASKED
    kind = torch.rand(ids.shape, generator=generator)
    other = torch.randint(1, vocabulary, ids.shape, generator=generator)
    seen = torch.where(asked & (kind < 0.8), MASK, torch.where(asked & (kind < 0.9), other, ids))
    return torch.stack([seen, torch.where(asked, ids, IGNORED)])


def loss(model: nn.Module, pair: Tensor) -> Tensor:
    """Mean negative log likelihood of the masked tokens, in nats."""
    seen, wanted = pair
    logits = model(input_ids=seen).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED)


def report(curves: dict[str, Curve], out: Path) -> None:
    """Time to the worse of the two final losses, which both runs reach."""
    goal = max(curve.last("test loss") for curve in curves.values())
    rows, figures = [], {}
    for name, curve in curves.items():
        reached, total = curve.time_to("test loss", goal), curve.seconds(curve.evaluated[-1])
        switch = curve.densified
        phases = [curve.step_seconds(until=switch or math.inf)]
        phases += [] if switch is None else [curve.step_seconds(after=switch)]
        figures[name] = {"loss": curve.last("test loss"), "goal": goal, "seconds to goal": reached, "step_s": phases}
        steps = ", then ".join(f"{seconds * 1e3:.1f}" for seconds in phases)
        rows.append((name, f"{curve.last('test loss'):.3f}", f"{reached:.1f}", f"{total:.1f}", steps, PAPER[name]))
    print_table(("run", "loss", f"s to a loss of {goal:.3f}", "s in all", "ms a step", "in the paper"), rows)
    write_json(out / "figures.json", figures)


if __name__ == "__main__":
    sys.exit(main())
