"""Sparse-to-dense training ("reverse sparsification"; Dao et al. 2022, section 4.2): factors become dense weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from monarch_fx.errors import ConfigError, OptimizerError, OptimizerStateWarning
from monarch_fx.layers import MonarchWeight
from monarch_fx.passes.checks import check_unwrapped
from monarch_fx.rewritten import make_dense
from monarch_fx.training.groups import FACTORS, KIND, MATRICES
from monarch_fx.training.transport import first_moment, second_moment

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")
COUNTERS = ("step", "mu_product")
# They need a state that only their constructor makes, one state for all parameters, or one on every machine.
REFUSED = ("Adagrad", "LBFGS", "ZeroRedundancyOptimizer")
NAMED = 5  # weights in a warning

State = dict[str, Any]
Moment = Callable[..., Tensor]


def densify(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, state: str = "transport"
) -> tuple[nn.Module, torch.optim.Optimizer | None]:
    """Multiplies the factors of every Monarch weight out, in mid-training; in place, between two optimizer steps.

    Outputs stay the same up to rounding. Every other parameter keeps its values and its optimizer state. A dense weight
    takes the place of its first factor in its parameter group, and with it the group's options; in groups made by
    ``parameter_groups`` it goes to the matrices. No group is added or taken away, so that learning-rate schedulers go
    on. Gradients of factors are dropped.

    Args:
        model: Any module that has Monarch weights in it, also compiled. An averaged copy of it
            (``torch.optim.swa_utils.AveragedModel``) is densified by itself, before it is updated again:
            ``densify(averaged)``.
        optimizer: What trains the factors, all of them that are not frozen. Where there are several, densify with each
            of them the part of the model that it trains.
        state: ``"transport"``: a dense weight's momentum is the smallest gradient, in Frobenius norm, that the factors'
            momenta tell of; its second moments are a fit of rank one in each block; its step count is theirs. SGD,
            Adam, AdamW, NAdam, RAdam, Lion and all others that keep no other state can be transported; where another
            one keeps more, or factors are complex, these weights start again, with a warning. ``"restart"``: dense
            weights have no state yet.

    Returns:
        ``model`` and ``optimizer``, the same objects.

    Raises:
        ConfigError: ``state`` is neither, or the model has no Monarch weight.
        NotAModuleError, WrappedModelError: The model is no module, or wrapped by DDP or FSDP.
        OptimizerError: A factor is missing from the optimizer or in it twice, or the optimizer is an Adagrad, L-BFGS or
            sharded one. Nothing has been changed then.

    Warns:
        OptimizerStateWarning: The state of a weight's factors can't be transported.
    """
    if state not in ("transport", "restart"):
        raise ConfigError(f'state must be "transport" or "restart", got {state!r}.')
    check_unwrapped(model)
    weights = {module: name for name, module in model.named_modules() if isinstance(module, MonarchWeight)}
    if not weights:
        raise ConfigError(
            f"{type(model).__name__} has no Monarch weight to multiply out: it was not rewritten, or is dense already."
        )
    if optimizer is not None:
        _check_optimizer(optimizer, weights)
    dense = {weight: weight.multiplied_out() for weight in weights}
    states: dict[MonarchWeight, State] = {}
    if optimizer is not None and state == "transport":
        states = _transported(weights, optimizer.state)
    ordered = [] if optimizer is None else [_is_ordered(group, model) for group in optimizer.param_groups]
    make_dense(model, dense)
    if optimizer is not None:
        _replace(optimizer, dense, states)
        for group, was_ordered in zip(optimizer.param_groups, ordered, strict=True):
            if was_ordered:
                _order(group, model)
    return model, optimizer


def _check_optimizer(optimizer: Any, weights: dict[MonarchWeight, str]) -> None:
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps the user's own
    kinds = {base.__name__ for base in type(inner).__mro__}
    if not isinstance(inner, torch.optim.Optimizer) or kinds.intersection(REFUSED):
        raise OptimizerError(
            f"The state of {type(inner).__name__} can't be changed for single parameters: densify the model alone, and "
            "make a new optimizer."
        )
    held: dict[int, int] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            held[id(p)] = held.get(id(p), 0) + 1
    for weight, name in weights.items():
        for key, factor in weight.named_parameters():
            count = held.get(id(factor), 0)
            if count > 1:
                raise OptimizerError(f"The optimizer holds {name}.{key} {count} times: each parameter must be in once.")
            if count == 0 and factor.requires_grad:
                raise OptimizerError(
                    f"The optimizer doesn't hold {name}.{key}, which isn't frozen: pass the optimizer that was made "
                    "for this model's parameters after it was rewritten, or the part of the model that it trains."
                )


def _transported(weights: dict[MonarchWeight, str], states: Any) -> dict[MonarchWeight, State]:
    """The states of dense weights, of those whose factors have one that can be carried over."""
    carried: dict[MonarchWeight, State] = {}
    lost: dict[str, list[str]] = {}
    for weight, name in weights.items():
        parts = {key: states.get(factor, {}) for key, factor in weight.named_parameters()}
        if any(parts.values()):
            why = "their factors are complex" if weight.is_complex() else _obstacle(list(parts.values()))
            if why is None:
                carried[weight] = _carried(weight, parts)
            else:
                lost.setdefault(why, []).append(name)
    for why, names in lost.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        warnings.warn(
            f"The optimizer's state of {', '.join(names[:NAMED])}{more} can't be carried over to dense weights, since "
            f"{why}: it starts again.",
            OptimizerStateWarning,
            stacklevel=3,
        )
    return carried


def _obstacle(parts: list[State]) -> str | None:
    """Why the states of a weight's factors make none of the dense weight."""
    unknown = set().union(*parts) - {*FIRST_MOMENTS, *SECOND_MOMENTS, *COUNTERS}
    if unknown:
        return f"it holds {', '.join(sorted(unknown))}"
    counts = [{key: float(part[key]) for key in COUNTERS if key in part} for part in parts]
    alike = all(part.keys() == parts[0].keys() for part in parts) and all(count == counts[0] for count in counts)
    return None if alike else "their factors were not updated equally often"


def _carried(weight: MonarchWeight, parts: dict[str, State]) -> State:
    made: State = {}
    for key, value in next(iter(parts.values())).items():
        if key in COUNTERS or value is None:
            made[key] = value.clone() if isinstance(value, Tensor) else value
        else:
            moment = first_moment if key in FIRST_MOMENTS else second_moment
            made[key] = _assembled(weight, {part: state[key] for part, state in parts.items()}, moment)
    return made


@torch.no_grad()
def _assembled(weight: MonarchWeight, values: dict[str, Tensor], moment: Moment) -> Tensor:
    """The moments of a whole parameter: those of structured pieces worked out, those of dense ones as they are."""
    wide = torch.promote_types(weight.own_dtype, torch.float32)
    pieces: list[Any] = []
    for i, view in enumerate(weight.views):
        monarch, suffix = weight.monarch(i), weight.suffix(i)
        if monarch is None:
            pieces.append((view, values[f"dense{suffix}"].to(wide)))
        else:
            four = (monarch.R, monarch.L, values[f"R{suffix}"], values[f"L{suffix}"])
            pieces.append((view, moment(monarch.shape, *(t.to(wide) for t in four))))
    rest = values["rest"].to(wide) if "rest" in values else None
    return MonarchWeight(weight.shape, pieces, rest).to_dense_root().to(next(iter(values.values())).dtype)


def _replace(optimizer: Any, dense: dict[MonarchWeight, nn.Parameter], states: dict[MonarchWeight, State]) -> None:
    """Puts dense parameters and their state where their factors were."""
    owner = {id(factor): weight for weight in dense for factor in weight.parameters()}
    matrices = next((group for group in optimizer.param_groups if group.get(KIND) == MATRICES), None)
    placed: set[MonarchWeight] = set()
    moved: list[tuple[nn.Parameter, str]] = []
    for group in optimizer.param_groups:
        kept: list[tuple[nn.Parameter, str]] = []
        for p, name in zip(group["params"], group.get("param_names", [""] * len(group["params"])), strict=True):
            weight = owner.get(id(p))
            if weight is None:
                kept.append((p, name))
                continue
            optimizer.state.pop(p, None)
            if weight not in placed:
                placed.add(weight)
                away = matrices is not None and group.get(KIND) == FACTORS
                (moved if away else kept).append((dense[weight], name.rpartition(".")[0]))
                if states.get(weight):
                    optimizer.state[dense[weight]] = states[weight]
        _fill(group, kept)
    if moved:
        _fill(matrices, [*_named(matrices), *moved])


def _named(group: Any) -> list[tuple[nn.Parameter, str]]:
    return list(zip(group["params"], group.get("param_names", [""] * len(group["params"])), strict=True))


def _fill(group: Any, named: list[tuple[nn.Parameter, str]]) -> None:
    group["params"][:] = [p for p, _ in named]
    if "param_names" in group:
        group["param_names"][:] = [name for _, name in named]


def _places(group: Any, model: nn.Module) -> list[int]:
    """Where each of the group's parameters stands among the model's, as far as they are the model's."""
    places = {id(p): i for i, p in enumerate(model.parameters())}
    return [places.get(id(p), -1) for p in group["params"]]


def _is_ordered(group: Any, model: nn.Module) -> bool:
    places = _places(group, model)
    return places == sorted(places)


def _order(group: Any, model: nn.Module) -> None:
    """In the model's order again, so that an optimizer made for the dense model can load this one's state."""
    named = _named(group)
    order = sorted(range(len(named)), key=_places(group, model).__getitem__)
    _fill(group, [named[i] for i in order])
