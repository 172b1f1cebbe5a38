"""Which entries of a parameter a product reads, as plain stride arithmetic.

A ``StridedView`` is what PyTorch's view operations make of a contiguous parameter: sizes, strides and an offset into
its entries. A ``MatrixView`` groups the dimensions of such a view into batch, output and input dimensions: two products
with equal ``MatrixView`` read the same matrix. No tensor is touched here, so that the same code serves the analysis of
a graph and the dispatch at run time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Dim = tuple[int, int]  # (size, stride)


@dataclass(frozen=True)
class MatrixView:
    """A batch of matrices (out, in) inside a contiguous parameter; every group of dimensions is merged maximally."""

    batch: tuple[Dim, ...]
    out: tuple[Dim, ...]
    inp: tuple[Dim, ...]
    offset: int = 0

    @property
    def batch_size(self) -> int:
        return math.prod(size for size, _ in self.batch)

    @property
    def out_features(self) -> int:
        return math.prod(size for size, _ in self.out)

    @property
    def in_features(self) -> int:
        return math.prod(size for size, _ in self.inp)

    @property
    def numel(self) -> int:
        return self.batch_size * self.out_features * self.in_features

    @property
    def transposed(self) -> "MatrixView":
        return MatrixView(self.batch, self.inp, self.out, self.offset)

    @property
    def strided(self) -> tuple[list[int], list[int], int]:
        """Sizes, strides and offset of all dimensions: batch, out, inp."""
        dims = self.batch + self.out + self.inp
        return [n for n, _ in dims], [stride for _, stride in dims], self.offset

    def gather(self, parameter: torch.Tensor) -> torch.Tensor:
        """The matrices as a tensor (out, in), or (batch, out, in) where there is a batch dimension."""
        sizes, strides, offset = self.strided
        flat = parameter.detach().contiguous().view(-1)
        dense = flat.as_strided(sizes, strides, flat.storage_offset() + offset)
        shape = (self.out_features, self.in_features)
        return dense.reshape((self.batch_size, *shape) if self.batch else shape)

    def scatter(self, parameter: torch.Tensor, dense: torch.Tensor) -> None:
        """Writes ``dense``, shaped as ``gather`` returns it, into the entries of a contiguous ``parameter``."""
        sizes, strides, offset = self.strided
        flat = parameter.view(-1)
        target = flat.as_strided(sizes, strides, flat.storage_offset() + offset)
        target.copy_(dense.reshape(target.shape))

    def entries(self) -> tuple[int, int]:
        """First and one past the last entry that the view can touch."""
        dims = self.batch + self.out + self.inp
        return self.offset, self.offset + 1 + sum((n - 1) * st for n, st in dims)

    def label(self, shape: Sequence[int]) -> str:
        """The view as index text on a parameter of ``shape``: '' for all of it, '[0:768]' for rows, else strides."""
        if self.numel == math.prod(shape):
            return ""
        dims = sorted(self.batch + self.out + self.inp, key=lambda dim: -dim[1])
        first, stop = self.entries()
        row = math.prod(shape[1:])
        if self.numel == stop - first and first % row == 0 and stop % row == 0:  # whole rows
            return f"[{first // row}]" if stop - first == row and len(shape) > 2 else f"[{first // row}:{stop // row}]"
        if len(shape) == 2 and len(dims) == 2 and dims[0] == (shape[0], shape[1]) and dims[1][1] == 1:  # columns
            return f"[:, {first}:{first + dims[1][0]}]"
        sizes = "x".join(str(n) for n, _ in dims)
        return f"[{sizes} at {first}]"


def merge(dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """Neighbouring dimensions that one stride can walk become one; dimensions of size 1 vanish."""
    merged: list[Dim] = []
    for size, stride in dims:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return tuple(merged)


@dataclass(frozen=True)
class StridedView:
    """Sizes, strides and offset of a view of a contiguous parameter."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @staticmethod
    def whole(shape: Sequence[int]) -> "StridedView":
        return StridedView(tuple(shape), contiguous_strides(shape))

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    def matrix(self, out: Sequence[int], inp: Sequence[int], batch: Sequence[int] = ()) -> MatrixView:
        """The view as matrices, given which of its dimensions are outputs, inputs and batch."""
        dims = list(zip(self.sizes, self.strides, strict=True))
        groups = [merge([dims[d] for d in group]) for group in (batch, out, inp)]
        return MatrixView(groups[0], groups[1], groups[2], self.offset)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return tuple(strides)


def _transpose(v: StridedView, dim0: int, dim1: int) -> StridedView:
    order = list(range(v.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(v, order)


def _permute(v: StridedView, *dims: Any) -> StridedView:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return StridedView(tuple(v.sizes[d] for d in order), tuple(v.strides[d] for d in order), v.offset)


def _reverse(v: StridedView) -> StridedView:
    return _permute(v, list(range(v.ndim))[::-1])


def _matrix_transpose(v: StridedView) -> StridedView:
    return _transpose(v, -2, -1)


def _select(v: StridedView, dim: int, index: int) -> StridedView:
    dim = _dim(v, dim)
    if not -v.sizes[dim] <= index < v.sizes[dim]:
        raise IndexError(f"index {index} is out of range for dimension {dim} of size {v.sizes[dim]}")
    index %= v.sizes[dim]
    rest = [d for d in range(v.ndim) if d != dim]
    kept = _permute(v, rest)
    return StridedView(kept.sizes, kept.strides, v.offset + index * v.strides[dim])


def _slice(
    v: StridedView, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> StridedView:
    dim = _dim(v, dim)
    if step < 1:
        raise ValueError(f"step must be greater than zero, got {step}")
    first, stop = _bound(start, 0, v.sizes[dim]), _bound(end, v.sizes[dim], v.sizes[dim])
    sizes, strides = list(v.sizes), list(v.strides)
    sizes[dim] = max(0, -(-(stop - first) // step))
    strides[dim] *= step
    return StridedView(tuple(sizes), tuple(strides), v.offset + first * v.strides[dim])


def _dim(v: StridedView, dim: int) -> int:
    if not -v.ndim <= dim < v.ndim:
        raise IndexError(f"dimension {dim} is out of range for sizes {v.sizes}")
    return dim % v.ndim


def _bound(at: int | None, default: int, size: int) -> int:
    """As ``slice.indices``, which dynamo doesn't trace on PyTorch 2.11."""
    if at is None:
        return default
    return min(max(at + size if at < 0 else at, 0), size)


def _narrow(v: StridedView, dim: int, start: int, length: int) -> StridedView:
    size = v.sizes[_dim(v, dim)]
    start = start + size if start < 0 else start
    if not 0 <= start <= start + length <= size:
        raise ValueError(f"{length} entries from {start} on exceed dimension {dim} of sizes {v.sizes}")
    return _slice(v, dim, start, start + length)


def _getitem(v: StridedView, index: Any) -> StridedView:
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        given = sum(1 for item in items if item is not None) - 1
        items[at : at + 1] = [slice(None)] * (v.ndim - given)
    dim = 0
    for item in items:
        if isinstance(item, bool):
            raise TypeError("a boolean index is no view")
        if item is None:
            v = _unsqueeze(v, dim)
        elif isinstance(item, int):
            v = _select(v, dim, item)
            continue
        elif isinstance(item, slice):
            v = _slice(v, dim, item.start, item.stop, item.step or 1)
        else:
            raise TypeError(f"an index of type {type(item).__name__} is no view")
        dim += 1
    return v


def _unsqueeze(v: StridedView, dim: int) -> StridedView:
    dim %= v.ndim + 1
    stride = v.sizes[dim] * v.strides[dim] if dim < v.ndim else 1
    return StridedView((*v.sizes[:dim], 1, *v.sizes[dim:]), (*v.strides[:dim], stride, *v.strides[dim:]), v.offset)


def _squeeze(v: StridedView, dim: int | None = None) -> StridedView:
    drop = [d for d in range(v.ndim) if v.sizes[d] == 1 and (dim is None or d == dim % v.ndim)]
    return _permute(v, [d for d in range(v.ndim) if d not in drop])


def _split(v: StridedView, size: int | Sequence[int], dim: int = 0) -> tuple[StridedView, ...]:
    total = v.sizes[dim]
    sizes = [min(size, total - at) for at in range(0, total, size)] if isinstance(size, int) else list(size)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(_narrow(v, dim, start, n) for start, n in zip(starts, sizes, strict=True))


def _chunk(v: StridedView, chunks: int, dim: int = 0) -> tuple[StridedView, ...]:
    return _split(v, -(-v.sizes[dim] // chunks), dim)


def _unbind(v: StridedView, dim: int = 0) -> tuple[StridedView, ...]:
    return tuple(_select(v, dim, i) for i in range(v.sizes[dim]))


def _view(v: StridedView, *shape: Any) -> StridedView:
    sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
    if not all(isinstance(size, int) for size in sizes):
        raise TypeError("a view as another dtype, or to symbolic sizes, is no plain view")
    sizes = _inferred(sizes, math.prod(v.sizes))
    old = list(merge(list(zip(v.sizes, v.strides, strict=True))))
    strides: list[int] = []
    for size in reversed(sizes):
        if size == 1:
            strides.append(1)
            continue
        if not old or old[-1][0] % size:
            raise ValueError(f"sizes {v.sizes} with strides {v.strides} have no view of shape {sizes}")
        rest, stride = old.pop()
        strides.append(stride)
        if rest // size > 1:
            old.append((rest // size, stride * size))
    if old:
        raise ValueError(f"shape {sizes} doesn't hold the entries of {v.sizes}")
    return StridedView(tuple(sizes), tuple(reversed(strides)), v.offset)


def _inferred(sizes: list[int], numel: int) -> list[int]:
    """With -1 as what the other sizes leave of ``numel``."""
    if 0 in sizes or numel == 0:
        raise ValueError(f"a view of nothing, or as sizes {sizes}")
    return [numel // -math.prod(sizes) if size == -1 else size for size in sizes]


def _flatten(v: StridedView, start_dim: int = 0, end_dim: int = -1) -> StridedView:
    first, last = start_dim % v.ndim, end_dim % v.ndim
    return _view(v, [*v.sizes[:first], math.prod(v.sizes[first : last + 1]), *v.sizes[last + 1 :]])


def _unflatten(v: StridedView, dim: int, sizes: Sequence[int]) -> StridedView:
    dim %= v.ndim
    inner = _inferred(list(sizes), v.sizes[dim])
    return _view(v, [*v.sizes[:dim], *inner, *v.sizes[dim + 1 :]])


def _movedim(v: StridedView, source: int, destination: int) -> StridedView:
    order = [d for d in range(v.ndim) if d != source % v.ndim]
    order.insert(destination % v.ndim, source % v.ndim)
    return _permute(v, order)


def _expand(v: StridedView, *shape: Any) -> StridedView:
    sizes = list(shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape)
    if [v.sizes[d] if size == -1 else size for d, size in enumerate(sizes)] != list(v.sizes):
        raise ValueError("an expanded weight is read more than once")
    return v


def _same(v: StridedView) -> StridedView:
    return v


# Names are those of torch.Tensor's methods and of the aten operators, which agree.
VIEW_OPERATIONS: dict[str, Callable[..., Any]] = {
    "T": _reverse,
    "alias": _same,
    "chunk": _chunk,
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
    "expand": _expand,
    "flatten": _flatten,
    "getitem": _getitem,
    "mT": _matrix_transpose,
    "movedim": _movedim,
    "moveaxis": _movedim,
    "narrow": _narrow,
    "numpy_T": _reverse,
    "permute": _permute,
    "reshape": _view,
    "select": _select,
    "slice": _slice,
    "split": _split,
    "split_with_sizes": _split,
    "squeeze": _squeeze,
    "swapaxes": _transpose,
    "swapdims": _transpose,
    "t": _reverse,
    "transpose": _transpose,
    "unbind": _unbind,
    "unflatten": _unflatten,
    "unsqueeze": _unsqueeze,
    "view": _view,
}
