"""Dense weights -> their factors and errors, out of a work directory where an interrupted run has left them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from monarch_fx import assess, files
from monarch_fx.errors import ConfigError
from monarch_fx.layers import init_factors
from monarch_fx.passes.anchor import Moments, compress_in_order
from monarch_fx.passes.calibrate import Statistics
from monarch_fx.projection import project, project_on_inputs, relative_error
from monarch_fx.records import Candidate, Plan
from monarch_fx.structure import Monarch, MonarchShape


def work_folder(work_dir: str | os.PathLike[str]) -> Path:
    """The folder, made where there is none.

    Raises:
        ConfigError: It is a file or inside one, or nothing can be written there.
    """
    folder = Path(work_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"work_dir={str(folder)!r} is a file or inside one: give a folder.") from error
    except OSError as error:
        raise ConfigError(f"work_dir={str(folder)!r} can't be made ({error.strerror}): give another folder.") from error
    files.check_folder(folder, f"work_dir={str(folder)!r}")
    return folder


class FactorMaker:
    """Makes factors one product after the other, and keeps what they cost.

    Args:
        init: ``"project"`` or ``"random"``.
        statistics: What calibration data tell, by product.
        folder: Where projected factors are kept; None: nowhere.
    """

    def __init__(self, init: str, statistics: Mapping[str, Statistics], folder: Path | None) -> None:
        self.init, self.statistics, self.folder = init, statistics, folder
        self.errors: dict[str, float] = {}
        self.losses: dict[str, float] = {}
        self.shifts: dict[str, Tensor] = {}  # of biases, (out,), float64
        self.made: dict[str, Monarch] = {}  # in the order of the model, before they are asked for

    def make(self, name: str, dense: Tensor, shape: MonarchShape) -> Monarch:
        """The structure of a dense weight (B?, out, in)."""
        return self.made.pop(name) if name in self.made else self._make(name, dense, shape, self.statistics.get(name))

    def make_in_order(self, model: nn.Module, plan: Plan, batches: Iterable[Any]) -> None:
        """Makes all of a plan but experts, each for what the compressed model feeds it on ``batches``."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        shapes = {d.candidate.name: d.shape for d in plan.rewritten if d.shape is not None}

        def compress(candidate: Candidate, moments: Moments | None) -> tuple[Tensor, Tensor | None]:
            name, dense = candidate.name, candidate.view.gather(parameters[candidate.parameter]).detach()
            seen, corrects = self.statistics.get(name), False
            if moments is not None:
                seen = moments.statistics(None if seen is None else seen.gradients)
                corrects = candidate.own_bias is not None
            self.made[name] = self._make(name, dense, shapes[name], seen, corrects)
            with torch.autocast(dense.device.type, enabled=False):
                return self.made[name].to_dense() - dense, self.shifts.get(name)

        compress_in_order(model, [d.candidate for d in plan.rewritten], batches, compress)

    def _make(
        self, name: str, dense: Tensor, shape: MonarchShape, seen: Statistics | None, corrects: bool = False
    ) -> Monarch:
        """``corrects``: a bias takes what is lost of the mean of the outputs."""
        if self.init == "random":
            monarch = Monarch.empty(shape, len(dense) if dense.ndim == 3 else None, dense.dtype, dense.device)
            init_factors(monarch, float(dense.float().square().mean().sqrt()))
            self.errors[name] = float("nan")
            return monarch
        if corrects and seen is not None and seen.shift is not None:
            monarch = self._projected(name, dense, shape, seen.centred())
            W, M = dense.double(), monarch.to_dense().double()
            self.shifts[name] = W @ (seen.mean + seen.shift) - M @ seen.mean
        else:
            monarch = self._projected(name, dense, shape, seen)
        self._note(name, dense, monarch, self.statistics.get(name, seen))
        return monarch

    def _note(self, name: str, dense: Tensor, monarch: Monarch, seen: Statistics | None) -> None:
        """What the structure costs."""
        wide = torch.promote_types(dense.dtype, torch.float32) if seen is None else torch.float64
        dense = dense.to(wide)
        wrong = dense - monarch.to_dense().to(wide)
        if seen is None:
            self.errors[name] = float(wrong.norm() / dense.norm().clamp_min(torch.finfo(wide).tiny))
            return
        if name in self.shifts:  # the bias as one more column, of a feature that is always 1
            shift = self.shifts[name][:, None]
            wrong, dense = torch.cat([wrong, -shift], 1), torch.cat([dense, torch.zeros_like(shift)], 1)
            seen = seen.with_constant()
        self.errors[name] = relative_error(wrong, dense, seen.inputs)
        if seen.gradients is not None:
            self.losses[name] = assess.loss(wrong, seen)

    def _projected(self, name: str, dense: Tensor, shape: MonarchShape, seen: Statistics | None) -> Monarch:
        if self.folder is None:
            return _project(dense, shape, seen)
        file = self.folder / (re.sub(r"[^\w.-]", "_", name) + ".safetensors")
        key = _key(dense, shape, seen)
        monarch = _read(file, key, shape, dense.device)
        if monarch is None:
            monarch = _project(dense, shape, seen)
            files.write(file, {"R": monarch.R, "L": monarch.L}, {"key": key})
        return monarch


def _project(dense: Tensor, shape: MonarchShape, seen: Statistics | None) -> Monarch:
    if seen is None:
        return project(dense, shape)
    return project_on_inputs(dense, shape, seen.inputs, seen.gradients, seen.drift)


def _read(file: Path, key: str, shape: MonarchShape, device: torch.device) -> Monarch | None:
    """The factors in a file; None where there is none, it can't be read, or not one of this key."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(file, "pt", device=str(device)) as stored:
        if (stored.metadata() or {}).get("key") == key:
            R, L = stored.get_tensor("R"), stored.get_tensor("L")
            return Monarch(R, L, in_features=shape.in_features, out_features=shape.out_features)
    return None


def _key(dense: Tensor, shape: MonarchShape, seen: Statistics | None) -> str:
    """A hash of all that factors follow from: the weight, the structure, the statistics, this library's projections."""
    digest = hashlib.sha256()
    for source in sorted((Path(__file__).parent / "projection").glob("*.py")):
        digest.update(source.read_bytes())
    digest.update(repr((shape, dense.dtype, tuple(dense.shape))).encode())
    known = () if seen is None else (seen.inputs, seen.gradients, seen.drift)
    for part in (dense, *known):
        digest.update(repr(None if part is None else tuple(part.shape)).encode())
        if part is None:
            continue
        digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
