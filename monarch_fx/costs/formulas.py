"""FLOPs, bytes and seconds of dense and Monarch products, as sympy expressions.

A product is a list of kernels. Expressions are in ``symbols``: sizes of the product (``tokens`` rows for each of
``batch`` equal matrices), the bytes of its dtype, and the constants of a ``DeviceProfile``.

A Monarch product runs with copies, as two halves without, or as one kernel: ``monarch``, ``first_half`` and
``second_half``, ``fused``. A transpose that only renames dimensions costs nothing. Biases cost nothing by themselves:
on both sides they are added in a kernel that writes the result anyway, and their gradients are the same sums.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from sympy import Expr, Max

from monarch_fx.costs.kernel import (
    AHEAD_FIRST_S,
    AHEAD_SECOND_S,
    Ahead,
    Copy,
    Epilogue,
    Faster,
    Fused,
    Held,
    Kernel,
    Pass,
    Product,
    TokenSum,
    Total,
)
from monarch_fx.costs.symbols import (
    at_least_one,
    batch,
    ceil_div,
    in_features,
    kernel_launch_s,
    launch_s,
    nblocks_in,
    nblocks_out,
    out_features,
    p,
    rank,
    s,
    several,
    splits,
    tokens,
)
from monarch_fx.kernels.choice import SOME_TOKENS
from monarch_fx.kernels.padding import ROW

# What launches cost on a GPU, a library's and this one's: first-halves-gpu, and where choices of layers-gpu were best.
# Second halves that start early gain less where they are more than a wave.
_IS_MANY = at_least_one(Max(0, tokens - SOME_TOKENS))
LIBRARY_S = launch_s * (1 - 0.13 * _IS_MANY)
STRIDED_S = launch_s * 0.58  # of many tokens
OWN_S = kernel_launch_s * (1 + 0.24 * _IS_MANY)
EARLY_S = kernel_launch_s * (1 + 0.24 * at_least_one(Max(0, tokens - 512)))


def dense(workload: str = "inference") -> tuple[Kernel, ...]:
    """Kernels of ``x @ W.T`` with W (out_features, in_features)."""
    return _with_backward([Product(batch, tokens, in_features, out_features)], workload)


def dense_on_gpu(
    workload: str, aligned: bool = True, columns: Expr = in_features, rows: Expr = out_features
) -> tuple[Kernel, ...]:
    """The same in half precision, where the gradient of W is a sum over tokens that a library may cut."""
    forward = Product(batch, tokens, columns, rows, launch=LIBRARY_S, aligned=aligned)
    if workload == "inference":
        return (forward,)
    to_x, to_weight = forward.backward
    return forward, to_x, Faster(to_weight, TokenSum(batch, rows, columns, aligned))


def dense_padded(workload: str) -> tuple[Kernel, ...]:
    """The same with zeros around x and W (and the gradient of the result), as Inductor does it; gradients are cut."""
    columns, rows = ROW * ceil_div(in_features, ROW), ROW * ceil_div(out_features, ROW)
    wider, higher = at_least_one(columns - in_features), at_least_one(rows - out_features)
    copies = (Copy(tokens * columns, wider), Copy(rows * columns, at_least_one(wider + higher)))
    backward = (Copy(tokens * rows, higher), *copies) if workload == "training" else ()
    return *copies, *dense_on_gpu(workload, columns=columns, rows=rows), *backward


def monarch(workload: str = "inference") -> tuple[Kernel, ...]:
    """Kernels of ``y_j = sum_k L[j, k] @ (R[j, k] @ x_k)`` (Dao et al. 2022, section 3.1, with free rank and grid).

    Two ``bmm`` with a transpose of whole blocks between them, and one after them where there is more than one row of
    blocks.
    """
    padded_in = nblocks_in * p
    width = nblocks_out * nblocks_in * rank
    forward: list[Product | Copy] = [
        Copy(batch * tokens * padded_in, needed=at_least_one(padded_in - in_features)),  # zeros behind x
        Product(batch * nblocks_in, tokens, p, nblocks_out * rank),
        Copy(batch * tokens * width, needed=several(nblocks_in)),  # (k, tokens, j, rank) -> (j, tokens, k, rank)
        Product(batch * nblocks_out, tokens, nblocks_in * rank, s),
        Copy(batch * tokens * nblocks_out * s, needed=several(nblocks_out) * several(tokens)),  # -> (tokens, j, s)
    ]
    return _with_backward(forward, workload)


def first_half_anew() -> tuple[Kernel, ...]:
    """The first half of the same that is computed once more, a product for every row of blocks."""
    return (Product(nblocks_in, tokens, p, rank, launches=nblocks_out),)


def first_half(how: str, aligned: bool = True, whole: bool = True) -> tuple[Kernel, ...]:
    """Kernels of a product's first half, forward, which write what the second one reads, as on a GPU.

    The gradient of the activations is the same product with the transposed matrix.

    Args:
        how: ``"joined"``: one call, for a single column of blocks. ``"strided"``: one call for every row of blocks.
            ``"own"``: a kernel of this library that stores block-transposed; of sums in several parts another one adds
            these up.
        aligned: See ``Product``.
        whole: Likewise.
    """
    width = nblocks_out * rank
    rows = {"aligned": aligned, "whole": whole}
    if how == "joined":
        return (Product(nblocks_in, tokens, p, width, launch=LIBRARY_S, **rows),)
    if how == "strided":
        return (Product(nblocks_in, tokens, p, rank, launches=nblocks_out, launch=STRIDED_S, **rows),)
    parts = Product(nblocks_in * splits, tokens, p / splits, width, launch=OWN_S, own=True, **rows)
    return parts, Total(nblocks_in, tokens, width)


def second_half(how: str, aligned: bool = True, whole: bool = True) -> tuple[Kernel, ...]:
    """The second half likewise: by a ``"library"``, an ``"own"`` kernel, or ``"early"``, by one that starts early."""
    launches = {"library": LIBRARY_S, "own": launch_s, "early": EARLY_S}
    rows = {"own": how != "library", "aligned": aligned, "whole": whole}
    return (Product(nblocks_out, tokens, nblocks_in * rank, s, launch=launches[how], **rows),)


def factor_gradients(first_aligned: bool = True, second_aligned: bool = True) -> tuple[Kernel, ...]:
    """Kernels of the gradients of both factors, without copies."""
    return (
        TokenSum(nblocks_in, nblocks_out * rank, p, first_aligned),
        TokenSum(nblocks_out, nblocks_in * rank, s, second_aligned),
    )


def padding(*what: str) -> tuple[Kernel, ...]:
    """Copies of what is padded around such a product ("x", "R", "L"), or cut behind it ("y"), in padded sizes."""
    blocks = nblocks_out * nblocks_in
    elements = {
        "x": tokens * nblocks_in * p,
        "R": blocks * rank * p,
        "L": blocks * rank * s,
        "y": tokens * nblocks_out * s,
    }
    return tuple(Copy(elements[name], needed=sympy.S.One) for name in what)


def activation() -> tuple[Kernel, ...]:
    """What an activation behind a dense product costs."""
    return (Pass(batch * tokens * out_features),)


def epilogue() -> tuple[Kernel, ...]:
    """What the same activation costs in a kernel of this library."""
    return (Epilogue(tokens * nblocks_out * s),)


def fused(rows: int, tokens_each: int, whole: bool = True) -> tuple[Kernel, ...]:
    """The kernel that runs a whole product; see ``Fused``. For inference alone."""
    return (Fused(rows, tokens_each, whole),)


def held(rows: int, columns: int) -> tuple[Kernel, ...]:
    """Both halves of one token whose factors registers hold, so much a program; see ``Held``. For inference alone."""
    return Held(nblocks_in, p, nblocks_out * rank, rows), Held(nblocks_out, nblocks_in * rank, s, columns)


def ahead() -> tuple[Kernel, ...]:
    """Both halves of few tokens that ask for their factors at once; see ``Ahead``. For inference alone."""
    return (
        Ahead(nblocks_in, p, nblocks_out * rank, AHEAD_FIRST_S),
        Ahead(nblocks_out, nblocks_in * rank, s, AHEAD_SECOND_S),
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


def _with_backward(forward: list[Product | Copy], workload: str) -> tuple[Kernel, ...]:
    backward: list[Product | Copy] = [gradient for kernel in forward for gradient in kernel.backward]
    return tuple(forward + backward if workload == "training" else forward)
