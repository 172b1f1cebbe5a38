"""The Triton kernels compile, and fit, without a GPU: what the interpreter can't tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "compile_kernels.py"


# KB that a program may take: NVIDIA's CUDA C++ programming guide, compute capabilities. For 8.0, which has 163, and 8.9
# the same kernels are chosen, and take as much.
@pytest.mark.parametrize(("arch", "shared"), [(80, 99), (90, 227), (100, 227)])
def test_every_kernel_that_can_be_chosen(arch: int, shared: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, SCRIPT, str(arch)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    taken = dict(json.loads(line) for line in run.stdout.splitlines())
    assert len(taken) > 10
    assert {name: size for name, size in taken.items() if size > shared * 1024} == {}
