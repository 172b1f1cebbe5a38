"""An image classifier from scratch on Fashion-MNIST, a ViT or an MLP-Mixer: dense, and with Monarch weights.

The structure is the authors' (4 blocks, rank min(in, out) / 16; Dao et al. 2022, section 5.1). The embedding of patches
and the head stay dense, and the Mixer's products over patches: they hold one in a hundred weights, and no structure is
predicted faster.

    python -m examples.classifier --model vit --data /usr/share/datasets/fashion-mnist --out results/vit
"""

from __future__ import annotations

import gzip
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from examples.attention import unmasked
from examples.curves import Curve, print_table, save_curves, spread, write_json
from examples.training import Figures, Settings, arguments, device, picks, seeds, train, with_factors

FOLDER = "/usr/share/datasets/fashion-mnist"  # of the Debian package dataset-fashion-mnist
SIDE, PATCH, CLASSES = 28, 4, 10
PATCHES = (SIDE // PATCH) ** 2
SHIFT = 2  # pixels that training images are moved by, at most
PAPER = {  # Dao et al. 2022, table 1: ImageNet accuracy, training speed
    "vit": {"dense": "ViT-B/16: 78.5 %, 1x", "monarch": "ViT-B/16: 78.9 %, 2.0x"},
    "mixer": {"dense": "Mixer-B/16: 77.7 %, 1x", "monarch": "Mixer-B/16: 77.8 %, 1.9x"},
}


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    batch: int
    steps: int
    lr: float
    test_images: int


SMALL = Size(192, 3, 16, 400, 1e-3, 500)
FULL = Size(768, 12, 256, 1500, 5e-4, 10000)  # ViT-B, Mixer-B


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601): images (batch, 1, 28, 28) -> logits (batch, 10)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH**2, width)
        self.blocks = nn.ModuleList(MixerBlock(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(nn.functional.unfold(images, PATCH, stride=PATCH).mT)  # (batch, patches, width)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class MixerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.tokens = mlp(PATCHES, width // 2)
        self.channels = mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norms[0](x).mT).mT
        return x + self.channels(self.norms[1](x))


def mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def vit(width: int, layers: int) -> nn.Module:
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=1,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=unmasked(),
    )
    return ViTForImageClassification(config)


MODELS: dict[str, Callable[[int, int], nn.Module]] = {"vit": vit, "mixer": Mixer}


def main() -> int:
    parser = arguments(__doc__, FOLDER)
    parser.add_argument("--model", choices=MODELS, default="vit")
    options = parser.parse_args()
    size = FULL if options.full else SMALL
    images, labels = (t.to(device()) for t in load(options.data, "train"))
    test_images, test_labels = (t[: size.test_images].to(device()) for t in load(options.data, "t10k"))

    def build() -> nn.Module:
        return MODELS[options.model](size.width, size.layers)

    def evaluate(model: nn.Module) -> Figures:
        right = [
            (logits(model, x).argmax(-1) == y).sum()
            for x, y in zip(test_images.split(500), test_labels.split(500), strict=True)
        ]
        return {"test error": 1 - torch.stack(right).sum().item() / len(test_labels)}

    runs: dict[str, list[Curve]] = {"dense": [], "monarch": []}
    params: dict[str, int] = {}
    saved_s = 0.0
    choices: dict[str, Any] = {"example_inputs": torch.empty(2, 1, SIDE, SIDE, device="meta")}
    if options.model == "mixer":
        choices["exclude"] = ["embed*", "head*", "*.tokens.*"]
    for seed in seeds(options):
        steps = options.steps or size.steps
        settings = Settings(options.out, steps, size.lr, seed=seed, weight_decay=0.05, full=options.full, evaluations=6)

        def batch(step: int, seed: int = seed) -> tuple[Tensor, Tensor]:
            picked = picks(len(images), size.batch, step, seed).to(images.device)
            return moved(images[picked]), labels[picked]

        for name, curves in runs.items():
            torch.manual_seed(seed)
            if name == "dense":
                model = build()
            else:
                model, saved_s = with_factors(build, full=options.full, tokens=size.batch * PATCHES, **choices)
            params[name] = sum(p.numel() for p in model.parameters())
            curves.append(train(f"{name}, seed {seed}", model, loss, batch, settings, evaluate))
            save_curves(options.out, runs, "test error", vars(options))
        report(runs, params, saved_s, options.out, PAPER[options.model], len(test_labels))
    return 0


def load(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 28, 28), of mean 0 and variance 1 over the training set, and labels (count,)."""
    pixels, labels = (folder / f"{part}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    if not pixels.exists() or not labels.exists():
        sys.exit(
            f"{folder} has no {pixels.name} and {labels.name}: give the folder of Fashion-MNIST as --data. On Debian "
            f"and Ubuntu it is {FOLDER} of the package dataset-fashion-mnist (`apt-get download`, `dpkg -x`)."
        )
    values, wanted = (
        torch.frombuffer(bytearray(gzip.decompress(file.read_bytes())), dtype=torch.uint8, offset=offset)
        for file, offset in ((pixels, 16), (labels, 8))
    )
    return values.view(-1, 1, SIDE, SIDE).float().div_(255).sub_(0.286).div_(0.353), wanted.long()


def moved(images: Tensor) -> Tensor:
    """Each batch shifted by a few pixels, and mirrored or not."""
    across, down, mirror = torch.randint(-SHIFT, SHIFT + 1, (3,)).tolist()
    images = torch.roll(images, (across, down), (-1, -2))
    return images.flip(-1) if mirror > 0 else images


def logits(model: nn.Module, images: Tensor) -> Tensor:
    y = model(images)
    return y if isinstance(y, Tensor) else y.logits


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(logits(model, images).float(), labels)


def report(
    runs: dict[str, list[Curve]], params: dict[str, int], saved_s: float, out: Path, paper: dict[str, str], count: int
) -> None:
    """One row a run: at equal images, and at the time that the fastest took for them, both without compilation."""
    fastest = min(curve.seconds(curve.evaluated[-1]) for curves in runs.values() for curve in curves)
    rows, figures = [], {}
    dense_s = statistics.fmean(curve.step_seconds() for curve in runs["dense"])
    for name, curves in runs.items():
        final = [1 - curve.last("test error") for curve in curves]
        at_time = [1 - curve.at_time("test error", fastest) for curve in curves]
        step_s = [curve.step_seconds() for curve in curves]
        predicted = dense_s if name == "dense" else dense_s - saved_s
        figures[name] = {"parameters": params[name], "accuracy": final, "at equal time": at_time, "step_s": step_s}
        figures[name] |= {"predicted_step_s": predicted, "left_out_s": [curve.left_out_s for curve in curves]}
        accuracy = f"{spread(final, '.1f', 100)} %", f"{spread(at_time, '.1f', 100)} %"
        times = spread(step_s, ".1f", 1e3), f"{predicted * 1e3:.1f}"
        rows.append((name, f"{params[name]:,}", *accuracy, *times, paper[name]))
    header = ("run", "parameters", f"accuracy, {count} images", f"at {fastest:.0f} s", "ms a step", "predicted")
    print_table((*header, "in the paper"), rows)
    write_json(out / "figures.json", figures)


if __name__ == "__main__":
    sys.exit(main())
