"""Exact forms of transforms against torch.fft, scipy.fft and scipy.linalg, and layers that start as them."""

import copy
import math

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import monarch_fx as mfx
from monarch_fx.errors import ConfigError, StructureError, WeightError
from monarch_fx.transforms import (
    Kronecker,
    LearnedTransform,
    Product,
    Transform,
    acdc,
    circulant,
    dct,
    dft,
    dft2,
    dst,
    fastfood,
    haar,
    hadamard,
    idft,
    idft2,
    kronecker,
    toeplitz,
)

COMPOSITE = [4, 6, 12, 15, 16, 49, 85]
POWERS = [4, 8, 32, 64]
NORMS = ["backward", "ortho", "forward"]
DOUBLE, COMPLEX = torch.float64, torch.complex128


def normal(*shape: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def haar_matrix(n: int) -> np.ndarray:
    """The textbook recursion: sums go on to the coarser levels, differences are the finest one."""
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        fine = np.kron(np.eye(len(matrix)), [[1, -1]])
        matrix = np.concatenate([np.kron(matrix, [[1, 1]]), fine]) / math.sqrt(2)
    return matrix


def check(transform: Transform, reference: Tensor | np.ndarray) -> None:
    """Dense values and products equal those of ``reference`` to rounding.

    Both are sums of at most n terms with a few roundings each, and errors of independent roundings add as roots: 8 eps
    sqrt(n) of the largest row's norm.
    """
    expected = torch.as_tensor(reference).resolve_conj()
    n = transform.in_features
    dense = transform.to_dense()
    assert dense.shape == expected.shape == (transform.out_features, n)
    assert dense.dtype == expected.dtype
    tolerance = 8 * torch.finfo(dense.dtype).eps * math.sqrt(n) * float(expected.norm(dim=1).max())
    torch.testing.assert_close(dense, expected, rtol=0, atol=tolerance)
    x = normal(3, 1, n)
    product = (x.to(expected.dtype) @ expected.mT) if expected.is_complex() else x @ expected.mT
    torch.testing.assert_close(transform(x), product, rtol=0, atol=tolerance * float(x.norm(dim=-1).max()))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", COMPOSITE)
def test_fourier(n: int, norm: str) -> None:
    eye = torch.eye(n, dtype=DOUBLE)
    check(dft(n, norm, dtype=COMPLEX), torch.fft.fft(eye, norm=norm, dim=0))
    check(idft(n, norm, dtype=COMPLEX), torch.fft.ifft(eye, norm=norm, dim=0))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("height", "width"), [(4, 6), (15, 8)])
def test_fourier_in_two_dimensions(height: int, width: int, norm: str) -> None:
    images = torch.eye(height * width, dtype=DOUBLE).view(-1, height, width)
    check(dft2(height, width, norm, dtype=COMPLEX), torch.fft.fft2(images, norm=norm).flatten(1).mT)
    check(idft2(height, width, norm, dtype=COMPLEX), torch.fft.ifft2(images, norm=norm).flatten(1).mT)


def test_fourier_of_a_prime_image_is_one_kronecker_product() -> None:
    eyes = [torch.eye(n, dtype=COMPLEX) for n in (5, 7)]
    images = torch.eye(35, dtype=DOUBLE).view(-1, 5, 7)
    check(kronecker(*map(torch.fft.fft, eyes)), torch.fft.fft2(images).flatten(1).mT)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [2, 3, 4])
@pytest.mark.parametrize("n", COMPOSITE)
def test_cosine_and_sine(n: int, kind: int, norm: str) -> None:
    check(dct(n, kind, norm, dtype=DOUBLE), scipy.fft.dct(np.eye(n), kind, norm=norm, axis=0))
    check(dst(n, kind, norm, dtype=DOUBLE), scipy.fft.dst(np.eye(n), kind, norm=norm, axis=0))


def test_third_type_is_the_inverse_of_the_second() -> None:
    for transform in (dct, dst):
        both = transform(12, 3, "forward", dtype=DOUBLE).to_dense() @ transform(12, 2, dtype=DOUBLE).to_dense()
        torch.testing.assert_close(both, torch.eye(12, dtype=DOUBLE))


@pytest.mark.parametrize("n", POWERS)
def test_hadamard_and_haar(n: int) -> None:
    check(hadamard(n, dtype=DOUBLE), scipy.linalg.hadamard(n, dtype=np.float64))
    check(haar(n, dtype=DOUBLE), haar_matrix(n))


@pytest.mark.parametrize("dtype", [DOUBLE, COMPLEX])
def test_kronecker(dtype: torch.dtype) -> None:
    A, B = normal(3, 4, dtype=dtype), normal(5, 7, dtype=dtype)
    check(kronecker(A, B), torch.kron(A, B))
    check(
        Kronecker(kronecker(A, B), dft(4, dtype=COMPLEX)), torch.kron(torch.kron(A, B).to(COMPLEX), fourier_matrix(4))
    )


def fourier_matrix(n: int) -> Tensor:
    return torch.fft.fft(torch.eye(n, dtype=COMPLEX))


@pytest.mark.parametrize("dtype", [DOUBLE, COMPLEX])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 12, 31, 64])
def test_circulant(n: int, dtype: torch.dtype) -> None:
    c = normal(n, dtype=dtype)
    check(circulant(c), scipy.linalg.circulant(c.numpy()))


@pytest.mark.parametrize("dtype", [DOUBLE, COMPLEX])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (9, 1), (2, 3), (16, 16), (17, 40), (40, 17)])
def test_toeplitz(rows: int, columns: int, dtype: torch.dtype) -> None:
    c, r = normal(rows, dtype=dtype), normal(columns, dtype=dtype)
    check(toeplitz(c, r), scipy.linalg.toeplitz(c.numpy(), r.numpy()))
    check(toeplitz(c), scipy.linalg.toeplitz(c.numpy()))


def test_convolution() -> None:
    kernel, x = normal(5), normal(20)
    c = torch.cat([kernel, kernel.new_zeros(19)])
    full = torch.as_tensor(np.convolve(kernel.numpy(), x.numpy()))
    torch.testing.assert_close(toeplitz(c, c.new_zeros(20))(x), full)


def test_fastfood_and_acdc() -> None:
    S, G, B = normal(3, 16)
    order = torch.randperm(16)
    H = torch.as_tensor(scipy.linalg.hadamard(16, dtype=np.float64))
    check(fastfood(S, G, order, B), S.diag() @ H @ G.diag() @ torch.eye(16, dtype=DOUBLE)[order] @ H @ B.diag())
    A, D = normal(2, 15)
    C = torch.as_tensor(scipy.fft.dct(np.eye(15), norm="ortho", axis=0))
    check(acdc(A, D), C.T @ D.diag() @ C @ A.diag())


EXAMPLES = {  # one of every kind
    "dft": lambda: dft(12),
    "idft2": lambda: idft2(4, 6),
    "dct": lambda: dct(16),
    "haar": lambda: haar(16),
    "kronecker": lambda: kronecker(torch.randn(3, 4), torch.randn(5, 2)),
    "circulant": lambda: circulant(torch.randn(12)),
    "circulant, complex": lambda: circulant(torch.randn(12, dtype=torch.complex64)),
    "toeplitz": lambda: toeplitz(torch.randn(7), torch.randn(11)),
    "acdc": lambda: acdc(torch.randn(12), torch.randn(12)),
    "nested": lambda: Product([circulant(torch.randn(24)), Kronecker(dct(4), dct(6)), dft(24)]),
    "padded": lambda: mfx.Monarch(torch.randn(2, 3, 1, 4), torch.randn(3, 2, 1, 2), in_features=7, out_features=5),
}


SINGLE = [name for name, make in EXAMPLES.items() if isinstance(make(), mfx.Monarch)]


@pytest.fixture(params=EXAMPLES)
def transform(request: pytest.FixtureRequest) -> Transform:
    return EXAMPLES[request.param]()


@pytest.mark.parametrize("tokens", [(), (5,), (2, 3), (0, 4)])
def test_layer_starts_as_the_transform(transform: Transform, tokens: tuple[int, ...]) -> None:
    layer, dense = LearnedTransform(transform), transform.to_dense()
    x = torch.randn(*tokens, transform.in_features)
    expected = x.to(dense.dtype) @ dense.mT
    assert (layer.in_features, layer.out_features) == (transform.in_features, transform.out_features)
    for y in (transform(x), layer(x)):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)  # float32, entries of up to 24
    torch.testing.assert_close(layer.to_dense(), dense, rtol=1e-4, atol=1e-4)


def test_complex_inputs() -> None:
    for transform in (dft(12), dct(12), circulant(torch.randn(12)), Kronecker(dct(4), dft(4))):
        dense = transform.to_dense().to(torch.complex64)
        x = torch.randn(3, len(dense), dtype=torch.complex64)
        for product in (transform, LearnedTransform(transform)):
            torch.testing.assert_close(product(x), x @ dense.mT, rtol=1e-4, atol=1e-4)


def test_parameters_are_those_of_the_layer(transform: Transform) -> None:
    assert transform.params == sum(parameter.numel() for parameter in LearnedTransform(transform).parameters())


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "nested"])  # which has real and complex factors
def test_operations_are_those_of_the_layer(name: str) -> None:
    transform = EXAMPLES[name]()
    layer = LearnedTransform(transform)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, transform.in_features))
    # PyTorch counts a complex multiplication with its addition as two operations, not as eight.
    factor = 4 if next(layer.parameters()).is_complex() else 1
    assert transform.flops == factor * counter.get_total_flops()


def test_counts_are_those_stated() -> None:
    n, sides = 60, 6 + 10
    assert (dft(n).params, dft(n).flops) == (n * sides, 8 * n * sides)
    assert (dct(n).params, dct(n).flops) == (2 * n * sides, 4 * n * sides)
    assert (circulant(torch.ones(n)).params, circulant(torch.ones(n)).flops) == (2 * n * sides, 16 * n * sides)
    assert (acdc(*torch.ones(2, n)).params, acdc(*torch.ones(2, n)).flops) == (4 * n * sides, 8 * n * sides)
    assert (haar(64).params, hadamard(64).flops) == (64 * 16, 2 * 64 * 16)
    image = dft2(12, 60)
    assert (image.params, image.flops) == (12 * 7 + 60 * 16, 8 * 12 * 60 * (7 + 16))
    assert toeplitz(torch.ones(1024)).params == pytest.approx(8 * 1024**1.5, rel=0.05)


@pytest.mark.parametrize("name", SINGLE)
def test_gradients_of_factors_are_those_through_the_dense_matrix(name: str) -> None:
    transform = EXAMPLES[name]()
    factors = [factor.detach().clone().requires_grad_() for factor in (transform.R, transform.L)]
    places = {"input_permutation": transform.input_permutation, "output_permutation": transform.output_permutation}
    monarch = mfx.Monarch(*factors, transform.in_features, transform.out_features, **places)
    layer = LearnedTransform(transform)
    x = torch.randn(4, transform.in_features)
    expected = torch.autograd.grad((x.to(factors[0].dtype) @ monarch.to_dense().mT).abs().square().sum(), factors)
    found = torch.autograd.grad(layer(x).abs().square().sum(), list(layer.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("start", [dft(12), circulant(torch.arange(12.0))])
def test_training_reaches_another_matrix_of_the_form(start: Transform) -> None:
    goal = copy.deepcopy(LearnedTransform(start))
    with torch.no_grad():
        for parameter in goal.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    layer, target = LearnedTransform(start), goal.to_dense().detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer.to_dense() - target).abs().square().sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1e-3 * losses[0]


def test_state_is_saved_and_loaded(transform: Transform) -> None:
    layer = LearnedTransform(transform)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    other = LearnedTransform(transform)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, transform.in_features)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert not torch.equal(LearnedTransform(transform)(x), layer(x))  # values were copied


def test_layer_traces_without_breaks(transform: Transform) -> None:
    layer = LearnedTransform(transform)
    x = torch.randn(2, transform.in_features)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_transforms_are_differentiable_in_what_they_are_made_of() -> None:
    x, order = normal(2, 8), torch.randperm(8)
    makers = {
        lambda c: circulant(c): [normal(8)],
        lambda c, r: toeplitz(c, r): [normal(5), normal(8)],
        lambda S, G, B: fastfood(S, G, order, B): list(normal(3, 8)),
        lambda A, D: acdc(A, D): list(normal(2, 8)),
        lambda A, B: kronecker(A, B): [normal(3, 2), normal(2, 4)],
    }
    for make, tensors in makers.items():
        inputs = [tensor.clone().requires_grad_() for tensor in tensors]
        assert torch.autograd.gradcheck(lambda *values, make=make: make(*values)(x), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_rounded_once(dtype: torch.dtype) -> None:
    for make in (dct, dst, haar, hadamard):
        exact, rounded = make(16, dtype=DOUBLE), make(16, dtype=dtype)
        assert torch.equal(rounded.R, exact.R.to(dtype))
        assert torch.equal(rounded.L, exact.L.to(dtype))
    exact, rounded = dft(16, dtype=COMPLEX), dft(16)
    assert rounded.R.dtype == torch.complex64
    assert torch.equal(rounded.R, exact.R.to(torch.complex64))


def test_half_precision_layer() -> None:
    layer = LearnedTransform(dct(16, norm="ortho", dtype=torch.bfloat16))
    x = torch.randn(4, 16)
    y = layer(x.bfloat16()).detach()
    assert y.dtype == torch.bfloat16
    # Two factors and two products are rounded, on an orthogonal matrix.
    reference = torch.as_tensor(scipy.fft.dct(x.numpy(), norm="ortho"))
    assert float((y.float() - reference).norm() / reference.norm()) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu(transform: Transform) -> None:
    layer = LearnedTransform(transform)
    x = torch.randn(4, transform.in_features)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), transform(x), rtol=1e-4, atol=1e-4)
    c = torch.randn(12, device="cuda")
    for made in (dft(12, device="cuda"), dst(12, device="cuda"), haar(16, device="cuda"), circulant(c), acdc(c, c)):
        assert made(torch.randn(2, made.in_features, device="cuda")).device == c.device


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dft(7), StructureError, r"dft of size 7 .* no two factors above 1.*Pad to a composite size, 8"),
        (lambda: idft2(4, 13), StructureError, "idft of size 13"),
        (lambda: dct(2), StructureError, "Pad to a composite size, 4"),
        (lambda: dft(0), StructureError, "must be a positive integer, got 0"),
        (lambda: dft(16, "unit"), ConfigError, "'backward', 'ortho', 'forward', got 'unit'"),
        (lambda: dft(16, dtype=torch.float32), ConfigError, r"dft has values in .*got dtype=torch\.float32"),
        (lambda: dct(16, 1), ConfigError, "type of dct must be 2, 3 or 4, got 1"),
        (lambda: dst(16, dtype=torch.complex64), ConfigError, "dst has values in"),
        (lambda: hadamard(12), StructureError, "hadamard must be a power of two from 4 on, got 12"),
        (lambda: haar(2), StructureError, "haar must be a power of two from 4 on, got 2"),
        (lambda: circulant(torch.zeros(2, 2)), StructureError, r"c of circulant must be a vector, got shape \(2, 2\)"),
        (lambda: circulant(torch.arange(4)), WeightError, r"got torch\.int64"),
        (lambda: toeplitz(torch.ones(4), torch.ones(4).double()), WeightError, "must have one dtype"),
        (lambda: toeplitz(torch.ones(4).half()), WeightError, r"got torch\.float16"),
        (lambda: acdc(torch.ones(4), torch.ones(6)), StructureError, r"one length, got A \(4,\), D \(6,\)"),
        (lambda: kronecker(torch.ones(4), torch.ones(4, 4)), StructureError, r"must be matrices, got shapes \(4,\)"),
        (lambda: Product([]), StructureError, "at least one factor"),
        (lambda: Product([dft(4), dft(6)]), StructureError, "4 outputs stands before one with 6 inputs"),
        (lambda: Product([mfx.Monarch(*torch.ones(2, 3, 2, 2, 1, 2))]), StructureError, "a batch of 3"),
        (lambda: LearnedTransform(dft(4))(torch.ones(5)), StructureError, r"end in 4 features, got shape \(5,\)"),
    ],
)
def test_refusals(make: object, error: type[Exception], message: str) -> None:
    assert callable(make)
    with pytest.raises(error, match=message):
        make()


def test_layer_refuses_blocks_of_several_ranks() -> None:
    ragged = mfx.Monarch(torch.ones(2, 1, 2, 2), torch.ones(1, 2, 2, 2), ranks=torch.tensor([[2, 1]]))
    with pytest.raises(StructureError, match="have one rank"):
        LearnedTransform(ragged)


def test_printouts() -> None:
    assert "Real part of the product of [Monarch(12x12, 3x4 r1" in repr(circulant(torch.ones(12)))
    assert repr(dft2(4, 6)).startswith("Kronecker product of Monarch(4x4, 2x2 r1")
    assert "(0): _Factor(12 -> 12, 4x3 r1)" in repr(LearnedTransform(dft(12)))
