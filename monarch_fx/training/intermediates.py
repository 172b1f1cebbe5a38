"""What a training step keeps of Monarch products for its backward pass."""

from __future__ import annotations

from torch import fx, nn

from monarch_fx.errors import MonarchError
from monarch_fx.layers import MonarchWeight
from monarch_fx.rules import op_name


def recompute_intermediates(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Makes the backward pass compute what lies between the factors anew, instead of keeping it; in place.

    A product keeps its intermediate for the gradient of L, ``tokens * nblocks_out * nblocks_in * rank`` numbers,
    besides the input that a dense layer keeps as well: at half the parameters together 1.1 to 2.5 times as much as the
    dense layer. Computed anew they are not kept, for one more first half (benchmark ``layers-train-gpu``). Keeping them
    is the faster choice, and the default; where whole blocks run under ``torch.utils.checkpoint`` nothing is kept
    anyway. Mixtures of experts and products under function transforms keep theirs.

    Args:
        model: A model with Monarch weights, rewritten or made of ``MonarchLinear``.
        enabled: False: keep intermediates again.

    Returns:
        The same model.

    Raises:
        MonarchError: The model has no Monarch weight.
    """
    weights = [module for module in model.modules() if isinstance(module, MonarchWeight)]
    if not weights:
        raise MonarchError(
            f"{type(model).__name__} has no Monarch weight: rewrite it with monarch_fx.monarchify() first."
        )
    for weight in weights:
        weight.recompute = enabled
    for module in model.modules():
        if isinstance(module, fx.GraphModule):  # its nodes were written when it was rewritten
            for node in module.graph.nodes:
                if op_name(node.target) == "monarch_fx::monarch_bmm":
                    node.kwargs = {**node.kwargs, "recompute": enabled}
            module.recompile()
    return model
