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

    Raises:
        DeviceProfileError: No profile fits.
    """

    def profile(constants: NDArray[np.float64], source: str = "being fitted") -> DeviceProfile:
        peak, bandwidth, copy, launch_s, fill, efficiency = np.exp(constants[:6]).tolist()
        return DeviceProfile(
            name=name,
            source=source,
            peak_flops={other: peak * share for other, share in relative_peaks.items()},
            bandwidth_bytes_per_s=bandwidth,
            copy_bytes_per_s=copy,
            launch_s=launch_s,
            overlap=float(constants[6]),
            tile=tile,
            units=units,
            fill=fill,
            kernel_efficiency=efficiency if any(case.kernels for case in cases) else 0.0,
        )

    def residuals(constants: NDArray[np.float64]) -> NDArray[np.float64]:
        made = profile(constants)
        return np.log([predicted(made, case, dtype) for case in cases]) - np.log(times)

    # the roofs that the fastest product shows, a launch as long as half the shortest one, little to fill, own kernels
    # as fast as others, half overlap
    flops = max(
        2 * c.tokens * c.in_features * c.out_features / t for c, t in zip(cases, times, strict=True) if not c.shape
    )
    start = np.append(np.log([flops, flops / 10, flops / 10, times.min() / 2, 10.0, 1.0]), 0.5)
    reach = np.append(np.full(6, np.log(1e3)), 0.5)
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
