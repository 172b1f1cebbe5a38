"""Sparse-to-dense training with ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from monarch_fx.errors import ConfigError
from monarch_fx.training.switch import Switch, refuse_many


class DensifyCallback(TrainerCallback):
    """``Trainer(model, ..., callbacks=[DensifyCallback(at=0.5)])``: ``monarch_fx.densify`` in mid-training.

    Goes with mixed precision, accumulation, clipping, ``torch_compile`` and the trainer's own optimizer and schedule.
    Checkpoints from after the switch hold a dense model, which ``from_pretrained`` reads; ``resume_from_checkpoint``
    takes those from before and from after it.

    Args:
        at: The optimizer step after which, or a share of all steps in (0, 1).
        state: ``"transport"`` or ``"restart"``, as of ``monarch_fx.densify``.

    Raises:
        ConfigError: ``at`` has no meaning; once training begins, where the switch would never come, the model has no
            Monarch weight, several processes or shards train it, or ``load_best_model_at_end`` is set.
    """

    def __init__(self, at: int | float, *, state: str = "transport") -> None:
        self.switch = Switch(at, state)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.switch.watch(kwargs["model"], kwargs.get("optimizer"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        refuse_many(args.world_size, "DeepSpeed" if args.deepspeed else "FSDP" if args.fsdp else None)
        if args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end=True may load factors into a dense model: load the best checkpoint yourself."
            )
        self.switch.begin(kwargs["model"], state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.switch.after(state.global_step, kwargs["model"], kwargs["optimizer"])
