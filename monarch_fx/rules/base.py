"""What a rule sees and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from monarch_fx.views import Dim, MatrixView, StridedView


@dataclass(frozen=True)
class Static:
    """A static operand: a view of one parameter.

    Attributes:
        view: Its sizes and strides in the parameter. Where dimension 0 is indexed by a tensor (experts chosen at run
            time), the dimension keeps the parameter's size and stride here.
        gathered: Dimension 0 is indexed by a 1-D tensor.
        picked: The parameter's dimension that a 0-D tensor indexed away.
    """

    view: StridedView
    gathered: bool = False
    picked: Dim | None = None

    @property
    def ndim(self) -> int:
        return self.view.ndim

    def matrix(self, out: Sequence[int], inp: Sequence[int], batch: Sequence[int] = ()) -> MatrixView:
        matrix = self.view.matrix(out, inp, batch)
        if self.picked is None:
            return matrix
        return MatrixView((self.picked, *matrix.batch), matrix.out, matrix.inp, matrix.offset)


class Multiply(Protocol):
    """Multiplies rows with the structured matrix: x (*, in_features) -> (*, out_features), bias added."""

    def __call__(self, x: Any, bias: Any = None, *, offs: Any = None) -> Any: ...


@dataclass(frozen=True)
class Product:
    """A product with a static operand, recognised.

    Attributes:
        matrix: The matrix (out, in), or the batch of matrices, in the parameter.
        x: The activation.
        rewrite: Computes the call's value, given the structured product.
        thin: Only one in ``thin`` rows of ``x`` is multiplied (strided 1x1 convolution).
        bias: The operand that the structured product is given as its bias, if any.
    """

    matrix: MatrixView
    x: Any
    rewrite: Callable[[Multiply], Any]
    thin: int = 1
    bias: Any = None


@dataclass(frozen=True)
class Refusal:
    """A product with a static operand that no rule can rewrite, and why."""

    reason: str


# A rule takes the call's own arguments, with every static operand given as ``Static``; activations are tensors, fake
# tensors or proxies. None means: no static operand takes part as a matrix.
Rule = Callable[..., "Product | Refusal | None"]


def ndim(x: Any) -> int:
    """Dimensions of an activation, also where it is a proxy of a graph that is being rewritten.

    Raises:
        ValueError: Its shape was not captured.
    """
    value: Any = x.node.meta.get("val") if isinstance(x, fx.Proxy) else x
    if getattr(value, "shape", None) is None:
        raise ValueError("the activation's shape is not known (give example_inputs)")
    return len(value.shape)


def op_name(target: Any) -> str:
    """One name for the torch function, the tensor method and the aten operator of the same meaning."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        target = target._overloadpacket
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, name = target._qualified_op_name.split("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    name = str(getattr(target, "__name__", target))
    if name == "__get__":  # a property of torch.Tensor, such as T
        return str(target.__self__.__name__)
    return "getitem" if name == "__getitem__" else name
