"""The loop of the training examples: seeds, learning rates, curves, and checkpoints that a stopped run goes on from.

An example gives a model, a loss and batches by step; a step has the same batch and the same dropout in every run, so
that a run that was stopped goes on as if it had not been. Curves go into the folder ``--out``, as JSON and PNG.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import monarch_fx as mfx

INTERVALS = 60  # of a run, for each of which the mean loss and the time are written down

Figures = dict[str, float]
Loss = Callable[[nn.Module, Any], Tensor]


def arguments(description: str, data: str | None = None) -> argparse.ArgumentParser:
    """The options that every example has; ``data``: where its data lie by default, for examples that read a folder."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("The curves need matplotlib: pip install -r examples/requirements-training.txt")
    first = description.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=first, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for curves, figures and checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--steps", type=int, help="of the optimizer; by default what the size is made for")
    parser.add_argument("--full", action="store_true", help="sizes for one GPU, compiled, in bfloat16")
    if data is not None:
        parser.add_argument("--data", type=Path, default=Path(data), help="folder with the data")
    return parser


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Attributes:
        out: Folder for checkpoints.
        steps: Optimizer steps.
        lr: Peak learning rate of AdamW; linear warm-up over ``warmup`` of the steps, then a cosine to a tenth.
        weight_decay: Decoupled, on matrices, and on the products of factors.
        full: Compiled, under bfloat16 autocast.
        evaluations: Parts of the run that end with an evaluation and a checkpoint.
        densify_at: Step before which the factors are multiplied out; None: never.
    """

    out: Path
    steps: int
    lr: float
    seed: int = 0
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    full: bool = False
    evaluations: int = 12
    densify_at: int | None = None

    def until(self, densify_at: int | None) -> Settings:
        """The same, sparse until step ``densify_at``."""
        return dataclasses.replace(self, densify_at=densify_at)

    def text(self) -> str:
        """What a checkpoint has to agree with."""
        return ", ".join(f"{key}={value}" for key, value in dataclasses.asdict(self).items() if key != "out")

    def ends(self, step: int, parts: int) -> bool:
        """Whether ``step`` is the last one of a ``parts``-th of the run."""
        return step * parts // self.steps > (step - 1) * parts // self.steps

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Curve:
    """What a run writes down.

    Attributes:
        steps: After which a loss was written down.
        losses: Mean training loss since the entry before.
        step_s: Seconds of one step since then, without evaluations. The first interval, and the first one after the
            switch, are left out: they compile.
        evaluated: Steps of the evaluations.
        figures: What they gave, by name.
        densified: The step before which the factors were multiplied out.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    densified: int | None = None

    def step_seconds(self, after: int = 0, until: float = math.inf) -> float:
        """Median seconds of a step, of those after ``after`` and up to ``until``."""
        return statistics.median(s for at, s in zip(self.steps, self.step_s, strict=True) if after < at <= until)

    def seconds(self, step: int) -> float:
        """Training time up to a step: medians before and after the switch, so that a busy moment doesn't count."""
        if self.densified is None or step <= self.densified:
            return step * self.step_seconds(until=self.densified or math.inf)
        return self.seconds(self.densified) + (step - self.densified) * self.step_seconds(after=self.densified)

    def last(self, name: str) -> float:
        return self.figures[name][-1]

    def at_time(self, name: str, seconds: float) -> float:
        """The figure after so much training time, between evaluations on a straight line."""
        return float(np.interp(seconds, [self.seconds(step) for step in self.evaluated], self.figures[name]))

    def time_to(self, name: str, value: float) -> float:
        """Seconds of training until the figure is ``value`` or less, between evaluations on a straight line.

        Raises:
            ValueError: It never is.
        """
        figures, times = self.figures[name], [self.seconds(step) for step in self.evaluated]
        for i, figure in enumerate(figures):
            if figure <= value:
                before = max(0, i - 1)
                span = figures[before] - figure
                return times[i] if not span else times[i] - (times[i] - times[before]) * (value - figure) / span
        raise ValueError(f"{name} never came down to {value:.4g}.")


def train(
    name: str,
    model: nn.Module,
    loss: Loss,
    batch: Callable[[int], Any],
    settings: Settings,
    evaluate: Callable[[nn.Module], Figures] | None = None,
    factor_lr: float = 1.0,
) -> Curve:
    """Trains ``model`` in place.

    Args:
        name: Of the run, among others in the same folder.
        loss: ``(model, batch) -> scalar``.
        batch: The batch of a step, the same in every run.
        evaluate: Figures of the model, in eval mode and without gradients.
        factor_lr: As of ``monarch_fx.parameter_groups``.
    """
    device, checkpoint = settings.device, settings.out / f"{name}.pt"
    model.to(device).train()
    groups = mfx.parameter_groups(model, lr=settings.lr, weight_decay=settings.weight_decay, factor_lr=factor_lr)
    fused = device.type == "cuda" and not any(p.is_complex() for p in model.parameters())  # complex ones can't be
    optimizer = torch.optim.AdamW(groups, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings))
    curve, start = Curve(), 0
    if checkpoint.exists():
        curve, start = _resume(checkpoint, model, optimizer, schedule, settings)
    run = torch.compile(model) if settings.full else model
    bar = tqdm(range(start, settings.steps), initial=start, total=settings.steps, desc=name, leave=False)
    total, since, spent_s, compiled = torch.zeros((), device=device), 0, 0.0, False
    clock = _now(device)
    for step in bar:
        if step == settings.densify_at:
            mfx.densify(model, optimizer)
            curve.densified, compiled = step, False
        torch.manual_seed(_mixed(settings.seed, step))  # dropout
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.full):
            value = loss(run, batch(step))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total, since = total + value.detach(), since + 1
        done = step + 1
        if settings.ends(done, INTERVALS):
            mean, spent_s = total.item() / since, spent_s + _now(device) - clock
            if compiled:
                curve.steps.append(done)
                curve.losses.append(mean)
                curve.step_s.append(spent_s / since)
            bar.set_postfix(loss=f"{mean:.3f}")
            total, since, spent_s, compiled, clock = torch.zeros_like(total), 0, 0.0, True, _now(device)
        if settings.ends(done, settings.evaluations):
            spent_s += _now(device) - clock
            if evaluate is not None:
                _write_down(curve, done, _evaluated(run, evaluate, settings))
            _save(checkpoint, model, optimizer, schedule, curve, done, settings)
            clock = _now(device)
    return curve


def rate(step: int, settings: Settings) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to a tenth."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, settings.steps - warm))


def picks(count: int, size: int, step: int, seed: int) -> Tensor:
    """``size`` of ``count`` examples for a step, the same in every run."""
    return torch.randint(count, (size,), generator=torch.Generator().manual_seed(_mixed(seed, step)))


def _mixed(seed: int, step: int) -> int:
    return hash((seed, step))  # of integers, the same in every process


def save_curves(out: Path, curves: Mapping[str, Curve], figure: str, settings: Mapping[str, Any]) -> None:
    """Writes ``curves.json`` and ``curves.png``: a figure against steps, and against training time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = {name: dataclasses.asdict(curve) for name, curve in curves.items()}
    write_json(out / "curves.json", {"settings": {key: str(v) for key, v in settings.items()}, "curves": data})
    drawing, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for name, curve in curves.items():
        axes[0].plot(curve.evaluated, curve.figures[figure], label=name)
        axes[1].plot([curve.seconds(step) for step in curve.evaluated], curve.figures[figure], label=name)
    axes[0].set(xlabel="steps", ylabel=figure)
    axes[1].set(xlabel="seconds of training")
    axes[0].legend()
    drawing.tight_layout()
    drawing.savefig(out / "curves.png", dpi=120)
    plt.close(drawing)


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all."""
    _replace(path, lambda temporary: temporary.write_text(json.dumps(data, indent=1) + "\n"))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), flush=True)


def _evaluated(model: nn.Module, evaluate: Callable[[nn.Module], Figures], settings: Settings) -> Figures:
    model.eval()
    with torch.no_grad(), torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.full):
        figures = evaluate(model)
    model.train()
    return figures


def _write_down(curve: Curve, step: int, figures: Figures) -> None:
    curve.evaluated.append(step)
    for key, value in figures.items():
        curve.figures.setdefault(key, []).append(value)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _save(
    path: Path, model: nn.Module, optimizer: Any, schedule: Any, curve: Curve, step: int, settings: Settings
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    state |= {"curve": dataclasses.asdict(curve), "step": step, "settings": settings.text()}
    _replace(path, lambda temporary: torch.save(state, temporary))


def _resume(path: Path, model: nn.Module, optimizer: Any, schedule: Any, settings: Settings) -> tuple[Curve, int]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["settings"] != settings.text():
        sys.exit(
            f"{path} is of a run with {state['settings']}, not {settings.text()}: remove it, or choose another --out."
        )
    curve = Curve(**state["curve"])
    if curve.densified is not None:
        mfx.densify(model, optimizer)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return curve, state["step"]


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes beside ``path`` and renames, so that a stopped run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)
