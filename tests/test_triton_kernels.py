"""The Triton kernels in Triton's interpreter, or on a GPU where there is one, against float64."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import monarch_fx as mfx
from monarch_fx.kernels import choice
from monarch_fx.kernels.reference import ACTIVATIONS, activated

pytest.importorskip("triton")
few, launch = (pytest.importorskip(f"monarch_fx.kernels.{name}") for name in ("few", "launch"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = torch.finfo(torch.float16).eps
# tokens, n_in, n_out, rank, p, s: one row, ragged tiles, ranks and blocks that no tile divides, a single row of blocks,
# and blocks that tensor descriptors take
SHAPES = [
    (1, 2, 3, 8, 40, 24),
    (3, 4, 1, 16, 70, 33),
    (63, 3, 2, 20, 33, 50),
    (130, 2, 2, 16, 64, 140),
    (500, 2, 2, 24, 64, 64),
    (65, 1, 2, 16, 64, 64),
    (300, 3, 2, 24, 72, 88),
    (150, 2, 2, 16, 24, 136),
]
# n_in, n_out, rank, s of products that read the same 120 features: two and three, other grids and ranks, ragged tiles
GROUPS = [
    ((2, 3, 8, 24), (1, 1, 20, 33)),
    ((4, 2, 16, 130), (2, 3, 8, 24), (1, 2, 20, 33)),
    ((1, 1, 32, 128), (3, 2, 16, 32), (3, 2, 16, 16)),
]
# pairs with equal blocks of results; with blocks that a tile divides; with blocks that it doesn't
PAIRS = [((2, 3, 8, 24), (1, 3, 20, 24)), ((2, 3, 8, 64), (1, 1, 20, 192)), ((2, 3, 8, 16), (1, 1, 20, 48))]
# of one token, with a row of each block in one chunk or several, 8, 4 or 2 rows a program; L held by 4 warps, by 8; too
# long to be held
HELD = [
    ((2, 3, 8, 40, 24), (8, 1, 4)),
    ((2, 2, 20, 2100, 50), (8, 2, 4)),
    ((1, 2, 5, 8000, 33), (4, 4, 4)),
    ((1, 1, 3, 13000, 40), (2, 7, 4)),
    ((3, 1, 301, 17, 70), (8, 1, 8)),
    ((4, 1, 450, 20, 40), None),
]
# of 2 to 16 tokens, loaded at once: one chunk of R or two, several rounds of them; rows of 16 or of 32 a program,
# columns of 32 or of 64, in one chunk to five; with one column of blocks; too long (for 32 columns, for 64), too many
# programs, narrow loads
AHEAD = [
    ((2, 3, 8, 40, 24), (16, 1, 32, 1)),
    ((3, 2, 24, 1104, 72), (16, 2, 32, 1)),
    ((1, 3, 150, 264, 40), (16, 2, 32, 2)),
    ((4, 4, 100, 24, 48), (32, 1, 32, 4)),
    ((3, 2, 210, 32, 40), (32, 1, 32, 5)),
    ((2, 4, 30, 72, 600), (16, 1, 64, 1)),
    ((2, 1, 256, 24, 2056), (16, 1, 64, 4)),
    ((2, 2, 321, 24, 40), None),
    ((2, 1, 257, 24, 2056), None),
    ((2, 4, 30, 72, 1032), None),
    ((4, 8, 100, 24, 48), None),
    ((2, 3, 8, 36, 24), None),
    ((2, 3, 8, 40, 20), None),
]
# whose long sums are cut into parts: even ones, rows that aren't aligned, several rows and columns of blocks, short
# last parts, an empty one, by programs that walk over tiles; not cut: short sums, enough programs
SPLIT = [
    ((5, 1, 2, 40, 3402, 24), choice.SKINNY, 6),
    ((17, 1, 1, 24, 2048, 40), choice.PLAIN_THIN, 5),
    ((64, 2, 1, 80, 1544, 24), choice.PLAIN_NARROW, 2),
    ((40, 2, 3, 40, 7208, 24), choice.PLAIN, 8),
    ((30, 1, 1, 16, 3080, 24), choice.PLAIN_THIN, 8),
    ((100, 2, 1, 48, 2048, 72), choice.PLAIN_NARROW, 2),
    ((100, 2, 1, 96, 3080, 72), choice.SMALL, 4),
    ((300, 1, 2, 168, 3072, 72), choice.BROAD, 2),
    ((40, 2, 2, 24, 1528, 24), choice.PLAIN_THIN, 1),
    ((2, 2, 2, 500, 2048, 24), choice.SKINNY_WIDE, 1),
]
TILES = [tile for tile in vars(choice).values() if isinstance(tile, choice.Tile)]
EPILOGUES = [(True, False, name) for name in ACTIVATIONS] + [(False, True, "silu"), (True, True, "gelu")]


def operands(
    tokens: int, n_in: int, n_out: int, rank: int, p: int, s: int, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, ...]:
    """x with rows that lie apart, R, L, and results full of NaN."""
    R = torch.randn(n_in, n_out, rank, p, dtype=dtype, device=DEVICE) / math.sqrt(p)
    L = torch.randn(n_out, n_in, rank, s, dtype=dtype, device=DEVICE) / math.sqrt(n_in * rank)
    x = torch.randn(tokens, n_in * p + 8, dtype=dtype, device=DEVICE)[:, : n_in * p]
    t = torch.full((n_out, tokens, n_in * rank), float("nan"), dtype=dtype, device=DEVICE)
    y = torch.full((tokens, n_out * s), float("nan"), dtype=dtype, device=DEVICE)
    return x, R, L, t, y


def operands_together(tokens: int, shapes: tuple[tuple[int, ...], ...]) -> tuple:
    """x, and of each product R, L, bias, and results full of NaN."""
    made = [operands(tokens, n_in, n_out, rank, 120 // n_in, s) for n_in, n_out, rank, s in shapes]
    y = [results for *_, results in made]
    biases = [torch.randn(results.shape[1], dtype=torch.float16, device=DEVICE) for results in y]
    return made[0][0], [R for _, R, *_ in made], [L for _, _, L, *_ in made], biases, y


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    for made in (*vars(few).values(), *vars(launch).values()):
        if hasattr(made, "cache_clear"):
            made.cache_clear()


def check(x: torch.Tensor, R: torch.Tensor, L: torch.Tensor, y: torch.Tensor, *epilogue: object) -> None:
    bias, gate, activation = epilogue
    exact = mfx.Monarch(R.double(), L.double())(x.double())
    scale = mfx.Monarch(R.double().abs(), L.double().abs())(x.double().abs())
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    exact = activated(exact, None if gate is None else gate.double(), activation)
    if gate is not None:
        scale = scale * gate.double().abs() * 1.2
    # the intermediate is rounded, which every activation passes on with a slope of at most 1.2, and so is the result;
    # sums are in float32; GELU is within 3e-6
    assert ((y.double() - exact).abs() <= 3 * EPS * scale + 4e-6).all()


def check_gated(
    x: torch.Tensor,
    R: list[torch.Tensor],
    L: list[torch.Tensor],
    y: torch.Tensor,
    biases: list[torch.Tensor | None],
    activation: str,
) -> None:
    exact, scale = [], []
    for r, factor, bias in zip(R, L, biases, strict=True):
        extra = 0 if bias is None else bias.double()
        exact.append(mfx.Monarch(r.double(), factor.double())(x.double()) + extra)
        scale.append(mfx.Monarch(r.double().abs(), factor.double().abs())(x.double().abs()) + abs(extra))
    right = ACTIVATIONS[activation](exact[0]) * exact[1]
    # the intermediates' roundings, the gate's passed on with a slope of at most 1.2, and that of the result
    assert ((y.double() - right).abs() <= 6 * EPS * scale[0] * scale[1] + 4e-6 * scale[1]).all()


def check_together(tokens: int) -> None:
    """Three products, and one that is the gate of another."""
    x, R, L, biases, y = operands_together(tokens, GROUPS[1])
    assert few.products(x, R, L, y, biases, None)
    for product in zip(R, L, y, biases, strict=True):
        check(x, *product, None, "none")
    x, R, L, biases, (_, y) = operands_together(tokens, PAIRS[0])
    assert few.products(x, R, L, [y], biases, "silu")
    check_gated(x, R, L, y, biases, "silu")


@pytest.mark.parametrize("shape", SHAPES)
def test_two_halves(shape: tuple[int, ...]) -> None:
    x, R, L, t, y = operands(*shape)
    launch.first_half(x, R, t)
    launch.second_half(t, L, y, None, None, "none")
    check(x, R, L, y, None, None, "none")


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("rank", "s"), [(40, 72), (40, 256), (136, 264)])
def test_every_tile(tile: choice.Tile, rank: int, s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where programs walk over several tiles, and a last one is cut off or shares results with its neighbour."""
    if tile.per_unit and s < tile.N:
        pytest.skip("a described tile stays in one block")
    monkeypatch.setattr(launch, "first_tile", lambda *sizes, **features: tile)
    monkeypatch.setattr(launch, "second_tile", lambda *sizes, **features: tile)
    x, R, L, t, y = operands(150, 2, 2, rank, 128, s)
    launch.first_half(x, R, t)
    launch.second_half(t, L, y, None, None, "none")
    check(x, R, L, y, None, None, "none")


@pytest.mark.parametrize("s", [64, 104, 128, 208, 264])
def test_results_stay_in_their_blocks(s: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a wider tile would compute few columns too many for one block, but those of the next one are beside it."""
    monkeypatch.setattr(launch, "units", lambda device: 6)  # some programs end with a block, others begin with it
    x, R, L, t, y = operands(512, 2, 3, 144, 64, s)
    bias = torch.randn(3 * s, dtype=torch.float16, device=DEVICE)
    launch.first_half(x, R, t)
    launch.second_half(t, L, y, bias, None, "none")
    check(x, R, L, y, bias, None, "none")


def test_no_tile_that_is_described_is_wider_than_a_block() -> None:
    kinds = [{"activated": activation, "gated": gate} for activation in (False, True) for gate in (False, True)]
    sizes = itertools.product((100, 600, 4096), range(64, 600, 8), (128, 512), (1, 2, 4))
    for size, kind in itertools.product(sizes, kinds):
        tile = choice.second_tile(*size, 132, described=True, **kind)
        assert tile.per_unit == 0 or size[1] >= tile.N


@pytest.mark.parametrize("shape", [(130, 2, 3, 48, 64, 20), (300, 1, 2, 24, 192, 8), (128, 4, 1, 16, 128, 64)])
def test_first_halves_in_tf32(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "units", lambda device: 4)
    x, R, _, t, _ = operands(*shape, dtype=torch.float32)
    assert launch.first_half(x, R, t)
    blocks = x.unflatten(1, (R.shape[0], -1))
    exact, scale = (
        torch.einsum("tkp,kjip->jtki", *factors).flatten(2)
        for factors in ((blocks.double(), R.double()), (blocks.double().abs(), R.double().abs()))
    )
    # both operands lose all but ten bits behind the leading one
    assert ((t.double() - exact).abs() <= 2 * 2.0**-10 * scale).all()


def test_no_first_half_in_tf32_where_a_library_is_faster() -> None:
    for shape in ((130, 2, 3, 48, 61, 20), (70, 1, 1, 16, 64, 64)):  # blocks that no descriptor takes; a single tile
        x, R, _, t, _ = operands(*shape, dtype=torch.float32)
        assert not launch.first_half(x, R, t)
        assert t.isnan().all()


@pytest.mark.parametrize("shape", [(1, 2, 3, 8, 40, 24), (3, 4, 1, 16, 70, 33), (63, 3, 2, 20, 33, 50)])
def test_few_tokens_in_tf32(shape: tuple[int, ...]) -> None:
    x, R, L, _, y = operands(*shape, dtype=torch.float32)
    assert few.product(x, R, L, y, None, None, "none")
    exact = mfx.Monarch(R.double(), L.double())(x.double())
    scale = mfx.Monarch(R.double().abs(), L.double().abs())(x.double().abs())
    assert ((y.double() - exact).abs() <= 4 * 2.0**-10 * scale).all()  # four operands


@pytest.mark.parametrize("tokens", [1, 3, 63])
@pytest.mark.parametrize("shapes", GROUPS)
def test_products_together(shapes: tuple[tuple[int, ...], ...], tokens: int) -> None:
    x, R, L, biases, y = operands_together(tokens, shapes)
    some = [None if i == 1 else bias for i, bias in enumerate(biases)]
    assert few.products(x, R, L, y, some, None)
    for product in zip(R, L, y, some, strict=True):
        check(x, *product, None, "none")


@pytest.mark.parametrize("tokens", [1, 3])
def test_intermediates_that_share_an_allocation_are_aligned(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else kernels are compiled for narrow loads: 20 numbers of 2 bytes are no multiple of 16."""
    found: list[bool] = []
    original = launch.Launch.__call__

    def aligned(self: launch.Launch, tensors: list[torch.Tensor], addresses: list[int]) -> None:
        assert addresses == [tensor.data_ptr() for tensor in tensors]
        found.append(self.aligned and all(address % launch.ALIGNED == 0 for address in addresses))
        original(self, tensors, addresses)

    monkeypatch.setattr(launch.Launch, "__call__", aligned)
    x, R, L, biases, y = operands_together(tokens, (((1, 1, 20, 24),) * 3))
    assert few.products(x, R, L, y, [None] * len(biases), None)
    assert found == [True, True]


@pytest.mark.parametrize("tokens", [1, 3, 63])
@pytest.mark.parametrize("shapes", PAIRS)
@pytest.mark.parametrize(("activation", "biased"), [("silu", ()), ("gelu", (0,)), ("relu", (1,)), ("silu", (0, 1))])
def test_a_product_that_is_the_gate_of_another(
    shapes: tuple[tuple[int, ...], ...], tokens: int, activation: str, biased: tuple[int, ...]
) -> None:
    x, R, L, biases, (_, y) = operands_together(tokens, shapes)
    some = [bias if i in biased else None for i, bias in enumerate(biases)]
    can = shapes != PAIRS[2]  # a tile of results would lie in several of its blocks
    assert few.products(x, R, L, [y], some, activation) == can
    if can:
        check_gated(x, R, L, y, some, activation)


@pytest.mark.parametrize("tile", [tile for tile in TILES if not tile.per_unit], ids=str)
def test_every_tile_of_products_together(tile: choice.Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "first_tile", lambda *sizes, **features: tile)
    monkeypatch.setattr(few, "second_tile", lambda *sizes, **features: tile)
    check_together(16)


def test_products_of_one_token_that_no_program_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "held_tiles", lambda *sizes: None)
    check_together(1)


@pytest.mark.parametrize("rank", [31, 32, 33, 150])
def test_one_token_s_gate_and_product_hold_as_many_chunks(rank: int) -> None:
    """Of an even or an odd number of chunks for both."""
    x, R, L, biases, (_, y) = operands_together(1, ((2, 3, rank, 24), (1, 3, 20, 24)))
    assert few.products(x, R, L, [y], biases, "silu")
    check_gated(x, R, L, y, biases, "silu")


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_few_tokens(shape: tuple[int, ...]) -> None:
    x, R, L, _, y = operands(*shape)
    assert few.product(x, R, L, y, None, None, "none")
    check(x, R, L, y, None, None, "none")


@pytest.mark.parametrize(("shape", "expected"), HELD)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_one_token(shape: tuple[int, ...], expected: tuple[int, int, int] | None, dtype: torch.dtype) -> None:
    n_in, n_out, rank, p, s = shape
    tiles = choice.held_tiles(p, n_in * rank, [s], [n_out], 132, 2)
    assert (tiles and (tiles[0].N, tiles[0].chunks, tiles[1].warps)) == expected
    x, R, L, _, y = operands(1, *shape, dtype=dtype)
    assert few.product(x, R, L, y, None, None, "none")
    check(x, R, L, y, None, None, "none")


@pytest.mark.parametrize(("shape", "expected"), AHEAD)
@pytest.mark.parametrize("tokens", [2, 11, 16])
def test_factors_loaded_at_once(
    shape: tuple[int, ...], expected: tuple[int, ...] | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "units", lambda device: 64)
    x, R, L, _, y = operands(tokens, *shape)
    tiles = few.tiles_at_once(tokens, [R.shape], [L.shape[3]], False, x.dtype, x.device)
    found = tiles and (tiles[0].N, tiles[0].chunks, tiles[1].N, tiles[1].chunks)
    assert found == expected
    assert few.product(x, R, L, y, None, None, "none")
    check(x, R, L, y, None, None, "none")


@pytest.mark.parametrize("tokens", [2, 16])
@pytest.mark.parametrize("shapes", [((5, 3, 8, 24), (1, 1, 20, 40)), *GROUPS[1:]])
def test_products_together_loaded_at_once(
    shapes: tuple[tuple[int, ...], ...], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "units", lambda device: 64)
    x, R, L, biases, y = operands_together(tokens, shapes)
    some = [None if i == 1 else bias for i, bias in enumerate(biases)]
    found = few.tiles_at_once(tokens, [r.shape for r in R], [w.shape[3] for w in L], False, x.dtype, x.device)
    assert (found is None) == (shapes == GROUPS[1])  # whose rows are no multiples of 16 bytes
    assert few.products(x, R, L, y, some, None)
    for product in zip(R, L, y, some, strict=True):
        check(x, *product, None, "none")


@pytest.mark.parametrize(("shape", "tile", "count"), SPLIT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_long_sums_in_parts(
    shape: tuple[int, ...], tile: choice.Tile, count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.float32 and shape[0] > choice.FEW_TOKENS:
        pytest.skip("sums of many tokens in TF32 aren't cut")
    monkeypatch.setattr(launch, "units", lambda device: 16)
    x, R, L, t, y = operands(*shape, dtype=dtype)
    found: list[tuple[choice.Tile, int]] = []
    original = launch.splits

    def splits(tile: choice.Tile, *sizes: int) -> int:
        found.append((tile, original(tile, *sizes)))
        return found[0][1]

    monkeypatch.setattr(launch, "splits", splits)
    assert launch.first_half(x, R, t)
    assert launch.second_half(t, L, y, None, None, "none")
    assert found == [(tile, count)]
    check(x, R, L, y, None, None, "none")


def test_one_token_s_second_halves_are_held_where_all_programs_fit() -> None:
    fit, too_many = (choice.held_tiles(1024, 1024, [s], [4], 132, 2) for s in (2112, 2144))
    assert fit is not None
    assert too_many is None  # two programs of a unit hold 64 registers a thread: 264 of 32 columns
    assert choice.held_tiles(1024, 1024, [1024, 1088], [4, 4], 132, 2) is not None
    assert choice.held_tiles(1024, 1024, [1024, 1120], [4, 4], 132, 2) is None


@pytest.mark.parametrize(("with_bias", "gated", "activation"), EPILOGUES)
@pytest.mark.parametrize("kernel", ["held", "ahead", "few", "tiles", "persistent", "fused", "fused, ragged"])
def test_epilogues(kernel: str, with_bias: bool, gated: bool, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, s = (40, 56) if kernel in ("held", "ahead", "few", "tiles") else (130, 72 if "ragged" in kernel else 128)
    tokens = {"held": 1, "ahead": 9}.get(kernel, tokens)
    monkeypatch.setattr(launch, "units", lambda device: 64)
    x, R, L, t, y = operands(tokens, 2, 2, 24, 64, s)
    bias = torch.randn(2 * s, dtype=torch.float16, device=DEVICE) if with_bias else None
    gate = torch.randn(tokens, 2 * s + 8, dtype=torch.float16, device=DEVICE)[:, : 2 * s] if gated else None
    if "fused" in kernel:
        launch.whole(x, R, L, y, bias, gate, activation)
    elif kernel in ("held", "ahead", "few"):
        few.product(x, R, L, y, bias, gate, activation)
    else:
        launch.first_half(x, R, t)
        launch.second_half(t, L, y, bias, gate, activation)
    check(x, R, L, y, bias, gate, activation)


# with a rank of two parts, the second one cut off or not, and more tokens for each program
@pytest.mark.parametrize(
    "shape",
    [
        (100, 3, 3, 16, 64, 64),
        (64, 1, 3, 33, 128, 64),
        (1, 3, 2, 64, 64, 192),
        (70, 2, 1, 80, 64, 64),
        (130, 1, 2, 90, 64, 128),
        (520, 2, 2, 96, 64, 64),
        (600, 1, 2, 120, 128, 64),
        (70, 3, 2, 16, 40, 88),
        (130, 2, 3, 72, 96, 104),
    ],
)
def test_one_kernel_for_the_whole_product(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "units", lambda device: 4)
    x, R, L, _, y = operands(*shape)
    assert launch.whole(x, R, L, y, None, None, "none")
    check(x, R, L, y, None, None, "none")


def test_other_numbers_of_tokens_compile_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants of a kernel, for which it is compiled, don't go with the tokens of one tile."""
    constants: list[dict[str, object]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *operands, **options: constants.append(options)

    monkeypatch.setattr(launch, "units", lambda device: 4)
    for module in (launch.persistent, launch.tiles):
        monkeypatch.setattr(module, "first", Recorder())
        monkeypatch.setattr(module, "second", Recorder())
    for few, many in ((1, 16), (17, 64), (1000, 1800)):
        for tokens in (few, many):
            x, R, L, t, y = operands(tokens, 2, 2, 64, 64, 128)
            launch.first_half(x, R, t)
            launch.second_half(t, L, y, None, None, "none")
        assert constants[-4:-2] == constants[-2:]


def test_a_compiled_kernel_is_kept_and_called_with_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        function, packed_metadata = "function", "metadata"

        def __init__(self) -> None:
            self.calls: list[tuple[object, ...]] = []

        def run(self, *operands: object) -> None:
            self.calls.append(operands)

    class Kernel:
        arg_names = ("a", "b", "number", "LAST", "FIRST")

        def __init__(self, compiled: Compiled) -> None:
            self.compiled = compiled
            self.calls: list[tuple[object, ...]] = []

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *operands, **options: self.calls.append((grid, *operands, options)) or self.compiled

    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda _: 5)))
    a, b = torch.zeros(32, 16, device=DEVICE), torch.zeros(4, device=DEVICE)
    layouts = {0: ([32, 16], [16, 1], [16, 16])}
    for aligned, counts in ((True, (1, 2)), (False, (3, 0))):
        kernel = Kernel(compiled := Compiled())
        run = launch.Launch(kernel, (2,), layouts, (7,), {"FIRST": 1, "num_warps": 4, "LAST": 2}, aligned)
        for _ in range(3):
            run((a, b), (a.data_ptr(), b.data_ptr()))
        assert (len(kernel.calls), len(compiled.calls)) == counts
        for grid, described, operand, *rest in kernel.calls:
            assert (grid, described.base is a, operand is b, rest[0]) == ((2, 1, 1), True, True, 7)
        for *front, described, operand, number, last, first in compiled.calls:
            assert front == [2, 1, 1, 5, "function", "metadata", None, None, None]
            assert (described.base.data_ptr(), operand) == (a.data_ptr(), b.data_ptr())
            assert (number, last, first) == (7, 2, 1)


def test_tensor_descriptors_are_kept_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for ever, without the tensors, and never one for another address."""
    monkeypatch.setattr(launch, "REMEMBERED", 2)
    tensors = [torch.zeros(32, 16, dtype=torch.float16, device=DEVICE) for _ in range(3)]
    run = launch.Launch(None, (1,), {0: ([32, 16], [16, 1], [16, 16])}, (), {}, True)
    for _ in range(2):
        for tensor in tensors:
            found = run._descriptor(0, tensor.data_ptr(), tensor.dtype)
            assert (found.base.data_ptr(), found.base.dtype) == (tensor.data_ptr(), torch.float16)
            assert found is run._descriptor(0, tensor.data_ptr(), tensor.dtype)
            assert len(run.descriptors) <= 2


def test_what_tensor_descriptors_can_have() -> None:
    x, R, L, _, y = operands(8, 1, 1, 16, 64, 64)
    if not launch.has_hopper_features(x.device):
        pytest.skip("an older GPU describes nothing")

    def can(x: torch.Tensor) -> bool:
        return launch.whole(x, R, L, y, None, None, "none")

    assert can(x)
    wide = torch.zeros(8, 80, dtype=torch.float16, device=DEVICE)
    assert can(wide[:, 8:72])
    assert not can(wide[:, 1:65])  # not aligned
    assert not can(x[:1].expand(8, 64))
    assert not can(torch.zeros(8, 68, dtype=torch.float16, device=DEVICE)[:, :64])


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_what_is_no_number_stays_so(activation: str) -> None:
    x, R, L, t, y = operands(20, 1, 1, 16, 16, 64)
    x[3] = torch.nan
    launch.first_half(x, R, t)
    launch.second_half(t, L, y, None, None, activation)
    assert y[3].isnan().all()
    assert not y[:3].isnan().any()


def test_more_programs_than_a_grid_has_are_left_to_others() -> None:
    sizes = torch.float16, torch.device(DEVICE), True
    kinds = (False, "none", False)
    for tokens, is_one in ((2**21, True), (2**23, False)):
        launched = launch.whole_launch(tokens, (2, 2, 64, 128), 128, (256, 256, 256), kinds, *sizes)
        assert (launched is not None) == is_one, tokens
    for tokens, is_one in ((2**22, True), (2**24, False)):
        strides = (tokens * 128, 128, 1), 101, 101  # results that descriptors can't have
        launched = launch.second_launch(tokens, (1, 2, 64, 101), strides, kinds, *sizes)
        assert (launched is not None) == is_one, tokens


def test_activations_at_their_ends() -> None:
    """Large values pass, or vanish, and nothing overflows on the way."""
    x, R, L, t, y = operands(16, 1, 1, 16, 16, 64)
    R[:], L[:] = 0, 0
    values = torch.tensor([-6e4, -30, -8, -3, -1e-4, 0, 1e-4, 3, 8, 30, 6e4], device=DEVICE, dtype=torch.float16)
    bias = torch.nn.functional.pad(values, (0, 64 - len(values)))
    for name, activation in ACTIVATIONS.items():
        launch.first_half(x, R, t)
        launch.second_half(t, L, y, bias, None, name)
        exact = activation(bias.double()).expand(16, 64)
        assert ((y.double() - exact).abs() <= EPS * exact.abs() + 4e-6).all(), name
