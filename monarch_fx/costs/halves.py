"""Seconds of Monarch products on a GPU as two halves, with what padding adds: ``kernels/halves.py``, priced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monarch_fx.costs.kernel import TF32_GRADIENTS
from monarch_fx.kernels import choice
from monarch_fx.kernels.padding import PADDED_TOKENS, ROW, TF32_ROW, padded_rank, padded_sides
from monarch_fx.structure import MonarchShape

Seconds = float | NDArray[np.float64]


@dataclass(frozen=True)
class Halves:
    """What is priced, and for how many tokens.

    Attributes:
        seconds: Of a shape in a lowering of ``formulas``.
        rows: Tokens.
        units: Multiprocessors.
        in_tf32: Whether in TF32, where libraries are no faster at second halves than this library's kernels are.
        on_hopper: Whether kernels start early, and take tensor descriptors.
        alone: Whether few tokens' halves have launches of their own, whose long sums may be cut into parts.
    """

    seconds: Callable[..., Seconds]
    rows: NDArray[np.int64]
    units: int
    in_tf32: bool
    on_hopper: bool
    alone: bool

    def forward(self, shape: MonarchShape, bias: bool = False, activated: bool = False) -> Seconds:
        """Both halves, of which the second one may add a bias and compute an activation."""

        def at(of: MonarchShape) -> Seconds:
            return self._halves(of, self._second(shape, of, bias, activated)) + self._copies(shape, of)

        return self._padded(shape, at)

    def training(self, shape: MonarchShape, bias: bool = False, *, recomputed: bool = False) -> Seconds:
        """Both halves forward and backward, and the gradients of the factors; low rank that is kept is a library's."""
        is_plain = shape.nblocks_in == shape.nblocks_out == 1 and not recomputed

        def at(of: MonarchShape) -> Seconds:
            turned = MonarchShape(of.out_features, of.in_features, of.nblocks_in, of.nblocks_out, of.rank)
            halves = (of, self._second(shape, of, bias)), (turned, self._second(turned, turned))
            forward, backward = (self._plain(one) if is_plain else self._halves(one, how) for one, how in halves)
            backward = backward + self._gradients(of)
            return forward + backward + 2 * self._copies(shape, of)  # gradients are cut

        return self._padded(shape, at, trained=True)

    def first(self, shape: MonarchShape) -> Seconds:
        """The first half alone, forward."""
        return self._padded(shape, lambda of: self._halves(of, "none"))

    def _padded(self, shape: MonarchShape, at: Callable[[MonarchShape], Seconds], *, trained: bool = False) -> Seconds:
        """``at`` the sizes that are computed with: ranks, p and s are padded for many tokens."""
        n_out, n_in, own = shape.nblocks_out, shape.nblocks_in, (shape.rank, shape.p, shape.s)

        def of(rank: int, p: int, s: int) -> MonarchShape:
            return MonarchShape(n_in * p, n_out * s, n_out, n_in, rank)

        features = shape.in_features, shape.out_features
        sides = padded_sides((n_in, n_out, *own), features, trained=trained, in_tf32=self.in_tf32)
        sizes = padded_rank(shape.rank), *sides
        few = at(of(*own))
        return few if sizes == own else np.where(self.rows < PADDED_TOKENS, few, at(of(*sizes)))

    def _second(self, shape: MonarchShape, of: MonarchShape, bias: bool = False, activated: bool = False) -> str:
        """What runs the second half of ``shape``, computed as ``of``: padded rows are cut before a bias is added."""
        has_epilogue = activated or (bias and shape.nblocks_out > 1 and of.s == shape.s)
        return "own" if has_epilogue or self.in_tf32 else "library"

    def _halves(self, of: MonarchShape, second: str) -> Seconds:
        return self._first_half(of) + (0 if second == "none" else self._second_half(of, second))

    def _plain(self, of: MonarchShape) -> Seconds:
        """Both halves of low rank, by a library."""
        aligned, whole = self._are_aligned(of), self._are_whole(of)
        first = self._few_or_many(of, "first_half", "joined", is_aligned(2, of.p), aligned[0], whole[0])
        return first + self._few_or_many(of, "second_half", "library", is_aligned(2, of.s), aligned[1], whole[1])

    def _few_or_many(self, of: MonarchShape, half: str, how: str, few: bool, *many: bool) -> Seconds:
        """Of a library's half, of which rows that aren't aligned matter where tokens are many."""
        return np.where(
            self.rows <= choice.FEW_TOKENS, self.seconds(of, half, how, few), self.seconds(of, half, how, *many)
        )

    def _first_half(self, of: MonarchShape) -> Seconds:
        n_in, width = of.nblocks_in, of.nblocks_out * of.rank
        rows, aligned = (self._are_aligned(of)[0], self._are_whole(of)[0]), is_aligned(ROW, of.p)

        def splits(tokens: int) -> int:
            are_many = tokens > choice.FEW_TOKENS
            if (are_many and self.in_tf32) or not (are_many or self.alone):
                return 1
            described = are_many and aligned and self.on_hopper
            tile = choice.first_tile(tokens, width, n_in, of.p, self.units, described=described)
            return choice.splits(tile, tokens, width, n_in, of.p, self.units)

        parts = self._by_tokens(splits, 1)
        few = self.seconds(of, "first_half", "own", is_aligned(2, of.p), splits=parts)
        own = self.seconds(of, "first_half", "own", *rows, splits=parts)
        by_library = self.seconds(of, "first_half", "joined" if n_in == 1 else "strided", *rows)
        if self.in_tf32 and n_in > 1:
            enough = choice.tf32_tokens(width, n_in, self.units)
            own = np.where((self.rows >= enough) & (of.p % TF32_ROW == 0), own, by_library)
        elif not aligned:
            own = np.where(2 * self.rows * of.in_features * width >= choice.STRIDED_FLOPS, by_library, own)
        many = np.where(self.rows >= self._library_tokens(of), by_library, own)
        return np.where(self.rows <= choice.FEW_TOKENS, few, many)

    def _second_half(self, of: MonarchShape, how: str) -> Seconds:
        rows = self._are_aligned(of)[1], self._are_whole(of)[1]
        few = self.seconds(of, "second_half", "early", is_aligned(2, of.s))
        many = self.seconds(of, "second_half", how, *rows)
        if not self.in_tf32:
            sizes, by_library = (of.s, of.nblocks_in * of.rank, of.nblocks_out, self.units), self._library_tokens(of)

            def is_own_second(tokens: int) -> bool:
                return how == "own" or choice.is_own_second(tokens, *sizes, after_library=tokens >= by_library)

            is_own = self._by_tokens(is_own_second, False)
            # a library's first half doesn't say when the next kernel may start
            early, late = (self.seconds(of, "second_half", when, *rows) for when in ("early", "own"))
            own = np.where(self.rows < by_library, early, late)
            many = np.where(is_own & self.on_hopper, own, many)
        return np.where(self.rows <= choice.FEW_TOKENS, few, many)

    def _library_tokens(self, of: MonarchShape) -> float:
        """From how many tokens a library runs the first half."""
        itemsize = 4 if self.in_tf32 else 2
        return choice.library_tokens(of.nblocks_in, of.nblocks_out, of.rank, of.p, self.units, itemsize)

    def _by_tokens(self, found: Callable[[int], int], beyond: int) -> NDArray[np.int64]:
        """What ``found`` says of as many tokens as there are tiles for, up to ``SOME_TOKENS``; ``beyond`` of more."""
        each = choice.PLAIN.M
        edges = [choice.AHEAD_TOKENS, *range(each, choice.SOME_TOKENS + 1, each)]
        which, of = np.unique(np.searchsorted(edges, self.rows), return_inverse=True)
        values = [found(edges[i]) if i < len(edges) else beyond for i in which.tolist()]
        return np.asarray(values)[of].reshape(self.rows.shape)

    def _are_aligned(self, of: MonarchShape) -> tuple[bool, bool]:
        """Whether rows of all operands of each half are."""
        row = TF32_ROW if self.in_tf32 else ROW
        return is_aligned(row, of.rank, of.p), is_aligned(row, of.rank, of.s)

    def _are_whole(self, of: MonarchShape) -> tuple[bool, bool]:
        """Whether rows of x, and of the result, are no odd multiples of 16 bytes."""
        row = TF32_ROW if self.in_tf32 else ROW
        return of.p % (2 * row) != row, of.s % (2 * row) != row

    def _gradients(self, of: MonarchShape) -> Seconds:
        """Of both factors."""
        time_s = self.seconds(of, "factor_gradients")
        aligned = self._are_aligned(of)
        if not all(aligned):
            unaligned = self.seconds(of, "factor_gradients", *aligned)
            time_s = np.where(self.rows <= choice.FEW_TOKENS, time_s, unaligned)
        return time_s / TF32_GRADIENTS if self.in_tf32 else time_s

    def _copies(self, shape: MonarchShape, of: MonarchShape) -> Seconds:
        """Of what is padded where ``shape`` is computed as ``of``."""
        more, wider, higher = of.rank > shape.rank, of.p > shape.p, of.s > shape.s
        copied = {
            "x": of.in_features > shape.in_features,
            "R": more or wider,
            "L": more or higher,
            "y": of.out_features > shape.out_features,
        }
        return self.seconds(of, "padding", *(name for name, is_copied in copied.items() if is_copied))


def is_aligned(row: int, *sizes: int) -> bool:
    """Whether rows of all these sizes start at multiples of ``row`` numbers."""
    return all(size % row == 0 for size in sizes)
