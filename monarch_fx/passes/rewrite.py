"""Model + decisions + factors -> rewritten model: every rewritten parameter makes room for a MonarchWeight."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from monarch_fx.errors import MonarchError
from monarch_fx.layers import MonarchLinear, MonarchWeight
from monarch_fx.records import Candidate, Decision, Plan
from monarch_fx.structure import Monarch, MonarchShape
from monarch_fx.views import MatrixView

# The name of a product, its dense matrix (or batch of matrices), and the structure that is made of it.
Make = Callable[[str, torch.Tensor, MonarchShape], Monarch]


def by_parameter(plan: Plan) -> dict[str, list[Decision]]:
    """The decisions of each parameter of which anything is rewritten."""
    names = dict.fromkeys(d.candidate.parameter for d in plan.rewritten)
    return {name: [d for d in plan.decisions if d.candidate.parameter == name] for name in names}


def build_weight(parameter: torch.Tensor, decisions: Sequence[Decision], make: Make) -> MonarchWeight:
    """The module that stands for ``parameter``: structured pieces, dense pieces, and the entries no product reads."""
    pieces: list[tuple] = []
    free = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
    for decision in decisions:
        name, view, shape = decision.candidate.name, decision.candidate.view, decision.shape
        dense = view.gather(parameter)
        pieces.append((view, dense.clone() if shape is None else make(name, dense, shape)))
        view.scatter(free, torch.zeros(view.numel, dtype=torch.bool, device=parameter.device))
    rest = parameter.detach()[free].clone() if bool(free.any()) else None
    return MonarchWeight(parameter.shape, pieces, rest, requires_grad=parameter.requires_grad)


def dense_weight(parameter: torch.Tensor, views: Sequence[MatrixView]) -> MonarchWeight:
    """The module that stands for ``parameter`` with every piece dense, for reading; values are shared where views allow
    it."""
    free = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
    for view in views:
        view.scatter(free, torch.zeros(view.numel, dtype=torch.bool, device=parameter.device))
    rest = parameter.detach()[free] if bool(free.any()) else None
    pieces = [(view, view.gather(parameter)) for view in views]
    return MonarchWeight(parameter.shape, pieces, rest, requires_grad=False)


def install(model: nn.Module, name: str, weight: MonarchWeight) -> None:
    """Puts ``weight`` where the parameter ``name`` is, under the same name."""
    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    names = list(owner._parameters)
    weight.behind = tuple(names[names.index(key) + 1 :])
    del owner._parameters[key]
    weight.train(owner.training)
    owner.register_module(key, weight)


def shift_bias(model: nn.Module, candidate: Candidate, shift: torch.Tensor) -> None:
    """Adds ``shift`` (out,) to the bias of its own that a product has; in place."""
    assert candidate.own_bias is not None
    name, start = candidate.own_bias
    bias = dict(model.named_parameters(remove_duplicate=False))[name]
    values = bias.data.flatten().clone()  # what was made in inference mode can't be changed in place
    values[start : start + len(shift)] += shift.to(values)
    bias.data = values.view(bias.shape)


def copy_without(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A deep copy of ``model``, ties kept, in which the parameters ``names`` are empty placeholders.

    Raises:
        MonarchError: The model can't be copied.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return copy_with(model, {id(parameters[name]): nn.Parameter(torch.empty(0), requires_grad=False) for name in names})


def copy_with(model: nn.Module, others: dict[int, Any]) -> nn.Module:
    """A deep copy of ``model`` that has ``others`` in the places of the objects with these ids.

    Raises:
        MonarchError: The model can't be copied.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.export's own modules warn when they are copied
            return copy.deepcopy(model, others)
    except Exception as error:
        raise MonarchError(
            f"{type(model).__name__} can't be copied ({type(error).__name__}: {error}): give its class a __deepcopy__ "
            "that leaves that out; monarchify(inplace=True) without calibration and anchor needs no copy."
        ) from error


def restore_dense(model: nn.Module, dense: Mapping[MonarchWeight, nn.Parameter] | None = None) -> None:
    """Puts a dense parameter in the place of every MonarchWeight, ties kept; in place.

    Args:
        dense: The parameters; by default the weights are multiplied out.
    """
    made = dict(dense or {})
    for module in list(model.modules()):
        for key, child in list(module._modules.items()):
            if isinstance(child, MonarchWeight):
                if child not in made:
                    made[child] = child.multiplied_out()
                del module._modules[key]
                module.register_parameter(key, made[child])
                for name in [name for name in module._parameters if name in child.behind]:
                    module._parameters[name] = module._parameters.pop(name)  # optimizers know parameters by their order
        if isinstance(module, MonarchLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
