"""What looks like a dense tensor, and isn't one: its products are recognised, its views are views.

``F.linear(x, self.weight)``, ``x @ self.W``, ``torch.einsum(..., self.W[:d])`` reach it through ``__torch_function__``:
the rules recognise the product, and ``monarch_bmm`` computes it. Any other operation gets the dense matrix, multiplied
out, with a warning; one that would write into it is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.variables import builtin as _dynamo_builtins

from monarch_fx.errors import StructureError
from monarch_fx.layers.attention import multi_head_attention
from monarch_fx.layers.multiply import multiplier, warn_dense
from monarch_fx.rules import RULES, Product, Static, op_name
from monarch_fx.views import VIEW_OPERATIONS, Dim, StridedView, contiguous_strides

if TYPE_CHECKING:
    from monarch_fx.layers.weight import MonarchWeight

# Dynamo turns ``W @ x`` into ``x.matmul(W)`` when W is no tensor: its table of reversed operators lacks matmul (2.11 to
# 2.14). With the entry it calls __rmatmul__, as eager mode does.
_dynamo_builtins.BUILTIN_TO_TENSOR_RFN_MAP.setdefault(operator.matmul, torch.Tensor.__rmatmul__)


class DenseLike:
    """What MonarchWeight and its views share: they look like the dense tensor, and products know them."""

    root: MonarchWeight
    strided: StridedView
    index: torch.Tensor | None = None
    picked: Dim | None = None
    cast: torch.dtype | None = None
    detached = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    @property
    def shape(self) -> torch.Size:
        sizes = self.strided.sizes
        if self.index is not None and self.picked is None:
            return torch.Size((*self.index.shape, *sizes[1:]))
        return torch.Size(sizes)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.cast or self.root.own_dtype

    @property
    def device(self) -> torch.device:
        return self.root.some_factor.device

    @property
    def requires_grad(self) -> bool:
        return not self.detached and any(factor.requires_grad for factor in self.root.parameters())

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        self.root.requires_grad_(wanted)

    @property
    def data(self) -> torch.Tensor:
        """What reads this is about to write."""
        raise _writing("data")

    @data.setter
    def data(self, value: Any) -> None:
        raise _writing("data")

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    is_nested = False
    is_sparse = False
    is_quantized = False

    @property
    def T(self) -> WeightView:  # noqa: N802 (torch.Tensor's own name)
        return view_of(self, "T")

    @property
    def mT(self) -> WeightView:  # noqa: N802
        return view_of(self, "mT")

    def viewed(self) -> WeightView:
        """The same as a view, which is what products read."""
        raise NotImplementedError

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def stride(self, dim: int | None = None) -> Any:
        return self.strided.strides if dim is None else self.strided.strides[dim]

    def is_contiguous(self) -> bool:
        return self.strided.strides == contiguous_strides(self.strided.sizes)

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        return self.dtype.is_complex

    # nn.Module has methods of these names that cast or move in place; a weight that is read must never do that.
    def to(self, *args: Any, **kwargs: Any) -> Any:
        """A cast is a view, which products know; on another device only the dense values are."""
        like = next((a for a in args if isinstance(a, (torch.Tensor, DenseLike))), None)
        dtype, device = (None, None) if like is None else (like.dtype, like.device)
        dtype = kwargs.get("dtype", next((a for a in args if isinstance(a, torch.dtype)), dtype))
        named = (a for a in args if isinstance(a, (str, torch.device, int)) and not isinstance(a, bool))
        device = kwargs.get("device", next(named, device))
        if device is not None and not _is_same(torch.device(device), self.device):
            return densify(self, "to").to(device, dtype or self.dtype)
        return self if dtype is None or dtype == self.dtype else self.type(dtype)

    def cpu(self, *args: Any, **kwargs: Any) -> Any:
        return self.to("cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Any:
        return self.to("cuda" if device is None else device)

    def xpu(self, device: Any = None, non_blocking: bool = False) -> Any:
        return self.to("xpu" if device is None else device)

    def type(self, dtype: torch.dtype) -> Any:
        return self.derived(cast=dtype)

    def type_as(self, other: Any) -> Any:
        return self.to(other.dtype)

    def float(self) -> Any:
        return self.to(torch.float32)

    def double(self) -> Any:
        return self.to(torch.float64)

    def half(self) -> Any:
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        return self.to(torch.bfloat16)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, torch.Tensor) and index.dtype != torch.bool:
            return _indexed(self, index)
        try:
            return view_of(self, "getitem", index)
        except (TypeError, ValueError):
            return densify(self, "__getitem__")[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _writing("__setitem__")

    def __len__(self) -> int:
        return self.shape[0]

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    def to_dense(self) -> torch.Tensor:
        """The dense tensor that this stands for, differentiable in the factors."""
        dense = self.root.to_dense_root()
        dense = dense.reshape(-1).as_strided(self.strided.sizes, self.strided.strides, self.strided.offset)
        if self.index is not None:
            if self.picked is not None:
                raise StructureError("A single expert picked at run time can't be multiplied out: index with an int.")
            dense = dense[self.index]
        return (dense.detach() if self.detached else dense).to(self.dtype)

    def derived(self, **changes: Any) -> WeightView:
        """A view with other fields."""
        fields = {name: getattr(self, name) for name in ("strided", "index", "picked", "cast", "detached")}
        return WeightView(self.root, **{**fields, **changes})


def _on_dense_values(name: str) -> Callable[..., Any]:
    def operation(self: DenseLike, *others: Any) -> Any:
        return getattr(densify(self, name), name)(*[_dense(other, name) for other in others])

    return operation


def _in_place(name: str) -> Callable[..., Any]:
    def operation(self: DenseLike, *others: Any) -> Any:
        raise _writing(name)

    return operation


# Comparisons for equality stay those of objects, by which modules are told apart
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(DenseLike, f"__{_name}__", _on_dense_values(f"__{_name}__"))
    setattr(DenseLike, f"__r{_name}__", _on_dense_values(f"__r{_name}__"))
    setattr(DenseLike, f"__i{_name}__", _in_place(f"__i{_name}__"))
for _name in ("neg", "abs", "invert", "lt", "le", "gt", "ge", "float", "int"):
    setattr(DenseLike, f"__{_name}__", _on_dense_values(f"__{_name}__"))


class WeightView(DenseLike):
    """A view of a MonarchWeight: transposed, sliced, indexed, cast or detached."""

    def __init__(
        self,
        root: MonarchWeight,
        strided: StridedView,
        index: torch.Tensor | None = None,
        picked: Dim | None = None,
        cast: torch.dtype | None = None,
        detached: bool = False,
    ) -> None:
        self.root = root
        self.strided = strided
        self.index = index
        self.picked = picked
        self.cast = cast
        self.detached = detached

    def viewed(self) -> WeightView:
        return self

    def __getattr__(self, name: str) -> Any:
        return tensor_attribute(self, name)


def view_of(operand: DenseLike, name: str, *args: Any, **kwargs: Any) -> Any:
    """The view operation ``name`` of ``torch.Tensor`` on a weight: only strides change.

    Raises:
        TypeError, ValueError, IndexError: The operation is no view of this operand.
    """
    operand = operand.viewed()
    views = VIEW_OPERATIONS[name](operand.strided, *args, **kwargs)
    if operand.index is not None and operand.picked is None:
        first = operand.strided.sizes[0], operand.strided.strides[0]
        for view in (views,) if isinstance(views, StridedView) else views:
            if (view.sizes[0], view.strides[0]) != first:
                raise TypeError("a view that moves the dimension indexed at run time")
    detached = operand.detached or name == "detach"
    made = [
        operand.derived(strided=view, detached=detached)
        for view in ((views,) if isinstance(views, StridedView) else views)
    ]
    return made[0] if isinstance(views, StridedView) else tuple(made)


def _indexed(operand: DenseLike, index: torch.Tensor) -> Any:
    """Matrices chosen at run time: ``W[experts]`` and ``W[expert]`` with a tensor."""
    if operand.index is not None or operand.ndim != 3 or index.ndim > 1:
        return densify(operand, "__getitem__")[index]
    strided = operand.strided
    if index.ndim == 1:
        return operand.derived(index=index)
    rest = StridedView(strided.sizes[1:], strided.strides[1:], strided.offset)
    return operand.derived(strided=rest, index=index, picked=(strided.sizes[0], strided.strides[0]))


def tensor_attribute(operand: DenseLike, name: str) -> Any:
    """Attributes of ``torch.Tensor`` that are not spelled out above: views as views, the rest on the dense values."""
    if name.startswith("__") or not hasattr(torch.Tensor, name):
        raise AttributeError(f"{type(operand).__name__!r} object has no attribute {name!r}")
    if name in VIEW_OPERATIONS:
        return lambda *args, **kwargs: _view_or_dense(operand, name, args, kwargs)
    if _writes(name):
        raise _writing(name)
    return getattr(densify(operand, name), name)


def _view_or_dense(operand: DenseLike, name: str, args: Any, kwargs: Any) -> Any:
    try:
        return view_of(operand, name, *args, **kwargs)
    except (TypeError, ValueError):
        return getattr(densify(operand, name), name)(*args, **kwargs)


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """A torch function that has a MonarchWeight, or a view of one, among its arguments."""
    name = op_name(func)
    if name in VIEW_OPERATIONS and isinstance(args[0], DenseLike):
        return _view_or_dense(args[0], name, args[1:], kwargs)
    if name == "multi_head_attention_forward":
        return multi_head_attention(*args, **kwargs)
    rule = RULES.get(name)
    if rule is not None and kwargs.get("out") is None:
        answer = rule(*[_static(a) for a in args], **{key: _static(a) for key, a in kwargs.items()})
        if isinstance(answer, Product):
            operand = next(a for a in _flat([*args, *kwargs.values()]) if isinstance(a, DenseLike))
            return answer.rewrite(multiplier(operand.viewed(), answer.matrix))
    written = _flat([*((args[:1] or kwargs.values()) if _writes(name) else ()), kwargs.get("out")])
    if any(isinstance(a, DenseLike) for a in written):
        raise _writing(name)
    plain = [_dense(a, name) for a in args]
    return func(*plain, **{key: _dense(a, name) for key, a in kwargs.items()})


def _flat(arguments: Sequence[Any]) -> list[Any]:
    """Arguments, and those one list down (operands of an einsum)."""
    return [b for a in arguments for b in (a if isinstance(a, (list, tuple)) else (a,))]


def _static(argument: Any) -> Any:
    if isinstance(argument, DenseLike):
        view = argument.viewed()
        return Static(view.strided, view.index is not None and view.picked is None, view.picked)
    if isinstance(argument, (list, tuple)) and any(isinstance(a, DenseLike) for a in argument):
        return [_static(a) for a in argument]
    return argument


def _dense(argument: Any, name: str) -> Any:
    if isinstance(argument, DenseLike):
        return densify(argument, name)
    if isinstance(argument, (list, tuple)) and any(isinstance(a, DenseLike) for a in argument):
        return type(argument)(_dense(a, name) for a in argument)
    return argument


def densify(operand: DenseLike, name: str) -> torch.Tensor:
    """The dense values, for an operation that is no product."""
    warn_dense(operand, name)
    return operand.to_dense()


def _is_same(device: torch.device, own: torch.device) -> bool:
    return device.type == own.type and device.index in (None, own.index)


def _writes(name: str) -> bool:
    """Whether an operation writes into its first operand."""
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "set_data")


def _writing(name: str) -> StructureError:
    return StructureError(
        f"{name!r} would write into a Monarch weight as if it were dense, and the values would be lost: write to its "
        "factors R and L, or call monarch_fx.to_dense(model) first."
    )
