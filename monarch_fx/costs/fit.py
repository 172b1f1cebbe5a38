"""Fits the constants of the cost formulas to measured times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray

from monarch_fx.costs.predict import dense_seconds, monarch_seconds
from monarch_fx.costs.profile import DeviceProfile
from monarch_fx.costs.timing import Case
from monarch_fx.errors import DeviceProfileError

SHARES = ("overlap", "kernel_overlap")
WORST_ERROR = 0.3  # median of |predicted / measured - 1|; 0.05 to 0.1 on an idle machine


def fit_profile(
    cases: Sequence[Case],
    times: NDArray[np.float64],
    *,
    name: str,
    dtype: str,
    relative_peaks: Mapping[str, float],
    given: Mapping[str, float],
    expected: Mapping[str, float],
) -> DeviceProfile:
    """The profile whose predictions are closest to ``times`` (seconds), as least squares of their logarithms.

    Args:
        cases: The products.
        times: Measured seconds of each.
        name: Of the profile.
        dtype: Of the products.
        relative_peaks: FLOP/s in every dtype over those in ``dtype``.
        given: Constants of the profile that aren't fitted.
        expected: Those that should be near these values; each counts as one more time. Many sets of them predict times
            about as well, and not all of them choose well between products whose times differ little.

    Raises:
        DeviceProfileError: No profile fits.
    """

    # Starts: the roofs that the fastest product shows, a launch as long as half the shortest one, little to fill, half
    # overlap.
    flops = max(
        2 * c.tokens * c.in_features * c.out_features / t for c, t in zip(cases, times, strict=True) if not c.shape
    )
    roofs = {"peak_flops": flops, "bandwidth_bytes_per_s": flops / 10, "copy_bytes_per_s": flops / 10}
    free = {**roofs, "launch_s": times.min() / 2, "fill": 10.0, "overlap": 0.5, **expected}
    starts = {constant: value for constant, value in free.items() if constant not in given}
    is_share = np.isin(list(starts), SHARES)
    is_expected = np.isin(list(starts), list(expected))

    def profile(constants: NDArray[np.float64], source: str = "being fitted") -> DeviceProfile:
        found: dict[str, Any] = {**given, **dict(zip(starts, values_of(constants), strict=True))}
        peak = found.pop("peak_flops")
        peaks = {other: peak * share for other, share in relative_peaks.items()}
        return DeviceProfile(name=name, source=source, peak_flops=peaks, **found)

    def values_of(constants: NDArray[np.float64]) -> list[float]:
        return np.where(is_share, constants, np.exp(constants)).tolist()

    def errors(constants: NDArray[np.float64]) -> NDArray[np.float64]:
        made = profile(constants)
        return np.log([predicted(made, case, dtype) for case in cases]) - np.log(times)

    def residuals(constants: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([errors(constants), (constants - start)[is_expected]])

    values = np.array(list(starts.values()))
    start = np.where(is_share, values, np.log(values))
    lowest = np.where(is_share, 0.0, start - np.log(1e3))
    highest = np.where(is_share, 1.0, start + np.log(1e3))
    # soft_l1: a few products that a library runs unusually badly don't bend the rest
    fitted = scipy.optimize.least_squares(residuals, start, bounds=(lowest, highest), loss="soft_l1", f_scale=0.1)
    error = float(np.median(np.abs(np.expm1(errors(fitted.x)))))
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
    return float(monarch_seconds(profile, case.tokens, case.shape, dtype=dtype))
