"""Stride arithmetic against what PyTorch's own views do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from monarch_fx.views import VIEW_OPERATIONS, MatrixView, StridedView

CASES: list[tuple[tuple[int, ...], str, tuple[Any, ...]]] = [
    ((4, 6), "t", ()),
    ((4, 6), "T", ()),
    ((2, 4, 6), "mT", ()),
    ((2, 4, 6), "transpose", (0, -1)),
    ((2, 4, 6), "permute", (2, 0, 1)),
    ((2, 4, 6), "permute", ([1, 2, 0],)),
    ((2, 4, 6), "select", (1, -2)),
    ((4, 6), "narrow", (1, 2, 3)),
    ((4, 6), "chunk", (3, 1)),
    ((5, 6), "chunk", (2,)),
    ((6, 4), "split", (4,)),
    ((6, 4), "split", ([1, 3, 2],)),
    ((3, 4), "unbind", ()),
    ((4, 6), "unsqueeze", (1,)),
    ((4, 6), "unsqueeze", (-1,)),
    ((1, 4, 1, 6), "squeeze", ()),
    ((1, 4, 1, 6), "squeeze", (2,)),
    ((4, 6), "view", (2, 2, -1)),
    ((4, 6), "reshape", (24,)),
    ((2, 3, 4), "flatten", (1,)),
    ((2, 12), "unflatten", (1, (3, -1))),
    ((2, 3, 4), "movedim", (0, -1)),
    ((2, 3, 4), "swapaxes", (0, 1)),
    ((4, 6), "expand", (4, -1)),
]


def shaped(view: StridedView, base: Tensor) -> Tensor:
    return base.as_strided(view.sizes, view.strides, view.offset)


def check(actual: Any, expected: Any, base: Tensor) -> None:
    if isinstance(actual, StridedView):
        actual, expected = (actual,), (expected,)
    assert len(actual) == len(expected)
    for view, tensor in zip(actual, expected, strict=True):
        assert torch.equal(shaped(view, base), tensor)


@pytest.mark.parametrize(("shape", "name", "args"), CASES)
def test_view(shape: tuple[int, ...], name: str, args: tuple[Any, ...]) -> None:
    base = torch.arange(torch.Size(shape).numel()).view(shape)
    method = getattr(base, name)
    check(VIEW_OPERATIONS[name](StridedView.whole(shape), *args), method(*args) if callable(method) else method, base)


@pytest.mark.parametrize(
    "index",
    [2, -1, slice(1, 3), slice(None, None, 2), (slice(None), 1), (..., slice(2, 5)), (1, None, slice(0, 4)), ()],
)
def test_getitem(index: Any) -> None:
    base = torch.arange(4 * 6).view(4, 6)
    check(VIEW_OPERATIONS["getitem"](StridedView.whole((4, 6)), index), base[index], base)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda v: VIEW_OPERATIONS["view"](VIEW_OPERATIONS["t"](v), 24), ValueError),
        (lambda v: VIEW_OPERATIONS["expand"](VIEW_OPERATIONS["unsqueeze"](v, 0), 3, 4, 6), ValueError),
        (lambda v: VIEW_OPERATIONS["getitem"](v, [0, 1]), TypeError),
        (lambda v: VIEW_OPERATIONS["select"](v, 0, 4), IndexError),
        (lambda v: VIEW_OPERATIONS["select"](v, 2, 0), IndexError),
        (lambda v: VIEW_OPERATIONS["getitem"](v, (0, 0, 0)), IndexError),
        (lambda v: VIEW_OPERATIONS["narrow"](v, 0, 3, 2), ValueError),
        (lambda v: VIEW_OPERATIONS["view"](VIEW_OPERATIONS["narrow"](v, 0, 0, 0), -1, 6), ValueError),
    ],
)
def test_what_is_no_view_is_refused(make: Callable, error: type[Exception]) -> None:
    with pytest.raises(error):
        make(StridedView.whole((4, 6)))


def test_gather_and_scatter_are_inverse() -> None:
    base = torch.randn(3, 4, 6)
    view = VIEW_OPERATIONS["mT"](VIEW_OPERATIONS["getitem"](StridedView.whole((3, 4, 6)), (slice(1, 3), slice(0, 2))))
    matrix = view.matrix(out=[1], inp=[2], batch=[0])
    assert torch.equal(matrix.gather(base), base[1:3, :2].mT)
    other = torch.zeros(3, 4, 6)
    matrix.scatter(other, matrix.gather(base))
    assert torch.equal(other[1:3, :2], base[1:3, :2])
    assert other.count_nonzero() == 2 * 2 * 6


def test_equal_matrices_have_equal_views() -> None:
    whole = StridedView.whole((8, 6))
    linear = whole.matrix(out=[0], inp=[1])
    matmul = VIEW_OPERATIONS["t"](whole).matrix(out=[1], inp=[0])
    heads = VIEW_OPERATIONS["view"](whole, 2, 4, 6).matrix(out=[0, 1], inp=[2])
    assert linear == matmul == heads
    assert linear.transposed == VIEW_OPERATIONS["t"](whole).matrix(out=[0], inp=[1])


@pytest.mark.parametrize(
    ("view", "label"),
    [
        (StridedView.whole((8, 6)), ""),
        (VIEW_OPERATIONS["getitem"](StridedView.whole((8, 6)), slice(2, 4)), "[2:4]"),
        (VIEW_OPERATIONS["getitem"](StridedView.whole((8, 6)), (slice(None), slice(1, 4))), "[:, 1:4]"),
    ],
)
def test_labels(view: StridedView, label: str) -> None:
    assert view.matrix(out=[0], inp=[1]).label((8, 6)) == label


def test_label_of_one_matrix_of_a_stack() -> None:
    view = VIEW_OPERATIONS["select"](StridedView.whole((3, 8, 6)), 0, 2)
    matrix: MatrixView = view.matrix(out=[0], inp=[1])
    assert matrix.label((3, 8, 6)) == "[2]"
