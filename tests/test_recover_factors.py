"""Factors of matrices in MM* (Dao et al. 2022, Algorithm 2), recovered from dense values."""

import math

import pytest
import torch
from torch import Tensor

import monarch_fx as mfx
from monarch_fx.errors import MetaDeviceError, RecoveryError, StructureError, WeightError

DTYPES = [torch.float64, torch.complex128, torch.float32, torch.complex64]


def matrix(n: int, b: int, dtype: torch.dtype) -> Tensor:
    """A matrix of MM* by its definition. U_i and V_j are orthogonal, and entries of D_ij lie between 1 and 2."""
    m = n // b
    wide = torch.promote_types(dtype, torch.float64)
    U, V = (torch.linalg.qr(torch.randn(b, m, m, dtype=wide)).Q for _ in range(2))
    D = 1 + torch.rand(b, b, m, dtype=torch.float64)
    return assembled(torch.einsum("ist,ijt,jtu->ijsu", U, D.to(wide), V)).to(dtype)


def assembled(blocks: Tensor) -> Tensor:
    """Blocks A_ij (b, b, m, m) -> A, with A_ij[s, t] = A[s b + i, t b + j]."""
    b, _, m, _ = blocks.shape
    return blocks.permute(2, 0, 3, 1).reshape(b * m, b * m)


def error(found: mfx.transforms.Product, A: Tensor) -> float:
    return float((found.to_dense() - A).norm() / A.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "b"), [(16, 4), (36, 6), (48, 4), (48, 12), (64, 8), (15, 3)])
def test_factors_multiply_to_the_matrix(n: int, b: int, dtype: torch.dtype) -> None:
    A = matrix(n, b, dtype)
    found = mfx.recover_factors(A, b)
    # Roundings of A are divided by the gaps between m random eigenvalues, the closest about 1 / m^2 apart (and 100
    # times closer with a probability of a percent).
    bound = 100 * torch.finfo(dtype).eps * (n // b) ** 2 * math.sqrt(n)
    assert error(found, A) < bound
    assert [factor.R.dtype for factor in found.factors] == [dtype, dtype]
    assert found.params == 2 * n * (b + n // b)
    x = torch.randn(3, n, dtype=dtype)
    torch.testing.assert_close(found(x), x @ A.mT, rtol=0, atol=bound * float(x.norm() * A.norm()))


def test_middle_factor_may_have_zeros_beside_one_row_and_column() -> None:
    U, V = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    D = 1 + torch.rand(4, 4, 4, dtype=torch.float64)
    D[torch.arange(4) != 2, 1, :2] = 0
    D[3, 3] = 0
    A = assembled(torch.einsum("ist,ijt,jtu->ijsu", U, D, V))
    assert error(mfx.recover_factors(A), A) < 1e-9  # normal factors of this size have condition numbers up to 1e3


@pytest.mark.parametrize("n", [36, 48, 64])
def test_circulant(n: int) -> None:
    """Its eigenvalues are complex: so are the factors, of a real product."""
    A = mfx.transforms.circulant(torch.randn(n, dtype=torch.float64)).to_dense()
    found = mfx.recover_factors(A)
    assert found.real
    assert found.to_dense().dtype == torch.float64
    assert error(found, A) < 1e-11  # blocks are circulant, and have condition numbers of some hundreds


@pytest.mark.parametrize(
    "A",
    [
        torch.kron(torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)),
        mfx.transforms.hadamard(64, dtype=torch.float64).to_dense(),
    ],
    ids=["kronecker", "hadamard"],
)
def test_equal_eigenvalues(A: Tensor) -> None:
    """All blocks are multiples of each other: any basis diagonalises, and a real one is found."""
    found = mfx.recover_factors(A, 8)
    assert not found.factors[0].R.is_complex()
    assert error(found, A) < 1e-12


def test_some_equal_eigenvalues() -> None:
    U, V = (torch.linalg.qr(torch.randn(4, 6, 6, dtype=torch.float64)).Q for _ in range(2))
    D = 1 + torch.rand(4, 4, 6, dtype=torch.float64)
    D[..., 1:4] = D[..., :1]
    A = assembled(torch.einsum("ist,ijt,jtu->ijsu", U, D, V))
    assert error(mfx.recover_factors(A, 4), A) < 1e-11


def test_result_starts_a_layer() -> None:
    A = mfx.transforms.circulant(torch.randn(16)).to_dense()
    layer = mfx.transforms.LearnedTransform(mfx.recover_factors(A))
    torch.testing.assert_close(layer.to_dense(), A, rtol=0, atol=1e-3 * float(A.abs().max()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu() -> None:
    A = matrix(36, 6, torch.float64).cuda()
    found = mfx.recover_factors(A)
    assert found.factors[0].R.device == A.device
    assert error(found, A) < 1e-9


def test_matrix_is_only_read_and_nothing_is_random() -> None:
    A = torch.nn.Parameter(matrix(16, 4, torch.float64))
    before, state = A.detach().clone(), torch.get_rng_state()
    first, second = mfx.recover_factors(A), mfx.recover_factors(A)
    assert torch.equal(A, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.to_dense(), second.to_dense())
    assert not first.factors[0].R.requires_grad


def test_other_matrices_are_refused_with_the_error_made() -> None:
    with pytest.raises(
        RecoveryError, match=r"64x64 matrix is not in MM\* with 8 blocks: .* of its norm, more than rtol"
    ):
        mfx.recover_factors(torch.randn(64, 64))
    A = matrix(16, 4, torch.float64)
    noisy = A + 1e-6 * torch.randn_like(A)
    with pytest.raises(RecoveryError, match=r"rtol=1\.5e-08"):
        mfx.recover_factors(noisy)
    assert error(mfx.recover_factors(noisy, rtol=1e-3), noisy) < 1e-3
    with pytest.raises(RecoveryError, match="not in MM"):
        mfx.recover_factors(A, 8)


def test_blocks_that_have_no_common_eigenvectors_are_refused() -> None:
    blocks = torch.eye(2, dtype=torch.float64).repeat(2, 2, 1, 1)
    blocks[1, 1, 0, 1] = 1  # a Jordan block
    with pytest.raises(RecoveryError, match="not in MM"):
        mfx.recover_factors(assembled(blocks), 2)


@pytest.mark.parametrize("A", [torch.eye(16), torch.zeros(16, 16), mfx.transforms.dft(16).to_dense()])
def test_singular_blocks_are_refused_with_their_condition(A: Tensor) -> None:
    with pytest.raises(RecoveryError, match=r"4x4 blocks the best have a condition number of (inf|\d\.\de\+\d+)"):
        mfx.recover_factors(A)


def test_refusals() -> None:
    with pytest.raises(StructureError, match=r"square matrix, got shape \(4, 6\)"):
        mfx.recover_factors(torch.ones(4, 6))
    with pytest.raises(StructureError, match=r"square matrix, got shape \(2, 4, 4\)"):
        mfx.recover_factors(torch.ones(2, 4, 4))
    with pytest.raises(StructureError, match="divisor of the size 12, got 5"):
        mfx.recover_factors(torch.ones(12, 12), 5)
    with pytest.raises(StructureError, match="recover_factors of size 7"):
        mfx.recover_factors(torch.ones(7, 7))
    with pytest.raises(WeightError, match="NaN"):
        mfx.recover_factors(torch.full((4, 4), math.nan))
    with pytest.raises(MetaDeviceError):
        mfx.recover_factors(torch.empty(4, 4, device="meta"))
