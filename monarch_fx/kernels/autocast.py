"""In which dtype a product runs under autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def is_on(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # PyTorch knows of none on "meta"


def dtype(x: Tensor) -> torch.dtype:
    """Autocast's, where it casts x: PyTorch's leaves float64 and complex numbers as they are."""
    casts = is_on(x.device) and x.dtype.is_floating_point and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


def cast(x: Tensor) -> Tensor:
    return x.to(dtype(x))
