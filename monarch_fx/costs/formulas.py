"""FLOPs, bytes and seconds of dense and Monarch products, as sympy expressions.

A product is a list of kernels. Expressions are in the symbols of this module: sizes of the product (``tokens`` rows for
each of ``batch`` equal matrices), the bytes of its dtype, and the constants of a ``DeviceProfile``.

A Monarch product runs with copies or without, see ``monarch`` and ``without_copies``. A transpose that only renames
dimensions costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
from sympy import Expr, Max, Min, ceiling

# fmt: off
SIZES = sympy.symbols(
    "tokens in_features out_features nblocks_out nblocks_in rank batch dtype_bytes", positive=True, integer=True
)
tokens, in_features, out_features, nblocks_out, nblocks_in, rank, batch, dtype_bytes = SIZES

DEVICE = sympy.symbols(
    "peak_flops bandwidth_bytes_per_s copy_bytes_per_s launch_s overlap tile units fill kernel_efficiency",
    nonnegative=True,
)
peak_flops, bandwidth_bytes_per_s, copy_bytes_per_s, launch_s, overlap, tile, units, fill, kernel_efficiency = DEVICE
# fmt: on


@dataclass(frozen=True)
class Product:
    """``batch`` products (m, k) @ (k, n) in one launch, ``launches`` times; ``own``: by a kernel of this library."""

    batch: Expr
    m: Expr
    k: Expr
    n: Expr
    launches: Expr = sympy.S.One
    own: bool = False

    @property
    def flops(self) -> Expr:
        """Multiplications and additions, one each for every (batch, m, k, n)."""
        return 2 * self.launches * self.batch * self.m * self.k * self.n

    @property
    def bytes_moved(self) -> Expr:
        """Both operands read once, the result written once."""
        return self.launches * self._bytes_moved

    @property
    def _bytes_moved(self) -> Expr:
        return dtype_bytes * self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)

    @property
    def seconds(self) -> Expr:
        """Compute, traffic, as far as they don't overlap, and one launch.

        ``units`` tiles of ``tile x tile`` results are computed at once, so the device is idle in the last, partly
        filled wave; each tile waits for ``fill`` inner steps before its pipeline runs. The library's own kernels reach
        ``kernel_efficiency`` of the peak, overlap half as much, and have tiles twice as wide for more than 512 rows.
        """
        side, peak, hidden = tile, peak_flops, overlap
        if self.own:
            side = tile * (1 + _at_least_one(Max(self.m - 512, 0)))
            peak, hidden = peak_flops * kernel_efficiency, overlap / 2
        waves = _ceil_div(self.batch * _ceil_div(self.m, side) * _ceil_div(self.n, side), units)
        compute_s = waves * units * 2 * side**2 * (self.k + fill) / peak
        traffic_s = self._bytes_moved / bandwidth_bytes_per_s
        once = Max(compute_s, traffic_s) + (1 - hidden) * Min(compute_s, traffic_s) + launch_s
        return self.launches * once

    @property
    def backward(self) -> tuple[Product, ...]:
        """The gradients of both operands."""
        batch, m, k, n = self.batch, self.m, self.k, self.n
        return (
            Product(batch, m, n, k, self.launches, self.own),  # the same kernels, with the factors swapped
            Product(self.launches * batch, k, m, n),
        )


@dataclass(frozen=True)
class Copy:
    """A copy of ``elements`` numbers to another place; ``needed`` is 0 where a view does, else 1."""

    elements: Expr
    needed: Expr

    @property
    def flops(self) -> Expr:
        return sympy.Integer(0)

    @property
    def bytes_moved(self) -> Expr:
        """Every number read once and written once."""
        return 2 * dtype_bytes * self.elements * self.needed

    @property
    def seconds(self) -> Expr:
        return self.bytes_moved / copy_bytes_per_s + launch_s * self.needed

    @property
    def backward(self) -> tuple[Copy, ...]:
        """The gradient is copied back."""
        return (self,)


Kernel = Product | Copy


def dense(workload: str = "inference") -> tuple[Kernel, ...]:
    """Kernels of ``x @ W.T`` with W (out_features, in_features)."""
    return _with_backward([Product(batch, tokens, in_features, out_features)], workload)


def monarch(workload: str = "inference") -> tuple[Kernel, ...]:
    """Kernels of ``y_j = sum_k L[j, k] @ (R[j, k] @ x_k)`` (Dao et al. 2022, section 3.1, with free rank and grid).

    Two ``bmm`` with a transpose of whole blocks between them, and one after them where there is more than one row of
    blocks.
    """
    p = _ceil_div(in_features, nblocks_in)
    s = _ceil_div(out_features, nblocks_out)
    padded_in = nblocks_in * p
    width = nblocks_out * nblocks_in * rank
    forward: list[Kernel] = [
        Copy(batch * tokens * padded_in, needed=_at_least_one(padded_in - in_features)),  # zeros behind x
        Product(batch * nblocks_in, tokens, p, nblocks_out * rank),
        Copy(batch * tokens * width, needed=_several(nblocks_in)),  # (k, tokens, j, rank) -> (j, tokens, k, rank)
        Product(batch * nblocks_out, tokens, nblocks_in * rank, s),
        Copy(batch * tokens * nblocks_out * s, needed=_several(nblocks_out) * _several(tokens)),  # -> (tokens, j, s)
    ]
    return _with_backward(forward, workload)


def without_copies(workload: str, first: str, second: str) -> tuple[Kernel, ...]:
    """Kernels of the same product where each one writes what the next one reads, as on a GPU.

    Args:
        workload: ``"inference"`` or ``"training"``.
        first: ``"joined"``: one call, for a single column of blocks. ``"strided"``: one call for every row of blocks.
            ``"own"``: a kernel of this library that stores block-transposed.
        second: ``"library"`` or ``"own"``.
    """
    p = _ceil_div(in_features, nblocks_in)
    s = _ceil_div(out_features, nblocks_out)
    firsts = {
        "joined": Product(nblocks_in, tokens, p, nblocks_out * rank),
        "strided": Product(nblocks_in, tokens, p, rank, launches=nblocks_out),
        "own": Product(nblocks_in, tokens, p, nblocks_out * rank, own=True),
    }
    return _with_backward(
        [firsts[first], Product(nblocks_out, tokens, nblocks_in * rank, s, own=second == "own")], workload
    )


def flops(kernels: Iterable[Kernel]) -> Expr:
    """Floating point operations of all kernels."""
    return sympy.Add(*(kernel.flops for kernel in kernels))


def bytes_moved(kernels: Iterable[Kernel]) -> Expr:
    """Bytes that all kernels read and write."""
    return sympy.Add(*(kernel.bytes_moved for kernel in kernels))


def seconds(kernels: Iterable[Kernel]) -> Expr:
    """Seconds of all kernels, one after the other."""
    return sympy.Add(*(kernel.seconds for kernel in kernels))


def _with_backward(forward: list[Kernel], workload: str) -> tuple[Kernel, ...]:
    backward = [gradient for kernel in forward for gradient in kernel.backward]
    return tuple(forward + backward if workload == "training" else forward)


def _ceil_div(a: Expr, b: Expr) -> Expr:
    """The quotient of integers, rounded up; the half keeps rounding errors of NumPy from adding one."""
    return ceiling((a - sympy.Rational(1, 2)) / b)


def _at_least_one(n: Expr) -> Expr:
    """1 for n >= 1, 0 for n = 0; unlike ``Piecewise`` it broadcasts in NumPy."""
    return Min(n, 1)


def _several(n: Expr) -> Expr:
    return _at_least_one(n - 1)
