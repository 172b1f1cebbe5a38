"""Projection in order: biases take what is lost of the means of outputs, where they are a product's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import monarch_fx as mfx
from monarch_fx.projection.activation import DAMPING

FEW = mfx.MonarchConfig(nblocks=2, rank=2, reorder=False)


class Attention(nn.Module):
    """Three pieces of a packed weight and bias, which it reads one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(72, 24) / 5), nn.Parameter(torch.randn(72))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, W, b) for W, b in zip(self.weight.chunk(3), self.bias.chunk(3), strict=True))
        return torch.cat([q, k, v], -1)


class Rows(nn.Module):
    """Biases of two layers in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(32, 24) / 5), nn.Parameter(torch.randn(32, 24) / 5)
        self.biases = nn.Parameter(torch.randn(2, 32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, self.first, self.biases[0]), F.linear(x, self.second, self.biases[1])], -1)


class Pixels(nn.Module):
    """A convolution of 1x1, with rows in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT[..., None]).squeeze(-1).mT


def inputs(count: int = 3) -> list[Tensor]:
    """Of another mean in every feature."""
    torch.manual_seed(1)
    mean = torch.randn(24, dtype=torch.float64)
    return [mean + torch.randn(2, 50, 24, dtype=torch.float64) for _ in range(count)]


def mean(model: Callable[[Tensor], Tensor], batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x).flatten(0, -2) for x in batches]).mean(0)


SINGLE = {
    "linear": lambda: nn.Linear(24, 32),
    "Conv1D": lambda: Conv1D(32, 24),
    "packed": Attention,
    "rows of one parameter": Rows,
    "convolution": Pixels,
    "graph": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(24, 32))),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("form", SINGLE)
def test_means_of_outputs_are_kept(form: str, inplace: bool) -> None:
    """To rounding: float64 sums of 300 tokens."""
    torch.manual_seed(0)
    model, batches = SINGLE[form]().double(), inputs()
    expected = mean(model, batches)
    before = copy.deepcopy(model.state_dict())
    plain = mfx.monarchify(model, example_inputs=batches[0], config=FEW)
    ours = mfx.monarchify(model, example_inputs=batches[0], config=FEW, anchor=batches, inplace=inplace)
    assert (mean(plain, batches) - expected).abs().max() > 0.1
    torch.testing.assert_close(mean(ours, batches), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(mean(mfx.to_dense(ours), batches), expected, rtol=0, atol=1e-12)
    if not inplace:
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_error_left_is_the_smallest_with_any_bias() -> None:
    """Of a single block Eckart and Young tell it; what damping adds is no more than it costs to lose all of W."""
    torch.manual_seed(0)
    model, batches = nn.Linear(24, 32).double(), inputs()
    config = mfx.MonarchConfig(nblocks=1, rank=4)
    plan = mfx.plan(model, example_inputs=batches[0], config=config)
    ours = mfx.monarchify(model, plan=plan, anchor=batches)  # without calibration all outputs count alike
    x = torch.cat(batches).flatten(0, 1)
    with torch.no_grad():
        lost = float((ours(x) - model(x)).square().sum())
    away = x - x.mean(0)
    values = torch.linalg.svdvals(away @ model.weight.detach().mT)
    best = float(values[4:].square().sum())
    whole = torch.linalg.svdvals(x @ model.weight.detach().mT)
    damped = DAMPING * float(away.square().sum()) / 24 * float(model.weight.detach().square().sum())
    assert best * (1 - 1e-9) <= lost <= best + damped
    assert lost < float(whole[4:].square().sum())  # what no matrix of this rank could do without the bias


@pytest.mark.parametrize("calibrated", [False, True])
def test_layers_one_after_the_other(calibrated: bool) -> None:
    """The means of every layer are kept, and not only of those that see what the dense model gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 32)).double()
    batches = inputs()
    plan = mfx.plan(model, example_inputs=batches[0], config=FEW)
    ours = mfx.monarchify(model, plan=plan, calibration=batches if calibrated else None, anchor=batches)
    for i in (0, 2, 4):
        layers = slice(0, i + 1)
        torch.testing.assert_close(mean(ours[layers], batches), mean(model[layers], batches), rtol=0, atol=1e-12)


class Shared(nn.Module):
    """Two layers with one bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32), nn.Linear(24, 32)
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


class ReadElsewhere(nn.Module):
    def __init__(self, read: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.read = nn.Linear(24, 32), read

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.read(self.layer, x)


OTHERS = {
    "tied": Shared,
    "in a sum": lambda: ReadElsewhere(lambda layer, x: x.sum() + layer.bias),
    "in part, by a product": lambda: ReadElsewhere(lambda layer, x: F.linear(x, x.new_ones(1, 24), layer.bias[3:4])),
    "scaled": lambda: ReadElsewhere(
        lambda layer, x: torch.addmm(layer.bias, x.flatten(0, 1), layer.weight.mT, beta=2).view(2, 50, 32)
    ),
}


@pytest.mark.parametrize("form", OTHERS)
def test_a_bias_that_others_read_stays(form: str) -> None:
    torch.manual_seed(0)
    model, batches = OTHERS[form]().double(), inputs()
    ours = mfx.monarchify(model, example_inputs=batches[0], config=FEW, anchor=batches)
    assert mfx.report(ours).plan.rewritten
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(dict(ours.named_parameters())[name], parameter)


def test_a_plan_that_was_saved_says_so() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24)).double(), inputs()
    plan = mfx.plan(model, example_inputs=batches[0], config=FEW)
    assert plan["0.weight"].candidate.own_bias == ("0.bias", 0)
    again = mfx.Plan.from_json(plan.to_json())
    assert again == plan
    one, other = (mfx.monarchify(model, plan=known, anchor=batches) for known in (plan, again))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_interrupted_work_goes_on_with_the_same_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 24)).double(), inputs()
    plan = mfx.plan(model, example_inputs=batches[0], config=FEW)
    one, other = (mfx.monarchify(model, plan=plan, anchor=batches, work_dir=tmp_path) for _ in range(2))
    assert not torch.equal(one[0].bias, model[0].bias)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_hidden_features_in_another_order() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 32)).double(), inputs()
    config = mfx.MonarchConfig(nblocks=2, rank=4)
    ours = mfx.monarchify(model, example_inputs=batches[0], config=config, calibration=batches, anchor=batches)
    assert mfx.report(ours).plan.orders
    torch.testing.assert_close(mean(ours, batches), mean(model, batches), rtol=0, atol=1e-12)


def test_reports_count_the_bias() -> None:
    """The error that is reported is that of the outputs with it; so is the loss, which goes by the same moments."""
    torch.manual_seed(0)
    model, batches = nn.Linear(24, 32).double(), inputs()
    plan = mfx.plan(model, example_inputs=batches[0], config=FEW)
    seen = mfx.calibrate(model, batches)
    ours = mfx.monarchify(model, plan=plan, calibration=seen, anchor=batches)
    x = torch.cat(batches).flatten(0, 1)
    with torch.no_grad():
        wrong, exact = ours(x) - model(x), model(x) - model.bias
    G = seen.statistics["weight"].gradients
    assert G is not None
    report = mfx.report(ours)
    assert dict(report.errors)["weight"] == pytest.approx(float(wrong.norm() / exact.norm()), rel=1e-9)
    assert report.loss == pytest.approx(float((wrong @ G * wrong).sum(1).mean()) / 2, rel=1e-9)
