"""The Monarch class against dense arithmetic in float64."""

import pytest
import torch
from torch import Tensor

from monarch_fx import Monarch, MonarchShape
from monarch_fx.errors import DisconnectedInputsWarning, StructureError


def factors(
    n_out: int = 3, n_in: int = 2, rank: int = 2, s: int = 4, p: int = 5, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    return torch.randn(n_in, n_out, rank, p, dtype=dtype), torch.randn(n_out, n_in, rank, s, dtype=dtype)


def permuted() -> Monarch:
    """11 x 9 in a 3 x 2 grid of 4 x 5 blocks: padded, permuted in both directions, with ragged ranks."""
    torch.manual_seed(0)
    return Monarch(
        *factors(),
        9,
        11,
        input_permutation=torch.randperm(10)[:9],
        output_permutation=torch.randperm(12)[:11],
        ranks=torch.tensor([[2, 1], [0, 2], [1, 1]]),
    )


MATRICES = {
    "plain": lambda: Monarch(*factors()),
    "padded": lambda: Monarch(*factors(), 9, 11),
    "complex": lambda: Monarch(*factors(dtype=torch.complex128), 9, 11),
    "batch": lambda: Monarch(*(torch.stack([f, -2 * f, f + 1]) for f in factors()), 9, 11),
    "permuted": permuted,
    "low rank": lambda: Monarch(*factors(1, 1, 3, 7, 6)),
}


@pytest.fixture(params=MATRICES)
def monarch(request: pytest.FixtureRequest) -> Monarch:
    return MATRICES[request.param]()


def test_blocks_are_products_of_factors() -> None:
    R, L = factors()
    dense = Monarch(R, L).to_dense()
    for j in range(3):
        for k in range(2):
            torch.testing.assert_close(dense[4 * j : 4 * j + 4, 5 * k : 5 * k + 5], L[j, k].T @ R[k, j])


def test_permutations_say_where_features_stand() -> None:
    monarch = permuted()
    grid = Monarch(monarch.R, monarch.L).to_dense()
    i, o = monarch.input_permutation, monarch.output_permutation
    assert i is not None
    assert o is not None
    torch.testing.assert_close(monarch.to_dense(), grid[o][:, i], rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [(), (7,), (2, 3), (0, 4)])
def test_product_is_that_of_the_dense_matrix(monarch: Monarch, tokens: tuple[int, ...]) -> None:
    dense = monarch.to_dense()
    batch = dense.shape[:-2]
    x = torch.randn(*batch, *tokens, monarch.in_features, dtype=dense.dtype)
    expected = torch.einsum("b...i,boi->b...o" if batch else "...i,oi->...o", x, dense)
    torch.testing.assert_close(monarch(x), expected)


def test_transpose(monarch: Monarch) -> None:
    transposed = monarch.transpose()
    torch.testing.assert_close(transposed.to_dense(), monarch.to_dense().mT)
    assert transposed.params == monarch.params
    assert torch.equal(transposed.transpose().to_dense(), monarch.to_dense())


def test_params_count_what_is_stored() -> None:
    R, L = factors()
    assert Monarch(R, L).params == Monarch(R, L).shape.params == R.numel() + L.numel()
    assert MATRICES["batch"]().params == 3 * (R.numel() + L.numel())
    assert permuted().params == 7 * (4 + 5)
    assert permuted().R.count_nonzero() + permuted().L.count_nonzero() == 7 * (4 + 5)


def test_repr() -> None:
    assert repr(Monarch(*factors(), 9, 11)) == "Monarch(11x9, 3x2 r2, 108 parameters, float64)"
    assert repr(permuted()) == (
        "Monarch(11x9, 3x2 r2, ranks 0 to 2, input_permutation, output_permutation, 63 parameters, float64)"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"L": torch.zeros(3, 2, 1, 4, dtype=torch.float64)}, "nblocks_out, nblocks_in, rank, s"),
        ({"L": torch.zeros(3, 2, 2, 4)}, "one dtype and device"),
        ({"R": torch.zeros(2, 3)}, "nblocks_in, nblocks_out, rank, p"),
        ({"in_features": 8}, "sizes of W before padding"),
        ({"out_features": 13}, "sizes of W before padding"),
        ({"in_features": 0}, "in_features must be a positive integer, got 0"),
        ({"input_permutation": torch.arange(9)}, r"shape \(10,\)"),
        ({"output_permutation": torch.zeros(12)}, "must be an int64 tensor"),
        ({"output_permutation": torch.zeros(12, dtype=torch.int64)}, "12 different indices from 0 to 11"),
        ({"output_permutation": torch.arange(12) + 1}, "12 different indices from 0 to 11"),
        ({"ranks": torch.full((3, 2), 3)}, "values from 0 to 2"),
        ({"ranks": torch.full((2, 3), 1)}, r"shape \(3, 2\)"),
    ],
)
def test_refuses_what_makes_no_matrix(arguments: dict[str, object], message: str) -> None:
    R, L = factors()
    with pytest.raises(StructureError, match=message):
        Monarch(**{"R": R, "L": L, **arguments})


def authors_layer(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Their ``blockdiag_butterfly_multiply``, by its definition."""
    inner = torch.einsum("kqp,bkp->bkq", w1, x.unflatten(-1, (w1.shape[0], -1))).flatten(1)  # (b, k * q)
    mixed = inner.unflatten(1, (-1, w2.shape[0])).transpose(1, 2)  # (b, l, r)
    return torch.einsum("lsr,blr->bsl", w2, mixed).flatten(1)


@pytest.mark.parametrize(
    ("k", "q", "p", "l_out", "s", "r"),
    [
        (2, 4, 3, 4, 5, 2),
        (4, 6, 5, 8, 2, 3),
        (3, 8, 2, 6, 3, 4),
        (5, 3, 2, 15, 2, 1),
        (1, 6, 4, 2, 3, 3),
        (4, 5, 1, 4, 1, 5),
    ],
)
@pytest.mark.filterwarnings("ignore::monarch_fx.errors.DisconnectedInputsWarning")
def test_blockdiag_butterfly_both_ways(k: int, q: int, p: int, l_out: int, s: int, r: int) -> None:
    w1 = torch.randn(k, q, p, dtype=torch.float64, requires_grad=True)
    w2 = torch.randn(l_out, s, r, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, k * p, dtype=torch.float64)
    monarch = Monarch.from_blockdiag_butterfly(w1, w2)
    torch.testing.assert_close(monarch(x), authors_layer(x, w1, w2))
    assert monarch.params == w1.numel() + w2.numel()
    back = monarch.to_blockdiag_butterfly()
    assert torch.equal(back[0], w1)
    assert torch.equal(back[1], w2)
    ours = torch.autograd.grad(monarch(x).square().sum(), (w1, w2))
    theirs = torch.autograd.grad(authors_layer(x, w1, w2).square().sum(), (w1, w2))
    torch.testing.assert_close(ours, theirs)


def test_disconnected_inputs_are_counted() -> None:
    with pytest.warns(DisconnectedInputsWarning, match=r"None of the layer's 8 inputs .* 8 of 16 blocks are zero"):
        monarch = Monarch.from_blockdiag_butterfly(torch.ones(4, 2, 2), torch.ones(4, 2, 2))
    assert int((monarch.to_dense() == 0).sum()) == 8 * 8 // 2


def test_blockdiag_butterfly_refusals() -> None:
    with pytest.raises(StructureError, match=r"k \* q == l \* r"):
        Monarch.from_blockdiag_butterfly(torch.zeros(2, 4, 3), torch.zeros(4, 5, 3))
    with pytest.raises(StructureError, match="interleaves the outputs"):
        Monarch(*factors()).to_blockdiag_butterfly()
    with pytest.raises(StructureError, match="a batch of 3"):
        MATRICES["batch"]().to_blockdiag_butterfly()
    ragged = Monarch(*factors(1, 2), ranks=torch.tensor([[2, 1]]))
    with pytest.raises(StructureError, match=r"blocks of ranks \[\[2, 1\]\]"):
        ragged.to_blockdiag_butterfly()


def test_shape_says_whether_it_pads() -> None:
    assert MonarchShape(9, 11, 3, 2, 2).padded
    assert not MonarchShape(10, 12, 3, 2, 2).padded
