"""Models are run in evaluation mode without their own ``eval()``: some refuse it, some do more in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import monarch_fx as mfx

CONFIG = mfx.MonarchConfig(nblocks=2, rank=8)
X = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 32))


def exported() -> nn.Module:
    """Its ``eval()`` and ``train()`` raise."""
    return torch.export.export(dense().eval(), (X,)).module()


class Holder(nn.Module):
    """In training mode itself, around a model in any."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Stubborn(Holder):
    """Returns nothing from ``train``, as code that keeps a part frozen often does, and counts the calls."""

    calls = 0

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.calls += 1


@pytest.mark.parametrize("make", [exported, lambda: Holder(exported()), lambda: Stubborn(dense())])
@pytest.mark.parametrize("inplace", [False, True])
def test_models_that_do_as_they_like_with_eval(make: Callable[[], nn.Module], inplace: bool) -> None:
    teacher, expected = make(), make()
    calibration = mfx.calibrate(teacher, [X], example_inputs=X)
    options = {"example_inputs": X, "config": CONFIG, "anchor": [X], "inplace": inplace}
    model = mfx.monarchify(make(), calibration=calibration, **options)
    plain = mfx.monarchify(dense().eval(), calibration=[X], **options)
    wanted = mfx.measure_loss(plain, dense(), [X])
    found = mfx.measure_loss(model, teacher, [X])
    assert found == pytest.approx(wanted, rel=1e-5)  # sums of a few hundred float32 terms
    mfx.recover(model, teacher, [X, X], steps=2)
    assert mfx.report(model).recovery.before == pytest.approx(wanted, rel=1e-5)
    for before, after in zip(expected.modules(), teacher.modules(), strict=True):
        assert before.training == after.training
    assert getattr(teacher, "calls", 0) == getattr(model, "calls", 0) == 0
