"""Which profile a plan is made for."""

from __future__ import annotations

import torch

from monarch_fx.costs.measure import cached_profile, description, stored_profile
from monarch_fx.costs.profile import DeviceProfile
from monarch_fx.costs.shipped import SHIPPED
from monarch_fx.costs.timing import WORKBENCHES
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


def device_of(profile: DeviceProfile, torch_device: torch.device | str) -> torch.device:
    """The device of this machine that ``profile`` is of, ``torch_device`` rather than others.

    Raises:
        DeviceProfileError: There is none.
    """
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    here = [device for device in (torch.device(torch_device), torch.device("cpu"), *gpus) if device.type in WORKBENCHES]
    for device in here:
        if _is_shipped_for(profile, device) or profile.name == description(device):
            return device
    raise DeviceProfileError(
        f"Nothing can be timed for the profile {profile.name!r} here, only for "
        f'{", ".join(dict.fromkeys(map(description, here)))}: plan with device="auto", or with times="predicted".'
    )


def _is_shipped_for(profile: DeviceProfile, torch_device: torch.device) -> bool:
    if torch_device.type == "cuda":
        return profile.name in torch.cuda.get_device_name(torch_device).lower().replace(" ", "")
    return profile.name == torch_device.type


def _shipped_for(torch_device: torch.device) -> DeviceProfile:
    for profile in SHIPPED.values():
        if _is_shipped_for(profile, torch_device):
            return profile
    name = torch.cuda.get_device_name(torch_device) if torch_device.type == "cuda" else torch_device.type
    measure = f"run measure_device({str(torch_device)!r}) once, or " if torch_device.type == "cuda" else ""
    raise DeviceProfileError(
        f"No shipped profile fits the device {name!r}: {measure}pass the closest of {', '.join(map(repr, SHIPPED))}."
    )
