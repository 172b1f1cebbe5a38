import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

OPTIONAL = ("triton", "transformers", "timm", "torchvision", "accelerate", "lightning", "psutil")


@pytest.mark.parametrize("devices", ["", "0"])
def test_the_library_needs_no_optional_package(devices: str):
    """In a fresh process, where importing any of them fails."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); import monarch_fx; print(monarch_fx.monarchify)"
    )
    env = os.environ | {"CUDA_VISIBLE_DEVICES": devices, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_every_script_imports(folder: str):
    for file in sorted((Path(__file__).parents[1] / folder).glob("*.py")):
        if file.stem != "__main__":  # that one runs
            importlib.import_module(f"{folder}.{file.stem}")
