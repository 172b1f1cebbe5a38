"""measure_device: a profile fitted to this machine, kept in the user's cache directory."""

from __future__ import annotations

import os
import platform
import re
import tempfile
import warnings
from pathlib import Path

import platformdirs
import torch

from monarch_fx.costs.fit import fit_profile
from monarch_fx.costs.profile import DeviceProfile
from monarch_fx.costs.shipped import GPU, HOPPER
from monarch_fx.costs.timing import WORKBENCHES, copy_bytes_per_s, relative_peaks, time_products
from monarch_fx.errors import DeviceProfileError, MonarchWarning


def measure_device(device: str | torch.device | None = None, *, force: bool = False) -> DeviceProfile:
    """Fits a profile to a device of this machine in well under a minute.

    Times dense products and Monarch products (on a GPU by this library's kernels, else two ``bmm`` and block
    transposes) of several sizes, and fits the constants of the cost formulas by least squares on the logarithms of the
    times. How a GPU cuts products into tiles is expected to be as in the shipped profiles, unless the times say
    otherwise. The profile is kept in the user's cache directory for this device, PyTorch version and number of threads;
    ``device="auto"`` finds it there.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...; default the GPU where there is one, else the CPU.
        force: Measure again, whatever is stored.

    Raises:
        DeviceProfileError: The device can't be measured, or the times make no sense (a busy machine).
    """
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DeviceProfileError(f"Can't measure the device {device!r}: {error}") from error
    if target.type not in WORKBENCHES:
        raise DeviceProfileError(f"Can't measure the device {str(target)!r}: only CPUs and CUDA devices.")
    if target.type == "cuda" and not torch.cuda.is_available():
        raise DeviceProfileError(f"Can't measure the device {str(target)!r}: PyTorch sees no GPU here.")
    stored = None if force else cached_profile(target)
    if stored is not None:
        return stored
    bench = WORKBENCHES[target.type]
    given: dict[str, float] = {"tile": bench.tile}
    expected: dict[str, float] = {}
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []):
        cases, times = time_products(target)
        peaks = relative_peaks(target)
    if target.type == "cuda":
        gpu = torch.cuda.get_device_properties(target)
        given |= {"units": gpu.multi_processor_count, "cache_bytes": gpu.L2_cache_size / 3}
        given["copy_bytes_per_s"] = copy_bytes_per_s(target)
        expected = HOPPER if gpu.major >= 9 and torch.version.hip is None else GPU
    profile = fit_profile(
        cases,
        times,
        name=description(target),
        dtype=bench.dtype,
        relative_peaks=peaks,
        given=given,
        expected=expected,
    )
    try:
        _store(profile)
    except OSError as error:
        warnings.warn(f"The profile can't be kept for the next time: {error}.", MonarchWarning, stacklevel=2)
    return profile


def cached_profile(device: torch.device) -> DeviceProfile | None:
    """What ``measure_device`` has stored for ``device``; None where there is nothing, or nothing that can be read."""
    return stored_profile(description(device)) if device.type in WORKBENCHES else None


def stored_profile(name: str) -> DeviceProfile | None:
    """The same by the profile's name, whatever devices there are now."""
    try:
        profile = DeviceProfile.from_json(_cache_file(name).read_text())
    except (OSError, UnicodeDecodeError, DeviceProfileError):
        return None
    return profile if profile.name == name else None


def _cache_file(name: str) -> Path:
    key = f"{name} torch {torch.__version__}"
    return Path(platformdirs.user_cache_dir("monarch_fx")) / f"{re.sub(r'[^a-z0-9.+]+', '-', key.lower())}.json"


def _store(profile: DeviceProfile) -> None:
    path = _cache_file(profile.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(profile.to_json())
    os.replace(file.name, path)  # at once, so that no other process reads half a profile


def description(device: torch.device) -> str:
    """The device as a plan names it: 'cpu AMD EPYC, 2 threads'."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"cpu {_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
