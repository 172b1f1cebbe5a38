"""Compiles every Triton kernel that ``choice`` can ask for, without a GPU, for the architecture given.

Run by ``test_triton_compile.py`` in a process of its own, since Triton either interprets or compiles. Prints one JSON
line a kernel: its name, tile and epilogue, and the bytes of shared memory that it takes.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from monarch_fx.kernels import ahead, choice, fused, held, launch, padding, persistent, split, tiles, together
from monarch_fx.kernels.choice import Held, Tile

UNITS = 132
FEW_TOKENS = (1, 16, 17, 64)
TOKENS = (*FEW_TOKENS, 100, 256, 1000, 4096, 16384)
COLUMNS = (48, 64, 96, 128, 192, 256, 1024, 4096)
TERMS = (256, 2048, 8192)
BLOCKS = (1, 2, 4, 8)
PARTS = re.compile(r"(p|width|rank|depth|s|stride_.*)\d?")  # given in parts of ROW, of which nothing is known
OF_MANY_TOKENS = (tiles.first, tiles.second, persistent.first)
EPILOGUES = (("none", False), ("gelu", False), ("silu", True))


def first_tiles(described: bool) -> set[Tile]:
    sizes = itertools.product(TOKENS, COLUMNS, BLOCKS, TERMS)
    return {choice.first_tile(*size, UNITS, described=described) for size in sizes}


def second_tiles(described: bool, activation: str, gated: bool) -> set[Tile]:
    features = {"described": described, "activated": activation != "none", "gated": gated}
    sizes = itertools.product(TOKENS, COLUMNS, (64, 256, 1024), BLOCKS)
    return {choice.second_tile(*size, UNITS, **features) for size in sizes}


def compiled(
    arch: int,
    kernel: Any,
    constants: dict[str, Any],
    warps: int,
    stages: int,
    number: str = "bf16",
    of_one: Held | None = None,
    is_ahead: bool = False,
    **descriptors: str,
) -> int:
    """Bytes of shared memory."""
    kinds = {}
    for name in kernel.arg_names:
        pointer = "*fp32" if name == "sums_ptr" else f"*{number}" if name.endswith("_ptr") else "i32"
        kinds[name] = "constexpr" if name in constants else pointer
    kinds |= descriptors
    others = {*constants, *descriptors, *(filter(PARTS.fullmatch, kernel.arg_names) if "ROW" in constants else ())}
    numbers = [i for i, name in enumerate(kernel.arg_names) if name not in others]
    source = ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in numbers},
    )
    options = {"num_warps": warps, "num_stages": stages}
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    if kernel in OF_MANY_TOKENS:
        cut_off = re.search(r"muli %stride_j\S*, \S+ : i32", found.asm["ttir"])
        assert cut_off is None, f"{kernel} cuts off the numbers between rows of blocks: {cut_off}"
    if of_one is not None and arch >= 90:
        before, after = found.asm["ptx"].split("griddepcontrol.wait")
        is_first = "griddepcontrol.launch_dependents" in after  # what is in front may have written the factors
        loads = re.findall(r"ld\.global\.(v4)?", before)
        registers = 0 if is_first else of_one.registers(4 if number == "fp32" else 2)
        assert loads == registers // 4 * ["v4"], f"{kernel} waits, {registers} registers expected, with loads {loads}"
        assert "griddepcontrol.launch_dependents" not in before, f"{kernel} lets others start before it waits"
    elif is_ahead and arch >= 90:
        before, after = found.asm["ptx"].split("griddepcontrol.wait")
        is_first = "griddepcontrol.launch_dependents" in after
        copies = len(re.findall(r"cp\.async\.c[ag]\.shared\.global .*?\], 0x10", before))
        # of 16 bytes a thread, all that is on its way; what is in front of a first half may have written the factors
        expected = (stages - 1) * constants["C"] * constants["N"] * constants["K"] * 2 // (16 * 32 * warps)
        assert copies == (0 if is_first else expected), f"{kernel} waits with {copies} copies on their way"
        assert "ld.global" not in before, f"{kernel} loads before it waits"
        assert "griddepcontrol.launch_dependents" not in before, f"{kernel} lets others start before it waits"
    elif "ROW" in constants and of_one is None:
        assert "st.global.b" not in found.asm["ptx"], f"{kernel} stores number by number"
        loaded = set(re.findall(r"cp\.async\.c[ag]\.shared\.global .*?\], (0x\w+)", found.asm["ptx"]))
        is_turned = number == "fp32" and arch >= 90  # tensor cores want columns of second factors as rows
        expected = set() if descriptors or "K" not in constants else {"0x10"}  # to shared memory, for products
        assert is_turned or loaded == expected, f"{kernel} loads {loaded} bytes at once"
    return found.metadata.shared


def block(*sizes: int, number: str = "bf16") -> str:
    return f"tensordesc<{number}{list(sizes)}>"


def kernels(arch: int) -> Iterator[tuple[str, int]]:
    new = arch >= 90
    uneven = {"EVEN": False, "T_ROW": padding.ROW}
    for tile in first_tiles(described=False) | (first_tiles(described=True) if new else set()):
        sizes = {"M": tile.M, "N": tile.N, "K": tile.K, "ROW": padding.ROW, "PDL": new}
        if tile.per_unit:
            constants = {**sizes, "N_IN": 2, "UNITS": UNITS}
            blocks = {"x_desc": block(tile.M, tile.K), "r_desc": block(1, tile.N, tile.K)}
            yield f"first {tile}", compiled(arch, persistent.first, constants, tile.warps, tile.stages, **blocks)
        else:
            yield f"first {tile}", compiled(arch, tiles.first, {**sizes, **uneven}, tile.warps, tile.stages)
    for activation, gated in EPILOGUES:
        epilogue = {"BIAS": True, "ACT": activation, "GATED": gated, "FAST": True}
        plain = second_tiles(False, activation, gated)
        for tile in plain | (second_tiles(True, activation, gated) if new else set()):
            sizes = {"M": tile.M, "N": tile.N, "K": tile.K, "PDL": new, **epilogue}
            name = f"second {tile} {activation} {gated}"
            if tile.per_unit:
                constants = {**sizes, "N_OUT": 2, "UNITS": UNITS}
                blocks = {"t_desc": block(1, tile.M, tile.K), "l_desc": block(1, tile.K, tile.N)}
                blocks["y_desc"] = block(tile.M, tile.N)
                yield name, compiled(arch, persistent.second, constants, tile.warps, tile.stages, **blocks)
            else:
                constants = {**sizes, "ROW": padding.ROW, "EVEN": False}
                yield name, compiled(arch, tiles.second, constants, tile.warps, tile.stages)
        if new:
            M, N, K = choice.FUSED_TOKENS, launch.FUSED_N, launch.FUSED_K
            most = choice.FUSED_RANK, choice.FUSED_BLOCKS
            for (rank, count), rows in (*((size, M) for size in ((16, 3), (64, 3), most, (96, 2))), ((96, 2), 2 * M)):
                held, rest = choice.fused_ranks(rank)
                shape = {"N_IN": count, "N_OUT": count, "RANK": held, "REST": rest}
                shape["STAGES"] = choice.fused_stages(held + rest, rows)
                constants = {"M": rows, "N": N, "K": K, "PDL": True, **shape, **epilogue}
                blocks = {"x_desc": block(rows, K), "y_desc": block(rows, N)}
                blocks |= {"r_desc": block(1, 1, held, K), "r_rest_desc": block(1, 1, rest or held, K)}
                blocks |= {"l_desc": block(1, 1, held, N), "l_rest_desc": block(1, 1, rest or held, N)}
                name = f"fused rank {rank} {rows} {activation} {gated}"
                yield name, compiled(arch, fused.product, constants, 4, 3, **blocks)


def kernels_in_tf32(arch: int) -> Iterator[tuple[str, int]]:
    """Of few tokens, and first halves of many."""
    pdl = {"PDL": arch >= 90, "ROW": launch.ALIGNED // 4}
    epilogue = {"BIAS": False, "ACT": "none", "GATED": False, "FAST": True, "EVEN": False}
    few = itertools.product(FEW_TOKENS, COLUMNS, BLOCKS, TERMS)
    for tile in {choice.first_tile(*size, UNITS, described=False).holding(4) for size in few}:
        constants = {"M": tile.M, "N": tile.N, "K": tile.K, "EVEN": False, "T_ROW": pdl["ROW"], **pdl}
        yield f"first {tile} TF32", compiled(arch, tiles.first, constants, tile.warps, tile.stages, "fp32")
    few = itertools.product(FEW_TOKENS, COLUMNS, (64, 256, 1024), BLOCKS)
    features = {"described": False, "activated": False, "gated": False}
    for tile in {choice.second_tile(*size, UNITS, **features).holding(4) for size in few}:
        constants = {"M": tile.M, "N": tile.N, "K": tile.K, **epilogue, **pdl}
        yield f"second {tile} TF32", compiled(arch, tiles.second, constants, tile.warps, tile.stages, "fp32")
    if arch >= 90:
        tile = choice.TF32
        constants = {"M": tile.M, "N": tile.N, "K": tile.K, "N_IN": 2, "UNITS": UNITS, **pdl}
        blocks = {
            "x_desc": block(tile.M, tile.K, number="fp32"),
            "r_desc": block(1, tile.N, tile.K, number="fp32"),
        }
        yield (
            f"first {tile} TF32",
            compiled(arch, persistent.first, constants, tile.warps, tile.stages, "fp32", **blocks),
        )


def kernels_together(arch: int) -> Iterator[tuple[str, int]]:
    sizes = list(itertools.product(FEW_TOKENS, COLUMNS, BLOCKS))
    early = {"PDL": arch >= 90, "ROW": padding.ROW}
    firsts = itertools.product(sizes, TERMS)
    for tile in {choice.first_tile(*size, terms, UNITS, described=False) for size, terms in firsts}:
        constants = {"M": tile.M, "N": tile.N, "K": tile.K, "C": 0, "COUNT": choice.TOGETHER, "EVEN": 5, **early}
        yield f"first, together {tile}", compiled(arch, together.first, constants, tile.warps, tile.stages)
    features = {"described": False, "activated": False, "gated": False}
    for tile in {choice.second_tile(*size[:2], 256, size[2], UNITS, **features) for size in sizes}:
        constants = {"M": tile.M, "N": tile.N, "K": tile.K, "C": 0, "EVEN": 1, "BIAS": 2, "FAST": True, **early}
        for name, kernel, more in (
            ("second, together", together.second, {"COUNT": choice.TOGETHER}),
            ("gated", together.gated, {"ACT": "gelu"}),
        ):
            yield f"{name} {tile}", compiled(arch, kernel, {**constants, **more}, tile.warps, tile.stages)


def kernels_of_parts(arch: int) -> Iterator[tuple[str, int]]:
    new = arch >= 90
    early = {"ROW": padding.ROW, "PDL": new}
    sizes = itertools.product(TOKENS, COLUMNS, BLOCKS, TERMS, (False, new))
    tiles_of = ((choice.first_tile(*size, UNITS, described=described), size) for *size, described in sizes)
    for tile in {tile for tile, size in tiles_of if choice.splits(tile, *size, UNITS) > 1}:
        constants = {"M": tile.M, "N": tile.N, "K": tile.K, "SPLITS": choice.MOST_SPLITS, **early}
        if tile.per_unit:
            constants |= {"N_IN": 2, "UNITS": UNITS}
            blocks = {"x_desc": block(tile.M, tile.K), "r_desc": block(1, tile.N, tile.K)}
            made = compiled(arch, split.described, constants, tile.warps, tile.stages, **blocks)
        else:
            constants |= {"EVEN": False, "T_ROW": padding.ROW}
            made = compiled(arch, split.first, constants, tile.warps, tile.stages)
        yield f"first, split {tile}", made
    for columns in (launch.TOTAL_N, 2 * launch.TOTAL_N):
        constants = {"M": launch.TOTAL_M, "N": columns, "SPLITS": choice.MOST_SPLITS, **early}
        yield f"total {columns}", compiled(arch, split.total, constants, 4, 3)


def kernels_of_one_token(arch: int) -> Iterator[tuple[str, int]]:
    pdl = {"PDL": arch >= 90}
    for p, depth, number in itertools.product((256, 1024, 4096, 7168), (192, 704, 1344), ("bf16", "fp32")):
        itemsize = 4 if number == "fp32" else 2
        tiles = choice.held_tiles(p, depth, [512], [4], UNITS, itemsize)
        if tiles is None:
            continue
        row = launch.ALIGNED // itemsize
        rows, columns = ({"N": tile.N, "K": tile.K, "C": tile.chunks, "ROW": row, **pdl} for tile in tiles)
        (first, second), name = tiles, f"{p} {depth} {number}"
        constants = {**rows, "T_ROW": row}
        yield f"first, held {name}", compiled(arch, held.first, constants, first.warps, 3, number, first)
        constants = {**columns, "BIAS": True, "ACT": "silu", "GATED": True, "FAST": True}
        yield f"second, held {name}", compiled(arch, held.second, constants, second.warps, 3, number, second)
        more = {"M": 1, "COUNT": 1, "EVEN": 0}
        yield (
            f"first, held, together {name}",
            compiled(arch, together.first, {**rows, **more}, first.warps, 3, number, first),
        )
        more |= {"BIAS": 1, "FAST": True}
        yield (
            f"second, held, together {name}",
            compiled(arch, together.second, {**columns, **more}, second.warps, 3, number, second),
        )
        if second.chunks % 2 == 0:
            constants = {**columns, "M": 1, "EVEN": 0, "BIAS": 1, "FAST": True, "ACT": "silu"}
            yield f"gated, held {name}", compiled(arch, together.gated, constants, second.warps, 3, number, second)


def kernels_ahead(arch: int) -> Iterator[tuple[str, int]]:
    pdl = {"PDL": arch >= 90, "ROW": padding.ROW}
    sizes = itertools.product((200, 1024, 4096), (16, 256), (48, 192, 640), (512, 2048))
    tiles = (choice.ahead_tiles(p, [width], [4], depth, [s], [4], UNITS) for p, width, depth, s in sizes)
    firsts, seconds = zip(*filter(None, tiles), strict=True)
    for tile in set(firsts):
        constants = {"M": tile.M, "N": tile.N, "K": tile.K, "C": tile.chunks, **pdl}
        for name, kernel, more in (
            ("ahead", ahead.first, {"T_ROW": padding.ROW}),
            ("ahead, together", together.first, {"COUNT": 1, "EVEN": 0}),
        ):
            shared = compiled(arch, kernel, {**constants, **more}, tile.warps, tile.stages, is_ahead=True)
            yield f"first, {name} {tile}", shared
    for tile in set(seconds):
        constants = {"M": tile.M, "N": tile.N, "K": tile.K, "C": tile.chunks, "BIAS": True, "FAST": True, **pdl}
        for name, kernel, more in (
            ("ahead", ahead.second, {"ACT": "silu", "GATED": True}),
            ("ahead, together", together.second, {"COUNT": 1, "EVEN": 0}),
        ):
            shared = compiled(arch, kernel, {**constants, **more}, tile.warps, tile.stages, is_ahead=True)
            yield f"second, {name} {tile}", shared


if __name__ == "__main__":
    all_made = (
        made(int(sys.argv[1]))
        for made in (kernels, kernels_in_tf32, kernels_together, kernels_of_parts, kernels_of_one_token, kernels_ahead)
    )
    for name, shared in itertools.chain(*all_made):
        print(json.dumps([name, shared]), flush=True)
