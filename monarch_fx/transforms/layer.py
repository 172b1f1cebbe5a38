"""LearnedTransform: a layer that starts as a transform."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monarch_fx.errors import StructureError
from monarch_fx.kernels.op import monarch_bmm
from monarch_fx.structure import Monarch
from monarch_fx.transforms.composition import Kronecker, Product, Transform


class LearnedTransform(nn.Module):
    """A layer y = x W^T whose W is a transform at first, and whose Monarch factors are learned.

    Every factor's R and L are parameters, complex ones where the transform's are; permutations are buffers and stay. A
    ``Product`` that is a real part stays one.

    Args:
        transform: Any of ``monarch_fx.transforms``, a ``Monarch``, or a composition of these. Its values are copied.

    Raises:
        StructureError: A factor is a batch, or has blocks of several ranks.
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        whole = transform if isinstance(transform, Product | Kronecker) else Product([transform])
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.combine = whole.combine
        self.factors = nn.ModuleList(
            _Factor(factor) if isinstance(factor, Monarch) else LearnedTransform(factor) for factor in whole.factors
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), for x in the dtype of the factors, real or complex.

        Raises:
            StructureError: x has another size or dtype.
        """
        return self.combine(x, self.factors)

    def to_dense(self) -> Tensor:
        """W (out_features, in_features)."""
        R = next(self.parameters())
        return self(torch.eye(self.in_features, dtype=R.dtype.to_real(), device=R.device)).mT

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class _Factor(nn.Module):
    """One Monarch matrix with its permutations."""

    source: Tensor | None
    output_permutation: Tensor | None

    def __init__(self, monarch: Monarch) -> None:
        super().__init__()
        if monarch.ranks is not None:
            raise StructureError(f"The blocks of a learned factor have one rank, got {monarch!r}.")
        self.in_features, self.out_features = monarch.in_features, monarch.out_features
        self.R = nn.Parameter(monarch.R.detach().clone(memory_format=torch.contiguous_format))
        self.L = nn.Parameter(monarch.L.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("source", _sources(monarch))
        self.register_buffer("output_permutation", monarch.output_permutation)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise StructureError(f"x must end in {self.in_features} features, got shape {tuple(x.shape)}.")
        R: Tensor = self.R
        L: Tensor = self.L
        if R.is_complex() != x.is_complex():
            dtype = torch.promote_types(x.dtype, R.dtype)
            x, R, L = x.to(dtype), R.to(dtype), L.to(dtype)
        if self.source is not None:
            padded = len(self.source) > self.in_features
            x = (F.pad(x, (0, 1)) if padded else x).index_select(-1, self.source)
        if self.output_permutation is None:
            return monarch_bmm(x, R, L, out_features=self.out_features)
        return monarch_bmm(x, R, L).index_select(-1, self.output_permutation)

    def extra_repr(self) -> str:
        n_out, n_in, rank, _ = self.L.shape
        return f"{self.in_features} -> {self.out_features}, {n_out}x{n_in} r{rank}"


def _sources(monarch: Monarch) -> Tensor | None:
    """Which input stands at each place of the grid; places of padding name the zero that is appended to x."""
    if monarch.input_permutation is None:
        return None
    source = monarch.input_permutation.new_full((monarch.R.shape[0] * monarch.R.shape[-1],), monarch.in_features)
    source[monarch.input_permutation] = torch.arange(monarch.in_features, device=source.device)
    return source
