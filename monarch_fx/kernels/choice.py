"""Which kernel runs which half of a product on a GPU, by its sizes and its dtype alone.

The rules were read off the times of every tile of this file on an H100, bfloat16, for 17 structures of 768 to 14336
features at 16 to 16384 tokens, and for many tokens anew: 70 first halves, 324 second ones, 118 whole products
(benchmarks/results/tiles-h100); one token's off pairs of both halves there, few tokens' off 201 products
(few-tokens-h100), and what changes up to ``SOME_TOKENS`` off 1,398 products on an H200 (some-tokens-h200).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

FEW_TOKENS = 64  # up to which reading the factors is most of the work, and both halves are Triton kernels
SOME_TOKENS = 2048  # up to which it weighs that a library's kernels don't start early
HELD_FIRST, HELD_SECOND = 96, 112  # registers of a thread that may hold its part of a factor; it needs ``MORE``
MORE = 40
AHEAD_TOKENS = 16  # of a tile, the fewest that tensor cores take
AHEAD_FIRST_TERMS = 2048  # of a single first half's sums: longer ones are faster in parts, if they are cut
AHEAD_TERMS = 640  # of a second half's sums: registers hold no more of the intermediate
AHEAD_NUMBERS = 2**15  # of L for each program: most GPUs have 99 KB of shared memory for one
REGISTERS = 65536  # of a unit
TOGETHER = 3  # products of the same few tokens in one launch
ROW_TOKENS = 512  # from which a library may be the faster one at the first half of two rows of blocks, or one in TF32
TERMS = 64  # that kernels for many tokens add up at once: sums between two multiples take as long as the longer one
ROWS_FLOPS = 2e10  # of two rows of blocks from which it is
SPLIT_TERMS = 384  # of a part of a first half's sums, at least
SPLIT_FROM = 1536  # terms, from which sums are cut
MOST_SPLITS = 8
SHARING_NUMBERS = 4096  # of x in a tile up to which two programs share a unit
LONG_TERMS = 6144  # of a first half's sums
WIDE_WAVE = 7 / 4  # of wide tiles, in waves of square ones
SHALLOW = 256  # terms of a second half up to which it mostly stores
SHARED = 5 / 4  # of other second halves, columns that are computed over columns that there are
STRIDED_FLOPS = 8e9  # in one call of the first half; above, cuBLAS is faster than tiles without tensor descriptors
FUSED_TOKENS = 64  # of a program of the kernel that runs whole products
FUSED_FEATURES = 1024
FUSED_RANK = 128
FUSED_WHOLE = 64  # the first part of ranks that are computed in two
FUSED_LOW = 80  # ranks up to which fewer tiles on their way let one more program run
FUSED_HELD = 192  # numbers of the intermediate that a token may have where a program has twice the tokens
FUSED_BLOCKS = 3


@dataclass(frozen=True)
class Tile:
    """How a Triton kernel cuts its work.

    Attributes:
        M: Tokens of a tile.
        N: Columns of results of a tile.
        K: Terms that are added up at once.
        warps: Of a program.
        stages: Tiles of operands on their way.
        per_unit: Programs on each multiprocessor that walk over all tiles; 0: every tile has a program of its own.
        chunks: Of K terms each, that are loaded together (``ahead``); 0: one after another.
    """

    M: int
    N: int
    K: int
    warps: int
    stages: int
    per_unit: int = 0
    chunks: int = 0

    def holding(self, itemsize: int) -> Tile:
        """Tiles of half precision, with as many bytes of numbers of ``itemsize`` bytes."""
        return dataclasses.replace(self, K=2 * self.K // itemsize)

    def count(self, tokens: int, columns: int, blocks: int) -> int:
        """Tiles of ``blocks`` results of (tokens, columns)."""
        return -(-tokens // self.M) * -(-columns // self.N) * blocks


WIDE = Tile(128, 256, 64, 8, 3, 1)
SQUARE = Tile(128, 128, 64, 8, 4, 1)
PAIRED = Tile(128, 128, 64, 4, 3, 2)
GATED = Tile(128, 128, 64, 4, 2, 2)
NARROW = Tile(128, 64, 64, 4, 4, 2)
BROAD = Tile(64, 128, 64, 4, 4, 2)
SMALL = Tile(64, 64, 64, 4, 5, 2)
TF32 = Tile(128, 128, 32, 8, 4, 1)

PLAIN_LARGE = Tile(128, 128, 64, 8, 3)
PLAIN = Tile(64, 64, 64, 4, 4)
PLAIN_BROAD = Tile(64, 128, 64, 4, 4)
PLAIN_DEEP = Tile(64, 64, 64, 4, 6)
PLAIN_NARROW = Tile(64, 32, 128, 4, 4)
PLAIN_SHORT = Tile(64, 32, 64, 4, 6)
PLAIN_TALL = Tile(128, 64, 64, 4, 4)
PLAIN_THIN = Tile(64, 16, 128, 4, 4)
SKINNY = Tile(16, 16, 128, 2, 5)
SKINNY_SHORT = Tile(16, 32, 64, 4, 6)
SKINNY_WIDE = Tile(16, 32, 128, 4, 4)
SKINNY_WIDEST = Tile(16, 64, 64, 4, 6)


@dataclass(frozen=True)
class Held:
    """How a kernel for one token cuts its work.

    Attributes:
        N: Rows of R, or columns of L, of a program.
        K: Terms of a chunk.
        chunks: That are held.
        warps: Of a program.
    """

    N: int
    K: int
    chunks: int
    warps: int

    def registers(self, itemsize: int) -> int:
        """Of a thread, that hold numbers of ``itemsize`` bytes."""
        return self.chunks * self.N * self.K * itemsize // (4 * 32 * self.warps)


def held_tiles(
    p: int, depth: int, s: Sequence[int], n_out: Sequence[int], units: int, itemsize: int
) -> tuple[Held, Held] | None:
    """Of both halves of one token's products, in registers; None where others are faster, or registers too few.

    Both or none: a GPU stands still to give memory from its first cache to kernels that share it in programs, and back.
    All second halves' programs have to be there at once, else those of the next wave load where nothing computes.

    Args:
        p: Columns of the widest blocks.
        depth: ``nblocks_in * rank`` of the deepest product, twice that where one is the gate of another.
        s: Rows of the blocks of each product.
        n_out: Rows of blocks of each.
        units: Multiprocessors of the GPU.
        itemsize: Bytes of a number.
    """
    K = min(_power_of_two(p), 8 * 512 // itemsize)  # 16 bytes a thread, of up to 8 warps
    rows = (Held(N, K, -(-p // K), 8) for N in (8, 4, 2))
    columns = (Held(32, 32 * warps // itemsize, -(-depth * itemsize // (32 * warps)), warps) for warps in (4, 8))
    first = next((tile for tile in rows if tile.registers(itemsize) <= HELD_FIRST), None)
    second = next((tile for tile in columns if tile.registers(itemsize) <= HELD_SECOND), None)
    if first is None or second is None:
        return None
    programs = sum(-(-rows // second.N) * blocks for rows, blocks in zip(s, n_out, strict=True))
    there = units * (REGISTERS // (32 * second.warps * (second.registers(itemsize) + MORE)))
    return (first, second) if programs <= there else None


def ahead_tiles(
    p: int,
    width: Sequence[int],
    n_in: Sequence[int],
    depth: int,
    s: Sequence[int],
    n_out: Sequence[int],
    units: int,
) -> tuple[Tile, Tile] | None:
    """Of both halves of products of 2 to ``AHEAD_TOKENS`` tokens in half precision; None where others are faster.

    As of ``held_tiles``, all programs of a half have to be there at once.

    Args:
        p: Columns of the widest blocks.
        width: ``nblocks_out * rank`` of each product.
        n_in: Its columns of blocks.
        depth: ``nblocks_in * rank`` of the deepest one.
        s: Rows of the blocks of each.
        n_out: Its rows of blocks.
        units: Multiprocessors of the GPU.
    """

    def are_there(tile: Tile, columns: Sequence[int], blocks: Sequence[int]) -> bool:
        return sum(tile.count(1, *sizes) for sizes in zip(columns, blocks, strict=True)) <= units

    M = AHEAD_TOKENS
    rows = (Tile(M, N, 256, N // 8, 3, chunks=1 if p <= 256 else 2) for N in (16, 32))
    columns = (Tile(M, N, 128, 4, 2, chunks=-(-depth // 128)) for N in (32, 64) if depth * N <= AHEAD_NUMBERS)
    first = next((tile for tile in rows if are_there(tile, width, n_in)), None)
    second = next((tile for tile in columns if are_there(tile, s, n_out)), None)
    if not (first and second and depth <= AHEAD_TERMS):
        return None
    sizes = M, width[0], n_in[0], p, units
    is_cut = len(width) == 1 and splits(first_tile(*sizes, described=False), *sizes) > 1
    return None if is_cut and p > AHEAD_FIRST_TERMS else (first, second)


def first_tile(tokens: int, width: int, blocks: int, p: int, units: int, *, described: bool) -> Tile:
    """The tile of the first half: ``blocks`` products (tokens, p) @ (p, width).

    Args:
        tokens: Rows.
        width: ``nblocks_out * rank``.
        blocks: ``nblocks_in``.
        p: Terms of the sums.
        units: Multiprocessors of the GPU.
        described: Whether tensor descriptors can be had.
    """

    def tiles(tile: Tile) -> float:
        return tile.count(tokens, width, blocks) / units

    if tokens <= 16:
        return SKINNY_WIDE if tiles(SKINNY_WIDE) >= 2 else SKINNY
    narrow = tiles(PLAIN_NARROW)
    if tokens <= FEW_TOKENS:
        if narrow < (0.5 if p < SPLIT_FROM else 0.15):
            return PLAIN_THIN
        return PLAIN if p >= LONG_TERMS and narrow >= 0.33 else PLAIN_NARROW
    if tokens <= SOME_TOKENS and narrow <= 2:
        if described and p >= 2 * SPLIT_FROM and narrow > 0.5:
            return SMALL
        return PLAIN_DEEP if p < SPLIT_FROM and narrow > 1 else PLAIN_NARROW
    if tokens <= SOME_TOKENS and narrow <= 4 and described:
        return BROAD if p >= 2 * SPLIT_FROM else SMALL
    if not described:
        return PLAIN_LARGE if tiles(PLAIN_LARGE) >= 1 else PLAIN
    if tiles(WIDE) > 1 and _are_fewer_waves(tiles(WIDE), tiles(SQUARE)):
        return WIDE
    if tiles(SQUARE) >= 0.5:
        is_odd = math.ceil(tiles(SQUARE)) % 2  # of a pair one would be alone in the last wave, and slow
        return SQUARE if is_odd else PAIRED
    return NARROW if tiles(NARROW) >= 0.5 else SMALL


def splits(tile: Tile, tokens: int, width: int, blocks: int, p: int, units: int) -> int:
    """Into how many parts the sums of a first half are cut, whose tiles leave units idle; 1: not at all.

    Args:
        tile: As of ``first_tile``, as are the others.
        tokens: Rows.
        width: ``nblocks_out * rank``.
        blocks: ``nblocks_in``.
        p: Terms of the sums.
        units: Multiprocessors of the GPU.
    """
    if tokens > SOME_TOKENS or p < SPLIT_FROM:
        return 1
    programs = units if tile.M * tile.K > SHARING_NUMBERS else 2 * units
    return max(1, min(programs // tile.count(tokens, width, blocks), p // SPLIT_TERMS, MOST_SPLITS))


def _are_fewer_waves(wide: float, square: float) -> bool:
    """Whether so many wide tiles of each unit take less time than so many square ones."""
    return WIDE_WAVE * math.ceil(wide) <= math.ceil(square)


def tf32_tokens(width: int, blocks: int, units: int) -> int:
    """From how many tokens a first half in TF32 has a tile for every second unit; sizes as of ``first_tile``.

    With fewer, and without tensor descriptors, a library is the faster one. At second halves it always is: tensor cores
    want both operands in rows along the sums there, as only first halves have them.
    """
    return TF32.M * (-(-units // (2 * TF32.count(1, width, blocks))) - 1) + 1


def second_tile(
    tokens: int, s: int, depth: int, blocks: int, units: int, *, described: bool, activated: bool, gated: bool
) -> Tile:
    """The tile of the second half: ``blocks`` products (tokens, depth) @ (depth, s).

    Args:
        tokens: Rows.
        s: Rows of a block of the matrix.
        depth: ``nblocks_in * rank``.
        blocks: ``nblocks_out``.
        units: Multiprocessors of the GPU.
        described: Whether tensor descriptors can be had.
        activated: Whether an activation is computed with the result.
        gated: Whether the result is multiplied by another tensor.
    """

    def tiles(tile: Tile) -> float:
        return tile.count(tokens, s, blocks) / units

    if tokens <= 16:
        return SKINNY_WIDEST if tiles(SKINNY_WIDEST) >= 0.75 else SKINNY_SHORT
    if tokens <= FEW_TOKENS:
        if tiles(PLAIN_DEEP) >= 0.75:
            return PLAIN_BROAD if tiles(PLAIN_DEEP) >= 1.5 else PLAIN_DEEP
        return PLAIN_SHORT if depth <= 2 * SHALLOW else PLAIN_NARROW
    if tokens <= SOME_TOKENS and tiles(PLAIN) <= 1:
        return PLAIN if tiles(PLAIN) >= 0.5 else PLAIN_NARROW
    if tokens <= SOME_TOKENS and tiles(PLAIN) <= 2 and depth <= SHALLOW and not gated:
        return PLAIN_TALL

    def fits(tile: Tile) -> bool:
        """Whether it stays in a block, and the last one there has enough results of its own."""
        return s >= tile.N and -(-s // tile.N) * tile.N <= (1 if depth <= SHALLOW else SHARED) * s

    if not described or s < NARROW.N:
        return PLAIN_LARGE if tiles(PLAIN_LARGE) >= 1 else PLAIN
    if gated:  # the gate's tile takes the place of operands
        if s % SQUARE.N or tiles(SQUARE) < 1:
            return NARROW
        return GATED if depth <= SHALLOW else SQUARE
    if activated and depth <= SHALLOW:  # mostly epilogue: two programs in turn compute and store
        return NARROW
    if tokens <= SOME_TOKENS and depth <= SHALLOW and fits(BROAD):
        return BROAD
    if fits(WIDE) and _are_fewer_waves(tiles(WIDE), tiles(SQUARE)):
        return WIDE
    if fits(SQUARE) and tiles(SQUARE) >= 1:
        return SQUARE
    return NARROW if tiles(NARROW) >= 0.4 else SMALL


def is_own_second(tokens: int, s: int, depth: int, blocks: int, units: int, *, after_library: bool) -> bool:
    """Whether a second half of many tokens, without an epilogue, is faster than a library's; arguments as above.

    Short ones of few waves are, which start while the first half ends, unless that is a library's (``after_library``).
    One full wave of wide tiles is where sums are longer, and of several blocks behind a library, too.
    """
    waves = PLAIN.count(tokens, s, blocks) / units
    if tokens > SOME_TOKENS or s % 8 or depth % 8 or waves > 8:
        return False
    is_full_wave = 0.75 <= WIDE.count(tokens, s, blocks) / units <= 1
    if after_library and (blocks == 1 or not is_full_wave):
        return False
    return depth <= (4 if is_full_wave else 2) * SHALLOW


def library_tokens(n_in: int, n_out: int, rank: int, p: int, units: int, itemsize: int) -> float:
    """From how many tokens a library runs the first half; infinity: never.

    With one column of blocks, or one row, there is nothing to transpose. Two rows are a call each: that pays where
    products are large, and only a part of the last tile of columns is left.
    """
    if n_in == 1 and (p % 8 or p > 4096 or itemsize > 2):
        return FEW_TOKENS + 1
    if p % 8:
        return math.inf
    if itemsize == 2 and 1 in (n_in, n_out):  # as long as a library's tiles leave units idle, small ones are faster
        waves = _own_waves(n_in, n_out, p)
        rows = PLAIN_NARROW.M * (int(waves * units) // PLAIN_NARROW.count(1, n_out * rank, n_in))
        return min(max(rows, FEW_TOKENS), SOME_TOKENS) + 1
    if n_out == 2 and rank >= WIDE.N and n_out * rank % WIDE.N:
        return max(ROW_TOKENS, math.ceil(ROWS_FLOPS / (2 * n_in * p * n_out * rank)))
    return ROW_TOKENS if n_out == 1 else math.inf


def _own_waves(n_in: int, n_out: int, p: int) -> float:
    """Waves of narrow tiles up to which a first half of one row or column of blocks is faster than a library's."""
    if p >= SPLIT_FROM:  # where ours cut their sums into parts
        return 0.5
    return 2 if n_out > n_in else 1


def are_summed_apart(blocks: int, m: int, n: int) -> bool:
    """Whether gradients of ``blocks`` matrices (m, n) of float32 numbers are single products, not a batched one.

    A library cuts the long sums of a single product into parts, but not those of a batched one.
    """
    return blocks * -(-m // 128) * -(-n // 128) < 32


def fused_tokens(n_in: int, n_out: int, rank: int, p: int, s: int, units: int) -> float:
    """From how many tokens one kernel, its intermediate in registers, beats two halves; infinity: never.

    A program has one row of blocks, and there is one for every unit then. A single row is so long that it takes three.
    """
    small = n_in * p <= FUSED_FEATURES and n_out * s <= FUSED_FEATURES
    few = n_in <= FUSED_BLOCKS and n_out <= FUSED_BLOCKS
    if not (small and few and rank <= FUSED_RANK and p % 8 == 0 and s % 8 == 0 and s >= 64):
        return math.inf
    return _tokens_of(FUSED_TOKENS, units if n_out > 1 else 3 * units, n_out)


def fused_large_tokens(n_in: int, n_out: int, held: int, units: int) -> float:
    """From how many tokens a program has twice as many: units are busy all the same, and registers suffice; or never.

    With few ``held`` rows of factors more programs on each unit are faster.
    """
    if held <= FUSED_LOW or n_in * held > FUSED_HELD:
        return math.inf
    return _tokens_of(2 * FUSED_TOKENS, -(-7 * units // 5), n_out)


def _tokens_of(rows: int, programs: int, n_out: int) -> int:
    """The fewest tokens that are as many programs, of which each has one of ``n_out`` rows of blocks."""
    return rows * (-(-programs // n_out) - 1) + 1


def fused_ranks(rank: int) -> tuple[int, int]:
    """Powers of two, the second one may be 0, as whose sum that kernel computes the rank.

    Parts of ranks below ``FUSED_WHOLE`` would be too small for tensor cores.
    """
    rest = max(16, _power_of_two(rank - FUSED_WHOLE))
    if rank > FUSED_WHOLE and FUSED_WHOLE + rest < _power_of_two(rank):
        return FUSED_WHOLE, rest
    return max(16, _power_of_two(rank)), 0


def _power_of_two(count: int) -> int:
    """The next one."""
    return 1 << max(0, count - 1).bit_length()


def fused_stages(held: int, rows: int) -> int:
    """Tiles of operands on their way, where a program computes with ``held`` rows of a factor for ``rows`` tokens."""
    return 4 if held > FUSED_LOW and rows == FUSED_TOKENS else 3
