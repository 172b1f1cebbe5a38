"""Which known matrices can low rank, sparsity and Monarch represent, at equal numbers of parameters?

Every transform sets the budget by its exact Monarch form, and its relative error in the Frobenius norm is that of the
best low-rank matrix, of its largest entries alone (their places are not counted), of the nearest Monarch matrix in the
plain block layout, and of the nearest one behind the permutations of the exact form; then of the exact form itself,
and of factors recovered from the dense values (Dao et al. 2022, section 3.2 and Algorithm 2). A complex number counts
as two.

    python -m examples.expressiveness --out results/expressiveness
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.linalg
import torch
from torch import Tensor

import monarch_fx as mfx
from examples.curves import print_table, write_json
from monarch_fx import transforms
from monarch_fx.errors import RecoveryError
from monarch_fx.projection import project
from monarch_fx.transforms import Transform

Errors = dict[str, float | None]
STRUCTURES = ("low rank", "sparse", "Monarch, plain", "Monarch, permuted", "exact form", "recovered MM*")
FLOOR = 1e-16  # of the drawing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    parser.add_argument("--size", type=int, default=1024, help="of the matrices, a power of 4 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of random matrices")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_default_dtype(torch.float64)
    rows: dict[str, Errors] = {}
    budgets: dict[str, float] = {}
    for name, dense, exact in matrices(options.size):
        numbers = 2 * options.size**1.5 if exact is None else reals(exact)
        numbers = int(numbers / 2 if dense.is_complex() else numbers)  # entries of the dtype of the dense matrix
        budgets[name] = numbers / dense.numel()
        rows[name] = errors(dense, exact, numbers)
    print(f"relative errors of {options.size} x {options.size} matrices\n")
    shown = [[name, f"{budgets[name]:.3f}", *(text(row[s]) for s in STRUCTURES)] for name, row in rows.items()]
    print_table(["", "parameters", *STRUCTURES], shown)
    settings = {"size": options.size, "seed": options.seed}
    write_json(options.out / "expressiveness.json", {"settings": settings, "budgets": budgets, "errors": rows})
    draw(options.out / "expressiveness.png", rows, budgets)
    return 0


def matrices(n: int) -> Iterator[tuple[str, Tensor, Transform | None]]:
    """Names, dense values made by SciPy or PyTorch, and exact forms."""
    eye, side = np.eye(n), math.isqrt(n)
    a, b, c, d = torch.randn(4, n)
    A, B, order = torch.randn(side, side), torch.randn(side, side), torch.randperm(n)
    H = torch.as_tensor(scipy.linalg.hadamard(n, dtype=float))
    C = torch.as_tensor(scipy.fft.dct(eye, norm="ortho", axis=0))
    yield "DFT", torch.fft.fft(torch.eye(n)), transforms.dft(n)
    yield "DCT-II", torch.as_tensor(scipy.fft.dct(eye, axis=0)), transforms.dct(n)
    yield "DST-IV", torch.as_tensor(scipy.fft.dst(eye, 4, axis=0)), transforms.dst(n, 4)
    yield "Hadamard", H, transforms.hadamard(n)
    yield "Haar", haar(n), transforms.haar(n)
    yield "Kronecker", torch.kron(A, B), transforms.kronecker(A, B)
    yield "circulant", torch.as_tensor(scipy.linalg.circulant(a.numpy())), transforms.circulant(a)
    yield "Toeplitz", torch.as_tensor(scipy.linalg.toeplitz(a.numpy(), b.numpy())), transforms.toeplitz(a, b)
    fastfood = a.diag() @ H @ b.diag() @ torch.eye(n)[order] @ H @ c.sign().diag()
    yield "Fastfood", fastfood, transforms.fastfood(a, b, order, c.sign())
    yield "ACDC", C.T @ d.diag() @ C @ a.diag(), transforms.acdc(a, d)
    yield "random", torch.randn(n, n), None


def haar(n: int) -> Tensor:
    """The orthonormal Haar matrix by its recursion: sums go on to the next level, differences are finished."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        sums, differences = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]])
        matrix = torch.cat([torch.kron(matrix, sums), torch.kron(torch.eye(len(matrix)), differences)]) / math.sqrt(2)
    return matrix


def errors(dense: Tensor, exact: Transform | None, numbers: int) -> Errors:
    n = len(dense)
    spectrum = torch.linalg.svdvals(dense).square()
    entries = dense.abs().square().flatten().sort(descending=True).values
    single = isinstance(exact, mfx.Monarch)
    return {
        "low rank": tail(spectrum, numbers // (2 * n)),
        "sparse": tail(entries, numbers),
        "Monarch, plain": nearest(dense, numbers),
        "Monarch, permuted": nearest(unpermuted(dense, exact), numbers) if single else None,
        "exact form": None if exact is None else relative(exact.to_dense(), dense),
        "recovered MM*": recovered(dense),
    }


def nearest(dense: Tensor, numbers: int) -> float:
    """The error of the Monarch matrix of the most square grid that is nearest to ``dense``."""
    n, blocks = len(dense), math.isqrt(len(dense))
    return relative(
        project(dense, mfx.MonarchShape(n, n, blocks, blocks, numbers // (2 * n * blocks))).to_dense(), dense
    )


def unpermuted(dense: Tensor, exact: mfx.Monarch) -> Tensor:
    """``dense`` with rows and columns in the order of the grid of its exact form."""
    for dim, order in enumerate((exact.output_permutation, exact.input_permutation)):
        dense = dense if order is None else dense.index_select(dim, order.argsort())
    return dense


def recovered(dense: Tensor) -> float | None:
    """The error of factors in MM* that are found from the dense values; None where there are none."""
    try:
        return relative(mfx.recover_factors(dense).to_dense(), dense)
    except RecoveryError:
        return None


def relative(approximation: Tensor, dense: Tensor) -> float:
    return float((approximation - dense).norm() / dense.norm())


def tail(squares: Tensor, kept: int) -> float:
    """The error of keeping the first of ``squares``, which fall."""
    return math.sqrt(float(squares[kept:].sum() / squares.sum()))


def reals(exact: Transform) -> int:
    """Real numbers that a transform stores."""
    if isinstance(exact, mfx.Monarch):
        return exact.params * (2 if exact.R.is_complex() else 1)
    return sum(reals(factor) for factor in exact.factors)


def text(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}" if error < 1e-3 else f"{error:.3f}"


def draw(path: Path, rows: Mapping[str, Errors], budgets: Mapping[str, float]) -> None:
    """Bars of errors on a logarithmic axis, a group per matrix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(13, 4.5))
    width = 0.8 / len(STRUCTURES)
    for index, structure in enumerate(STRUCTURES):
        places = [group + (index - len(STRUCTURES) / 2 + 0.5) * width for group in range(len(rows))]
        heights = [max(row[structure] or FLOOR, FLOOR) if row[structure] is not None else 0 for row in rows.values()]
        axes.bar(places, heights, width, label=structure, bottom=FLOOR / 3)
    axes.set(yscale="log", ylim=(FLOOR / 3, 3), ylabel="relative error")
    axes.set_xticks(range(len(rows)), [f"{name}\n{budgets[name]:.3f}" for name in rows])
    axes.set_xlabel("matrix, and share of its parameters that every structure has")
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
