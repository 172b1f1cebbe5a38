"""FLOPs, bytes and seconds of dense and Monarch products, as sympy expressions.

A product is a list of kernels. Expressions are in the symbols of this module: sizes of the product (``tokens`` rows for
each of ``batch`` equal matrices), the bytes of its dtype, and the constants of a ``DeviceProfile``.

A Monarch product runs with copies, without, or as one kernel: ``monarch``, ``without_copies``, ``fused``. A transpose
that only renames dimensions costs nothing. Biases cost nothing by themselves: on both sides they are added in a kernel
that writes the result anyway, and their gradients are the same sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
from sympy import Expr, Max, Min, ceiling, floor

# fmt: off
SIZES = sympy.symbols(
    "tokens in_features out_features nblocks_out nblocks_in rank batch dtype_bytes", positive=True, integer=True
)
tokens, in_features, out_features, nblocks_out, nblocks_in, rank, batch, dtype_bytes = SIZES

DEVICE = sympy.symbols(
    "peak_flops bandwidth_bytes_per_s copy_bytes_per_s tile units launch_s overlap fill "
    "kernel_efficiency kernel_launch_s kernel_overlap kernel_fill fused_efficiency vector_flops",
    nonnegative=True,
)
(
    peak_flops, bandwidth_bytes_per_s, copy_bytes_per_s, tile, units, launch_s, overlap, fill,
    kernel_efficiency, kernel_launch_s, kernel_overlap, kernel_fill, fused_efficiency, vector_flops,
) = DEVICE
# fmt: on

SUM_TILE = 128  # of the gradients of factors
SUM_BLOCK = 64  # tokens that are added up at once
MOST_PARTS = 64
ACTIVATION_FLOPS = 54  # GELU in the epilogue: 11 instructions, and 2 of the special function unit that take 8 each

greatest_common_divisor = sympy.Function("gcd")


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
        filled wave; each tile waits for ``fill`` inner steps before its pipeline runs. This library's own kernels have
        constants of their own.
        """
        peak, launch, hidden, steps = peak_flops, launch_s, overlap, fill
        if self.own:
            peak, launch, hidden, steps = peak_flops * kernel_efficiency, kernel_launch_s, kernel_overlap, kernel_fill
        waves = _ceil_div(self.batch * _ceil_div(self.m, tile) * _ceil_div(self.n, tile), units)
        compute_s = waves * units * 2 * tile**2 * (self.k + steps) / peak
        traffic_s = self._bytes_moved / bandwidth_bytes_per_s
        return self.launches * (launch + _overlapped(compute_s, traffic_s, hidden))

    @property
    def backward(self) -> tuple[Product, ...]:
        """The gradients of both operands."""
        batch, m, k, n = self.batch, self.m, self.k, self.n
        return Product(batch, m, n, k, self.launches), Product(self.launches * batch, k, m, n)


@dataclass(frozen=True)
class Fused:
    """A whole Monarch product in one kernel of this library, whose programs have 64 tokens and a row of blocks each."""

    rows: Expr  # of factors that a program computes with: the rank, rounded up to a power of two

    @property
    def flops(self) -> Expr:
        """Multiplications and additions of both halves."""
        return 2 * batch * tokens * nblocks_out * nblocks_in * rank * (_p() + _s())

    @property
    def bytes_moved(self) -> Expr:
        """Activations and factors read once, the result written once; the intermediate stays on chip."""
        factors = nblocks_out * nblocks_in * rank * (_p() + _s())
        return dtype_bytes * (tokens * (nblocks_in * _p() + nblocks_out * _s()) + factors)

    @property
    def seconds(self) -> Expr:
        """As of ``Product``, with ``2 * units`` programs at once."""
        waves = _ceil_div(_ceil_div(tokens, 64) * nblocks_out, 2 * units)
        program = 2 * 64 * nblocks_in * self.rows * (_p() + _s() + kernel_fill)
        compute_s = waves * 2 * units * program / (peak_flops * fused_efficiency)
        return kernel_launch_s + _overlapped(compute_s, self.bytes_moved / bandwidth_bytes_per_s, kernel_overlap)


@dataclass(frozen=True)
class TokenSum:
    """The gradients of ``batch`` matrices (m, n), as sums over all tokens, in one call of a library.

    Tiles are few where the sums are long. So that no unit is idle they are cut into parts where that is faster, which
    are stored in float32 and added up by a second launch. Parts are equal: 25,216 tokens, 394 blocks, are cut in two.
    """

    batch: Expr
    m: Expr
    n: Expr

    @property
    def flops(self) -> Expr:
        """Multiplications and additions, one each for every (batch, token, m, n)."""
        return 2 * self.batch * tokens * self.m * self.n

    @property
    def bytes_moved(self) -> Expr:
        """Both operands read once, the result written once; parts stay in a cache."""
        return dtype_bytes * self.batch * (tokens * (self.m + self.n) + self.m * self.n)

    @property
    def seconds(self) -> Expr:
        """The smaller time of uncut sums and of as many parts as there are units for."""
        tiles = self.batch * _ceil_div(self.m, SUM_TILE) * _ceil_div(self.n, SUM_TILE)
        equal = greatest_common_divisor(tokens, SUM_BLOCK * MOST_PARTS) / SUM_BLOCK
        parts = Max(1, Min(floor((units + sympy.Rational(1, 2)) / tiles), equal))
        stored_and_read = 2 * 4 * parts * self.batch * self.m * self.n
        return launch_s + Min(
            self._in_parts(tiles, sympy.S.One),
            self._in_parts(tiles, parts) + launch_s + stored_and_read / bandwidth_bytes_per_s,
        )

    def _in_parts(self, tiles: Expr, parts: Expr) -> Expr:
        waves = _ceil_div(tiles * parts, units)
        compute_s = waves * units * 2 * SUM_TILE**2 * (tokens / parts + fill) / peak_flops
        return _overlapped(compute_s, self.bytes_moved / bandwidth_bytes_per_s, overlap)


@dataclass(frozen=True)
class Pass:
    """A function of every one of ``elements`` results that a kernel of its own reads and writes."""

    elements: Expr

    @property
    def flops(self) -> Expr:
        return sympy.Integer(0)

    @property
    def bytes_moved(self) -> Expr:
        """Every number read once and written once."""
        return 2 * dtype_bytes * self.elements

    @property
    def seconds(self) -> Expr:
        return launch_s + self.bytes_moved / bandwidth_bytes_per_s


@dataclass(frozen=True)
class Epilogue:
    """The same function, in the kernel of this library that computes the results: arithmetic of its vector units."""

    elements: Expr

    @property
    def flops(self) -> Expr:
        return sympy.Integer(0)

    @property
    def bytes_moved(self) -> Expr:
        return sympy.Integer(0)

    @property
    def seconds(self) -> Expr:
        """As far as other tiles' products don't hide it."""
        return (1 - kernel_overlap) * ACTIVATION_FLOPS * self.elements / vector_flops


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


Kernel = Product | Copy | Fused | TokenSum | Pass | Epilogue


def dense(workload: str = "inference") -> tuple[Kernel, ...]:
    """Kernels of ``x @ W.T`` with W (out_features, in_features)."""
    return _with_backward([Product(batch, tokens, in_features, out_features)], workload)


def monarch(workload: str = "inference") -> tuple[Kernel, ...]:
    """Kernels of ``y_j = sum_k L[j, k] @ (R[j, k] @ x_k)`` (Dao et al. 2022, section 3.1, with free rank and grid).

    Two ``bmm`` with a transpose of whole blocks between them, and one after them where there is more than one row of
    blocks.
    """
    p, s = _p(), _s()
    padded_in = nblocks_in * p
    width = nblocks_out * nblocks_in * rank
    forward: list[Product | Copy] = [
        Copy(batch * tokens * padded_in, needed=_at_least_one(padded_in - in_features)),  # zeros behind x
        Product(batch * nblocks_in, tokens, p, nblocks_out * rank),
        Copy(batch * tokens * width, needed=_several(nblocks_in)),  # (k, tokens, j, rank) -> (j, tokens, k, rank)
        Product(batch * nblocks_out, tokens, nblocks_in * rank, s),
        Copy(batch * tokens * nblocks_out * s, needed=_several(nblocks_out) * _several(tokens)),  # -> (tokens, j, s)
    ]
    return _with_backward(forward, workload)


def without_copies(first: str, second: str) -> tuple[Kernel, ...]:
    """Kernels of the product, forward, where each one writes what the next one reads, as on a GPU.

    The gradient of the activations is the same product with the transposed matrix.

    Args:
        first: ``"joined"``: one call, for a single column of blocks. ``"strided"``: one call for every row of blocks.
            ``"own"``: a kernel of this library that stores block-transposed.
        second: ``"library"`` or ``"own"``.
    """
    firsts = {
        "joined": Product(nblocks_in, tokens, _p(), nblocks_out * rank),
        "strided": Product(nblocks_in, tokens, _p(), rank, launches=nblocks_out),
        "own": Product(nblocks_in, tokens, _p(), nblocks_out * rank, own=True),
    }
    return firsts[first], Product(nblocks_out, tokens, nblocks_in * rank, _s(), own=second == "own")


def factor_gradients() -> tuple[Kernel, ...]:
    """Kernels of the gradients of both factors, without copies."""
    return TokenSum(nblocks_in, nblocks_out * rank, _p()), TokenSum(nblocks_out, nblocks_in * rank, _s())


def activation() -> tuple[Kernel, ...]:
    """What an activation behind a dense product costs."""
    return (Pass(batch * tokens * out_features),)


def epilogue() -> tuple[Kernel, ...]:
    """What the same activation costs in a kernel of this library."""
    return (Epilogue(tokens * nblocks_out * _s()),)


def fused(rows: int) -> tuple[Kernel, ...]:
    """The kernel that runs a whole product; see ``Fused``. For inference alone."""
    return (Fused(sympy.Integer(rows)),)


def flops(kernels: Iterable[Kernel]) -> Expr:
    """Floating point operations of all kernels."""
    return sympy.Add(*(kernel.flops for kernel in kernels))


def bytes_moved(kernels: Iterable[Kernel]) -> Expr:
    """Bytes that all kernels read and write."""
    return sympy.Add(*(kernel.bytes_moved for kernel in kernels))


def seconds(kernels: Iterable[Kernel]) -> Expr:
    """Seconds of all kernels, one after the other."""
    return sympy.Add(*(kernel.seconds for kernel in kernels))


def _p() -> Expr:
    return _ceil_div(in_features, nblocks_in)


def _s() -> Expr:
    return _ceil_div(out_features, nblocks_out)


def _overlapped(compute_s: Expr, traffic_s: Expr, hidden: Expr) -> Expr:
    return Max(compute_s, traffic_s) + (1 - hidden) * Min(compute_s, traffic_s)


def _with_backward(forward: list[Product | Copy], workload: str) -> tuple[Kernel, ...]:
    backward: list[Product | Copy] = [gradient for kernel in forward for gradient in kernel.backward]
    return tuple(forward + backward if workload == "training" else forward)


def _ceil_div(a: Expr, b: Expr) -> Expr:
    """The quotient of integers, rounded up; the half keeps rounding errors of NumPy from adding one."""
    return ceiling((a - sympy.Rational(1, 2)) / b)


def _at_least_one(n: Expr) -> Expr:
    """1 for n >= 1, 0 for n = 0; unlike ``Piecewise`` it broadcasts in NumPy."""
    return Min(n, 1)


def _several(n: Expr) -> Expr:
    return _at_least_one(n - 1)
