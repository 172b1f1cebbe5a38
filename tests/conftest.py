"""What holds for every test: no network, one thread, fixed seeds, caches of this run alone."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the folder from the process that starts them
    # Compiled code, and the user's cache folder: a device profile that lies there would change every plan.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="monarch-fx-tests-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(os.environ["XDG_CACHE_HOME"], "inductor")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton


def pytest_unconfigure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Graphs that one test compiles would count towards the recompile limit of the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def gpt2() -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """A dense model, the same rewritten, and token ids."""
    pytest.importorskip("transformers")
    import zoo  # after TRITON_INTERPRET is set

    import monarch_fx as mfx

    torch.manual_seed(0)
    model, inputs = zoo.gpt2()
    model.eval()
    return model, mfx.monarchify(model, config=zoo.HALF_GRID), inputs["input_ids"]
