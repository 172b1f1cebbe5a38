"""What a training step costs, dense against rewritten."""

from __future__ import annotations

from torch import nn

from monarch_fx.costs import DeviceProfile, resolve
from monarch_fx.planning.workload import Run
from monarch_fx.records import Decision, TrainingSummary
from monarch_fx.rewritten import report


def training_summary(model: nn.Module, device: str | DeviceProfile | None = None) -> TrainingSummary:
    """Parameters, FLOPs and predicted time of a training step in the products of a rewritten model.

    For the tokens and the dtype of its plan.

    Args:
        model: Made by ``monarchify``.
        device: As of ``monarch_fx.plan``; default the one that the model was planned for.

    Raises:
        MonarchError: The model was not made by ``monarchify``, or is dense again.
        DeviceProfileError: There is no such profile here, such as one that was measured on another machine.
    """
    done = report(model)
    plan = done.plan
    profile = resolve(plan.device if device is None else device, next(model.parameters()).device)
    run = Run(profile, dict(plan.tokens), "training", plan.dtype)

    def flops(decision: Decision, params: int) -> float:
        """A multiplication and an addition for every row and parameter: forward, and for both gradients."""
        return 3 * 2 * params * sum(rows * weight for rows, weight in run.rows(decision.candidate).items())

    return TrainingSummary(
        params_before=done.params_before,
        params_after=done.params_after,
        dense_flops=sum(flops(d, d.candidate.params) for d in plan.decisions),
        flops=sum(flops(d, d.params) for d in plan.decisions),
        dense_s=sum(run.seconds(d.candidate, None) for d in plan.decisions),
        time_s=sum(run.seconds(d.candidate, d.shape) for d in plan.decisions),
        tokens=plan.tokens,
        dtype=plan.dtype,
        device=profile.name,
    )
