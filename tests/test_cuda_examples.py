"""The examples' recorded steps on a GPU, where there is one: as launched ones, dropout and the switch included."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from zoo import HALF_GRID

import monarch_fx as mfx
from examples import steps, training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def launched(run: object, at: torch.device) -> steps.Step:
    """A step that is never recorded."""
    return steps.Step(run, torch.device("cpu"))  # type: ignore[arg-type]


def test_recorded_steps_train_as_launched_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, targets = torch.randn(100, 64, device="cuda"), torch.randint(8, (100,), device="cuda")
    start = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1), nn.GELU(), nn.Linear(64, 8))
    start = mfx.monarchify(start, config=HALF_GRID, init="random", example_inputs=torch.randn(2, 64))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def batch(step: int) -> tuple[Tensor, Tensor]:
        picked = training.picks(100, 16, step, seed=0)
        return rows[picked.cuda()], targets[picked.cuda()]

    def run(name: str) -> training.Curve:
        settings = training.Settings(tmp_path, steps=60, lr=1e-2, densify_at=30)
        return training.train(
            name, copy.deepcopy(start), loss, batch, settings, lambda m: {"loss": loss(m, (rows, targets)).item()}
        )

    recorded = run("recorded")
    monkeypatch.setattr(training, "Step", launched)
    found = run("launched")
    assert recorded.steps[0] == 5  # four steps to launch and record
    # float32, the same dropout; Adam amplifies sums in another order, a wrong batch or rate is off by far more
    torch.testing.assert_close(recorded.figures["loss"], found.figures["loss"], rtol=1e-2, atol=0)


@pytest.mark.filterwarnings("ignore::UserWarning:torch.*")  # hints of the compiler
@pytest.mark.parametrize("densify_at", [None, 30])
def test_a_compiled_language_model_learns_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, densify_at: int | None
) -> None:
    pytest.importorskip("transformers")
    from examples.corpus import Size
    from examples.language_model import gpt2, loss

    ids = torch.randint(256, (64, 64), device="cuda")
    size = Size(256, 64, 256, 2, 4, 16, 60, 1e-3, 1)

    def run(full: bool) -> training.Curve:
        torch.manual_seed(0)
        model, _ = training.with_factors(lambda: gpt2(size, 256), full=full, tokens=1024)
        settings = training.Settings(tmp_path, steps=60, lr=1e-3, full=full, densify_at=densify_at)
        return training.train(f"full={full}", model, loss, lambda step: ids[training.picks(64, 16, step, 0)], settings)

    found = run(full=True)
    monkeypatch.setattr(training, "Step", launched)
    exact = run(full=False)
    after = dict(zip(exact.steps, exact.losses, strict=True))
    assert found.losses[-1] < found.losses[0]
    for step, value in zip(found.steps, found.losses, strict=True):
        assert value == pytest.approx(after[step], rel=0.03)  # eight bits, against float32
    assert dataclasses.asdict(found)["densified"] == densify_at
