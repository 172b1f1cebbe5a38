"""The Monarch matrix itself: mathematics only."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from monarch_fx.errors import DisconnectedInputsWarning, StructureError


@dataclass(frozen=True)
class MonarchShape:
    """Size, grid and rank of one Monarch matrix W (out, in), ``W[j, k] = L[j, k] @ R[j, k]``.

    The grid has ``nblocks_out x nblocks_in`` blocks of (s, p) entries; sizes that it doesn't divide are padded, and
    ``params`` counts the padding.

    Raises:
        StructureError: A field is not a positive integer, or a grid has more blocks than the matrix has rows or
            columns.
    """

    in_features: int
    out_features: int
    nblocks_out: int = 1
    nblocks_in: int = 1
    rank: int = 1

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "nblocks_out", "nblocks_in", "rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise StructureError(f"MonarchShape.{name} must be a positive integer, got {value!r}.")
        if self.nblocks_in > self.in_features or self.nblocks_out > self.out_features:
            raise StructureError(
                f"A grid of {self.nblocks_out}x{self.nblocks_in} blocks doesn't fit a matrix with "
                f"out_features={self.out_features} and in_features={self.in_features}: use fewer blocks."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """``(nblocks_out, nblocks_in)``."""
        return self.nblocks_out, self.nblocks_in

    @property
    def p(self) -> int:
        """Columns of a block, padding included."""
        return -(-self.in_features // self.nblocks_in)

    @property
    def s(self) -> int:
        """Rows of a block, padding included."""
        return -(-self.out_features // self.nblocks_out)

    @property
    def full_rank(self) -> int:
        """The rank at which blocks are exact: ``min(s, p)``."""
        return min(self.s, self.p)

    @property
    def params(self) -> int:
        """Stored numbers: ``nblocks_out * nblocks_in * rank * (p + s)``."""
        return self.nblocks_out * self.nblocks_in * self.rank * (self.p + self.s)

    @property
    def ratio(self) -> float:
        """Stored numbers over those of the dense matrix."""
        return self.params / (self.in_features * self.out_features)

    @property
    def padded(self) -> bool:
        return self.p * self.nblocks_in != self.in_features or self.s * self.nblocks_out != self.out_features

    def __str__(self) -> str:
        return f"{self.nblocks_out}x{self.nblocks_in} r{self.rank}"


class Monarch:
    """A Monarch matrix by its factors: ``W[j, k] = L[j, k]^T R[j, k]`` over a grid (Dao et al. 2022, section 3.1).

    Args:
        R: (nblocks_in, nblocks_out, rank, p), or (B, ...) for a batch of equal matrices; real or complex.
        L: (nblocks_out, nblocks_in, rank, s), or (B, ...).
        in_features: Columns of W; default ``nblocks_in * p``; fewer where the grid pads.
        out_features: Rows of W; default ``nblocks_out * s``.
        input_permutation: Input i of W is column ``input_permutation[i]`` of the grid; (in_features,). Default: i.
        output_permutation: Output o of W is row ``output_permutation[o]`` of the grid; (out_features,). Default: o.
        ranks: The rank of every block, where they differ; (nblocks_out, nblocks_in), at most ``rank``. Rows of R and L
            beyond a block's rank are set to zero and don't count as parameters.

    Raises:
        StructureError: The arguments don't make a matrix of that size.
    """

    def __init__(
        self,
        R: Tensor,
        L: Tensor,
        in_features: int | None = None,
        out_features: int | None = None,
        *,
        input_permutation: Tensor | None = None,
        output_permutation: Tensor | None = None,
        ranks: Tensor | None = None,
    ) -> None:
        _check_factors(R, L)
        self.R, self.L = R, L
        self.in_features = R.shape[-4] * R.shape[-1] if in_features is None else in_features
        self.out_features = L.shape[-4] * L.shape[-1] if out_features is None else out_features
        self.input_permutation, self.output_permutation = input_permutation, output_permutation
        self.ranks = ranks
        shape = self.shape
        if (shape.s, shape.p) != (L.shape[-1], R.shape[-1]):
            raise StructureError(
                f"A {shape.nblocks_out}x{shape.nblocks_in} grid over out_features={self.out_features} and "
                f"in_features={self.in_features} has blocks of {shape.s}x{shape.p}, but L and R are for blocks of "
                f"{L.shape[-1]}x{R.shape[-1]}: give the sizes of W before padding."
            )
        _check_permutation("input_permutation", input_permutation, self.in_features, shape.nblocks_in * shape.p)
        _check_permutation("output_permutation", output_permutation, self.out_features, shape.nblocks_out * shape.s)
        if ranks is not None:
            self.R, self.L = _masked(R, L, ranks)

    @classmethod
    def empty(
        cls,
        shape: MonarchShape,
        batch: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Monarch:
        """A matrix, or ``batch`` equal ones, with factors that are not filled in yet."""
        lead = () if batch is None else (batch,)
        n_out, n_in, rank = shape.nblocks_out, shape.nblocks_in, shape.rank
        R = torch.empty(*lead, n_in, n_out, rank, shape.p, dtype=dtype, device=device)
        L = torch.empty(*lead, n_out, n_in, rank, shape.s, dtype=dtype, device=device)
        return cls(R, L, in_features=shape.in_features, out_features=shape.out_features)

    @property
    def shape(self) -> MonarchShape:
        """Size, grid and (largest) rank."""
        n_out, n_in, rank, _ = self.L.shape[-4:]
        return MonarchShape(self.in_features, self.out_features, n_out, n_in, rank)

    @property
    def params(self) -> int:
        """Stored numbers of the whole batch, grid padding included, rows beyond a block's rank not."""
        if self.ranks is None:
            return self.R.numel() + self.L.numel()
        return self.L.shape[:-4].numel() * int(self.ranks.sum()) * (self.R.shape[-1] + self.L.shape[-1])

    @property
    def flops(self) -> int:
        """Floating-point operations for one x (in_features,), by every matrix of the batch: 2 a stored number, 8 where
        it is complex."""
        return self.params * (8 if self.R.is_complex() else 2)

    def __call__(self, x: Tensor) -> Tensor:
        """``x W^T``: (..., in_features) -> (..., out_features), the product's definition in two einsums.

        A batch of matrices takes x of shape (B, ..., in_features). A real x may meet complex factors, and the reverse.
        """
        R, L = self.R, self.L
        if R.is_complex() != x.is_complex():
            dtype = torch.promote_types(x.dtype, R.dtype)
            x, R, L = x.to(dtype), R.to(dtype), L.to(dtype)
        n_in, p = R.shape[-4], R.shape[-1]
        if self.input_permutation is None:
            x = F.pad(x, (0, n_in * p - self.in_features))
        else:
            x = x.new_zeros(*x.shape[:-1], n_in * p).index_copy(-1, self.input_permutation, x)
        b = "b" if R.ndim == 5 else ""
        t = torch.einsum(f"{b}kjrp,{b}...kp->{b}...kjr", R, x.unflatten(-1, (n_in, p)))
        y = torch.einsum(f"{b}jkrs,{b}...kjr->{b}...js", L, t).flatten(-2)
        return y[..., : self.out_features] if self.output_permutation is None else y[..., self.output_permutation]

    def to_dense(self) -> Tensor:
        """W (out_features, in_features), or (B, out_features, in_features)."""
        dense = torch.einsum("...jkrs,...kjrp->...jskp", self.L, self.R).flatten(-2).flatten(-3, -2)
        out, inp = self.output_permutation, self.input_permutation
        dense = dense[..., : self.out_features, :] if out is None else dense[..., out, :]
        return dense[..., : self.in_features] if inp is None else dense[..., inp]

    def transpose(self) -> Monarch:
        """W^T, which is the Monarch matrix with R and L exchanged. It shares the factors."""
        return Monarch(
            self.L,
            self.R,
            self.out_features,
            self.in_features,
            input_permutation=self.output_permutation,
            output_permutation=self.input_permutation,
            ranks=None if self.ranks is None else self.ranks.T,
        )

    @staticmethod
    def from_blockdiag_butterfly(
        w1: Tensor, w2: Tensor, in_features: int | None = None, out_features: int | None = None
    ) -> Monarch:
        """The matrix of the authors' ``blockdiag_butterfly_multiply(x, w1, w2)`` (github.com/HazyResearch/fly).

        Differentiable in ``w1`` and ``w2``. Row h of their inner vector belongs to input block ``h // q`` and to output
        block ``h % l``: where l doesn't divide q the ranks of the blocks differ.

        Args:
            w1: (k, q, p), first block-diagonal factor: k input blocks.
            w2: (l, s, r), second one: l output blocks; ``l * r == k * q``.
            in_features: Inputs of their layer before padding; default ``k * p``.
            out_features: Outputs of their layer; default ``l * s``.

        Raises:
            StructureError: The factors don't fit.

        Warns:
            DisconnectedInputsWarning: ``q < l``, so that no input reaches all outputs.
        """
        if w1.ndim != 3 or w2.ndim != 3 or w1.shape[:2].numel() != w2.shape[0] * w2.shape[2]:
            raise StructureError(
                "w1 must be (k, q, p) and w2 (l, s, r) with k * q == l * r, "
                f"got {tuple(w1.shape)} and {tuple(w2.shape)}."
            )
        (n_in, q, p), (n_out, s, _) = w1.shape, w2.shape
        first, ranks = _butterfly_rows(n_in, q, n_out)
        rows = first.unsqueeze(-1) + n_out * torch.arange(int(ranks.max()))  # rows h, (l, k, rank)
        rows = rows.clamp_max(n_in * q - 1).to(w1.device)
        R = w1.flatten(0, 1)[rows.transpose(0, 1)]
        L = w2.mT[torch.arange(n_out, device=w1.device).view(-1, 1, 1), rows // n_out]
        inputs = n_in * p if in_features is None else in_features
        outputs = n_out * s if out_features is None else out_features
        if q < n_out:
            warnings.warn(
                f"None of the layer's {inputs} inputs reaches all of its {outputs} outputs: w1 has {q} rows per input "
                f"block for {n_out} output blocks, and {int((ranks == 0).sum())} of {ranks.numel()} blocks are zero.",
                DisconnectedInputsWarning,
                stacklevel=2,
            )
        return Monarch(
            R,
            L,
            inputs,
            outputs,
            output_permutation=_interleaved(n_out, s).to(w1.device)[:outputs],
            ranks=None if bool((ranks == ranks.max()).all()) else ranks,
        )

    def to_blockdiag_butterfly(self) -> tuple[Tensor, Tensor]:
        """The authors' factors w1 (k, q, p) and w2 (l, s, r) of this matrix; inverse of ``from_blockdiag_butterfly``.

        Raises:
            StructureError: Their layer can't hold this matrix: its outputs are not interleaved as theirs, its inputs
                are permuted, its ranks are not theirs, or it is a batch.
        """
        if self.R.ndim != 4:
            raise StructureError(f"The authors' layer holds one matrix, this is a batch of {self.R.shape[0]}.")
        n_out, n_in, rank, s = self.L.shape
        interleaved = _interleaved(n_out, s)[: self.out_features]
        outputs = torch.arange(self.out_features) if self.output_permutation is None else self.output_permutation.cpu()
        if self.input_permutation is not None or not torch.equal(outputs, interleaved):
            raise StructureError(
                f"The authors' layer interleaves the outputs of its blocks and leaves its inputs in place; {self!r} "
                "has another order: give it that output_permutation, which permutes the rows of W."
            )
        ranks = torch.full((n_out, n_in), rank) if self.ranks is None else self.ranks.cpu()
        inner = int(ranks.sum())
        first, theirs = _butterfly_rows(n_in, inner // n_in, n_out)
        if inner % n_in or inner % n_out or not torch.equal(ranks, theirs):
            raise StructureError(f"The authors' layer can't have blocks of ranks {ranks.tolist()}.")
        h = torch.arange(inner)
        j, k = h % n_out, h // (inner // n_in)
        t = (h - first[j, k]) // n_out
        w1 = self.R[k, j, t].unflatten(0, (n_in, -1))
        w2 = self.L[j, k, t].unflatten(0, (-1, n_out)).permute(1, 2, 0)
        return w1.contiguous(), w2.contiguous()

    def __repr__(self) -> str:
        text = f"Monarch({self.out_features}x{self.in_features}, {self.shape}"
        if self.R.ndim == 5:
            text += f", batch {self.R.shape[0]}"
        if self.ranks is not None:
            text += f", ranks {int(self.ranks.min())} to {int(self.ranks.max())}"
        for name in ("input_permutation", "output_permutation"):
            if getattr(self, name) is not None:
                text += f", {name}"
        return f"{text}, {self.params} parameters, {str(self.R.dtype).removeprefix('torch.')})"


def _check_factors(R: Tensor, L: Tensor) -> None:
    grid = R.transpose(-4, -3).shape[:-1] if R.ndim in (4, 5) else None
    if grid is None or grid != L.shape[:-1]:
        raise StructureError(
            "R must be (nblocks_in, nblocks_out, rank, p) and L (nblocks_out, nblocks_in, rank, s), both with a batch "
            f"dimension or none; got {tuple(R.shape)} and {tuple(L.shape)}."
        )
    if R.dtype != L.dtype or R.device != L.device:
        raise StructureError(
            f"R and L must have one dtype and device, got {R.dtype} on {R.device} and {L.dtype} on {L.device}."
        )


def _check_permutation(name: str, permutation: Tensor | None, size: int, places: int) -> None:
    """``size`` different places below ``places``."""
    if permutation is None:
        return
    if permutation.shape != (size,) or permutation.dtype != torch.int64:
        raise StructureError(
            f"{name} must be an int64 tensor of shape ({size},), got {permutation.dtype} {tuple(permutation.shape)}."
        )
    ordered = permutation.sort().values
    if ordered[0] < 0 or ordered[-1] >= places or (ordered.diff() == 0).any():
        raise StructureError(f"{name} must hold {size} different indices from 0 to {places - 1}, got {permutation}.")


def _masked(R: Tensor, L: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with zeros beyond every block's rank."""
    grid, rank = L.shape[-4:-2], L.shape[-2]
    if ranks.shape != grid or ranks.dtype != torch.int64 or ranks.min() < 0 or ranks.max() > rank:
        raise StructureError(
            f"ranks must be an int64 tensor of shape {tuple(grid)} with values from 0 to {rank}, got {ranks}."
        )
    beyond = (torch.arange(rank) >= ranks.cpu().unsqueeze(-1)).unsqueeze(-1).to(L.device)  # (n_out, n_in, rank, 1)
    return R.masked_fill(beyond.transpose(0, 1), 0), L.masked_fill(beyond, 0)


def _butterfly_rows(n_in: int, q: int, n_out: int) -> tuple[Tensor, Tensor]:
    """First row h of the authors' inner vector in every block, and how many there are, both
    (n_out, n_in). Block (j, k) holds the h in [k*q, (k+1)*q) with ``h % n_out == j``.
    """
    start = q * torch.arange(n_in)
    first = start + (torch.arange(n_out).unsqueeze(-1) - start) % n_out
    return first, (start + q - first + n_out - 1).clamp_min(0) // n_out


def _interleaved(blocks: int, size: int) -> Tensor:
    """The authors' order of outputs: the first of every block, then the second of every block, ..."""
    return torch.arange(blocks * size).view(blocks, size).T.flatten()
