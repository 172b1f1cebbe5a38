"""What can be asked of a rewritten model: its report, its graph, its true loss, and its dense weights back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from tqdm.auto import tqdm

from monarch_fx.errors import ConfigError, MonarchError
from monarch_fx.layers import MonarchWeight
from monarch_fx.passes import checks, graph, rewrite
from monarch_fx.passes.capture import capture
from monarch_fx.passes.inputs import check_batches, each_inputs, inputs_of
from monarch_fx.passes.listing import listing
from monarch_fx.passes.losses import distance
from monarch_fx.passes.modes import evaluating
from monarch_fx.records import Report

_REPORT = "_monarch_fx_report"


def report(model: nn.Module | torch.export.ExportedProgram) -> Report:
    """What ``monarchify`` did to ``model``; of a program what it did to this object, which its file doesn't hold.

    Raises:
        MonarchError: The model was not made by ``monarchify``.
    """
    made = getattr(model, _REPORT, None)
    if not isinstance(made, Report):
        raise MonarchError(f"{type(model).__name__} has no report: it was not made by monarch_fx.monarchify().")
    return made


def note(model: nn.Module | torch.export.ExportedProgram, made: Report) -> None:
    """Replaces the report of a model."""
    setattr(model, _REPORT, made)


def print_graph(model: nn.Module, example_inputs: Any = None) -> None:
    """Prints the graph of ``model``, one line a node, with one readable line for every ``monarch_bmm``.

    Args:
        model: A rewritten model, or any other.
        example_inputs: As for ``plan``; without them the model's own dummy inputs are used.

    Raises:
        ExampleInputsError, CaptureError: The model can't be captured on the inputs.
    """
    model = checks.check_model(model)
    print("\n".join(listing(capture(model, inputs_of(model, example_inputs)))))


def measure_loss(model: nn.Module, teacher: nn.Module, batches: Iterable[Any]) -> float:
    """What rewriting really costs, to be read beside the loss predicted; both models are run in eval mode.

    Args:
        model: What ``monarchify`` returned, recovered or not.
        teacher: The dense model that it was made from.
        batches: Real inputs, each in one of the forms of ``example_inputs``. Tokens that an ``attention_mask`` hides
            don't count.

    Returns:
        How far the outputs are from the teacher's, mean over the batches: the divergence of logits a token, else half
        the relative squared error of the first floating-point tensor. ``report(model)`` shows it from now on.

    Raises:
        MonarchError: ``model`` was not made by ``monarchify``.
        ConfigError: There are no batches, or ``batches`` is a single one.
        NotAModuleError, WrappedModelError, PlanMismatchError: ``teacher`` is no plain module, or another architecture.
        ExampleInputsError, OutputError: A model can't run on a batch, or returns no floating-point tensor.
    """
    made = report(model)
    check_batches(batches, "batches")
    checks.check_teacher(teacher, model, made.plan)
    device = next(model.parameters()).device
    found = []
    with evaluating(model, teacher):
        for given in each_inputs(model, tqdm(batches, desc="loss", unit="batch", leave=False), "batches"):
            inputs = given.on(device)
            with torch.no_grad():
                output, wanted = (inputs.into(both) for both in (model, teacher))
            found.append(float(distance(output, wanted, inputs.mask(model))))
    if not found:
        raise ConfigError("measure_loss needs batches, got none.")
    loss = sum(found) / len(found)
    note(model, dataclasses.replace(made, measured_loss=loss))
    return loss


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every Monarch weight is a plain dense parameter again; same outputs.

    Raises:
        NotAModuleError: ``model`` is not an ``nn.Module``.
    """
    model = checks.check_model(model)
    dense = rewrite.copy_without(model, ())
    make_dense(dense)
    return dense


def make_dense(model: nn.Module, dense: Mapping[MonarchWeight, nn.Parameter] | None = None) -> None:
    """``to_dense`` in place, also of what is rewritten inside ``model``; ``dense``: its parameters, where there are."""
    for module in list(model.modules()):
        if isinstance(module, fx.GraphModule):
            graph.conceal(module)
    rewrite.restore_dense(model, dense)
    for module in model.modules():
        if hasattr(module, _REPORT):
            delattr(module, _REPORT)
