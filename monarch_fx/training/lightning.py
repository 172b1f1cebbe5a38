"""Sparse-to-dense training with Lightning."""

from __future__ import annotations

from typing import Any

from torch import nn

from monarch_fx.errors import ConfigError
from monarch_fx.training.switch import Switch, refuse_many

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:
    from pytorch_lightning import Callback


class DensifyCallback(Callback):
    """``Trainer(callbacks=[DensifyCallback(at=0.5)])``: ``monarch_fx.densify`` in mid-training.

    For modules with one optimizer. ``fit(..., ckpt_path=...)`` takes checkpoints from before and from after the switch;
    the latter hold a dense model.

    Args:
        at: The optimizer step after which, or a share of all steps in (0, 1).
        state: ``"transport"`` or ``"restart"``, as of ``monarch_fx.densify``.

    Raises:
        ConfigError: ``at`` has no meaning; once training begins, where the switch would never come, the module has no
            Monarch weight or several optimizers, or several processes train it.
    """

    def __init__(self, at: int | float, *, state: str = "transport") -> None:
        super().__init__()
        self.switch = Switch(at, state)

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        if stage == "fit":
            refuse_many(trainer.world_size)
            self.switch.watch(pl_module, None)  # optimizers are made after weights are loaded

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        if len(trainer.optimizers) != 1:
            raise ConfigError(
                f"DensifyCallback is for one optimizer, the module has {len(trainer.optimizers)}: call "
                "monarch_fx.densify for each of them with the part of the model that it trains."
            )
        self.switch.begin(pl_module, trainer.global_step, trainer.estimated_stepping_batches)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.switch.after(trainer.global_step, pl_module, trainer.optimizers[0])
