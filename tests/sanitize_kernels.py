"""Every Triton kernel, tile and epilogue with small ragged sizes, on a GPU, compared with float64 on the CPU.

To be run under NVIDIA's compute-sanitizer, with every tensor in an allocation of its own; it must find nothing:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    WATCHED='regex=^(first|described|total|second|product|gated)$'
    compute-sanitizer --tool memcheck --kernel-name "$WATCHED" python tests/sanitize_kernels.py
    compute-sanitizer --tool racecheck --kernel-name "$WATCHED" python tests/sanitize_kernels.py --without-library

racecheck breaks cuBLAS, whose batched products the gradients of factors are: a process of PyTorch's alone that computes
such gradients ends in an illegal access under it (CUDA 13.0). The kernels of the backward pass are those of the forward
pass. ``--tool initcheck`` doesn't see what tensor descriptors store, and calls right results uninitialised.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import monarch_fx as mfx
from monarch_fx.kernels import choice, few, gpu, halves, launch
from monarch_fx.kernels.op import monarch_grouped_mm
from monarch_fx.kernels.reference import ACTIVATIONS, activated

HALF = torch.float16
BOUND = 4e-3  # a few roundings to 11 bits, relative error in Frobenius norm
LAUNCHES: collections.Counter[str] = collections.Counter()

Sizes = tuple[int, int, int, int, int, int]  # tokens, nblocks_in, nblocks_out, rank, p, s

RAGGED: tuple[Sizes, ...] = (
    *((1, 2, 3, 8, 40, 24), (3, 4, 1, 16, 70, 33), (63, 3, 2, 20, 33, 50)),
    *((130, 2, 2, 16, 64, 140), (65, 1, 2, 16, 64, 64), (500, 3, 2, 20, 33, 50)),
)
FEW, MANY, FUSED = (63, 2, 2, 24, 40, 50), (500, 2, 2, 24, 64, 128), (130, 2, 2, 24, 64, 128)
TOGETHER = ((4, 2, 16, 130), (2, 3, 8, 24), (1, 2, 20, 33))  # nblocks_in, nblocks_out, rank, s
ROWS_OF_16 = ((5, 3, 8, 24), (1, 1, 20, 40))  # as products need them whose factors are loaded at once
PAIR, WIDE, ODD = ((2, 3, 8, 24), (1, 3, 20, 24)), ((2, 3, 8, 64), (1, 1, 20, 192)), ((2, 3, 8, 16), (1, 1, 20, 48))


def random(*size: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(size) * scale).to(HALF)


def on_gpu(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.cuda() for t in tensors]


def factors(n_in: int, n_out: int, rank: int, p: int, s: int) -> tuple[Tensor, Tensor]:
    return random(n_in, n_out, rank, p, scale=p**-0.5), random(n_out, n_in, rank, s, scale=(n_in * rank) ** -0.5)


def exact(x: Tensor, R: Tensor, L: Tensor, bias: Tensor | None, gate: Tensor | None, activation: str) -> Tensor:
    y = mfx.Monarch(R.double(), L.double())(x.double())
    y = y if bias is None else y + bias.double()
    return activated(y, None if gate is None else gate.double(), activation)


def compare(found: Tensor, right: Tensor) -> None:
    error = float((found.detach().cpu().double() - right.detach()).norm() / right.detach().norm())
    assert error < BOUND, f"wrong by {error:.1e}"
    assert not halves._failed, halves._failed


def product(
    sizes: Sizes, fused: bool = False, activation: str = "none", bias: bool = False, gate: bool = False
) -> None:
    """Both halves, or the one kernel that is both."""
    tokens, n_in, n_out, rank, p, s = sizes
    operands = (random(tokens, n_in * p), *factors(n_in, n_out, rank, p, s))
    extra = random(n_out * s) if bias else None, random(tokens, n_out * s) if gate else None
    (x, R, L), epilogue = on_gpu(*operands), on_gpu(*extra)
    y = torch.empty(tokens, n_out * s, dtype=HALF, device="cuda")
    if fused:
        assert launch.whole(x, R, L, y, *epilogue, activation)
    elif tokens <= choice.FEW_TOKENS:
        assert few.product(x, R, L, y, *epilogue, activation)
    else:
        t = torch.empty(n_out, tokens, n_in * rank, dtype=HALF, device="cuda")
        assert launch.first_half(x, R, t)
        assert launch.second_half(t, L, y, *epilogue, activation)
    compare(y, exact(*operands, *extra, activation))


def with_tile(tile: choice.Tile) -> None:
    """Both halves with this tile, whatever the sizes say."""
    chosen = launch.first_tile, launch.second_tile
    launch.first_tile = launch.second_tile = lambda *sizes, **features: tile  # type: ignore[assignment]
    try:
        _forget_launches()
        product((150, 2, 2, 136, 128, 264 if tile.per_unit else 72))
    finally:
        launch.first_tile, launch.second_tile = chosen
        _forget_launches()


def in_tf32(sizes: Sizes) -> None:
    """Both halves of few tokens, else the first one."""
    tokens, n_in, n_out, rank, p, s = sizes
    operands = tuple(operand.float() for operand in (random(tokens, n_in * p), *factors(n_in, n_out, rank, p, s)))
    x, R, L = on_gpu(*operands)
    if tokens <= choice.FEW_TOKENS:
        y = torch.empty(tokens, n_out * s, device="cuda")
        assert few.product(x, R, L, y, None, None, "none")
        compare(y, exact(*operands, None, None, "none"))
        return
    t = torch.empty(n_out, tokens, n_in * rank, device="cuda")
    assert launch.first_half(x, R, t)
    blocks = operands[0].double().unflatten(1, (n_in, p))
    compare(t, torch.einsum("tkp,kjip->jtki", blocks, operands[1].double()).flatten(2))


def _forget_launches() -> None:
    for made in vars(launch).values():
        if hasattr(made, "cache_clear"):
            made.cache_clear()


@torch.no_grad()
def together(
    tokens: int, shapes: Sequence[tuple[int, int, int, int]], biased: Sequence[int], gated: str | None
) -> None:
    x = random(tokens, 120)
    made = [factors(n_in, n_out, rank, 120 // n_in, s) for n_in, n_out, rank, s in shapes]
    biases = [random(L.shape[0] * L.shape[3]) if i in biased else None for i, (_, L) in enumerate(made)]
    R, L = zip(*made, strict=True)
    found = gpu.together(x.cuda(), on_gpu(*R), on_gpu(*L), on_gpu(*biases), gated)
    right = [exact(x, *pair, bias, None, "none") for pair, bias in zip(made, biases, strict=True)]
    right = right if gated is None else [ACTIVATIONS[gated](right[0]) * right[1]]
    for one, other in zip(found, right, strict=True):
        compare(one, other)


def backward(sizes: Sizes, recompute: bool) -> None:
    tokens, n_in, n_out, rank, p, s = sizes
    leaves = [random(tokens, n_in * p), *factors(n_in, n_out, rank, p, s), random(n_out * s)]
    _compare_gradients(functools.partial(mfx.monarch_bmm, recompute=recompute), leaves, random(tokens, n_out * s))


def experts(rows: int) -> None:
    made = [factors(2, 3, 8, 60, 24) for _ in range(3)]
    R, L = (torch.stack(parts) for parts in zip(*made, strict=True))
    ends = torch.tensor([rows // 3, rows // 3, rows], dtype=torch.int32)

    def run(x: Tensor, R: Tensor, L: Tensor) -> Tensor:
        return monarch_grouped_mm(x, R, L, ends.to(x.device))

    _compare_gradients(run, [random(rows, 120), R, L], random(rows, 72))


def _compare_gradients(run: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor) -> None:
    results = []
    for moved in ([leaf.cuda() for leaf in leaves], [leaf.double() for leaf in leaves]):
        for leaf in moved:
            leaf.requires_grad_()
        y = run(*moved)
        results.append([y, *torch.autograd.grad(y, moved, grad.to(y))])
    for found, right in zip(*results, strict=True):
        compare(found, right)


def cases() -> Iterator[Callable[[], None]]:
    """Of this library's kernels alone."""
    for sizes in RAGGED:
        yield functools.partial(product, sizes)
    for activation, (sizes, fused) in itertools.product(ACTIVATIONS, ((FEW, False), (MANY, False), (FUSED, True))):
        yield functools.partial(product, sizes, fused, activation, bias=True)
        yield functools.partial(product, sizes, fused, activation, bias=True, gate=True)
    for sizes in ((1, 2, 2, 20, 2100, 50), (1, 1, 2, 5, 8000, 33), (1, 3, 1, 301, 17, 70), (1, 4, 1, 450, 20, 40)):
        yield functools.partial(product, sizes)
    at_once = (2, 3, 2, 24, 1104, 72), (11, 1, 3, 150, 264, 40), (16, 4, 9, 100, 24, 48), (5, 3, 2, 210, 32, 40)
    for sizes in (*at_once, (7, 2, 8, 30, 72, 600), (4, 2, 2, 700, 24, 40)):
        yield functools.partial(product, sizes)
    in_parts = (17, 1, 1, 48, 2048, 40), (5, 1, 2, 40, 3402, 24), (64, 2, 3, 24, 7208, 24), (100, 1, 1, 48, 2048, 72)
    for sizes in (*in_parts, (150, 2, 2, 400, 4104, 72), (500, 2, 2, 500, 2120, 72)):
        yield functools.partial(product, sizes)
    for sizes, activation in itertools.product(RAGGED[:2], ACTIVATIONS):
        yield functools.partial(product, sizes, False, activation, bias=True, gate=True)
    whole = (64, 1, 3, 33, 128, 64), (1, 3, 2, 64, 64, 192), (100, 3, 3, 16, 64, 64), (100, 1, 2, 90, 64, 64)
    for sizes in (*whole, (130, 2, 3, 72, 96, 104), (12000, 2, 2, 96, 64, 64)):
        yield functools.partial(product, sizes, True)
    odd = (300, 3, 2, 24, 72, 88), (150, 2, 2, 16, 24, 136)  # blocks that 8 divides, but no tile
    for sizes in (*odd, (300, 2, 2, 24, 64, 64), (500, 2, 2, 24, 64, 512), (1000, 2, 4, 130, 192, 320)):
        yield functools.partial(product, sizes)
    for tile in vars(choice).values():
        if isinstance(tile, choice.Tile):
            yield functools.partial(with_tile, tile)
    for tokens in (1, 3, 16, 63):
        yield functools.partial(together, tokens, TOGETHER, (0, 2), None)
        yield functools.partial(together, tokens, ROWS_OF_16, (0,), None)
        for shapes, gated in itertools.product((PAIR, WIDE, ODD), ACTIVATIONS):
            yield functools.partial(together, tokens, shapes, (1,), gated)
    for sizes in (*RAGGED[:3], (2000, 2, 4, 130, 192, 64), (3000, 1, 2, 200, 64, 64)):
        yield functools.partial(in_tf32, sizes)


def cases_with_library() -> Iterator[Callable[[], None]]:
    for sizes in (*RAGGED[:3], RAGGED[5], MANY, (300, 3, 2, 24, 72, 88), (500, 1, 2, 16, 64, 64)):
        for recompute in (False, True):
            yield functools.partial(backward, sizes, recompute)
    yield functools.partial(experts, 63)


def main() -> None:
    parser = argparse.ArgumentParser(description="Every Triton kernel, compared with float64.")
    parser.add_argument("--without-library", action="store_true", help="leave out what runs products of cuBLAS, too")
    library = () if parser.parse_args().without_library else cases_with_library()
    torch.manual_seed(0)
    original = launch.Launch.__call__

    def counted(self: launch.Launch, tensors: Sequence[Tensor], addresses: Sequence[int]) -> None:
        LAUNCHES[f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"] += 1
        original(self, tensors, addresses)

    launch.Launch.__call__ = counted  # type: ignore[method-assign]
    right = 0
    for case in itertools.chain(cases(), library):
        case()
        torch.cuda.synchronize()
        right += 1
    print(f"{right} cases right; launches: {dict(LAUNCHES)}")


if __name__ == "__main__":
    main()
