"""BERT pre-training, dense and sparse to dense: training time to the same loss.

Monarch weights (4 blocks, the authors' rank) for the first 70 % of the steps, dense weights for the rest, as in Dao et
al. 2022, section 5.2. Both runs see the same tokens and the same masks.

    python -m examples.masked_language_model --out results/masked_language_model
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from examples.attention import unmasked
from examples.corpus import Size, load_corpus
from examples.curves import Curve, milliseconds, print_table, save_curves, spread, write_json
from examples.training import Figures, Settings, arguments, seeds, train, with_factors

PAPER = {  # Dao et al. 2022, table 7: BERT-large, 8 A100
    "dense": "30.2 h (Nvidia, MLPerf 1.1)",
    "sparse to dense": "23.8 h",
}
SPARSE_SHARE = 0.7  # of the steps, at the start
MASKED = 0.15  # of the tokens; of them 80 % become the mask, 10 % another token (Devlin et al. 2018)
MASK = 0  # its id: the tokeniser's first byte, "!", is given up
IGNORED = -100


SMALL = Size(1024, 64, 256, 3, 4, 8, 250, 1e-3, 20)
FULL = Size(8192, 128, 768, 12, 12, 128, 6000, 3e-4, 8)  # BERT-base, pieces as in the first phase of its training


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, help="a text file; by default articles of the package gensim")
    options = parser.parse_args()
    size = FULL if options.full else SMALL
    steps = options.steps or size.steps
    corpus = load_corpus(options.data, size.vocabulary)
    pieces = corpus.test_batches(size.batch, size.length, size.test_batches)
    test = [masked(ids, corpus.vocabulary, i) for i, ids in enumerate(pieces)]

    def build() -> nn.Module:
        return bert(size, corpus.vocabulary)

    def evaluate(model: nn.Module) -> Figures:
        return {"test loss": statistics.mean(loss(model, pair).item() for pair in test)}

    runs: dict[str, list[Curve]] = {name: [] for name in PAPER}
    saved_s = 0.0
    for seed in seeds(options):
        settings = Settings(options.out, steps, size.lr, seed=seed, full=options.full)

        def batch(step: int, seed: int = seed) -> Tensor:
            return masked(corpus.batch(step, size.batch, size.length, seed), corpus.vocabulary, step)

        for name in PAPER:
            torch.manual_seed(seed)
            if name == "dense":
                model = build()
            else:
                model, saved_s = with_factors(build, full=options.full, tokens=size.batch * size.length)
                settings = settings.until(round(SPARSE_SHARE * steps))
            curve = train(f"{name}, seed {seed}", model, loss, batch, settings, evaluate)
            runs[name].append(curve)
            save_curves(options.out, runs, "test loss", vars(options))
        report(runs, saved_s, options.out)
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
        attn_implementation=unmasked(),
    )
    return BertForMaskedLM(config)


def masked(ids: Tensor, vocabulary: int, seed: int) -> Tensor:
    """What the model sees, and what it is asked for (``IGNORED`` where nothing); (2, size, length)."""
    generator = torch.Generator(ids.device).manual_seed(seed)
    asked = torch.rand(ids.shape, generator=generator, device=ids.device) < MASKED
    kind = torch.rand(ids.shape, generator=generator, device=ids.device)
    other = torch.randint(1, vocabulary, ids.shape, generator=generator, device=ids.device)
    seen = torch.where(asked & (kind < 0.8), MASK, torch.where(asked & (kind < 0.9), other, ids))
    return torch.stack([seen, torch.where(asked, ids, IGNORED)])


def loss(model: nn.Module, pair: Tensor) -> Tensor:
    """Mean negative log likelihood of the masked tokens, in nats."""
    seen, wanted = pair
    logits = model(input_ids=seen).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED)


def report(runs: dict[str, list[Curve]], saved_s: float, out: Path) -> None:
    """Time to the worst of all final losses, which every run reaches; compilation is in none of the times."""
    goal = max(curve.last("test loss") for curves in runs.values() for curve in curves)
    rows, figures = [], {}
    dense_s = statistics.fmean(curve.step_seconds() for curve in runs["dense"])
    for name, curves in runs.items():
        final = [curve.last("test loss") for curve in curves]
        reached = [curve.time_to("test loss", goal) for curve in curves]
        total = [curve.seconds(curve.evaluated[-1]) for curve in curves]
        steps = [statistics.fmean(times) for times in zip(*(curve.phases() for curve in curves), strict=True)]
        predicted = dense_s if name == "dense" else dense_s - saved_s
        figures[name] = {"loss": final, "goal": goal, "seconds to goal": reached, "seconds": total, "step_s": steps}
        figures[name] |= {"predicted_step_s": predicted, "left_out_s": [curve.left_out_s for curve in curves]}
        row = (spread(final, ".3f"), spread(reached, ".1f"), spread(total, ".1f"), milliseconds(steps))
        rows.append((name, *row, f"{predicted * 1e3:.1f}", PAPER[name]))
    header = ("run", "loss", f"s to a loss of {goal:.3f}", "s in all", "ms a step", "predicted", "in the paper")
    print_table(header, rows)
    write_json(out / "figures.json", figures)


if __name__ == "__main__":
    sys.exit(main())
