"""What is refused before anything is changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from monarch_fx.errors import (
    ConfigError,
    MetaDeviceError,
    NotAModuleError,
    PlanMismatchError,
    WeightError,
    WrappedModelError,
)
from monarch_fx.layers import MonarchWeight
from monarch_fx.passes.candidates import tied_names
from monarch_fx.records import Candidate, Plan


def check_model(model: Any) -> nn.Module:
    """The model itself, if it is a plain module.

    Raises:
        NotAModuleError: It is not an ``nn.Module``.
        WrappedModelError: It is compiled, scripted, or wrapped for data parallelism; says what to pass instead.
        WeightError: A parameter of a lazy module has no shape yet.
    """
    check_unwrapped(model)
    for path, module in model.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule):
            if not path:
                raise WrappedModelError(
                    "The model is compiled: pass the plain model (model._orig_mod), then compile the result."
                )
            raise WrappedModelError(f"The module at {path!r} is compiled: rewrite the plain model, then compile.")
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise WeightError(f"The weight {name!r} of a lazy module has no shape yet: run the model on a batch first.")
    return model


def check_unwrapped(model: Any) -> None:
    """As ``check_model``, but a compiled model is allowed."""
    if not isinstance(model, nn.Module):
        raise NotAModuleError(
            f"The model is a {type(model).__name__}; monarch_fx takes a torch.nn.Module, a torch.fx.GraphModule or a "
            "torch.export.ExportedProgram."
        )
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise WrappedModelError("The model is a ScriptModule, which has no FX graph: pass the Python module.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise WrappedModelError(f"The model is wrapped in {kind}: pass model.module, then wrap the result.")
    for path, module in model.named_modules():
        name = type(module).__name__
        if name in ("FullyShardedDataParallel", "FSDPModule") or any(
            base.__name__ == "FSDPModule" for base in type(module).__mro__
        ):
            where = f" at {path!r}" if path else ""
            raise WrappedModelError(f"The model is sharded by FSDP{where}: rewrite it before it is sharded.")


def check_teacher(teacher: Any, model: nn.Module, plan: Plan) -> None:
    """Whether ``teacher`` is of the architecture that ``model`` was made from by ``plan``, and where ``model`` is.

    Raises:
        NotAModuleError, WrappedModelError: As ``check_model``.
        PlanMismatchError: It is of another architecture.
        ConfigError: It is on another device.
    """
    if fingerprint(check_model(teacher)) != plan.fingerprint:
        rewritten = any(isinstance(module, MonarchWeight) for module in teacher.modules())
        why = (
            "it is rewritten itself: give the dense model"
            if rewritten
            else "names, shapes or ties of parameters differ"
        )
        raise PlanMismatchError(
            f"The teacher, a {type(teacher).__name__}, has another architecture than the model that this "
            f"{type(model).__name__} was made from; {why}."
        )
    there, here = (next(both.parameters()).device for both in (teacher, model))
    if there != here:
        raise ConfigError(
            f"The teacher, a {type(teacher).__name__}, is on {there}, the model on {here}: move one to the other."
        )


def check_weights(model: nn.Module, candidates: Sequence[Candidate], *, values: bool) -> None:
    """Whether every candidate's weight can be projected; its numbers are only looked at where ``values`` is set.

    Raises:
        WeightError: A weight is quantised, sparse, integer or complex, or holds NaN or infinity; it is named.
        MetaDeviceError: A part of the model is on the meta device where values are needed.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in dict.fromkeys(c.parameter for c in candidates):
        parameter = parameters[name]
        if parameter.is_quantized or parameter.layout != torch.strided:
            kind = "quantised" if parameter.is_quantized else f"sparse ({parameter.layout})"
            raise WeightError(f"The weight {name!r} is {kind}: dequantise or densify it, or exclude it.")
        if not parameter.dtype.is_floating_point or parameter.element_size() < 2:
            raise WeightError(
                f"The weight {name!r} has dtype {parameter.dtype}; float64, float32, bfloat16 and float16 can be "
                "projected: convert it, or exclude it."
            )
        if not values:
            continue
        if parameter.is_meta:
            raise MetaDeviceError(f"The weight {name!r} is on the meta device and has no values: load the model first.")
        finite = torch.isfinite(parameter.detach())
        if not finite.all():
            bad = int((~finite).sum())
            raise WeightError(
                f"The weight {name!r} holds {bad} NaN or infinite values of {parameter.numel()}: mend or exclude it."
            )


def on_meta(model: nn.Module) -> bool:
    """Whether the whole model is on the meta device.

    Raises:
        MetaDeviceError: Only a part of it is; names the first weight there.
    """
    meta = [name for name, p in model.named_parameters() if p.is_meta]
    if meta and len(meta) < len(list(model.parameters())):
        raise MetaDeviceError(
            f"{len(meta)} parameters are on the meta device and the others are not (the first is {meta[0]!r}): load "
            "all of the model, or none of it to plan only."
        )
    return bool(meta)


def check_runs(model: Any) -> None:
    """Whether it can run on calibration batches.

    Raises:
        NotAModuleError, WrappedModelError: As ``check_model``.
        ConfigError: It is an ExportedProgram.
        MetaDeviceError: It is on the meta device, or a part of it is.
    """
    if isinstance(model, torch.export.ExportedProgram):
        raise ConfigError(
            "An ExportedProgram can't be calibrated: rewrite the module that it was exported from, and export again."
        )
    if on_meta(check_model(model)):
        raise MetaDeviceError(f"{type(model).__name__} is on the meta device: it can't run calibration batches.")


def fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes and ties of all parameters; never of values, device or dtype."""
    ties = tied_names(model)
    rows = [
        f"{name} {tuple(p.shape)} {ties.get(name, '')}" for name, p in model.named_parameters(remove_duplicate=False)
    ]
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16]


def check_plan(model: nn.Module, plan: Any) -> None:
    """Whether ``plan`` was made for this architecture.

    Raises:
        PlanMismatchError: It was not; names what differs. Or it is no plan.
    """
    if not isinstance(plan, Plan):
        raise PlanMismatchError(
            f"plan is a {type(plan).__name__}: give a Plan; Plan.from_json(text) reads a saved one."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for decision in plan.decisions:
        candidate = decision.candidate
        parameter = parameters.get(candidate.parameter)
        if parameter is None or tuple(parameter.shape) != candidate.parameter_shape:
            has = "no such parameter" if parameter is None else f"shape {tuple(parameter.shape)}"
            raise PlanMismatchError(
                f"The plan is for another architecture: it has {candidate.parameter!r} of shape "
                f"{candidate.parameter_shape}, the model has {has}."
            )
        shape = decision.shape
        if shape is not None and shape.rank > shape.full_rank:
            raise PlanMismatchError(
                f"The plan gives {candidate.name!r} blocks of {shape.s} x {shape.p} with rank {shape.rank}: at "
                f"{shape.full_rank} they are exact. Make the plan again, or edit it with Plan.with_shape."
            )
    for order in plan.orders:
        for name, dimension in order.along:
            size = parameters[name].shape[dimension] if name in parameters else 0
            if sorted(order.order) != list(range(size)):
                raise PlanMismatchError(
                    f"The plan's order of the hidden features of {name!r} is no permutation of the {size} that the "
                    "model has there: make the plan again."
                )
    if plan.fingerprint != fingerprint(model):
        raise PlanMismatchError(
            f"The plan is for another architecture: names, shapes or ties of parameters differ (fingerprint "
            f"{plan.fingerprint}, the model's is {fingerprint(model)})."
        )


def total_params(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors)
