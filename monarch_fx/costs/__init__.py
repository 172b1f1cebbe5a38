"""What dense and Monarch products cost on a device: formulas, profiles and their measurement. No graphs here."""

from monarch_fx.costs.measure import measure_device
from monarch_fx.costs.predict import Surroundings, dense_seconds, has_kernels, monarch_seconds, paying_tokens
from monarch_fx.costs.profile import DTYPE_BYTES, DeviceProfile
from monarch_fx.costs.resolve import resolve

__all__ = [
    "DTYPE_BYTES",
    "DeviceProfile",
    "Surroundings",
    "dense_seconds",
    "has_kernels",
    "measure_device",
    "monarch_seconds",
    "paying_tokens",
    "resolve",
]
