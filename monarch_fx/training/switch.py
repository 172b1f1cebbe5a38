"""When a training run turns dense: what the callbacks for trainers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from monarch_fx.errors import ConfigError
from monarch_fx.layers import MonarchWeight
from monarch_fx.training.densify import densify


class Switch:
    """Calls ``densify`` once, after a given step; a checkpoint from after that step finds a dense model.

    Args:
        at: The optimizer step after which, or a share of all steps in (0, 1).
        state: As of ``densify``.

    Raises:
        ConfigError: ``at`` is neither a positive integer nor a share in (0, 1).
    """

    def __init__(self, at: int | float, state: str) -> None:
        share = isinstance(at, float) and 0 < at < 1
        count = isinstance(at, int) and not isinstance(at, bool) and at > 0
        if not share and not count:
            raise ConfigError(f"at must be a positive number of steps or a share of training in (0, 1), got {at!r}.")
        self.at, self.state = at, state
        self.step = 0
        self.watched: Any = None

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Until training begins, weights that are loaded and are dense make the model dense before they are taken."""

        def before_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
            names = [name for name, child in module.named_modules() if isinstance(child, MonarchWeight)]
            if any(prefix + name in state_dict for name in names):
                densify(module, optimizer, state="restart")  # the optimizer's own state is loaded next

        self.watched = model.register_load_state_dict_pre_hook(before_loading)

    def begin(self, model: nn.Module, done: int, total: float) -> None:
        """Training goes from step ``done`` to step ``total``.

        Raises:
            ConfigError: The switch would never come, or there is nothing to multiply out.
        """
        if isinstance(self.at, float) and total == float("inf"):
            raise ConfigError(f"at={self.at} is a share of a training without an end: give a number of steps.")
        self.step = self.at if isinstance(self.at, int) else max(1, round(self.at * total))
        if self.step >= total:
            raise ConfigError(f"at={self.at} is not before the last of {total} steps: the model would never get dense.")
        sparse = any(isinstance(module, MonarchWeight) for module in model.modules())
        if not sparse and done < self.step:
            raise ConfigError(f"{type(model).__name__} has no Monarch weight to multiply out after step {self.step}.")
        if sparse and done >= self.step and self.watched is None:
            raise ConfigError(
                f"Training goes on at step {done}, after the switch at {self.step}, and the callback couldn't see what "
                "weights were loaded: pass it to the trainer when that is made."
            )
        if self.watched is not None:
            self.watched.remove()

    def after(self, done: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Step ``done`` is over."""
        if done >= self.step and any(isinstance(module, MonarchWeight) for module in model.modules()):
            densify(model, optimizer, state=self.state)


def refuse_many(processes: int, why: str | None = None) -> None:
    """Wrappers for several processes hold on to the parameters that they were made with."""
    if processes > 1 or why:
        raise ConfigError(
            f"DensifyCallback replaces parameters, and {why or f'training in {processes} processes'} doesn't follow: "
            "stop at the switch, call monarch_fx.densify, and go on with a new trainer."
        )
