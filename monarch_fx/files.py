"""Tensors -> a safetensors file, whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from monarch_fx.errors import ConfigError


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file, over one that is there.

    Raises:
        ConfigError: It can't be written there.
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        save_file(tensors, unfinished, metadata=dict(metadata))
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{str(path)!r} can't be written ({error}): give a file in a folder that exists, may be written to and has "
            "room."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
