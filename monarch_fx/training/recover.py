"""A rewritten model and its dense teacher -> the rewritten model, nearer to the teacher: its factors are distilled.

No labels are needed. First every product is fitted by itself to what the teacher's product gives, on the inputs that
the rewritten model feeds it; then all factors together to the teacher's outputs. Learning rates are relative to the
size of each factor, so that one rate serves all layers and models.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from monarch_fx import files, rewritten
from monarch_fx.errors import ConfigError
from monarch_fx.passes import checks
from monarch_fx.passes.inputs import Inputs, check_batches, each_inputs
from monarch_fx.passes.losses import counted, distance, relative_error
from monarch_fx.passes.modes import evaluating
from monarch_fx.passes.pair import Pair
from monarch_fx.records import Recovery

LAYERWISE = 0.1  # of the run; more was no better (SmolLM2-135M, layers 10 to 19 at 0.5)
WARM_UP = 5  # steps of each of its two stages
HELD_OUT, MOST_HELD_OUT = 0.1, 8  # of the batches
LOOKS = 4  # at the held-out batches
SAVED_EVERY_S = 60.0


@torch.inference_mode(False)
def recover(
    model: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Any],
    *,
    minutes: float | None = None,
    steps: int | None = None,
    lr: float = 1e-3,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Distils the dense model into the factors of the rewritten one, in place; nothing else of it is trained.

    Experts take no part in the first stage: the two models may send them other tokens.

    A tenth of the batches, one to eight of them, is held out, and the factors that came nearest to the teacher there
    are kept: those that ``model`` came with, where training makes nothing better. So it is after an interruption, too.

    Args:
        model: What ``monarchify`` returned. It is run in eval mode.
        teacher: The dense model that it was made from, or another of the same architecture; it is left as it was.
        batches: Real inputs, each in one of the forms of ``example_inputs``; two or more, which are kept in memory.
            Tokens that an ``attention_mask`` of a batch hides don't count.
        minutes: How long to train, ...
        steps: ... or how many steps of one batch each. A tenth of either goes to single products.
        lr: Adam's learning rate, relative to the root mean square of each factor.
        checkpoint: A file to go on from where it exists; it is written every minute, and at the end.

    Returns:
        ``model``; ``report(model).recovery`` says how near it came.

    Raises:
        MonarchError: ``model`` was not made by ``monarchify``.
        ConfigError: Not exactly one of ``minutes`` and ``steps`` is given, a value has no meaning, there are too few
            batches, or the checkpoint is that of another model or in a folder that can't be written to.
        PlanMismatchError: ``teacher`` is of another architecture.
        NotAModuleError, WrappedModelError: ``teacher`` is no plain module.
        ExampleInputsError, OutputError: A model can't run on a batch, or returns no floating-point tensor.
    """
    report = rewritten.report(model)
    _check_arguments(minutes, steps, lr)
    check_batches(batches, "batches")
    checks.check_teacher(teacher, model, report.plan)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        if not path.parent.is_dir():
            raise ConfigError(f"checkpoint={str(checkpoint)!r} lies in a folder that doesn't exist: make it first.")
        files.check_folder(path.parent, f"The folder of checkpoint={str(checkpoint)!r}")
    device = next(model.parameters()).device
    inputs = [given.on(device) for given in each_inputs(model, batches, "batches")]
    if len(inputs) < 2:
        raise ConfigError(f"recover needs two batches or more, of which one is held out; got {len(inputs)}.")
    run = _Run(_Distances(model, teacher), inputs, steps, minutes, lr)
    if path is not None and path.exists():
        run.load(path)
    wanted = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    for factor in run.factors.values():
        factor.requires_grad_(True)
    try:
        with evaluating(model):
            try:
                run.train(path)
            finally:
                run.finish(path)
    finally:
        for p, requires_grad in wanted.items():
            p.requires_grad_(requires_grad)
            p.grad = None
        if run.best:
            rewritten.note(model, dataclasses.replace(report, recovery=run.recovery()))
    return model


class _Distances:
    """How far the rewritten model is from its teacher on a batch, by outputs and product by product."""

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        self.pair = Pair(model, teacher, rewritten.report(model).plan)
        self.factors = {
            f"{name}.{key}": factor
            for name, weight in self.pair.weights.items()
            for key, factor in weight.named_factors()
        }

    def of_outputs(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            wanted = inputs.into(self.pair.teacher)
        return distance(inputs.into(self.pair.model), wanted, inputs.mask(self.pair.model))

    def of_products(self, inputs: Inputs) -> Tensor:
        """Sum of the relative squared errors of the products' outputs; each depends on its own factors alone."""
        mask, errors = inputs.mask(self.pair.model), []

        def compare(wanted: Tensor, y: Tensor) -> Tensor:
            if y.requires_grad and y.numel():
                errors.append(relative_error(counted(y, mask).float(), counted(wanted, mask).float()))
            return y.detach()

        self.pair.run(inputs, compare)
        return torch.stack(errors).sum() if errors else torch.zeros(())


class _Run:
    """Steps, learning rates, the best factors, and what a checkpoint holds."""

    def __init__(
        self, distances: _Distances, inputs: list[Inputs], steps: int | None, minutes: float | None, lr: float
    ) -> None:
        self.distances, self.factors, self.lr = distances, distances.factors, lr
        self.most_steps, self.most_seconds = steps, None if minutes is None else 60 * minutes
        some = min(max(1, round(HELD_OUT * len(inputs))), MOST_HELD_OUT)
        self.held_out, self.inputs = inputs[:some], inputs[some:]
        self.step, self.earlier, self.started = 0, 0.0, time.perf_counter()
        # half-precision factors would round small steps away
        self.wide = {name: _wide(factor) for name, factor in self.factors.items()}
        self.sizes = {name: float(f.detach().float().square().mean().sqrt()) for name, f in self.factors.items()}
        self.stage, self.in_stage, self.looked = "", 0, 0
        self.before = self.nearest = math.nan
        self.best: dict[str, Tensor] = {}
        self.optimizer = self._optimizer()

    def train(self, path: Path | None) -> None:
        if not self.best:
            self._look()
            self.before = self.nearest
        saved = time.perf_counter()
        with tqdm(total=100, desc="recover", unit="%", leave=False) as bar:
            while (at := self._progress()) < 1:
                bar.update(int(100 * at) - bar.n)
                bar.set_postfix(distance=f"{self.nearest:.3g}", steps=self.step)
                if at * LOOKS >= self.looked + 1:
                    self.looked = int(at * LOOKS)
                    self._look()
                self._step(at)
                if path is not None and time.perf_counter() - saved > SAVED_EVERY_S:
                    self.save(path)
                    saved = time.perf_counter()

    def _step(self, at: float) -> None:
        stage, through = (
            ("layerwise", at / LAYERWISE) if at < LAYERWISE else ("whole", (at - LAYERWISE) / (1 - LAYERWISE))
        )
        if stage != self.stage:
            self.stage, self.in_stage, self.optimizer = stage, 0, self._optimizer()  # another loss, other moments
        inputs = self._batch()
        with torch.enable_grad():
            loss = self.distances.of_products(inputs) if stage == "layerwise" else self.distances.of_outputs(inputs)
        if loss.requires_grad or stage == "whole":  # a batch may reach no product that can be compared
            loss.backward()
        rate = self.lr * min(1.0, (self.in_stage + 1) / WARM_UP) * (1 + math.cos(math.pi * through)) / 2
        for group, (name, factor) in zip(self.optimizer.param_groups, self.factors.items(), strict=True):
            group["lr"] = rate * self.sizes[name]
            wide = self.wide[name]
            if wide is not factor:
                wide.grad = None if factor.grad is None else factor.grad.to(wide.dtype)
        self.optimizer.step()
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.grad = self.wide[name].grad = None
                if self.wide[name] is not factor:
                    factor.copy_(self.wide[name])
        self.step, self.in_stage = self.step + 1, self.in_stage + 1

    def finish(self, path: Path | None) -> None:
        """Keeps the best factors."""
        if self.best:
            self._look()
            with torch.no_grad():
                for name, value in self.best.items():
                    self.factors[name].copy_(value)
            if path is not None:
                self.save(path)

    def recovery(self) -> Recovery:
        return Recovery(self.before, self.nearest, self.step, self._seconds())

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name) for name in _SAVED}
        state |= {"seconds": self._seconds(), "optimizer": self.optimizer.state_dict()}
        state["wide"] = {name: value.detach() for name, value in self.wide.items()}
        unfinished = path.with_name(f"{path.name}.unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Goes on where ``save`` was.

        Raises:
            ConfigError: The file is not that of a model with these factors.
        """
        device = next(iter(self.wide.values())).device
        if not zipfile.is_zipfile(path):  # which torch.save writes; torch.load fails in any way on other bytes
            raise ConfigError(f"The checkpoint {path} can't be read as one of recover: give another file.")
        state = torch.load(path, map_location=device, weights_only=True)
        stored = state.get("wide", {}) if isinstance(state, dict) else {}
        sizes = {name: tuple(value.shape) for name, value in self.wide.items()}
        if {name: tuple(value.shape) for name, value in stored.items()} != sizes:
            raise ConfigError(f"The checkpoint {path} is not that of a model with these factors: give another file.")
        for name in _SAVED:
            setattr(self, name, state[name])
        self.earlier = state["seconds"]
        with torch.no_grad():
            for name, value in state["wide"].items():
                self.wide[name].copy_(value)
                self.factors[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])

    def _seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.started

    def _progress(self) -> float:
        if self.most_steps is not None:
            return self.step / self.most_steps
        assert self.most_seconds is not None
        return self._seconds() / self.most_seconds

    def _batch(self) -> Inputs:
        """All of them once, then again, in an order that the number of the step alone decides."""
        epoch, index = divmod(self.step, len(self.inputs))
        order = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(epoch), device="cpu")
        return self.inputs[int(order[index])]

    def _look(self) -> None:
        """Measures on the held-out batches, and remembers the factors where they are the nearest so far."""
        with torch.no_grad():
            found = sum(float(self.distances.of_outputs(inputs)) for inputs in self.held_out) / len(self.held_out)
        if not self.best or found < self.nearest:
            self.nearest = found
            self.best = {name: factor.detach().clone() for name, factor in self.factors.items()}

    def _optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam([{"params": [wide]} for wide in self.wide.values()], betas=(0.9, 0.99))


_SAVED = ("step", "stage", "in_stage", "looked", "before", "nearest", "best", "sizes")


def _wide(factor: nn.Parameter) -> Tensor:
    """The factor itself, or a copy in float32 of one in half precision."""
    return factor.detach().float().clone() if factor.dtype.itemsize < 4 else factor


def _check_arguments(minutes: float | None, steps: int | None, lr: float) -> None:
    if (minutes is None) == (steps is None):
        raise ConfigError(f"Give either minutes or steps, got minutes={minutes!r} and steps={steps!r}.")
    for name, value in (("minutes", minutes), ("steps", steps), ("lr", lr)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be positive, got {value!r}.")
