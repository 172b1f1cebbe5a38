"""What structures would cost a model in quality: estimated errors, what its loss feels of them, measurements; and the
order of hidden features in which grids cost less."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from monarch_fx.config import MonarchConfig
from monarch_fx.passes import checks
from monarch_fx.passes.calibrate import Calibration, Statistics
from monarch_fx.passes.permute import Hidden
from monarch_fx.planning import grids
from monarch_fx.projection import (
    PRIOR_DOUBT,
    energy,
    expected_seconds,
    feature_order,
    prior_tail,
    projected_error2,
    read_features,
    tail_errors,
    written_features,
)
from monarch_fx.records import Candidate, HiddenOrder
from monarch_fx.structure import MonarchShape

ANNOUNCE_SECONDS = 60.0


def errors(
    model: nn.Module, candidates: Sequence[Candidate], config: MonarchConfig, calibrated: Calibration | None
) -> tuple[dict[str, dict[tuple[int, int], Any]], str, float]:
    """Relative squared errors of every candidate by grid and rank, how they were estimated, and ``decide``'s doubt."""
    wanted = {c.name: grids(c, config) for c in candidates}
    if checks.on_meta(model):
        tails = {}
        for c in candidates:
            tails[c.name] = {grid: prior_tail(c.out_features, c.in_features, grid) for grid in wanted[c.name]}
        source = f"a prior by shape (the model has no values), within {PRIOR_DOUBT:.0%} of squared errors"
        return tails, source, PRIOR_DOUBT
    sizes = [(c.batch, c.out_features, c.in_features) for c in candidates]
    all_grids = sorted({grid for c in candidates for grid in wanted[c.name]})
    seconds = expected_seconds(sizes, all_grids)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    announced = seconds >= ANNOUNCE_SECONDS and parameters[candidates[0].parameter].device.type == "cpu"
    wait = f" (about {seconds / 60:.0f} min)" if announced else ""
    tails = {}
    for c in tqdm(candidates, desc=f"spectra{wait}", unit="weight", leave=False):
        seen = calibrated.statistics.get(c.name) if calibrated else None
        known = (None, None) if seen is None else (seen.inputs, seen.gradients)
        tails[c.name] = tail_errors(c.view.gather(parameters[c.parameter]), wanted[c.name], *known)
    if calibrated is None or not calibrated.statistics:
        return tails, "block spectra of the weights", 0.0
    felt = f", in the norm of {calibrated.loss}" if calibrated.loss else ""
    return tails, f"projections on the calibration inputs{felt}", 0.0


def orders(
    model: nn.Module, hidden: Sequence[Hidden], candidates: Sequence[Candidate], calibrated: Calibration
) -> tuple[HiddenOrder, ...]:
    """An order of all hidden features for which data tell what the products around them see."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = {c.name: c.view.gather(parameters[c.parameter]) for c in candidates if c.name in calibrated.statistics}
    found = []
    for features in tqdm(hidden, desc="order", unit="hidden layer", leave=False):
        rows = [
            form(weights[name], calibrated.statistics[name].inputs, calibrated.statistics[name].gradients)
            for members, form in ((features.writers, written_features), (features.readers, read_features))
            for name, _ in members
            if name in weights
        ]
        if rows:
            found.append(features.in_order(feature_order(rows)))
    return tuple(found)


def measures(
    model: nn.Module, candidates: Sequence[Candidate], calibrated: Calibration | None
) -> dict[str, Callable[[MonarchShape], float]]:
    """Relative squared errors by projecting, for the products of which block spectra are rough: those that data tell
    of, since there blocks make up for each other's errors, or add to them."""
    if calibrated is None:
        return {}
    statistics, parameters = calibrated.statistics, dict(model.named_parameters(remove_duplicate=False))

    def measure(candidate: Candidate, shape: MonarchShape) -> float:
        weight, seen = candidate.view.gather(parameters[candidate.parameter]), statistics[candidate.name]
        return projected_error2(weight, shape, seen.inputs, seen.gradients)

    return {c.name: functools.partial(measure, c) for c in candidates if c.name in statistics}


def losses(
    model: nn.Module, candidates: Sequence[Candidate], calibrated: Calibration | None
) -> dict[str, float] | None:
    """What losing a product altogether would cost, where the model's loss feels it; None without any such product."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for c in candidates:
        seen = None if calibrated is None else calibrated.statistics.get(c.name)
        if seen is not None and seen.gradients is not None:
            found[c.name] = loss(c.view.gather(parameters[c.parameter]), seen)
    return found or None


def loss(wrong: torch.Tensor, seen: Statistics) -> float:
    """Second-order increase of the loss where a weight is changed by ``wrong`` (B?, out, in); experts share statistics,
    so that each sees one in B of the tokens."""
    return energy(wrong, seen.inputs, seen.gradients) / (2 * (len(wrong) if wrong.ndim == 3 else 1))
