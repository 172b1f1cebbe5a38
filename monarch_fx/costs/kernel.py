"""The kernels that products are made of: FLOPs, bytes and seconds of each, as sympy expressions."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy import Expr, Max, Min, floor

from monarch_fx.costs.symbols import (
    at_least_one,
    bandwidth_bytes_per_s,
    batch,
    cache_bytes,
    ceil_div,
    copy_bytes_per_s,
    dtype_bytes,
    fill,
    fused_efficiency,
    kernel_efficiency,
    kernel_launch_s,
    kernel_operand_bytes_per_s,
    kernel_overlap,
    launch_s,
    nblocks_in,
    nblocks_out,
    overlap,
    p,
    peak_flops,
    rank,
    s,
    several,
    splits,
    tile,
    together,
    tokens,
    units,
    vector_flops,
)
from monarch_fx.kernels.choice import SOME_TOKENS

# Of ``tile``, which is 64 on a GPU: those of ``choice`` that stand for all
OWN_TILES = ((sympy.Rational(1, 4), 1), (1, 1), (2, 1), (2, 2), (2, 4))
OWN_FILL = 32  # their ``fill``, once; tried on choices of layers-gpu-h200 with 0 to 128
SUM_TILE = 128  # of the gradients of factors
SUM_LAUNCH = 0.6  # of ``launch_s``; tried on layers-step-*-gpu of two kinds of cards with 0.5 to 1
SUM_BLOCK = 64  # tokens that are added up at once
MOST_PARTS = 64
MOST_PARTS_OF_BATCHES = 4
BATCHED_SUMS = 0.9  # of the time of as many FLOPs of a single one; read off layers-train-gpu on two cards
# Times as long as with rows that start at multiples of 16 bytes: 1.1 to 5.9 on an H100, larger for odd numbers
UNALIGNED = 3
HALF_SECTORS = 1.3  # times as long where rows of x or of results are an odd multiple of 16 bytes; padded-sides-h100
UNALIGNED_FLOPS_PER_BYTE = 286  # of what they load: an H200 with its faster memory was no faster than an H100
# Speed in TF32 of what isn't a product of rows along the sums, over that of what is; read off 66 products of tf32-gpu
TF32_GRADIENTS = 0.6
TF32_KERNELS = 0.82  # ``kernel_efficiency`` in TF32 over that in half precision; read off 240 products of tf32-gpu
CACHED = 0.65  # of the memory's time for activations that a cache hands on; tried on layers-gpu with 0.35, 0.5 and 0.8
CACHE_SPEED = 20  # over that of the memory; with ``fused_efficiency`` the best fit to 85 times of fused-gpu and others
HELD_LAUNCH = 0.78  # of ``kernel_launch_s``, of a half of one token; read off 699 products of layers-gpu, three runs
# A half of 2 to 16 tokens that asks for its factor at once: its share of ``kernel_launch_s``, and of the memory's time;
# read off 164 products of few-tokens-h100
AHEAD_LAUNCH = 0.96
AHEAD_TRAFFIC = 0.65
AHEAD_FIRST_S, AHEAD_SECOND_S = 1.07e-9, 1.9e-9  # of each term of a program's sums
# GELU: 11 instructions, and 2 of the special function unit, which take 8 times as long
ACTIVATION_FLOPS = 2 * (11 + 2 * 8)
EPILOGUE_LAUNCH = 0.25  # of ``kernel_launch_s``, which it adds to a kernel at least; read off layers-forward-*-gpu-h200


@dataclass(frozen=True)
class Product:
    """``batch`` products (m, k) @ (k, n) in one launch, ``launches`` times; ``own``: by a kernel of this library.

    ``launch``: seconds that one costs besides its work. ``aligned``: whether all rows of operands and result start at
    multiples of 16 bytes; ``whole``: whether those of x and the result aren't odd multiples of them, since memory hands
    out 32.
    """

    batch: Expr
    m: Expr
    k: Expr
    n: Expr
    launches: Expr = sympy.S.One
    launch: Expr = launch_s
    own: bool = False
    aligned: bool = True
    whole: bool = True

    @property
    def flops(self) -> Expr:
        """Multiplications and additions, one each for every (batch, m, k, n)."""
        return 2 * self.launches * self.batch * self.m * self.k * self.n

    @property
    def bytes_moved(self) -> Expr:
        """Both operands read once, the result written once."""
        return self.launches * (self._activation_bytes + self._weight_bytes)

    @property
    def _activation_bytes(self) -> Expr:
        return dtype_bytes * self.batch * self.m * (self.k + self.n)

    @property
    def _weight_bytes(self) -> Expr:
        return dtype_bytes * self.batch * self.k * self.n

    @property
    def seconds(self) -> Expr:
        """Compute, traffic, as far as they don't overlap, and one launch.

        ``units`` tiles of ``tile x tile`` results are computed at once, each of which waits for ``fill`` inner steps
        before its pipeline runs. This library's own kernels have constants of their own, and take the fastest of
        several tiles, and what doesn't overlap is once for all products of a launch. Of few activations a part comes
        from a cache.
        """
        if self.own:
            compute_s = Min(*(self._in_tiles_s(rows * tile, columns * tile) for rows, columns in OWN_TILES))
        else:
            compute_s = self._library_waves * units * 2 * tile**2 * (self.k + fill) / peak_flops
        if self.aligned:
            are_many = at_least_one(Max(0, self._activation_bytes - cache_bytes))
            from_memory = (CACHED + (1 - CACHED) * are_many) * self._activation_bytes + self._weight_bytes
            traffic_s = from_memory / bandwidth_bytes_per_s
        else:
            traffic_s = (self._activation_bytes + self._weight_bytes) * UNALIGNED_FLOPS_PER_BYTE / peak_flops
        hidden, share = (kernel_overlap, 1 / together) if self.own else (overlap, sympy.S.One)
        time_s = _overlapped(compute_s, traffic_s, hidden, share) * (1 if self.whole else HALF_SECTORS)
        return self.launches * (self.launch * share + _slowed(time_s, self.aligned))

    def _in_tiles_s(self, rows: Expr, columns: Expr) -> Expr:
        """Of a kernel of this library with such tiles: small ones do less with every operand that they take in."""
        products_s = 2 * rows * columns / (peak_flops * kernel_efficiency)
        operands_s = dtype_bytes * (rows + columns) / kernel_operand_bytes_per_s
        return (self._waves(rows, columns) * self.k + OWN_FILL) * units * Max(products_s, operands_s)

    def _waves(self, rows: Expr, columns: Expr) -> Expr:
        """Of tiles: units are idle in the last, partly filled one."""
        return ceil_div(self.batch * ceil_div(self.m, rows) * ceil_div(self.n, columns), units)

    @property
    def _library_waves(self) -> Expr:
        """The same of a library, whose waves are full where rows are few: it has tiles of many sizes."""
        full = Max(1, self.batch * Max(1, self.m / tile) * Max(1, self.n / tile) / units)
        are_many = at_least_one(Max(0, self.m - SOME_TOKENS))
        return full + are_many * (self._waves(tile, tile) - full)

    @property
    def backward(self) -> tuple[Product, ...]:
        """The gradients of both operands."""
        batch, m, k, n, aligned = self.batch, self.m, self.k, self.n, self.aligned
        return (
            Product(batch, m, n, k, self.launches, self.launch, aligned=aligned),
            Product(self.launches * batch, k, m, n, launch=self.launch, aligned=aligned),
        )


@dataclass(frozen=True)
class Fused:
    """A whole Monarch product in one kernel of this library; a program has some tokens and a row of blocks."""

    rows: int  # of factors that a program computes with, for the rank
    tokens_each: int  # of a program
    whole: bool = True  # as of ``Product``

    @property
    def flops(self) -> Expr:
        """Multiplications and additions of both halves."""
        return 2 * batch * tokens * nblocks_out * nblocks_in * rank * (p + s)

    @property
    def bytes_moved(self) -> Expr:
        """Activations and factors read once, the result written once; the intermediate stays on chip."""
        factors = nblocks_out * nblocks_in * rank * (p + s)
        return dtype_bytes * (tokens * (nblocks_in * p + nblocks_out * s) + factors)

    @property
    def seconds(self) -> Expr:
        """As of ``Product``, where programs share a unit; each reads its rows of x and factors from a cache."""
        programs = ceil_div(tokens, self.tokens_each) * nblocks_out
        columns = tile * (ceil_div(p, tile) + ceil_div(s, tile))
        program = 2 * self.tokens_each * nblocks_in * self.rows * columns
        compute_s = ceil_div(programs, units) * units * program / (peak_flops * fused_efficiency)
        memory_s = self.bytes_moved / bandwidth_bytes_per_s
        read = nblocks_in * (self.tokens_each * p + rank * (p + s))
        cache_s = dtype_bytes * programs * read / (CACHE_SPEED * bandwidth_bytes_per_s)
        traffic_s = _overlapped(memory_s, cache_s, kernel_overlap)
        return kernel_launch_s + _overlapped(compute_s, traffic_s, kernel_overlap) * (1 if self.whole else HALF_SECTORS)


@dataclass(frozen=True)
class Total:
    """The total of ``splits`` parts of ``batch`` results (m, n), which a kernel of this library stored in float32."""

    batch: Expr
    m: Expr
    n: Expr

    @property
    def flops(self) -> Expr:
        """Additions aren't counted, as elsewhere."""
        return sympy.S.Zero

    @property
    def bytes_moved(self) -> Expr:
        """Every part read once, the total written; nothing where there is one part."""
        return several(splits) * (4 * splits + dtype_bytes) * self.batch * self.m * self.n

    @property
    def seconds(self) -> Expr:
        """One launch; parts stay in a cache."""
        return several(splits) * kernel_launch_s + self.bytes_moved / (CACHE_SPEED * bandwidth_bytes_per_s)


@dataclass(frozen=True)
class Held:
    """``batch`` products (1, k) @ (k, n) in one launch, whose programs hold ``each`` rows of n in registers."""

    batch: Expr
    k: Expr
    n: Expr
    each: int

    @property
    def flops(self) -> Expr:
        """Multiplications and additions, one each for every number of the factor."""
        return 2 * self.batch * self.k * self.n

    @property
    def bytes_moved(self) -> Expr:
        """The factor, which is nearly all: read once."""
        return dtype_bytes * self.batch * self.k * self.n

    @property
    def seconds(self) -> Expr:
        """What the memory takes, and then what the unit with the most programs takes in; products share a launch."""
        most = ceil_div(self.batch * ceil_div(self.n, self.each), units) * self.each * self.k
        operands_s = dtype_bytes * units * most / kernel_operand_bytes_per_s
        return HELD_LAUNCH * kernel_launch_s / together + self.bytes_moved / bandwidth_bytes_per_s + operands_s


@dataclass(frozen=True)
class Ahead:
    """``batch`` products (tokens, k) @ (k, n) of few tokens in one launch, whose programs ask for their factor at once.

    ``term_s``: what each term adds to the time of a program, all of which run side by side, those of products
    together, too.
    """

    batch: Expr
    k: Expr
    n: Expr
    term_s: float

    @property
    def flops(self) -> Expr:
        """Multiplications and additions, one each for every (batch, token, k, n)."""
        return 2 * self.batch * tokens * self.k * self.n

    @property
    def bytes_moved(self) -> Expr:
        """The factor, which is nearly all: read once."""
        return dtype_bytes * self.batch * self.k * self.n

    @property
    def seconds(self) -> Expr:
        traffic_s = AHEAD_TRAFFIC * self.bytes_moved / bandwidth_bytes_per_s
        return (AHEAD_LAUNCH * kernel_launch_s + self.term_s * self.k) / together + traffic_s


@dataclass(frozen=True)
class TokenSum:
    """The gradients of ``batch`` matrices (m, n), as sums over all tokens, in one call of a library.

    Tiles are few where the sums are long. So that no unit is idle they are cut into parts where that is faster, which
    are stored in float32 and added up by a second launch.
    """

    batch: Expr
    m: Expr
    n: Expr
    aligned: bool = True

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
        tiles = self.batch * ceil_div(self.m, SUM_TILE) * ceil_div(self.n, SUM_TILE)
        most = MOST_PARTS - (MOST_PARTS - MOST_PARTS_OF_BATCHES) * several(self.batch)
        parts = Max(1, Min(floor((units + sympy.Rational(1, 2)) / tiles), ceil_div(tokens, SUM_BLOCK), most))
        stored_and_read = 2 * 4 * parts * self.batch * self.m * self.n
        one_launch_s = SUM_LAUNCH * launch_s
        return one_launch_s + Min(
            self._in_parts(tiles, sympy.S.One),
            self._in_parts(tiles, parts) + one_launch_s + stored_and_read / bandwidth_bytes_per_s,
        )

    def _in_parts(self, tiles: Expr, parts: Expr) -> Expr:
        waves = ceil_div(tiles * parts, units)
        compute_s = waves * units * 2 * SUM_TILE**2 * (tokens / parts + fill) / peak_flops
        compute_s *= 1 - (1 - BATCHED_SUMS) * several(self.batch)
        return _slowed(_overlapped(compute_s, self.bytes_moved / bandwidth_bytes_per_s, overlap), self.aligned)


@dataclass(frozen=True)
class Faster:
    """The faster one of two ways to compute the same."""

    one: Product
    other: TokenSum

    @property
    def flops(self) -> Expr:
        return self.one.flops

    @property
    def bytes_moved(self) -> Expr:
        return self.one.bytes_moved

    @property
    def seconds(self) -> Expr:
        return Min(self.one.seconds, self.other.seconds)


@dataclass(frozen=True)
class Pass:
    """An activation of every one of ``elements`` results that a compiled kernel of its own reads and writes."""

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
        """Arithmetic of the vector units, and traffic."""
        traffic_s = self.bytes_moved / bandwidth_bytes_per_s
        return kernel_launch_s + _overlapped(_activation_s(self.elements), traffic_s, kernel_overlap)


@dataclass(frozen=True)
class Epilogue:
    """The same activation, in the kernel of this library that computes the results."""

    elements: Expr

    @property
    def flops(self) -> Expr:
        return sympy.Integer(0)

    @property
    def bytes_moved(self) -> Expr:
        return sympy.Integer(0)

    @property
    def seconds(self) -> Expr:
        """Other tiles' products hide a part of it beyond the first wave, of large tiles."""
        first = Min(self.elements, units * (2 * tile) ** 2)
        shown = first + (1 - kernel_overlap) * (self.elements - first)
        return EPILOGUE_LAUNCH * kernel_launch_s + _activation_s(shown)


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


Kernel = Product | Copy | Fused | Total | Held | Ahead | TokenSum | Faster | Pass | Epilogue


def _overlapped(compute_s: Expr, traffic_s: Expr, hidden: Expr, share: Expr = sympy.S.One) -> Expr:
    """``share``: of what doesn't overlap."""
    return Max(compute_s, traffic_s) + share * (1 - hidden) * Min(compute_s, traffic_s)


def _activation_s(elements: Expr) -> Expr:
    return ACTIVATION_FLOPS * elements / vector_flops


def _slowed(seconds: Expr, aligned: bool) -> Expr:
    return seconds if aligned else UNALIGNED * seconds
