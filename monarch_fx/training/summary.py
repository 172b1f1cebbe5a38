"""What a training step costs, dense against rewritten."""

from __future__ import annotations

from torch import nn

from monarch_fx.costs import DTYPE_BYTES, DeviceProfile, resolve
from monarch_fx.layers import MonarchWeight
from monarch_fx.planning.workload import Run
from monarch_fx.records import Decision, TrainingSummary
from monarch_fx.rewritten import report


def training_summary(model: nn.Module, device: str | DeviceProfile | None = None) -> TrainingSummary:
    """Parameters, FLOPs, predicted time and kept activations of a training step in the products of a rewritten model.

    For the tokens and the dtype of its plan, and for what ``recompute_intermediates`` has set.

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

    def rows(decision: Decision) -> float:
        """Of all calls."""
        return sum(count * weight for count, weight in run.rows(decision.candidate).items())

    def flops(decision: Decision, params: int) -> float:
        """A multiplication and an addition for every row and parameter: forward, and for both gradients."""
        return 3 * 2 * params * rows(decision)

    def again(decision: Decision) -> float:
        """The same of a first half that runs a second time."""
        shape = decision.shape
        if shape is None or not recomputed(decision):
            return 0.0
        return 2 * rows(decision) * shape.nblocks_out * shape.nblocks_in * shape.rank * shape.p

    def recomputed(decision: Decision) -> bool:
        weight = model.get_submodule(decision.candidate.parameter) if decision.shape else None
        return isinstance(weight, MonarchWeight) and weight.recompute and decision.candidate.batch == 1

    def kept(decision: Decision, rewritten: bool) -> float:
        """Numbers: the inputs, and the intermediate of a Monarch product."""
        candidate, shape = decision.candidate, decision.shape
        numbers = candidate.in_features / (1 + len(candidate.beside))
        if rewritten and shape is not None and not recomputed(decision):
            numbers += shape.nblocks_out * shape.nblocks_in * shape.rank
        return numbers * candidate.batch * rows(decision)

    return TrainingSummary(
        params_before=done.params_before,
        params_after=done.params_after,
        dense_flops=sum(flops(d, d.candidate.params) for d in plan.decisions),
        flops=sum(flops(d, d.params) + again(d) for d in plan.decisions),
        dense_s=sum(run.seconds(d.candidate, None) for d in plan.decisions),
        time_s=sum(run.seconds(d.candidate, d.shape, recomputed(d)) for d in plan.decisions),
        dense_kept_bytes=DTYPE_BYTES[plan.dtype] * sum(kept(d, rewritten=False) for d in plan.decisions),
        kept_bytes=DTYPE_BYTES[plan.dtype] * sum(kept(d, rewritten=True) for d in plan.decisions),
        tokens=plan.tokens,
        dtype=plan.dtype,
        device=profile.name,
    )
