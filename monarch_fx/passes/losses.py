"""A model's output -> the gradient of a loss there, whose second moments tell what the model's outputs feel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

CROSS_ENTROPY = "the cross-entropy of its logits"
OUTPUT_ERROR = "half the relative squared error of its output"


class NotDifferentiableError(RuntimeError):
    """The output has no tensor that gradients could start from."""


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
        NotDifferentiableError: The output has no floating-point tensor, or it doesn't depend on any product.
    """
    logits = getattr(output, "logits", None)
    categorical = isinstance(logits, Tensor) and logits.ndim in (2, 3) and logits.shape[-1] > 1
    floats = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    if categorical and isinstance(logits, Tensor):
        tensor = logits
    elif floats:
        tensor = floats[0]
    else:
        raise NotDifferentiableError(f"its output, a {type(output).__name__}, has no floating-point tensor")
    if not tensor.requires_grad:
        raise NotDifferentiableError("its output doesn't depend on any product in a differentiable way")
    values = tensor.detach().float()
    rows = values.reshape(-1, values.shape[-1])
    counted = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if mask is not None and mask.shape == tensor.shape[:-1]:
        counted = mask.reshape(-1)
    gradient = torch.zeros_like(rows)
    make = _cross_entropy if categorical else _output_error
    gradient[counted] = make(rows[counted], draw)
    return tensor, gradient.view_as(tensor).to(tensor.dtype), CROSS_ENTROPY if categorical else OUTPUT_ERROR


def _cross_entropy(logits: Tensor, draw: torch.Generator) -> Tensor:
    p = logits.softmax(-1)
    labels = torch.multinomial(p, 1, generator=draw)
    return p.scatter_add_(-1, labels, -torch.ones_like(labels, dtype=p.dtype))


def _output_error(y: Tensor, draw: torch.Generator) -> Tensor:
    spread = (y - y.mean(0)).square().mean() if len(y) > 1 else y.square().mean()
    scale = (spread * y.shape[-1]).clamp_min(torch.finfo(y.dtype).tiny).rsqrt()
    return scale * torch.randn(y.shape, generator=draw, device=y.device)
