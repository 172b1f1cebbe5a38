"""Model + calibration batches -> what every product sees, and how much the model's loss feels what it gives.

The loss increase of changing a weight W to W + D is ``1/2 E sum_t (g_t^T D x_t)^2`` to second order (Gauss-Newton),
with x_t the product's input and g_t the loss gradient at its output for token t. With the two taken as independent
(Kronecker-factored: Martens & Grosse 2015, arXiv 1503.05671) that is ``1/2 tr(G D C D^T)``, C = E[x x^T], G = E[g g^T].
Both come from one pass, forward and backward; where those of all products don't fit on a GPU, from one pass for each
group of products, between which they go to the CPU. ``losses.py`` says what the loss is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from monarch_fx import files
from monarch_fx.errors import ConfigError, MonarchWarning
from monarch_fx.layers.match import Match
from monarch_fx.passes import checks, rewrite
from monarch_fx.passes.inputs import Inputs, check_batches, each_inputs
from monarch_fx.passes.losses import counted, loss_gradient
from monarch_fx.passes.modes import evaluated
from monarch_fx.records import Candidate

Observe = Callable[[Sequence[Candidate], Match, Tensor, Tensor], Tensor]

FORMAT = "calibration 2"
ROWS_AT_ONCE = 4096  # added up in float32, then in float64


@dataclass(frozen=True)
class Statistics:
    """Moments of a product over the calibration data, float64.

    Attributes:
        inputs: (in, in), the mean of x x^T over its inputs.
        gradients: (out, out), the sum of g g^T over its outputs for each token of the model's loss; None where no loss
            was differentiated, or it doesn't depend on the product.
        mean: (in,), of x.
        drift: (in, in), the mean of (x - x') x'^T where ``inputs`` are those x' that a compressed model feeds it, and x
            those of the dense one; None where they are the same.
        shift: (in,), the mean of x - x', beside ``drift``.
    """

    inputs: Tensor
    gradients: Tensor | None
    mean: Tensor
    drift: Tensor | None = None
    shift: Tensor | None = None

    def on_cpu(self) -> Statistics:
        gradients = None if self.gradients is None else self.gradients.cpu()
        return Statistics(self.inputs.cpu(), gradients, self.mean.cpu())

    def centred(self) -> Statistics:
        """Covariances: what a matrix sees beside which a bias sees to the means."""
        inputs, drift = self.inputs - self.mean.outer(self.mean), self.drift
        if drift is not None and self.shift is not None:
            drift = drift - self.shift.outer(self.mean)
        return dataclasses.replace(self, inputs=inputs, drift=drift)

    def with_constant(self) -> Statistics:
        """What a matrix sees the last column of which is a bias: a 1 behind x."""
        mean = torch.cat([self.mean, self.mean.new_ones(1)])
        rows = torch.cat([self.inputs, self.mean[None]])
        return Statistics(torch.cat([rows, mean[:, None]], 1), self.gradients, mean)


@dataclass(frozen=True)
class Calibration:
    """What the products of a model see and what its loss feels of them; made by ``monarch_fx.calibrate``.

    Attributes:
        statistics: By the name of the product; those that saw any input.
        loss: What was differentiated, in words; None where nothing could be.
        fingerprint: Hash of names, shapes and ties of the model's parameters.
    """

    statistics: Mapping[str, Statistics]
    loss: str | None
    fingerprint: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, which ``Calibration.load`` reads.

        Raises:
            ConfigError: It can't be written there.
        """
        tensors = {}
        for name, seen in self.statistics.items():
            tensors[f"{name}.inputs"], tensors[f"{name}.mean"] = seen.inputs.contiguous(), seen.mean.contiguous()
            if seen.gradients is not None:
                tensors[f"{name}.gradients"] = seen.gradients.contiguous()
        files.write(path, tensors, {"monarch_fx": FORMAT, "loss": self.loss or "", "fingerprint": self.fingerprint})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Reads what ``save`` wrote, on the CPU.

        Raises:
            ConfigError: The file can't be read, or is no calibration as ``save`` writes it.
        """
        try:
            with safe_open(path, "pt") as stored:
                known = stored.metadata() or {}
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (no mapping)
        except OSError as error:
            what = "is a folder" if os.path.isdir(path) else f"can't be read ({error})"
            raise ConfigError(f"{os.fspath(path)!r} {what}: give the file that Calibration.save() wrote.") from error
        except SafetensorError as error:
            raise ConfigError(
                f"{os.fspath(path)!r} is not a calibration as Calibration.save() writes it, or not all of one "
                f"({error}): make it again with monarch_fx.calibrate()."
            ) from error
        if known.get("monarch_fx") != FORMAT:
            raise ConfigError(
                f"{os.fspath(path)!r} is not a calibration as this Calibration.save() writes it ({FORMAT}): it says "
                f"{known.get('monarch_fx')!r}."
            )
        names = [key.removesuffix(".inputs") for key in tensors if key.endswith(".inputs")]
        seen = {}
        for name in sorted(names):
            gradients = tensors.get(f"{name}.gradients")
            seen[name] = Statistics(tensors[f"{name}.inputs"], gradients, tensors[f"{name}.mean"])
        return Calibration(seen, known["loss"] or None, known["fingerprint"])


@dataclass
class _Sums:
    """Sums over tokens by candidate; ``mask`` tells which tokens of the running batch count.

    ``anchor`` is what makes outputs differentiable though no parameter is.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    loss: str | None = None
    mask: Tensor | None = None
    anchor: Tensor | None = None

    def observe(self, candidates: Sequence[Candidate], match: Match, x: Tensor, y: Tensor) -> Tensor:
        if match.flipped:  # the transposed weight sees what the plain one gives
            return y
        candidate = candidates[match.piece]
        rows = self._counted(x)
        size = rows.shape[1]
        add_products(_sum(self.inputs, candidate.name, rows, size, size), rows, rows)
        _sum(self.means, candidate.name, rows, size).add_(rows.sum(0, dtype=torch.float64))
        self.counts[candidate.name] = self.counts.get(candidate.name, 0) + len(rows)
        if self.anchor is not None:
            y = y + self.anchor
            if y.requires_grad:  # not where the model itself turned gradients off
                y.register_hook(functools.partial(self._feel, candidate, match.rows))
        return y

    def _feel(self, candidate: Candidate, part: slice | None, gradient: Tensor) -> None:
        rows = self._counted(gradient)
        total = _sum(self.gradients, candidate.name, rows, candidate.out_features, candidate.out_features)
        add_products(total if part is None else total[part, part], rows, rows)

    def _counted(self, x: Tensor) -> Tensor:
        return counted(x.detach(), self.mask)

    def start_again_without_gradients(self) -> None:
        self.inputs.clear()
        self.means.clear()
        self.counts.clear()
        self.gradients.clear()
        self.anchor = self.loss = None

    def statistics(self) -> dict[str, Statistics]:
        """The means, which take the place of the sums; nothing is left here."""
        found = {}
        for name, count in self.counts.items():
            inputs, gradients = self.inputs.pop(name), self.gradients.pop(name, None)
            if gradients is not None:
                gradients = gradients.div_(self.tokens) if gradients.any() else None
            if count:
                found[name] = Statistics(inputs.div_(count), gradients, self.means.pop(name).div_(count))
        return found


def _sum(sums: dict[str, Tensor], name: str, rows: Tensor, *sizes: int) -> Tensor:
    return sums.setdefault(name, rows.new_zeros(sizes, dtype=torch.float64))


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds the sum of l r^T over rows (tokens, features) to ``total``."""
    wide = torch.promote_types(left.dtype, torch.float32)
    with torch.autocast(left.device.type, enabled=False):  # it would make half-precision products of them
        for a, b in zip(left.split(ROWS_AT_ONCE), right.split(ROWS_AT_ONCE), strict=True):
            total += (a.to(wide).mT @ b.to(wide)).double()


def calibrate(model: nn.Module, candidates: Sequence[Candidate], batches: Iterable[Any]) -> Calibration:
    """Runs the dense model forward and backward on every batch once, in eval mode, and leaves it as it was.

    Args:
        model: The dense model. Where its outputs can't be differentiated, that is warned of, and gradients are None.
        candidates: Products whose statistics are wanted.
        batches: Each a tensor, a tuple of positional or a mapping of keyword arguments of ``forward``. Where they have
            an ``attention_mask`` (batch, tokens), tokens that it hides don't count.

    Returns:
        The statistics of each candidate that saw any input; experts of one weight share theirs.

    Raises:
        ConfigError: ``batches`` is a single batch, or empty, or gives a product NaN or infinite values; or the
            statistics are larger than the machine's memory.
        ExampleInputsError: The model can't run on a batch.
    """
    check_batches(batches, "calibration")
    device = next(model.parameters()).device
    groups = _groups(candidates, device)
    if len(groups) == 1:
        found, loss = _run(model, candidates, batches, "calibrate")
    else:
        found, loss, batches = {}, None, list(batches)
        for i, group in enumerate(groups):
            statistics, felt = _run(model, group, batches, f"calibrate, pass {i + 1} of {len(groups)}")
            for name in list(statistics):  # the GPU's memory is for those of the next group
                found[name] = statistics.pop(name).on_cpu()
            loss = loss or felt  # of some products alone there may be no gradients
    for name, seen in found.items():
        if not all(torch.isfinite(moments).all() for moments in (seen.inputs, seen.gradients) if moments is not None):
            raise ConfigError(
                f"On the calibration data {name!r} sees, or has loss gradients of, NaN or infinity: mend the data, or "
                "exclude it."
            )
    return Calibration(found, loss, checks.fingerprint(model))


def _groups(candidates: Sequence[Candidate], device: torch.device) -> list[list[Candidate]]:
    """As many candidates together as the statistics of which fit into half of a GPU's free memory; all on a CPU.

    Raises:
        ConfigError: The statistics go to the machine's memory, and are larger than it is.
    """
    sizes = [(c.in_features**2 + c.out_features**2) * torch.float64.itemsize for c in candidates]
    free = _free(device)
    groups: list[list[Candidate]] = [[]]
    taken = 0
    for candidate, size in zip(candidates, sizes, strict=True):
        if groups[-1] and taken + size > free / 2:  # activations and their gradients need memory, too
            groups.append([])
            taken = 0
        groups[-1].append(candidate)
        taken += size
    needed, there = sum(sizes), _memory()
    stay_on_gpu = len(groups) == 1 and math.isfinite(free)
    if there is not None and needed > there and not stay_on_gpu:
        raise ConfigError(
            f"The statistics of {len(sizes)} products take {needed / 2**30:.3g} GiB, this machine has "
            f"{there / 2**30:.3g}: calibrate fewer products (include=, exclude=); the others are projected plainly."
        )
    return groups


def _memory() -> int | None:
    """Of the machine, in bytes, where it can be known."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def _free(device: torch.device) -> float:
    """Memory of a GPU that nothing holds, in bytes; infinite where the statistics stay in the machine's own."""
    if device.type != "cuda":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _run(
    model: nn.Module, candidates: Sequence[Candidate], batches: Iterable[Any], title: str
) -> tuple[dict[str, Statistics], str | None]:
    """What the candidates see of all batches, and what was differentiated."""
    device = next(model.parameters()).device
    sums = _Sums(anchor=torch.zeros((), device=device, requires_grad=True))
    twin = evaluated(observed(model, candidates, sums.observe)).requires_grad_(False)
    draw = torch.Generator(device).manual_seed(0)  # the same plan every time, and the user's own generator left alone
    first = True
    for given in each_inputs(model, tqdm(batches, desc=title, unit="batch", leave=False), "calibration"):
        inputs, failed = given.on(device), None
        sums.mask = inputs.mask(model)
        if sums.anchor is not None:
            try:
                _forward_and_backward(twin, inputs, sums, draw)
            except RuntimeError as error:
                if not first or isinstance(error, torch.OutOfMemoryError):
                    raise
                failed = error.__cause__ or error
                sums.start_again_without_gradients()
        if sums.anchor is None:
            with torch.no_grad():
                inputs.into(twin)
        if failed is not None:  # and not because the model can't run on the batch at all
            warnings.warn(
                f"{type(model).__name__} can't be differentiated on the calibration data, so that the plan goes by the "
                f"errors of the products' outputs, not by what the model's loss feels of them: {failed}",
                MonarchWarning,
                stacklevel=5,
            )
        first = False
    if first:
        raise ConfigError("calibration has no batches; an iterator that was read already gives none again.")
    if sums.counts and not any(sums.counts.values()):
        raise ConfigError("The calibration data have no token that counts: they are empty, or a mask hides them all.")
    return sums.statistics(), sums.loss


def calibrated(model: nn.Module, candidates: Sequence[Candidate], data: Calibration | Iterable[Any]) -> Calibration:
    """The calibration that the user gives, or what ``calibrate`` makes of the batches.

    Raises:
        ConfigError: The calibration is of another architecture or of other parts of its weights, or as ``calibrate``.
    """
    if not isinstance(data, Calibration):
        return calibrate(model, candidates, data)
    if data.fingerprint != checks.fingerprint(model):
        raise ConfigError(
            f"The calibration was made with another architecture than this {type(model).__name__}: names, shapes or "
            "ties of parameters differ."
        )
    names = {candidate.name for candidate in candidates}
    others = {name.partition("[")[0]: name for name in data.statistics if name not in names}
    for candidate in candidates:
        if candidate.name not in data.statistics and candidate.parameter in others:
            raise ConfigError(
                f"The calibration tells of {others[candidate.parameter]!r}, the graph has {candidate.name!r}: give "
                "monarch_fx.calibrate and this call the same example_inputs, such as a batch."
            )
    return data


def _forward_and_backward(twin: nn.Module, inputs: Inputs, sums: _Sums, draw: torch.Generator) -> None:
    with torch.enable_grad():
        output = inputs.into(twin)
    tensor, gradient, sums.loss = loss_gradient(output, sums.mask, draw)
    tensor.backward(gradient)
    sums.tokens += int(gradient.any(-1).sum())


def observed(model: nn.Module, candidates: Sequence[Candidate], observe: Observe) -> nn.Module:
    """A copy of ``model`` that shares the candidates' values with it, and tells ``observe`` what its products see: the
    candidates of the weight, which piece of it that is, and its inputs and outputs; it gives the outputs back."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_parameter: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_parameter.setdefault(candidate.parameter, []).append(candidate)
    twin = rewrite.copy_without(model, by_parameter)
    for name, mine in by_parameter.items():
        weight = rewrite.dense_weight(parameters[name], [candidate.view for candidate in mine])
        weight.observer = functools.partial(observe, mine)
        rewrite.install(twin, name, weight)
    return twin
