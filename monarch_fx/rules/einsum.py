"""einsum('bsd,de->bse', x, W)  ->  monarch_bmm(x, R, L)"""

from typing import Any

from monarch_fx.rules.base import Product, Refusal, Static, ndim


def einsum(equation: Any, *operands: Any, path: Any = None) -> Product | Refusal | None:
    """An einsum of one activation and one static operand: W's letters are inputs (summed), outputs or batch.

    W's letters that are missing in the result are summed with x; those that x doesn't have are outputs; those that
    stand in x and in the result are a batch of matrices.
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not any(isinstance(operand, Static) for operand in operands):
        return None
    if not isinstance(equation, str):
        return Refusal("einsum's sublist form")
    if len(operands) != 2:
        return Refusal(f"an einsum of {len(operands)} operands is no single product")
    if all(isinstance(operand, Static) for operand in operands):
        return Refusal("both operands are static")
    terms, arrow, result = equation.replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    at = 0 if isinstance(operands[0], Static) else 1
    weight, x = operands[at], operands[1 - at]
    w, v = (first, second) if at == 0 else (second, first)
    if not arrow:
        letters = first.replace("...", "") + second.replace("...", "")
        result = ("..." if "..." in terms else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    if "..." in w:
        return Refusal("the static operand of the einsum has an ellipsis")
    if "..." in v:
        v, result = _spell_ellipsis(v, result, ndim(x))
    if len(set(w)) != len(w) or len(set(v)) != len(v):
        return Refusal("the einsum reads a diagonal")
    batch = [c for c in w if c in v and c in result]
    summed = [c for c in w if c in v and c not in result]
    free = [c for c in w if c not in v]
    if not summed or any(c not in result for c in free):
        return Refusal(f"einsum {equation!r} is no matrix product")
    rows = [c for c in v if c not in w]
    if any(c not in result for c in rows):
        return Refusal(f"einsum {equation!r} sums the activation alone")
    if weight.gathered or weight.picked is not None:
        return Refusal("an einsum whose matrices are chosen at run time")
    matrix = weight.matrix(
        out=[w.index(c) for c in free], inp=[w.index(c) for c in summed], batch=[w.index(c) for c in batch]
    )
    sizes = dict(zip(w, weight.view.sizes, strict=True))

    def rewrite(multiply: Any) -> Any:
        turned = _permuted(x, [*v], batch + rows + summed)
        flat = turned.flatten(len(batch) + len(rows)) if len(summed) > 1 else turned  # (*batch, *rows, in)
        if batch:
            flat = flat.flatten(0, len(batch) - 1)
            flat = flat.flatten(1, -2) if rows else flat.unsqueeze(1)  # (B, tokens, in)
        y = multiply(flat)
        if batch or len(free) != 1:
            lead = [turned.shape[d] for d in range(len(batch) + len(rows))]
            y = y.reshape(*lead, *[sizes[c] for c in free])
        return _permuted(y, batch + rows + free, [*result])

    return Product(matrix, x, rewrite)


def _permuted(x: Any, letters: list[str], wanted: list[str]) -> Any:
    return x if letters == wanted else x.permute([letters.index(c) for c in wanted])


def _spell_ellipsis(term: str, result: str, dims: int) -> tuple[str, str]:
    """Letters for the dimensions that '...' stands for in the activation and in the result."""
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" if c not in term and c not in result]
    letters = "".join(spare[-(dims - len(term.replace("...", ""))) :]) if dims > len(term.replace("...", "")) else ""
    return term.replace("...", letters), result.replace("...", letters)
