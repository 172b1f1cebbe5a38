"""MonarchWeight: stands where a dense parameter stood, and answers the products that read it.

It is registered in its owner under the parameter's own name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from monarch_fx.kernels.op import monarch_bmm
from monarch_fx.layers.dense_like import DenseLike, WeightView, dispatch, tensor_attribute
from monarch_fx.layers.match import Match
from monarch_fx.layers.multiply import Cut, Outline, cut, taken, widened
from monarch_fx.structure import Monarch, MonarchShape
from monarch_fx.views import MatrixView, StridedView

Piece = tuple[MatrixView, "Monarch | torch.Tensor"]


class MonarchWeight(DenseLike, nn.Module):  # type: ignore[misc] # the tensor's type(), not the module's
    """A parameter whose matrices are Monarch matrices.

    Args:
        shape: Shape of the parameter that it stands for.
        pieces: The matrices in it, each with its structure, or with its dense values where it stays dense.
        rest: Values of the parameter's entries that no piece covers, in their order.
        requires_grad: Of the factors.

    The factors are the parameters ``R`` and ``L`` (``R_0``, ``L_0``, ``R_1``, ... where there are several pieces),
    shaped as in ``monarch_fx.Monarch``.
    """

    recompute = False  # the intermediate of its products in the backward pass, instead of keeping it
    behind: tuple[str, ...] = ()  # the owner's parameters that stood behind it

    def __init__(
        self,
        shape: Sequence[int],
        pieces: Sequence[Piece],
        rest: torch.Tensor | None = None,
        requires_grad: bool = True,
    ) -> None:
        super().__init__()
        # sees inputs and outputs of every product when calibrating, and gives the outputs back
        self.observer: Callable[[Match, Any, Any], Any] | None = None
        self.shapes: tuple[MonarchShape | None, ...] = tuple(
            value.shape if isinstance(value, Monarch) else None for _, value in pieces
        )
        self.outline: Outline = (
            astuple(StridedView.whole(shape)),
            tuple(astuple(view) for view, _ in pieces),
            tuple(cut(structure) for structure in self.shapes),
        )
        whole = StridedView.whole(shape)
        is_whole = len(pieces) == 1 and whole.ndim == 2 and pieces[0][0] == whole.matrix(out=[0], inp=[1])
        self.whole: Cut | None = self.outline[2][0] if is_whole else None  # of the piece that is all of the weight
        for i, (_, value) in enumerate(pieces):
            if isinstance(value, Monarch):
                self._factor(f"R{self.suffix(i)}", value.R, requires_grad)
                self._factor(f"L{self.suffix(i)}", value.L, requires_grad)
            else:
                self._factor(f"dense{self.suffix(i)}", value, requires_grad)
        if rest is not None:
            self._factor("rest", rest, requires_grad)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """``F.linear`` with the whole weight asks no rule: Dynamo guards what a rule reads, at every call."""
        if func is F.linear and not kwargs and isinstance(args[0], torch.Tensor) and isinstance(args[1], MonarchWeight):
            weight, bias = args[1], args[2] if len(args) > 2 else None
            if weight.whole is not None and weight.observer is None and not isinstance(bias, DenseLike):
                R, L, (out, features) = weight.R, weight.L, weight.whole
                x = widened(taken(args[0], features), R)
                return monarch_bmm(x, R, L, bias, out_features=out, recompute=weight.recompute)
        return dispatch(func, args, kwargs or {})

    def _factor(self, name: str, value: torch.Tensor, requires_grad: bool) -> None:
        self.register_parameter(name, nn.Parameter(value.detach(), requires_grad=requires_grad))

    def suffix(self, piece: int) -> str:
        return "" if len(self.outline[1]) == 1 else f"_{piece}"

    def viewed(self) -> WeightView:
        return WeightView(self, StridedView(*self.outline[0]))

    @property
    def root(self) -> MonarchWeight:  # type: ignore[override]
        return self

    @property
    def strided(self) -> StridedView:  # type: ignore[override]
        return StridedView(*self.outline[0])

    @property
    def views(self) -> tuple[MatrixView, ...]:
        return tuple(MatrixView(*view) for view in self.outline[1])

    @property
    def own_dtype(self) -> torch.dtype:
        return self.some_factor.dtype

    @property
    def some_factor(self) -> torch.Tensor:
        """By name: replicas of ``nn.DataParallel`` have no parameters."""
        factor: torch.Tensor = getattr(self, f"{'dense' if self.shapes[0] is None else 'R'}{self.suffix(0)}")
        return factor

    def monarch(self, piece: int = 0) -> Monarch | None:
        """The structured matrix of a piece; None where the piece is dense."""
        shape, suffix = self.shapes[piece], self.suffix(piece)
        if shape is None:
            return None
        R, L = getattr(self, f"R{suffix}"), getattr(self, f"L{suffix}")
        return Monarch(R, L, in_features=shape.in_features, out_features=shape.out_features)

    def named_factors(self) -> list[tuple[str, nn.Parameter]]:
        """R and L of every structured piece, with their names."""
        return [(name, p) for name, p in self._parameters.items() if p is not None and name.startswith(("R", "L"))]

    def multiplied_out(self) -> nn.Parameter:
        """A dense parameter with the same values."""
        with torch.no_grad():
            return nn.Parameter(self.to_dense_root(), requires_grad=self.requires_grad)

    def to_dense_root(self) -> torch.Tensor:
        """The whole parameter, dense, differentiable in the factors."""
        entries = torch.arange(self.strided_numel, device=self.device).view(self.strided.sizes)
        dense = torch.zeros(self.strided_numel, dtype=self.own_dtype, device=self.device)
        covered = torch.zeros(self.strided_numel, dtype=torch.bool, device=self.device)
        for i, view in enumerate(self.views):
            monarch = self.monarch(i)
            value = getattr(self, f"dense{self.suffix(i)}") if monarch is None else monarch.to_dense()
            at = view.gather(entries).reshape(-1)
            dense = dense.index_put((at,), value.reshape(-1))
            covered[at] = True
        if "rest" in self._parameters:
            dense = dense.index_put(((~covered).nonzero()[:, 0],), self.rest)
        return dense.view(self.strided.sizes)

    @property
    def strided_numel(self) -> int:
        return torch.Size(self.strided.sizes).numel()

    def extra_repr(self) -> str:
        pieces = []
        for view, shape in zip(self.views, self.shapes, strict=True):
            label = view.label(self.strided.sizes)
            batch = f"{view.batch_size} x " if view.batch else ""
            size = f"{batch}{view.in_features} -> {view.out_features}"
            kept = "dense" if shape is None else f"grid {shape.nblocks_out}x{shape.nblocks_in}, rank {shape.rank}"
            pieces.append(f"{label} {size}, {kept}".strip())
        return "; ".join(pieces)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        for registry in ("_parameters", "_buffers", "_modules"):
            if registry in own and name in own[registry]:
                return own[registry][name]
        return tensor_attribute(self, name)
