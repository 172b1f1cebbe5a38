"""Which products the user wants rewritten: include, exclude, and the defaults."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from monarch_fx.errors import ConfigError, NoEligibleProductError, SelectionError
from monarch_fx.records import Candidate, Declined

Pattern = str | re.Pattern[str] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Sequence[Pattern]

# Output heads and input embeddings: first parts of a name, as transformers, timm and torchvision call them.
HEADS = (
    "lm_head",
    "head",
    "heads",
    "head_dist",
    "classifier",
    "score",
    "cls",
    "qa_outputs",
    "embed_out",
    "proj_out",
    "fc",
)
EMBEDDINGS = re.compile(r"(^|\.)(patch_embed\w*|\w*embeddings?|embed\w*|stem)\.")


def select(
    candidates: Sequence[Candidate],
    declined: Sequence[Declined],
    model: nn.Module,
    include: Patterns | None,
    exclude: Patterns | None,
) -> tuple[list[Candidate], list[Declined]]:
    """Splits ``candidates`` by the user's patterns; ``exclude`` wins, and an ``include`` lifts the defaults.

    Raises:
        SelectionError: A pattern matches no product of the model.
        NoEligibleProductError: Nothing is left to rewrite.
    """
    names = [c.name for c in candidates]
    others = [d.name for d in declined]  # a pattern may name them, but they stay dense
    included = _matcher(include, "include", names, others, model)
    excluded = _matcher(exclude, "exclude", names, others, model)
    head_names = _head_names(model)
    kept, left = [], list(declined)
    for candidate in candidates:
        reason = None
        if excluded is not None and candidate.name in excluded:
            reason = "excluded by the user"
        elif included is not None:
            reason = None if candidate.name in included else "not included by the user"
        elif candidate.parameter in head_names or (_head(candidate.name) and len(candidates) > 1):
            reason = "output head: excluded by default, include= it to rewrite it"
        elif EMBEDDINGS.search(candidate.name) and candidate.kind.startswith("conv"):
            reason = "input embedding: excluded by default, include= it to rewrite it"
        if reason is None:
            kept.append(candidate)
        else:
            size = candidate.in_features, candidate.out_features, candidate.params
            left.append(Declined(candidate.name, candidate.kind, *size, len(candidate.calls), reason))
    if not kept:
        raise NoEligibleProductError(_nothing_left(model, left))
    return kept, left


def _head(name: str) -> bool:
    return name.split(".")[0] in HEADS


def _head_names(model: nn.Module) -> set[str]:
    """The weight that a transformers model itself calls its output embeddings."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        head = None
    weight = getattr(head, "weight", None)
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p is weight}


def _matcher(
    patterns: Patterns | None, which: str, names: Sequence[str], others: Sequence[str], model: nn.Module
) -> set[str] | None:
    """The names that any of the patterns matches; None where there are no patterns."""
    if patterns is None:
        return None
    many: Iterable[Any] = patterns if isinstance(patterns, (list, tuple, set, frozenset)) else [patterns]
    matched: set[str] = set()
    for pattern in many:
        hits = {name for name in names if _matches(pattern, which, name, model)}
        if not hits and (callable(pattern) or not any(_matches(pattern, which, name, model) for name in others)):
            shown = getattr(pattern, "pattern", pattern)
            every = [*names, *others]
            known = ", ".join(every[:6]) + (", ..." if len(every) > 6 else "")
            raise SelectionError(f"{which}={shown!r} matches no product. Products are named like: {known}")
        matched |= hits
    return matched


def _matches(pattern: Pattern, which: str, name: str, model: nn.Module) -> bool:
    """A glob may name the weight or its layer (``h.*.mlp.c_fc``); a regex is searched in the weight's name."""
    if isinstance(pattern, str):
        layer = name.rpartition(".")[0]
        return fnmatch.fnmatchcase(name, pattern) or (bool(layer) and fnmatch.fnmatchcase(layer, pattern))
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    if callable(pattern) and not isinstance(pattern, (type, nn.Module)):
        return bool(pattern(name, _owner(model, name)))
    raise ConfigError(
        f"{which} must be a glob (str), a compiled regex or a callable(name, owner) such as "
        f"lambda name, owner: isinstance(owner, nn.Linear), got {pattern!r:.80}."
    )


def _owner(model: nn.Module, name: str) -> nn.Module:
    module: Any = model
    for part in name.split(".")[:-1]:
        module = getattr(module, part, module)
    return module if isinstance(module, nn.Module) else model


def _nothing_left(model: nn.Module, declined: Sequence[Declined]) -> str:
    kind = type(model).__name__
    if not declined:
        return f"{kind} has no matrix product with a static weight. Give example_inputs if its products are hidden."
    rows = "; ".join(f"{d.name}: {d.reason}" for d in declined[:5])
    more = f"; and {len(declined) - 5} more" if len(declined) > 5 else ""
    return f"{kind} has no product that may be rewritten. {rows}{more}."
