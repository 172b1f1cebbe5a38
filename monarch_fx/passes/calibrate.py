"""Model + calibration batches -> the mean of x x^T over the inputs of every product."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from monarch_fx.errors import ConfigError
from monarch_fx.layers.match import Match
from monarch_fx.passes import rewrite
from monarch_fx.passes.inputs import Inputs, user_inputs
from monarch_fx.records import Candidate

ROWS_AT_ONCE = 4096  # added up in float32, then in float64


@dataclass
class _Sums:
    """Sums of x x^T by candidate, and how many x there were; ``mask`` tells which tokens of the running batch count."""

    grams: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    mask: torch.Tensor | None = None

    def add(self, names: Sequence[str], match: Match, x: torch.Tensor) -> None:
        if match.flipped:  # the transposed weight sees what the plain one gives
            return
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            x = x[self.mask]
        rows = x.detach().reshape(-1, x.shape[-1])
        name = names[match.piece]
        gram = self.grams.setdefault(name, rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64))
        wide = torch.promote_types(rows.dtype, torch.float32)
        for part in rows.split(ROWS_AT_ONCE):
            gram += (part.to(wide).mT @ part.to(wide)).double()
        self.counts[name] = self.counts.get(name, 0) + len(rows)


@torch.no_grad()
def input_grams(model: nn.Module, candidates: Sequence[Candidate], batches: Iterable[Any]) -> dict[str, torch.Tensor]:
    """Runs the dense model on every batch, in eval mode, and leaves it as it was.

    Args:
        model: The dense model.
        candidates: Whose inputs are wanted.
        batches: Each a tensor, a tuple of positional or a mapping of keyword arguments of ``forward``. Where they have
            an ``attention_mask`` (batch, tokens), tokens that it hides don't count.

    Returns:
        (in, in) float64 for each candidate that saw any input; experts of one weight share theirs.

    Raises:
        ConfigError: ``batches`` is a single batch, or empty.
        ExampleInputsError: A batch doesn't fit the model's forward.
    """
    if isinstance(batches, (torch.Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"calibration is an iterable of batches, such as a list or a DataLoader; got a {type(batches).__name__}. "
            "Put a single batch into a list."
        )
    sums = _Sums()
    twin = _observed(model, candidates, sums).eval()
    device = next(model.parameters()).device
    number = 0
    for batch in tqdm(batches, desc="calibrate", unit="batch", leave=False):
        inputs = user_inputs(model, batch).on(device)
        sums.mask = _mask(inputs)
        twin(*inputs.args, **inputs.kwargs)
        number += 1
    if number == 0:
        raise ConfigError("calibration has no batches.")
    return {name: gram / sums.counts[name] for name, gram in sums.grams.items() if sums.counts[name]}


def _observed(model: nn.Module, candidates: Sequence[Candidate], sums: _Sums) -> nn.Module:
    """A copy of ``model`` that shares the candidates' values with it, and adds up what they are multiplied with."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_parameter: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_parameter.setdefault(candidate.parameter, []).append(candidate)
    twin = rewrite.copy_without(model, by_parameter)
    for name, mine in by_parameter.items():
        weight = rewrite.dense_weight(parameters[name], [candidate.view for candidate in mine])
        weight.observer = functools.partial(sums.add, [candidate.name for candidate in mine])
        rewrite.install(twin, name, weight)
    return twin


def _mask(inputs: Inputs) -> torch.Tensor | None:
    mask = inputs.kwargs.get("attention_mask")
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
