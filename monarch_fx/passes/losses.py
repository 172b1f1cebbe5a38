"""A model's output -> the gradient of a loss there, or its distance from another model's output."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from monarch_fx.errors import OutputError

CROSS_ENTROPY = "the cross-entropy of its logits"
OUTPUT_ERROR = "half the relative squared error of its output"


def main_tensor(output: Any) -> tuple[Tensor, bool]:
    """What a loss is taken of, and whether it is logits: ``output.logits``, or the first floating-point tensor that is
    no single number, in a tensor, a container or a dataclass.

    Raises:
        OutputError: The output has none.
    """
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.ndim in (2, 3) and logits.shape[-1] > 1:
        return logits, True
    leaves = pytree.tree_leaves(output)
    if dataclasses.is_dataclass(output) and any(leaf is output for leaf in leaves):  # PyTorch doesn't look into it
        leaves = pytree.tree_leaves(vars(output))
    floats = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.ndim]
    if not floats:
        raise OutputError(
            f"The model's output, a {type(output).__name__}, has no floating-point tensor with dimensions: let forward "
            "return one, alone or in a tuple, a dict or a dataclass."
        )
    return floats[0], False


def distance(output: Any, wanted: Any, mask: Tensor | None) -> Tensor:
    """How far an output is from another model's, a token: the divergence of its logits from those wanted, or half the
    relative squared error of its first floating-point tensor; differentiable in ``output``.

    Raises:
        OutputError: An output has no floating-point tensor with dimensions.
    """
    (tensor, categorical), (target, _) = main_tensor(output), main_tensor(wanted)
    rows, targets = (counted(t, mask).float() for t in (tensor, target.detach()))
    if categorical:
        divergence = F.kl_div(rows.log_softmax(-1), targets.log_softmax(-1), reduction="batchmean", log_target=True)
        return divergence.clamp_min(0)  # rounding takes those of nearly equal logits below
    return relative_error(rows, targets) / 2


def relative_error(rows: Tensor, wanted: Tensor) -> Tensor:
    """``||y - t||^2 / ||t - mean t||^2`` over rows (tokens, features)."""
    return (rows - wanted).square().sum() / _spread(wanted)


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (tokens, features) that count; ``mask`` (batch, tokens) is False for those that don't."""
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask]
    return x.reshape(-1, x.shape[-1])


def loss_gradient(output: Any, mask: Tensor | None, draw: torch.Generator) -> tuple[Tensor, Tensor, str]:
    """Where backpropagation starts: a tensor of the output, the gradient of a loss there, and what loss that is.

    Of ``output.logits`` it is the cross-entropy against labels that are drawn from the model's own distribution: the
    second moments of its gradients are the Fisher information exactly, and no labels are needed. Of any other output it
    is ``1/2 ||dy||^2 / ||y - mean y||^2`` for its first floating-point tensor: a random direction v has E[v v^T] = I,
    so that the second moments of J^T v are J^T J.

    Args:
        output: What the model returned.
        mask: (batch, tokens), False for tokens that don't count; None where all do.
        draw: The source of labels and directions, on the output's device.

    Returns:
        The tensor; its gradient, 0 for tokens that don't count and else with the loss of each token by itself, not the
        mean; and a description.

    Raises:
        OutputError: The output has no floating-point tensor with dimensions, or it doesn't depend on any product.
    """
    tensor, categorical = main_tensor(output)
    if not tensor.requires_grad:
        raise OutputError("The model's output doesn't depend on any product in a differentiable way.")
    values = tensor.detach().float()
    rows = values.reshape(-1, values.shape[-1])
    counts = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if mask is not None and mask.shape == tensor.shape[:-1]:
        counts = mask.reshape(-1)
    gradient = torch.zeros_like(rows)
    make = _cross_entropy if categorical else _output_error
    gradient[counts] = make(rows[counts], draw)
    return tensor, gradient.view_as(tensor).to(tensor.dtype), CROSS_ENTROPY if categorical else OUTPUT_ERROR


def _cross_entropy(logits: Tensor, draw: torch.Generator) -> Tensor:
    p = logits.softmax(-1)
    labels = torch.multinomial(p, 1, generator=draw)
    return p.scatter_add_(-1, labels, -torch.ones_like(labels, dtype=p.dtype))


def _output_error(y: Tensor, draw: torch.Generator) -> Tensor:
    scale = (_spread(y) / len(y)).rsqrt()
    return scale * torch.randn(y.shape, generator=draw, dtype=y.dtype, device=y.device)


def _spread(y: Tensor) -> Tensor:
    """The squares of what tokens differ from their mean, summed; of themselves where there is one, or all are alike."""
    numbers = torch.finfo(y.dtype)
    spread, energy = (y - y.mean(0)).square().sum(), y.square().sum()
    return torch.where(spread > numbers.eps * energy, spread, energy).clamp_min(numbers.tiny)
