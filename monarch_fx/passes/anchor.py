"""Products are compressed in the order in which the model runs them, each for what the compressed ones before feed it.

Every batch runs twice, side by side with all others: as the dense model, with inputs x, and as the compressed one, with
inputs x'. At a product all of them wait until it is compressed. Its outputs are to come near to those of the dense
model, W x, from x': errors made before are mended as far as they can be told from x'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from monarch_fx.errors import ConfigError
from monarch_fx.layers import MonarchWeight
from monarch_fx.layers.match import Match
from monarch_fx.passes.abreast import Run, side_by_side, this_run
from monarch_fx.passes.calibrate import Statistics, add_products, observed
from monarch_fx.passes.inputs import each_inputs
from monarch_fx.passes.losses import counted
from monarch_fx.passes.modes import evaluated
from monarch_fx.passes.rewrite import copy_with
from monarch_fx.records import Candidate


@dataclass
class Moments:
    """Sums over those tokens of a product that count.

    Attributes:
        gram: (in, in), of x' x'^T, float64.
        drift: (in, in), of (x - x') x'^T.
        mean: (in,), of x'.
        shift: (in,), of x - x'.
        tokens: Their number.
    """

    gram: Tensor
    drift: Tensor
    mean: Tensor
    shift: Tensor
    tokens: int = 0

    def add(self, rows: Tensor, wanted: Tensor | None) -> None:
        """Inputs x' (tokens, in) and those x of the dense model, None where it has no such ones."""
        self.tokens += len(rows)
        self.mean += rows.sum(0, dtype=torch.float64)
        add_products(self.gram, rows, rows)
        if wanted is not None:
            wide = torch.promote_types(rows.dtype, torch.float32)
            away = wanted.to(wide) - rows.to(wide)
            self.shift += away.sum(0, dtype=torch.float64)
            add_products(self.drift, away, rows)

    def statistics(self, gradients: Tensor | None) -> Statistics:
        gram, mean, drift, shift = (part / self.tokens for part in (self.gram, self.mean, self.drift, self.shift))
        return Statistics(gram, gradients, mean, drift, shift)


# A product, and what it sees, where that is known -> how much its matrix and its bias change.
Compress = Callable[[Candidate, "Moments | None"], tuple[Tensor, "Tensor | None"]]


def compress_in_order(
    model: nn.Module, candidates: Sequence[Candidate], batches: Iterable[Any], compress: Compress
) -> None:
    """Calls ``compress`` for every candidate, while the model runs; the model itself is left as it was.

    Products that run several times, and so see several kinds of inputs, come first, without moments; those that no
    batch reaches, last. Experts are left out, and stay dense meanwhile: the two runs may send them other tokens.

    Args:
        model: The dense model; it is run in eval mode.
        candidates: What is compressed.
        batches: Real inputs, all of them kept on the model's device, with what the model has computed of them so far.

    Raises:
        ConfigError: ``batches`` give a product NaN or infinite values.
        ExampleInputsError: The model can't run on a batch.
    """
    device = next(model.parameters()).device
    inputs = [given.on(device) for given in each_inputs(model, batches, "anchor")]
    plain = {c.name: c for c in candidates if c.batch == 1}
    changes: dict[str, tuple[Tensor, Tensor | None]] = {}
    twins: set[Run] = set()

    def observe(mine: Sequence[Candidate], match: Match, x: Tensor, y: Tensor) -> Tensor:
        name, run = mine[match.piece].name, this_run()
        if name in plain and name not in changes and not match.flipped:
            run.stop(name, x)
        if name not in changes or run not in twins:
            return y
        change, shift = changes[name]
        if match.flipped:
            return y + F.linear(x, change.mT.to(x.dtype)).to(y.dtype)
        rows = slice(None) if match.rows is None else match.rows
        return y + F.linear(x, change[rows].to(x.dtype), None if shift is None else shift[rows].to(x.dtype)).to(y.dtype)

    twin = evaluated(observed(model, candidates, observe)).requires_grad_(False)
    pairs = [(Run(_own(twin), batch.cloned()), Run(_own(twin), batch.cloned())) for batch in inputs]
    twins.update(compressed for _, compressed in pairs)
    with tqdm(total=len(plain), desc="project in order", unit="weight", leave=False) as bar:
        for name, candidate in plain.items():
            if len(candidate.calls) > 1:
                changes[name] = compress(candidate, None)
                bar.update()
        for name, resting in side_by_side([run for pair in pairs for run in pair], list(plain)):
            changes[name] = compress(plain[name], _moments(pairs, resting, name))
            bar.update()
    for name in [name for name in plain if name not in changes]:
        compress(plain[name], None)


def _own(twin: nn.Module) -> nn.Module:
    """A copy that shares all parameters and buffers: what a model keeps in attributes while it runs belongs to one
    run."""
    shared: list[Any] = [*twin.parameters(), *twin.buffers()]
    shared += [module.observer for module in twin.modules() if isinstance(module, MonarchWeight)]
    return copy_with(twin, {id(one): one for one in shared})


def _moments(pairs: Sequence[tuple[Run, Run]], resting: Sequence[Run], name: str) -> Moments | None:
    """A batch that the dense model doesn't send here, or in another shape, counts as if both had sent the same."""
    here, found = set(resting), None
    for dense, compressed in pairs:
        if compressed not in here:
            continue
        assert compressed.x is not None
        rows = counted(compressed.x, compressed.mask)
        if found is None:
            zero = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
            found = Moments(zero, zero.clone(), zero[0].clone(), zero[0].clone())
        x = dense.x if dense in here else None
        found.add(rows, None if x is None or x.shape != compressed.x.shape else counted(x, dense.mask))
    if found is None or not found.tokens:
        return None
    if not torch.isfinite(found.gram + found.drift).all():
        raise ConfigError(f"On the anchor data {name!r} sees NaN or infinity: mend the data, or exclude it.")
    return found
