"""The loop of the training examples: seeds, learning rates, evaluations, and checkpoints to go on from.

An example gives a model, a loss and batches by step; a step has the same batch and the same dropout in every run, so
that a run that was stopped goes on as if it had not been. On a GPU steps are CUDA graphs. What runs write down goes
into the folder ``--out``, as JSON and PNG (``examples/curves.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import monarch_fx as mfx
from examples.curves import Curve, replace
from examples.steps import Step

INTERVALS = 60  # of a run, for each of which the mean loss and the time are written down
CHECKPOINT_S = 60.0  # seconds between checkpoints at least: a stopped run loses hardly more, and saving takes little

Figures = dict[str, float]
Loss = Callable[[nn.Module, Any], Tensor]


def arguments(description: str, data: str | None = None) -> argparse.ArgumentParser:
    """The options that every example has; ``data``: where its data lie by default, for examples that read a folder."""
    first = description.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=first, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for curves, figures and checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds are run, one after the other")
    parser.add_argument("--steps", type=int, help="of the optimizer; by default what the size is made for")
    parser.add_argument("--full", action="store_true", help="sizes for one GPU, compiled, in bfloat16")
    if data is not None:
        parser.add_argument("--data", type=Path, default=Path(data), help="folder with the data")
    return parser


def seeds(options: argparse.Namespace) -> range:
    return range(options.seed, options.seed + options.seeds)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Attributes:
        out: Folder for checkpoints.
        steps: Optimizer steps.
        lr: Peak learning rate of AdamW; linear warm-up over ``warmup`` of the steps, then a cosine to a tenth.
        weight_decay: Decoupled, on matrices, and on the products of factors.
        full: Compiled, under bfloat16 autocast.
        evaluations: Parts of the run that end with an evaluation.
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


def with_factors(build: Callable[[], nn.Module], *, full: bool, tokens: int, **choices: Any) -> tuple[nn.Module, float]:
    """What ``build`` makes, with random factors of the authors' structure (4 blocks, their rank) in the place of its
    weights, and the seconds that they are predicted to save of a training step. What that adds up from is printed.

    Args:
        full: Planned for bfloat16, in which the run computes under autocast.
        tokens: Rows of the activations of a step.
        choices: Of ``monarch_fx.plan``.
    """
    with torch.device("meta"):  # planned for the GPU, where there is one
        twin = build()
    choices |= {"config": mfx.MonarchConfig(nblocks=4), "dtype": torch.bfloat16 if full else None}
    plan = mfx.plan(twin, tokens=tokens, workload="training", **choices)
    model = mfx.monarchify(build(), plan=plan, init="random", inplace=True)
    summary = mfx.training_summary(model)
    print(summary, flush=True)
    return model, summary.dense_s - summary.time_s


def train(
    name: str,
    model: nn.Module,
    loss: Loss,
    batch: Callable[[int], Any],
    settings: Settings,
    evaluate: Callable[[nn.Module], Figures] | None = None,
    groups: list[dict[str, Any]] | None = None,
) -> Curve:
    """Trains ``model`` in place.

    Args:
        name: Of the run, among others in the same folder.
        loss: ``(model, batch) -> scalar``.
        batch: The batch of a step, the same in every run.
        evaluate: Figures of the model, in eval mode and without gradients; it is not compiled for that.
        groups: Parameter groups; by default those of ``monarch_fx.parameter_groups``.
    """
    at, checkpoint = device(), settings.out / f"{name}.pt"
    if at.type == "cuda":  # recorded steps of runs before this one hold their memory
        gc.collect()
        torch.cuda.empty_cache()
    model.to(at).train()
    groups = groups or mfx.parameter_groups(model, lr=settings.lr, weight_decay=settings.weight_decay)
    optimizer = _optimizer(groups, at)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings))
    curve, start = Curve(), 0
    if checkpoint.exists():
        curve, start = _resume(checkpoint, model, optimizer, schedule, settings)
        _rates_to(optimizer, at)
    compiled: Loss = torch.compile(loss) if settings.full else loss

    def advance(batch: Any) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(at.type, torch.bfloat16, enabled=settings.full):
            value = compiled(model, batch)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        return value.detach()

    run = Step(advance, at)
    bar = tqdm(range(start, settings.steps), initial=start, total=settings.steps, desc=name, leave=False)
    total, since, spent_s, was_warm = torch.zeros((), device=at), 0, 0.0, False
    clock = saved = _now(at)
    for step in bar:
        if step == settings.densify_at:
            optimizer.zero_grad()
            mfx.densify(model, optimizer)
            curve.densified, run, was_warm = step, Step(advance, at), False
        torch.manual_seed(_mixed(settings.seed, step))  # dropout
        total, since = total + run(batch(step)), since + 1
        schedule.step()
        done = step + 1
        if settings.ends(done, INTERVALS):
            mean, spent_s = total.item() / since, spent_s + _now(at) - clock
            if was_warm:
                curve.steps.append(done)
                curve.losses.append(mean)
                curve.step_s.append(spent_s / since)
            else:
                curve.left_out_s += spent_s
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            total, since, spent_s, was_warm, clock = torch.zeros_like(total), 0, 0.0, run.is_warm, _now(at)
        if settings.ends(done, settings.evaluations):
            spent_s += _now(at) - clock
            if evaluate is not None:
                _write_down(curve, done, _evaluated(model, evaluate, settings))
            if _now(at) - saved >= CHECKPOINT_S:
                _save(checkpoint, model, optimizer, schedule, curve, done, settings)
                saved = _now(at)
            clock = _now(at)
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


def _optimizer(groups: list[dict[str, Any]], at: torch.device) -> torch.optim.Optimizer:
    """AdamW; on a GPU fused, where parameters are real, and with learning rates that a recorded step reads anew."""
    if at.type != "cuda":
        return torch.optim.AdamW(groups)
    fused = not any(p.is_complex() for group in groups for p in group["params"])
    optimizer = torch.optim.AdamW(groups, fused=fused, foreach=not fused, capturable=True)
    _rates_to(optimizer, at)
    return optimizer


def _rates_to(optimizer: torch.optim.Optimizer, at: torch.device) -> None:
    if at.type == "cuda":
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=at)


def _evaluated(model: nn.Module, evaluate: Callable[[nn.Module], Figures], settings: Settings) -> Figures:
    model.eval()
    with torch.no_grad(), torch.autocast(device().type, torch.bfloat16, enabled=settings.full):
        figures = evaluate(model)
    model.train()
    return figures


def _write_down(curve: Curve, step: int, figures: Figures) -> None:
    curve.evaluated.append(step)
    for key, value in figures.items():
        curve.figures.setdefault(key, []).append(value)


def _now(at: torch.device) -> float:
    if at.type == "cuda":
        torch.cuda.synchronize(at)
    return time.perf_counter()


def _save(
    path: Path, model: nn.Module, optimizer: Any, schedule: Any, curve: Curve, step: int, settings: Settings
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    state |= {"curve": dataclasses.asdict(curve), "step": step, "settings": settings.text()}
    replace(path, lambda temporary: torch.save(state, temporary))


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
