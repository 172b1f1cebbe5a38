import os
import subprocess
import sys

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
