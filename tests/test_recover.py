"""Distillation of the factors: nearer to the teacher, never farther, nothing else touched, goes on where it stopped."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import monarch_fx as mfx
from monarch_fx.errors import ConfigError, ExampleInputsError, MonarchError, PlanMismatchError, WrappedModelError


class Model(nn.Module):
    """Two layers and a norm; logits where there is a vocabulary."""

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm, self.drop = nn.LayerNorm(32), nn.Dropout(0.5)
        self.vocabulary = vocabulary

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        y = self.drop(self.norm(x + self.second(torch.relu(self.first(x)))))
        return SimpleNamespace(logits=4 * y) if self.vocabulary else y


CONFIG = mfx.MonarchConfig(nblocks=2, rank=4)


def made(teacher: nn.Module, x: torch.Tensor) -> nn.Module:
    return mfx.monarchify(teacher, example_inputs=x, config=CONFIG)


def texts(number: int = 10) -> list[torch.Tensor]:
    mixed = torch.randn(32, 32) / torch.arange(1, 33)
    return [torch.randn(4, 16, 32) @ mixed for _ in range(number)]


@pytest.mark.parametrize("vocabulary", [0, 32])
def test_it_comes_nearer_and_touches_factors_alone(vocabulary: int) -> None:
    torch.manual_seed(0)
    teacher, batches = Model(vocabulary).train(), texts()
    model = made(teacher, batches[0]).train()
    model.norm.weight.requires_grad_(False)
    before, theirs = (copy.deepcopy(m.state_dict()) for m in (model, teacher))
    assert mfx.recover(model, teacher, batches, steps=60, lr=3e-3) is model
    recovery = mfx.report(model).recovery
    assert recovery is not None
    assert recovery.steps == 60
    assert recovery.after < 0.9 * recovery.before
    assert f"{recovery.before:.3g} -> {recovery.after:.3g}, 60 steps" in str(mfx.report(model))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{layer}.weight.{factor}" for layer in ("first", "second") for factor in "RL"}
    torch.testing.assert_close(teacher.state_dict(), theirs, rtol=0, atol=0)
    assert model.training
    assert teacher.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["norm.weight"]
    assert all(p.grad is None for p in model.parameters())


def test_the_distance_is_that_of_the_outputs() -> None:
    torch.manual_seed(1)
    teacher, batches = Model(32).eval(), texts(2)
    model = made(teacher, batches[0]).eval()
    with torch.no_grad():
        p, q = (m(batches[0]).logits.flatten(0, 1).double().log_softmax(-1) for m in (teacher, model))
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    mfx.recover(model, teacher, batches, steps=1)
    recovery = mfx.report(model).recovery
    assert recovery is not None
    # float32: a sum of 32 terms up to 1 in absolute value
    assert recovery.before == pytest.approx(divergence, abs=32 * torch.finfo(torch.float32).eps)
    model, teacher = made(teacher, batches[0]).train(), teacher.train()
    assert mfx.measure_loss(model, teacher, batches[:1]) == recovery.before
    assert "loss measured" in str(mfx.report(model))
    assert model.training
    assert teacher.training
    assert model.drop.training
    with pytest.raises(ConfigError, match="measure_loss needs batches"):
        mfx.measure_loss(model, teacher, [])


def test_single_products_are_fitted_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys.modules["monarch_fx.training.recover"], "LAYERWISE", 1.0
    )  # the package has a function of its name
    torch.manual_seed(2)
    teacher, batches = Model().eval(), texts()
    model = made(teacher, batches[0]).eval()

    def errors() -> list[float]:
        x, found = batches[5], []
        with torch.no_grad():
            for layer in ("first", "second"):
                y, t = (getattr(m, layer)(x) for m in (model, teacher))
                found.append(float((y - t).norm() / t.norm()))
                x = torch.relu(y)
        return found

    before = errors()
    mfx.recover(model, teacher, batches, steps=60, lr=3e-3)
    assert all(after < 0.95 * at_first for after, at_first in zip(errors(), before, strict=True))


def test_it_is_never_farther() -> None:
    torch.manual_seed(3)
    teacher, batches = Model(), texts()
    model = made(teacher, batches[0])
    before = copy.deepcopy(model.state_dict())
    mfx.recover(model, teacher, batches, steps=10, lr=100.0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    recovery = mfx.report(model).recovery
    assert recovery is not None
    assert recovery.after == recovery.before


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    teacher, batches = Model(), texts()
    whole = made(teacher, batches[0])
    parts = copy.deepcopy(whole)
    mfx.recover(whole, teacher, batches, steps=24)

    step, calls = torch.optim.Adam.step, []

    def interrupted(self: torch.optim.Adam, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return step(self, *args)

    file = tmp_path / "recovery.pt"
    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mfx.recover(parts, teacher, batches, steps=24, checkpoint=file)
    monkeypatch.undo()
    assert all(p.grad is None and p.requires_grad for p in parts.parameters())
    recovery = mfx.report(parts).recovery
    assert recovery is not None
    assert recovery.steps == 14
    mfx.recover(parts, teacher, batches, steps=24, checkpoint=file)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [file]


def test_gradients_are_taken_wherever_it_is_called() -> None:
    torch.manual_seed(7)
    teacher, batches = Model(), texts()
    model = made(teacher, batches[0])
    with torch.no_grad():
        mfx.recover(model, teacher, batches, steps=40, lr=3e-3)
    recovery = mfx.report(model).recovery
    assert recovery is not None
    assert recovery.after < recovery.before


def test_experts_that_see_other_tokens_than_the_teachers() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.router = nn.Linear(32, 32), nn.Linear(32, 4)
            self.W = nn.Parameter(torch.randn(4, 32, 32) / 32**0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.before(x)
            chosen, y = self.router(h).argmax(-1), torch.zeros_like(h)
            for expert in range(4):
                at = (chosen == expert).nonzero()[:, 0]
                y = y.index_add(0, at, h[at] @ self.W[expert].T)
            return y

    torch.manual_seed(8)
    teacher, batches = Experts(), [torch.randn(60, 32) for _ in range(6)]
    model = mfx.monarchify(teacher, example_inputs=batches[0], config=CONFIG, exclude="router")
    with torch.no_grad():
        routes = [m.router(m.before(batches[1])).argmax(-1) for m in (teacher, model)]
    assert not torch.equal(routes[0].bincount(minlength=4), routes[1].bincount(minlength=4))
    mfx.recover(model, teacher, batches, steps=40, lr=3e-3)
    recovery = mfx.report(model).recovery
    assert recovery is not None
    assert recovery.steps == 40
    assert recovery.after < recovery.before


@pytest.mark.parametrize("looks", [0, 1])
def test_whatever_happens_the_model_is_put_back(looks: int) -> None:
    teacher, batches = Model(), texts()
    model = made(teacher, batches[0]).train()
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) > looks:  # also when the best factors are looked for at the end
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        mfx.recover(model, teacher, batches, steps=8)
    hook.remove()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training
    assert (mfx.report(model).recovery is None) == (looks == 0)


def test_half_precision_takes_steps_smaller_than_its_own() -> None:
    torch.manual_seed(5)
    teacher, batches = Model().bfloat16(), [x.bfloat16() for x in texts()]
    model = made(teacher, batches[0])
    # steps of 0.1 % of a factor are less than half a unit in the last place of most of its entries
    mfx.recover(model, teacher, batches, steps=100, lr=1e-3)
    recovery = mfx.report(model).recovery
    assert recovery is not None
    assert recovery.after < 0.9 * recovery.before
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_hidden_tokens_teach_nothing() -> None:
    torch.manual_seed(6)
    teacher, batches = Model(), texts()
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[:, 10:] = 0
    models = []
    for scale in (1.0, 100.0):
        seen = [torch.cat([x[:, :10], scale * x[:, 10:]], 1) for x in batches]
        model = made(teacher, batches[0])
        mfx.recover(model, teacher, [{"x": x, "attention_mask": mask} for x in seen], steps=8)
        models.append(model.state_dict())
    torch.testing.assert_close(models[0], models[1])


def test_divergences_are_not_negative() -> None:
    """Where logits differ by rounding alone sums of terms of both signs could fall on either side."""
    teacher, batches = Model(vocabulary=32), texts()
    exact = mfx.monarchify(teacher, config=mfx.MonarchConfig(nblocks=1, rank=32), example_inputs=batches[0])
    found = [mfx.measure_loss(exact, teacher, [batch]) for batch in batches]
    assert min(found) >= 0
    assert max(found) < 32 * torch.finfo(torch.float32).eps


def test_a_single_step_is_one() -> None:
    torch.manual_seed(7)
    teacher, batches = Model(), texts()
    model = made(teacher, batches[0])
    before = copy.deepcopy(model.state_dict())
    mfx.recover(model, teacher, batches, steps=1)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_refusals(tmp_path: Path) -> None:
    teacher, batches = Model(), texts(3)
    model = made(teacher, batches[0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MonarchError, match="Model has no report"):
        mfx.recover(teacher, teacher, batches, steps=1)
    with pytest.raises(ConfigError, match="either minutes or steps, got minutes=None and steps=None"):
        mfx.recover(model, teacher, batches)
    with pytest.raises(ConfigError, match="either minutes or steps, got minutes=1 and steps=2"):
        mfx.recover(model, teacher, batches, minutes=1, steps=2)
    with pytest.raises(ConfigError, match="lr must be positive, got -1"):
        mfx.recover(model, teacher, batches, steps=1, lr=-1)
    with pytest.raises(ConfigError, match=r"two batches or more, .* got 1"):
        mfx.recover(model, teacher, batches[:1], steps=1)
    with pytest.raises(ConfigError, match=r"batches is an iterable of batches, .* got a Tensor"):
        mfx.recover(model, teacher, batches[0], steps=1)
    with pytest.raises(ConfigError, match=r"batches is an iterable of batches, .* got a dict"):
        mfx.measure_loss(model, teacher, {"x": batches[0]})
    with pytest.raises(PlanMismatchError, match="The teacher, a Linear, has another architecture"):
        mfx.recover(model, nn.Linear(3, 4), batches, steps=1)
    with pytest.raises(ConfigError, match="lies in a folder that doesn't exist"):
        mfx.recover(model, teacher, batches, steps=1, checkpoint=tmp_path / "none" / "recovery.pt")
    if sys.platform == "linux":  # where not even an administrator writes to /proc
        with pytest.raises(ConfigError, match=r"folder of checkpoint='/proc/recovery.pt' can't be written to"):
            mfx.recover(model, teacher, batches, steps=1, checkpoint="/proc/recovery.pt")
    with pytest.raises(PlanMismatchError, match="The teacher, a Linear, has another architecture"):
        mfx.measure_loss(model, nn.Linear(3, 4), batches)
    with pytest.raises(PlanMismatchError, match="it is rewritten itself: give the dense model"):
        mfx.measure_loss(model, model, batches)
    with pytest.raises(ConfigError, match="The teacher, a Model, is on meta, the model on cpu: move one"):
        mfx.measure_loss(model, copy.deepcopy(teacher).to("meta"), batches)
    with pytest.raises(ExampleInputsError, match=r"Model can't run on batches\[0\]: RuntimeError"):
        mfx.measure_loss(model, teacher, [batches[0][..., 1:]])
    with pytest.raises(WrappedModelError, match="_orig_mod"):
        mfx.recover(model, torch.compile(teacher), batches, steps=1)
    file = tmp_path / "other.pt"
    file.write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"other\.pt can't be read as one of recover"):
        mfx.recover(model, teacher, batches, steps=1, checkpoint=file)
    torch.save([1, 2], file)
    with pytest.raises(ConfigError, match="not that of a model with these factors"):
        mfx.recover(model, teacher, batches, steps=1, checkpoint=file)
    torch.save({"wide": {"w": torch.zeros(3)}}, file)
    with pytest.raises(ConfigError, match="not that of a model with these factors"):
        mfx.recover(model, teacher, batches, steps=1, checkpoint=file)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
