"""Closed-form projection and block spectra against NumPy's SVD in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from monarch_fx import Monarch, MonarchShape
from monarch_fx.errors import MetaDeviceError, StructureError, WeightError
from monarch_fx.projection import expected_seconds, prior_tail, project, tail_errors

SIZES = [  # out, in, grid
    (48, 32, (1, 1)),
    (48, 32, (4, 2)),
    (32, 48, (2, 4)),
    (48, 48, (6, 1)),
    (37, 29, (3, 4)),  # padded
    (5, 7, (5, 7)),  # blocks of one entry
    (64, 16, (1, 16)),
]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64]


def full_rank(out: int, inp: int, grid: tuple[int, int]) -> int:
    shape = MonarchShape(inp, out, *grid, rank=1)
    return min(shape.s, shape.p)


def wide(monarch: Monarch) -> Tensor:
    """The dense matrix, multiplied in double precision."""
    dtype = torch.promote_types(monarch.R.dtype, torch.float64)
    return Monarch(monarch.R.to(dtype), monarch.L.to(dtype), monarch.in_features, monarch.out_features).to_dense()


def relative_error(weight: Tensor, monarch: Monarch) -> float:
    exact = wide(monarch)
    return float((exact - weight).norm() / weight.to(exact.dtype).norm())


def numpy_tail(weight: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Shares of energy beyond every rank, block by block."""
    matrices = weight.reshape(-1, *weight.shape[-2:]).numpy()
    out, inp = matrices.shape[1:]
    shape = MonarchShape(inp, out, *grid, rank=1)
    tail = np.zeros(min(shape.s, shape.p) + 1)
    for matrix in matrices:
        padded = np.pad(matrix, ((0, grid[0] * shape.s - out), (0, grid[1] * shape.p - inp)))
        for rows in np.split(padded, grid[0], axis=0):
            for block in np.split(rows, grid[1], axis=1):
                values = np.linalg.svd(block, compute_uv=False) ** 2
                tail += [values[rank:].sum() for rank in range(len(tail))]
    return tail / tail[0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("out", "inp", "grid"), SIZES)
def test_exact_at_full_rank(out: int, inp: int, grid: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(out, inp, dtype=dtype)
    monarch = project(weight, MonarchShape(inp, out, *grid, rank=full_rank(out, inp, grid)))
    # Each factor is rounded once; double precision also pays for the SVD itself, a few eps.
    eps = torch.finfo(dtype).eps
    assert relative_error(weight, monarch) < (50 if dtype in (torch.float64, torch.complex128) else 2) * eps
    assert monarch.R.dtype == monarch.L.dtype == dtype
    assert monarch.R.is_contiguous()
    assert monarch.L.is_contiguous()


@pytest.mark.parametrize(("out", "inp", "grid"), SIZES)
def test_no_nearer_matrix_exists(out: int, inp: int, grid: tuple[int, int]) -> None:
    weight = torch.randn(out, inp, dtype=torch.float64)
    best = numpy_tail(weight, grid)
    tail = tail_errors(weight, [grid])[grid]
    np.testing.assert_allclose(tail.numpy(), best, rtol=0, atol=1e-14)
    for rank in range(1, len(best)):
        error = relative_error(weight, project(weight, MonarchShape(inp, out, *grid, rank=rank)))
        assert error == pytest.approx(math.sqrt(best[rank]), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.complex64])
def test_tail_is_the_error_of_the_projection(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 60, dtype=dtype)
    tails = tail_errors(weight, [(1, 1), (2, 3), (3, 2)])
    for grid, tail in tails.items():
        assert tail.dtype == torch.float64
        assert tail[0] == 1
        assert tail[-1] == 0
        assert (tail.diff() <= 0).all()
        for rank in (1, len(tail) // 2):
            error = relative_error(weight, project(weight, MonarchShape(60, 40, *grid, rank=rank)))
            # rounding the factors adds in squares, being nearly orthogonal to what was cut off
            assert error == pytest.approx(float(tail[rank].sqrt()), rel=1e-5 + torch.finfo(dtype).eps)


def test_batch_is_each_matrix_by_itself() -> None:
    weight = torch.randn(3, 24, 20)
    shape = MonarchShape(20, 24, 2, 3, rank=4)
    batch = project(weight, shape)
    assert batch.R.shape == (3, 3, 2, 4, 7)
    for i, matrix in enumerate(weight):
        single = project(matrix, shape)
        assert torch.equal(batch.R[i], single.R)
        assert torch.equal(batch.L[i], single.L)
    np.testing.assert_allclose(
        tail_errors(weight, [(2, 3)])[2, 3].numpy(), numpy_tail(weight.double(), (2, 3)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_factors_are_balanced_and_unique(dtype: torch.dtype) -> None:
    weight = torch.randn(24, 20, dtype=dtype)
    shape = MonarchShape(20, 24, 2, 2, rank=5)
    monarch, other = project(weight, shape), project(-weight, shape)
    norms = [factor.norm(dim=-1) for factor in (monarch.R.transpose(0, 1), monarch.L)]
    torch.testing.assert_close(*norms)
    values = torch.linalg.svdvals(weight[:12, :10])[:5]
    torch.testing.assert_close(norms[0][0, 0].square(), values)
    assert torch.equal(other.R, monarch.R)
    assert torch.equal(other.L, -monarch.L)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_deficient_ranks_give_zero_rows(dtype: torch.dtype) -> None:
    assert project(torch.zeros(8, 8, dtype=dtype), MonarchShape(8, 8, 2, 2, 3)).to_dense().count_nonzero() == 0
    assert torch.equal(tail_errors(torch.zeros(8, 8, dtype=dtype), [(2, 2)])[2, 2], torch.zeros(5, dtype=torch.float64))
    weight = torch.randn(16, 2, dtype=dtype) @ torch.randn(2, 12, dtype=dtype)
    monarch = project(weight, MonarchShape(12, 16, 1, 1, 6))
    assert torch.isfinite(monarch.R).all()
    assert torch.isfinite(monarch.L).all()
    assert relative_error(weight, monarch) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale: float) -> None:
    weight = torch.randn(16, 12)
    torch.testing.assert_close(tail_errors(weight * scale, [(2, 2)])[2, 2], tail_errors(weight, [(2, 2)])[2, 2])
    monarch = project(weight * scale, MonarchShape(12, 16, 2, 2, 6))
    assert relative_error((weight * scale).double(), monarch) < 1e-6


def test_weight_is_only_read() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    before = weight.detach().clone()
    monarch = project(weight, MonarchShape(8, 8, 2, 2, 2))
    tail_errors(weight, [(2, 2)])
    assert torch.equal(weight, before)
    assert not monarch.R.requires_grad
    assert project(weight.T, MonarchShape(8, 8, 2, 2, 4)).R.is_contiguous()


def test_refusals() -> None:
    shape = MonarchShape(8, 6, 2, 2, 1)
    with pytest.raises(WeightError, match="NaN or infinite"):
        project(torch.full((6, 8), float("nan")), shape)
    with pytest.raises(WeightError, match=r"torch\.int64"):
        tail_errors(torch.zeros(6, 8, dtype=torch.int64), [(1, 1)])
    with pytest.raises(MetaDeviceError, match="meta device"):
        project(torch.zeros(6, 8, device="meta"), shape)
    with pytest.raises(StructureError, match=r"\(6, 8\), got \(8, 6\)"):
        project(torch.zeros(8, 6), shape)
    with pytest.raises(StructureError, match=r"got shape \(6,\)"):
        tail_errors(torch.zeros(6), [(1, 1)])
    with pytest.raises(StructureError, match="use at most 3"):
        project(torch.zeros(6, 8), MonarchShape(8, 6, 2, 2, 4))


@pytest.mark.parametrize(("out", "inp"), [(512, 512), (768, 256), (200, 600)])
@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (4, 1), (1, 4), (3, 7)])
def test_prior_lies_below_gaussian_weights(out: int, inp: int, grid: tuple[int, int]) -> None:
    prior, gaussian = prior_tail(out, inp, grid), tail_errors(torch.randn(out, inp), [grid])[grid]
    assert prior.shape == gaussian.shape
    assert prior.dtype == torch.float64
    assert prior[0] == 1
    assert prior[-1] == 0
    assert (prior.diff() <= 0).all()
    # 0.01 to 0.03: fluctuations of one sample, and the padding of grids that don't divide
    slack = 0.01 if grid != (3, 7) else 0.03
    assert (prior <= gaussian + slack).all()
    assert (prior >= 0.7 * gaussian - slack).all()


def test_prior_of_blocks_with_one_row() -> None:
    assert prior_tail(4, 4, (4, 4)).tolist() == [1, 0]
    assert prior_tail(1, 100, (1, 1)).tolist() == [1, 0]


def test_prior_of_large_weights_falls_with_rank_and_favours_low_rank() -> None:
    low_rank, blocks = prior_tail(4096, 4096, (1, 1)), prior_tail(4096, 4096, (4, 4))
    assert low_rank[1024] < blocks[256]  # the same number of parameters, half the dense
    assert 0.2 < low_rank[1024] < 0.4


def test_expected_seconds_grow_with_the_work() -> None:
    one = expected_seconds([(1, 768, 768)], [(1, 1)])
    assert expected_seconds([], [(1, 1)]) == 0
    assert expected_seconds([(8, 768, 768)], [(1, 1)]) == pytest.approx(8 * one)
    assert expected_seconds([(1, 768, 768)], [(1, 1), (4, 4)]) > one
    assert expected_seconds([(1, 4096, 4096)], [(1, 1)]) > 10 * one


def falling(n: int) -> Tensor:
    """Singular values that fall as those of trained weights do."""
    ends = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for _ in range(2)]
    return ends[0] * torch.arange(1, n + 1) ** -0.5 @ ends[1]


@pytest.mark.parametrize("kind", ["flat", "falling", "low rank", "outlier", "zero", "blocks"])
def test_few_of_many_directions(kind: str) -> None:
    """Iteration takes the place of a decomposition there."""
    n, rank, grid = 512, 64, (1, 1)
    if kind == "flat":
        weight = torch.randn(n, 600)
    elif kind == "falling":
        weight = falling(n).float()
    elif kind == "low rank":
        weight = torch.randn(n, 40) @ torch.randn(40, n)
    elif kind == "outlier":
        weight = torch.randn(n, n)
        weight[3] *= 1e3
    elif kind == "zero":
        weight = torch.zeros(n, n)
    else:  # of very different energies
        weight, grid = torch.cat([torch.randn(n, n), 1e-3 * torch.randn(n, n)]), (2, 1)
    monarch = project(weight, MonarchShape(weight.shape[1], weight.shape[0], *grid, rank))
    for block, found in zip(weight.double().chunk(grid[0]), wide(monarch).chunk(grid[0]), strict=True):
        energies = torch.linalg.svdvals(block).square()
        # its own rule of when to stop, and the rounding of float32 factors
        wanted = 1.001 * energies[rank:].sum() + torch.finfo(torch.float32).eps ** 2 * energies.sum()
        assert (block - found).square().sum() <= wanted
    norms = [factor.norm(dim=-1) for factor in (monarch.R.transpose(0, 1), monarch.L)]
    torch.testing.assert_close(*norms)
