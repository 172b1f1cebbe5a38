"""What a plan's times are predicted for: tokens, dtype, device, with or without a backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from monarch_fx.costs import DTYPE_BYTES, DeviceProfile, Surroundings, dense_seconds, has_kernels, monarch_seconds
from monarch_fx.errors import ConfigError
from monarch_fx.kernels import choice
from monarch_fx.kernels.halves import uses_tf32
from monarch_fx.records import Candidate
from monarch_fx.structure import MonarchShape

DEFAULT_TOKENS = 4096

Tokens = int | Mapping[int, float] | None


@dataclass(frozen=True)
class Run:
    """What the times are predicted for."""

    profile: DeviceProfile
    tokens: Mapping[int, float]
    workload: str
    dtype: str

    def rows(self, candidate: Candidate) -> dict[int, float]:
        """Rows per call -> weight, over all calls; weights of the token counts sum to one."""
        total = sum(self.tokens.values())
        rows: dict[int, float] = {}
        for tokens, weight in self.tokens.items():
            for count in candidate.token_counts(tokens):
                rows[count] = rows.get(count, 0.0) + weight / total
        return rows

    def seconds(self, candidate: Candidate, shape: MonarchShape | None, recomputed: bool = False) -> float:
        """Predicted seconds of all calls in one run, mean over the token counts.

        ``recomputed``: whether the backward pass computes the intermediate anew.
        """
        rows = self.rows(candidate)
        counts = np.array(list(rows))
        setting = self.setting(candidate, recomputed)
        if shape is None:
            times = dense_seconds(self.profile, counts, candidate.in_features, candidate.out_features, **setting)
        else:
            times = monarch_seconds(self.profile, counts, shape, **setting)
        return float(np.dot(times, list(rows.values())))

    def terms(self, candidate: Candidate) -> int:
        """What the kernels round sums up to, so that ranks between take as long and keep less."""
        are_many = min(self.rows(candidate), default=0) > choice.FEW_TOKENS
        in_tiles = self.dtype != "tf32" and has_kernels(self.profile, self.dtype, candidate.batch)
        return choice.TERMS if are_many and in_tiles else 1

    def setting(self, candidate: Candidate, recomputed: bool = False) -> dict[str, Any]:
        """What the costs of one candidate depend on besides device, tokens and structure."""
        around = Surroundings(candidate.bias, candidate.activated, self.beside(candidate), recomputed)
        return {"batch": candidate.batch, "dtype": self.dtype, "workload": self.workload, "around": around}

    def beside(self, candidate: Candidate) -> tuple[int, ...]:
        """``out_features`` of the other products that may run with it, of few tokens in inference."""
        are_few = self.workload == "inference" and min(self.rows(candidate), default=0) <= choice.FEW_TOKENS
        return candidate.beside if are_few else ()


def token_mix(tokens: Tokens, candidates: Sequence[Candidate], given: bool) -> tuple[dict[int, float], str]:
    """The token counts that are planned for, with weights whose sum is 1, and where they come from.

    Args:
        tokens: As of ``monarch_fx.plan``.
        candidates: Their calls tell how many tokens the captured inputs have.
        given: Whether these inputs are the user's.

    Raises:
        ConfigError: ``tokens`` has no meaning.
    """
    if tokens is not None:
        mix = dict(tokens) if isinstance(tokens, Mapping) else {tokens: 1.0}
        numbers = all(isinstance(t, int) and not isinstance(t, bool) and t > 0 for t in mix)
        if not mix or not numbers or not all(weight > 0 for weight in mix.values()):
            raise ConfigError(f"tokens must be a positive integer or {{tokens: weight}}, got {tokens!r}.")
        total = sum(mix.values())
        return {t: weight / total for t, weight in mix.items()}, "given"
    main = [call.count for candidate in candidates for call in candidate.calls if call.share == 1.0 and call.count]
    if given and main:
        return {main[0]: 1.0}, "from example_inputs"
    return {DEFAULT_TOKENS: 1.0}, "default, since no example_inputs say how many a run has"


def planned_dtype(dtype: torch.dtype | str | None, candidates: Sequence[Candidate], profile: DeviceProfile) -> str:
    """That which was chosen, without ``torch.``; by default the one that most parameters have.

    float32 on a GPU is "tf32" where PyTorch is set to that.

    Raises:
        ConfigError: The chosen one is not a real floating-point dtype that costs are known of.
    """
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPE_BYTES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, as torch.dtype or name, got {dtype!r}.")
        return _as_multiplied(name, profile)
    sizes: dict[str, int] = {}
    for candidate in candidates:
        sizes[candidate.dtype] = sizes.get(candidate.dtype, 0) + candidate.params
    return _as_multiplied(max(sizes, key=lambda dtype: sizes[dtype]), profile)


def _as_multiplied(dtype: str, profile: DeviceProfile) -> str:
    return "tf32" if dtype == "float32" and profile.kernel_efficiency > 0 and uses_tf32() else dtype
