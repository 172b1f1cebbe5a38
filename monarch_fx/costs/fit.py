"""Fits the constants of the cost formulas to measured times."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray

from monarch_fx.costs.predict import dense_seconds, monarch_seconds
from monarch_fx.costs.profile import DeviceProfile
from monarch_fx.costs.timing import Case
from monarch_fx.errors import DeviceProfileError

WORST_ERROR = 0.3  # median of |predicted / measured - 1|; 0.05 to 0.1 on an idle machine


def fit_profile(
    cases: Sequence[Case],
    times: NDArray[np.float64],
    *,
    name: str,
    dtype: str,
    relative_peaks: Mapping[str, float],
    tile: int,
    units: int,
    cache_bytes: float,
) -> DeviceProfile:
    """The profile whose predictions are closest to ``times`` (seconds), as least squares of their logarithms.

    Args:
        cases: The products.
        times: Measured seconds of each.
        name: Of the profile.
        dtype: Of the products.
        relative_peaks: FLOP/s in every dtype over those in ``dtype``.
        tile: See ``DeviceProfile``; given, not fitted.
        units: Likewise.
        cache_bytes: Likewise.

    Raises:
        DeviceProfileError: No profile fits.
    """

    has_kernels = any(case.kernels for case in cases)
    # Starts: the roofs that the fastest product shows, a launch as long as half the shortest one, little to fill, half
    # overlap, own kernels as fast as others, and as long at the operands of a square tile as at its products.
    flops = max(
        2 * c.tokens * c.in_features * c.out_features / t for c, t in zip(cases, times, strict=True) if not c.shape
    )
    shares = {"overlap": 0.5}
    scales = {"peak": flops, "bandwidth": flops / 10, "copy": flops / 10, "launch_s": times.min() / 2, "fill": 10.0}
    if has_kernels:
        shares["kernel_overlap"] = 0.5
        scales |= {"kernel_efficiency": 1.0, "kernel_launch_s": times.min() / 2, "fused_efficiency": 1.0}
        scales |= {"kernel_operand_bytes_per_s": flops / tile}

    def profile(constants: NDArray[np.float64], source: str = "being fitted") -> DeviceProfile:
        found = dict(zip(scales, np.exp(constants[: len(scales)]).tolist(), strict=True))
        found |= dict(zip(shares, constants[len(scales) :].tolist(), strict=True))
        peak = found.pop("peak")
        return DeviceProfile(
            name=name,
            source=source,
            peak_flops={other: peak * share for other, share in relative_peaks.items()},
            bandwidth_bytes_per_s=found.pop("bandwidth"),
            copy_bytes_per_s=found.pop("copy"),
            tile=tile,
            units=units,
            cache_bytes=cache_bytes,
            **found,
        )

    def residuals(constants: NDArray[np.float64]) -> NDArray[np.float64]:
        made = profile(constants)
        return np.log([predicted(made, case, dtype) for case in cases]) - np.log(times)

    start = np.concatenate([np.log(list(scales.values())), list(shares.values())])
    reach = np.concatenate([np.full(len(scales), np.log(1e3)), np.full(len(shares), 0.5)])
    # soft_l1: a few products that a library runs unusually badly don't bend the rest
    fitted = scipy.optimize.least_squares(
        residuals, start, bounds=(start - reach, start + reach), loss="soft_l1", f_scale=0.1
    )
    error = float(np.median(np.abs(np.expm1(residuals(fitted.x)))))
    if error > WORST_ERROR:
        raise DeviceProfileError(
            f"The times measured on {name!r} don't fit the cost formulas: median error {error:.0%}. Was the machine "
            "busy with something else? Measure again when it isn't, or choose a shipped profile."
        )
    return profile(
        fitted.x, f"measured: {len(cases)} products in {dtype}, PyTorch {torch.__version__}, median error {error:.0%}"
    )


def predicted(profile: DeviceProfile, case: Case, dtype: str) -> float:
    if case.shape is None:
        return float(dense_seconds(profile, case.tokens, case.in_features, case.out_features, dtype=dtype))
    profile = profile if case.kernels else dataclasses.replace(profile, kernel_efficiency=0.0)
    return float(monarch_seconds(profile, case.tokens, case.shape, dtype=dtype))
