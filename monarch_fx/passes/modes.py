"""Evaluation mode by the flags of modules alone: exported models refuse ``eval()``, and what else a model's own
``train()`` does might not be undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


def evaluated(model: nn.Module) -> nn.Module:
    """The model itself, from now on in evaluation mode."""
    for module in model.modules():
        module.training = False
    return model


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module is put back into its own after."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            evaluated(model)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
