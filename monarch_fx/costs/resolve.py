"""Which profile a plan is made for."""

from __future__ import annotations

import torch

from monarch_fx.costs.measure import cached_profile, stored_profile
from monarch_fx.costs.profile import DeviceProfile
from monarch_fx.costs.shipped import SHIPPED
from monarch_fx.errors import DeviceProfileError


def resolve(device: str | DeviceProfile, torch_device: torch.device | str) -> DeviceProfile:
    """The profile that ``device`` names.

    Args:
        device: A profile, the name of a shipped one or of one that ``measure_device`` has stored, or ``"auto"``: what
            it has stored for ``torch_device``, else the shipped profile that fits it.
        torch_device: Where the model is. A model on ``meta`` is planned for the GPU where there is one, else the CPU.

    Raises:
        DeviceProfileError: No profile has this name, or none fits ``torch_device``.
    """
    if isinstance(device, DeviceProfile):
        return device
    if device != "auto":
        named = (SHIPPED.get(device) or stored_profile(device)) if isinstance(device, str) else None
        if named is None:
            raise DeviceProfileError(
                f'Unknown device profile {device!r}. Known: "auto", {", ".join(map(repr, SHIPPED))}, and the names of '
                "profiles that measure_device() has stored here; or pass a DeviceProfile, such as it returns."
            )
        return named
    torch_device = torch.device(torch_device)
    if torch_device.type == "meta":
        torch_device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return cached_profile(torch_device) or _shipped_for(torch_device)


def _shipped_for(torch_device: torch.device) -> DeviceProfile:
    if torch_device.type == "cpu":
        return SHIPPED["cpu"]
    name = torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else torch_device.type
    for profile in SHIPPED.values():
        if torch_device.type == "cuda" and profile.name in name.lower().replace(" ", ""):
            return profile
    measure = f"run measure_device({str(torch_device)!r}) once, or " if torch_device.type == "cuda" else ""
    raise DeviceProfileError(
        f"No shipped profile fits the device {name!r}: {measure}pass the closest of {', '.join(map(repr, SHIPPED))}."
    )
