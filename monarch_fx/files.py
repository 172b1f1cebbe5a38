"""What is written to disk: safetensors files, whole or not at all, in folders that may be written to."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from monarch_fx.errors import ConfigError


def check_folder(folder: Path, name: str) -> None:
    """Whether files can be written to a folder that exists, which messages call ``name``.

    Raises:
        ConfigError: They can't.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{name} can't be written to ({error.strerror}): give a folder that may be.") from error


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
