"""DeviceProfile: the constants of a device that the cost formulas need."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from monarch_fx.errors import DeviceProfileError

DTYPE_BYTES = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class DeviceProfile:
    """What a device can do; see ``formulas.py`` for how the numbers are used.

    Args:
        name: What a plan calls it.
        source: Where the numbers come from, in words.
        peak_flops: FLOP/s that large matrix products reach, by dtype ("float32", "bfloat16", ...), without sparsity.
            "tf32": of float32 matrices that PyTorch multiplies in TF32 on a GPU.
        bandwidth_bytes_per_s: Bytes read and written per second by matrix products.
        copy_bytes_per_s: The same by a copy that transposes blocks.
        launch_s: Seconds that each kernel costs besides its work.
        overlap: How far compute and traffic of one kernel run at the same time: 1 is max(compute, traffic), 0 the sum.
        tile: Rows and columns of the results that one unit computes together; 1 where sizes aren't quantised.
        units: Tiles computed at once (streaming multiprocessors of a GPU).
        fill: Inner steps that a tile loses before its pipeline runs.
        kernel_efficiency: Speed of this library's own kernels over ``peak_flops``, for products in half precision
            and TF32; 0 where they don't run (CPUs). The next four are theirs, too.
        kernel_launch_s: Their ``launch_s``.
        kernel_overlap: Their ``overlap``.
        kernel_operand_bytes_per_s: Bytes of operands that their tiles take in per second, on all units together: what
            small tiles wait for.
        fused_efficiency: ``kernel_efficiency`` of the one that runs a whole product; 0 where none does (before Hopper).
        cache_bytes: Activations that a product reads and writes, up to which a cache hands them from kernel to kernel:
            a third of the cache. 0: that makes no difference.

    Raises:
        DeviceProfileError: A number is not finite, negative, or zero where it must not be.
    """

    name: str
    source: str
    peak_flops: Mapping[str, float] = field(hash=False)
    bandwidth_bytes_per_s: float
    copy_bytes_per_s: float
    launch_s: float
    overlap: float = 1.0
    tile: int = 1
    units: int = 1
    fill: float = 0.0
    kernel_efficiency: float = 0.0
    kernel_launch_s: float = 0.0
    kernel_overlap: float = 1.0
    kernel_operand_bytes_per_s: float = 0.0
    fused_efficiency: float = 0.0
    cache_bytes: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise DeviceProfileError(f"DeviceProfile.name must be a text, got {self.name!r}.")
        if not isinstance(self.peak_flops, Mapping) or not self.peak_flops:
            raise DeviceProfileError(
                f'Profile {self.name!r}: peak_flops must map dtypes to FLOP/s, such as {{"float32": 1e12}}, '
                f"got {self.peak_flops!r}."
            )
        for dtype, value in self.peak_flops.items():
            if dtype not in DTYPE_BYTES:
                raise DeviceProfileError(
                    f"Profile {self.name!r}: peak_flops has the unknown dtype {dtype!r}. "
                    f"Known: {', '.join(DTYPE_BYTES)}."
                )
            self._check(f"peak_flops[{dtype!r}]", value, positive=True)
        for name in ("bandwidth_bytes_per_s", "copy_bytes_per_s", "tile", "units"):
            self._check(name, getattr(self, name), positive=True)
        for name in (
            "launch_s",
            "overlap",
            "fill",
            "kernel_efficiency",
            "kernel_launch_s",
            "kernel_overlap",
            "kernel_operand_bytes_per_s",
            "fused_efficiency",
            "cache_bytes",
        ):
            self._check(name, getattr(self, name), positive=False)
        for name in ("overlap", "kernel_overlap"):
            if getattr(self, name) > 1:
                raise DeviceProfileError(
                    f"Profile {self.name!r}: {name} must be in [0, 1], got {getattr(self, name)!r}."
                )
        if self.kernel_efficiency > 0:
            self._check("kernel_operand_bytes_per_s", self.kernel_operand_bytes_per_s, positive=True)

    def _check(self, name: str, value: Any, *, positive: bool) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (positive and value == 0):
            wanted = "a positive" if positive else "a non-negative"
            raise DeviceProfileError(f"Profile {self.name!r}: {name} must be {wanted} finite number, got {value!r}.")

    def peak(self, dtype: str) -> float:
        """FLOP/s in ``dtype``.

        Raises:
            DeviceProfileError: The profile doesn't know the dtype.
        """
        if dtype not in self.peak_flops:
            known = ", ".join(self.peak_flops)
            raise DeviceProfileError(
                f"Profile {self.name!r} has no peak_flops for dtype {dtype!r}. Known: {known}. "
                "measure_device(force=True) measures all that this machine has."
            )
        return self.peak_flops[dtype]

    def to_json(self) -> str:
        """The profile as JSON text; ``DeviceProfile.from_json`` reads it back unchanged."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({**fields, "peak_flops": dict(self.peak_flops)}, indent=1)

    @staticmethod
    def from_json(text: str) -> DeviceProfile:
        """Reads what ``to_json`` wrote.

        Raises:
            DeviceProfileError: The text is not a profile.
        """
        try:
            return DeviceProfile(**json.loads(text))
        except (ValueError, TypeError) as error:
            if isinstance(error, DeviceProfileError):
                raise
            raise DeviceProfileError(
                f"This text is not a profile as DeviceProfile.to_json() writes it: {error}."
            ) from error
