"""Agreement with stored outputs of the authors' own code (github.com/HazyResearch/fly, float64 and complex128)."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monarch_fx import Monarch, MonarchShape
from monarch_fx.errors import DisconnectedInputsWarning
from monarch_fx.projection import project, tail_errors

FILE = Path(__file__).resolve().parents[1].parent / "shared" / "fly_reference.npz"
KEYS = list(np.load(FILE).files) if FILE.exists() else []
pytestmark = pytest.mark.skipif(not KEYS, reason=f"the authors' outputs are not at {FILE}")

Case = Callable[[str], Tensor]


@pytest.fixture(scope="module")
def archive() -> dict[str, Tensor]:
    with np.load(FILE) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def cases(group: str, last: str) -> list[str]:
    """Cases of a group, by a key that each of them has."""
    return [key.removesuffix(f"/{last}") for key in KEYS if key.startswith(f"{group}/") and key.endswith(f"/{last}")]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def imported(w1: Tensor, w2: Tensor, *size: int) -> Monarch:
    """The layer's matrix, with the warning exactly where blocks are disconnected."""
    if w1.shape[1] >= w2.shape[0]:
        return Monarch.from_blockdiag_butterfly(w1, w2, *size)
    with pytest.warns(DisconnectedInputsWarning, match=r"None of the layer's \d+ inputs"):
        return Monarch.from_blockdiag_butterfly(w1, w2, *size)


@pytest.mark.parametrize("case", cases("mul", "w1") + cases("mulc", "w1"))
def test_products_and_gradients(archive: dict[str, Tensor], case: str) -> None:
    x, w1, w2 = (archive[f"{case}/{name}"].clone().requires_grad_() for name in ("x", "w1", "w2"))
    monarch = imported(w1, w2)
    y = monarch(x)
    close(y, archive[f"{case}/y"])
    close(x @ monarch.to_dense().T, archive[f"{case}/y"])
    if f"{case}/dense" in archive:
        close(monarch.to_dense(), archive[f"{case}/dense"])
    y.backward(archive[f"{case}/gy"])
    for tensor, name in ((x, "dx"), (w1, "dw1"), (w2, "dw2")):
        assert tensor.grad is not None
        close(tensor.grad, archive[f"{case}/{name}"])


@pytest.mark.parametrize("case", cases("mul", "w1") + cases("mulc", "w1"))
def test_round_trip_is_exact(archive: dict[str, Tensor], case: str) -> None:
    w1, w2 = archive[f"{case}/w1"], archive[f"{case}/w2"]
    monarch = imported(w1, w2)
    assert monarch.params == w1.numel() + w2.numel()
    back1, back2 = monarch.to_blockdiag_butterfly()
    assert torch.equal(back1, w1)
    assert torch.equal(back2, w2)
    close(monarch.transpose().to_dense(), monarch.to_dense().T)


@pytest.mark.parametrize("case", cases("linear", "blkdiag1"))
def test_monarch_linear(archive: dict[str, Tensor], case: str) -> None:
    w1, w2, bias = (archive[f"{case}/{name}"] for name in ("blkdiag1", "blkdiag2", "bias"))
    x, dense = archive[f"{case}/x"], archive[f"{case}/dense_weight"]
    monarch = imported(w1, w2, dense.shape[1], dense.shape[0])
    close(monarch(x) + bias, archive[f"{case}/y"])
    close(monarch.to_dense(), dense)
    close(F.linear(x, monarch.to_dense(), bias), archive[f"{case}/y"])
    assert monarch.params / dense.numel() == pytest.approx(float(archive[f"{case}/saving"]), rel=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(monarch.to_blockdiag_butterfly(), (w1, w2), strict=True))


def nearest(A: Tensor, n_out: int, n_in: int, rank: int) -> tuple[Monarch, Tensor]:
    """The closed-form projection onto the authors' layer, and our estimate of its relative error."""
    out, inp = A.shape
    interleaved = torch.arange(out).view(n_out, out // n_out).T.flatten()
    blocks = torch.empty_like(A).index_copy(0, interleaved, A)
    monarch = project(blocks, MonarchShape(inp, out, n_out, n_in, rank))
    error = tail_errors(blocks, [(n_out, n_in)])[n_out, n_in][rank].sqrt()
    return Monarch(monarch.R, monarch.L, output_permutation=interleaved), error


def check_projection(archive: dict[str, Tensor], case: str, A: Tensor, monarch: Monarch, estimate: Tensor) -> None:
    close(monarch.to_dense(), archive[f"{case}/Ahat"])
    close((A - monarch.to_dense()).norm() / A.norm(), archive[f"{case}/relerr"])
    close(estimate, archive[f"{case}/relerr"])


@pytest.mark.parametrize("case", cases("proj", "Ahat"))
def test_projection(archive: dict[str, Tensor], case: str) -> None:
    nblocks, rank = map(int, case.split("/nb")[1].split("_rank"))
    A = archive[f"{case.rsplit('/', 1)[0]}/A"]
    monarch, estimate = nearest(A, nblocks, nblocks, rank)
    check_projection(archive, case, A, monarch, estimate)
    w1, w2 = monarch.to_blockdiag_butterfly()
    assert list(w1.shape) == archive[f"{case}/w1_shape"].tolist()
    assert list(w2.shape) == archive[f"{case}/w2_shape"].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DisconnectedInputsWarning)
        close(Monarch.from_blockdiag_butterfly(w1, w2).to_dense(), archive[f"{case}/Ahat"])


@pytest.mark.parametrize("case", cases("projsq", "Ahat"))
def test_square_projection(archive: dict[str, Tensor], case: str) -> None:
    n_in, n_out = map(int, case.split("sizes")[1].split("x"))
    A = archive[f"{case}/A"]
    check_projection(archive, case, A, *nearest(A, n_out, n_in, 1))
