"""Parameter groups: weight decay that acts on products, a learning rate for factors."""

from __future__ import annotations

from typing import Any

from torch import nn

from monarch_fx.errors import ConfigError
from monarch_fx.layers import MonarchWeight

KIND, MATRICES, FACTORS = "monarch", "matrices", "factors"  # the entry that says which group it is, and two answers


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, factor_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer with decoupled weight decay (AdamW).

    The decay acts on the product: W <- (1 - lr weight_decay) W is what factors give that shrink by its root each, which
    is half the decay to first order in ``lr weight_decay``. It is divided by ``factor_lr``, since optimizers decay at
    the learning rate of the group.

    Args:
        model: A model with Monarch weights, or without any.
        lr: Learning rate of everything but the factors.
        weight_decay: Of matrices and of the products of factors. Vectors (biases, norms) don't decay.
        factor_lr: What the learning rate of the factors is multiplied with. Projected and initialised factors are
            balanced, so that Adam moves the product by about as much a step as it would a dense weight: 1 is a good
            start. In the benchmark ``factor-lr`` (small GPT-2, 4x4 blocks) 0.5, 1 and 2 ended within 0.011 of each
            other in loss after projection; from scratch 2 was better at the lowest rate and worse at the highest.

    Returns:
        Three groups, of matrices, of vectors and of factors, any of which may be empty; each says which in its entry
        ``"monarch"``. ``densify`` moves the products of factors to the matrices. Frozen parameters are left out.

    Raises:
        ConfigError: ``lr`` or ``factor_lr`` is not positive, ``weight_decay`` is negative.
    """
    for name, value, fits in (
        ("lr", lr, lr > 0),
        ("factor_lr", factor_lr, factor_lr > 0),
        ("weight_decay", weight_decay, weight_decay >= 0),
    ):
        if not fits:
            raise ConfigError(
                f"{name} must be {'at least' if name == 'weight_decay' else 'more than'} 0, got {value!r}."
            )
    weights = [module for module in model.modules() if isinstance(module, MonarchWeight)]
    factors = {id(p) for weight in weights for _, p in weight.named_factors()}
    pieces = {id(p) for weight in weights for p in weight.parameters()} - factors  # of packed weights, kept dense
    groups: dict[str, list[nn.Parameter]] = {MATRICES: [], "vectors": [], FACTORS: []}
    for p in model.parameters():
        if p.requires_grad:
            kind = FACTORS if id(p) in factors else MATRICES if p.ndim > 1 or id(p) in pieces else "vectors"
            groups[kind].append(p)
    rules = {
        MATRICES: {"lr": lr, "weight_decay": weight_decay},
        "vectors": {"lr": lr, "weight_decay": 0.0},
        FACTORS: {"lr": lr * factor_lr, "weight_decay": weight_decay / (2 * factor_lr)},
    }
    return [{KIND: kind, "params": parameters, **rules[kind]} for kind, parameters in groups.items()]
