"""What dense and Monarch products cost on a device: formulas, profiles and their measurement. No graphs here."""

from monarch_fx.costs.measure import measure_device
from monarch_fx.costs.predict import Surroundings, dense_seconds, has_kernels, monarch_seconds, paying_tokens
from monarch_fx.costs.profile import DTYPE_BYTES, DeviceProfile
from monarch_fx.costs.resolve import device_of, resolve
from monarch_fx.costs.stopwatch import Stopwatch

__all__ = [
    "DTYPE_BYTES",
    "DeviceProfile",
    "Stopwatch",
    "Surroundings",
    "dense_seconds",
    "device_of",
    "has_kernels",
    "measure_device",
    "monarch_seconds",
    "paying_tokens",
    "resolve",
]
