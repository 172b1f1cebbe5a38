"""What the model's loss feels: gradients in the calibration pass, in the projection and in the plan."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import monarch_fx as mfx
from monarch_fx.errors import ConfigError, MetaDeviceError, MonarchWarning, OutputError
from monarch_fx.passes import calibrate
from monarch_fx.projection import activation, project_on_inputs, tail_errors

TOKENS = 20_000
SAMPLING = 5 * (2 / TOKENS) ** 0.5  # five standard deviations of a mean of squares over so many tokens


def moments(x: torch.Tensor) -> torch.Tensor:
    return x.double().mT @ x.double() / len(x)


class Chain(nn.Module):
    """Two products and nothing between: the second-order loss is exact, and its gradients are the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(24, 40), nn.Linear(40, 12)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.last(self.first(x))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(24, 32), nn.Linear(32, 6)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(torch.tanh(self.body(x))))


class Sum(nn.Module):
    """Two products of the same size, of which the second hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loud(x) + 0.01 * self.quiet(x)


def test_gradients_of_an_output_error_are_those_of_its_jacobian() -> None:
    model, x = Chain().eval(), torch.randn(TOKENS, 24)
    found = mfx.calibrate(model, [x], example_inputs=x[:8]).statistics["first.weight"]
    torch.testing.assert_close(found.inputs, moments(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        y = model(x).double()
    energy = (y - y.mean(0)).square().mean() * 12
    J = model.last.weight.detach().double()
    exact = J.mT @ J / energy
    # J^T (S - I) J with S of TOKENS directions in 12 dimensions, where E ||S - I||^2 is 12 * 13 / TOKENS
    assert (found.gradients - exact).norm() <= 2 * (12 * 13 / TOKENS) ** 0.5 * exact.norm()


def test_gradients_of_logits_are_the_fisher_information() -> None:
    model, x = Classifier().eval(), torch.randn(TOKENS, 24)
    calibration = mfx.calibrate(model, [x], example_inputs=x[:8], include="*")
    assert calibration.loss == "the cross-entropy of its logits"
    with torch.no_grad():
        p = model(x).logits.double().softmax(-1)
    exact = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    assert (calibration.statistics["head.weight"].gradients - exact).abs().max() <= SAMPLING  # entries are below 1


def test_the_loss_that_is_predicted_is_the_loss_that_is_measured() -> None:
    model, x = Chain().eval(), torch.randn(TOKENS, 24)
    config = mfx.MonarchConfig(nblocks=2, rank=6)
    rewritten = mfx.monarchify(model, example_inputs=x[:8], exclude="last*", config=config, calibration=[x])
    with torch.no_grad():
        y, change = model(x).double(), rewritten(x).double() - model(x).double()
    measured = change.square().sum(-1).mean() / (2 * 12 * (y - y.mean(0)).square().mean())
    report = mfx.report(rewritten)
    assert report.loss == pytest.approx(float(measured), rel=SAMPLING)
    assert report.plan.loss >= report.loss  # block by block, the spectra overstate it
    assert f"+{report.loss:.3g} to second order" in str(report)
    assert mfx.Plan.from_json(report.plan.to_json()).loss == report.plan.loss


def test_the_plan_cuts_what_the_loss_does_not_feel() -> None:
    model, x = Sum().eval(), torch.randn(500, 64)
    options = {"budget": 0.6, "config": mfx.MonarchConfig(require_speedup=False, rank_multiple=4)}
    plan = mfx.plan(model, example_inputs=x, calibration=[x], **options)
    assert plan["quiet.weight"].params < 0.5 * plan["loud.weight"].params
    plain = mfx.plan(model, example_inputs=x, **options)
    assert plain.loss is None
    assert abs(plain["quiet.weight"].params - plain["loud.weight"].params) < 0.2 * 64 * 64


class TestProjection:
    @pytest.fixture
    def case(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A weight (72, 60), and second moments of inputs and gradients over two orders of magnitude."""
        C, G = (moments(torch.randn(1000, n) @ (torch.randn(n, n) * torch.logspace(0, -2, n))) for n in (60, 72))
        return torch.randn(72, 60), C, G

    def test_a_single_block_is_solved_exactly(self, case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        """Eckart and Young between both roots; ``tail_errors`` foretells it."""
        W, C, G = case
        monarch = project_on_inputs(W, mfx.MonarchShape(60, 72, 1, 1, 10), C, G)
        left, right = (torch.linalg.cholesky(activation.damped(A, len(A))) for A in (G, C))
        seen = left.mT @ W.double() @ right
        best = torch.linalg.svdvals(seen)[10:].square().sum() / seen.square().sum()
        E = left.mT @ (W.double() - monarch.to_dense().double()) @ right
        # factors are rounded to float32
        assert float(E.square().sum() / seen.square().sum()) == pytest.approx(float(best), rel=1e-4)
        assert float(tail_errors(W, [(1, 1)], C, G)[1, 1][10]) == pytest.approx(float(best), rel=1e-3)

    @pytest.mark.parametrize("grid", [(1, 3), (3, 1), (2, 2), (5, 7)])
    def test_every_sweep_lowers_the_error_and_gradients_pay(
        self,
        case: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        grid: tuple[int, int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        W, C, G = case
        shape = mfx.MonarchShape(60, 72, *grid, 4)
        metric = [activation.damped(A, len(A)) for A in (C, G)]

        def error(monarch: mfx.Monarch) -> float:
            return activation.energy(W.double() - monarch.to_dense().double(), *metric)

        without = error(project_on_inputs(W.double(), shape, C))
        monkeypatch.setattr(activation, "ENOUGH", -1.0)
        errors = []
        for sweeps in (0, 1, 3, 7):
            monkeypatch.setattr(activation, "SWEEPS", sweeps)
            errors.append(error(project_on_inputs(W.double(), shape, C, G)))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < without


def test_what_is_predicted_for_grids_is_what_they_get() -> None:
    """Blocks make up for each other's errors, of which their spectra know nothing."""
    model, x = Sum(), torch.randn(400, 64) / torch.arange(1, 65).sqrt() @ torch.randn(64, 64)
    config = mfx.MonarchConfig(nblocks=4, rank=4)
    rewritten = mfx.monarchify(model, example_inputs=x, config=config, calibration=[x])
    for decision in mfx.report(rewritten).plan.rewritten:
        name = decision.candidate.name
        made = dict(mfx.report(rewritten).losses)[name]
        # four sweeps against as many as pay; the loss as made is not damped, by a thousandth of the mean energy
        assert made <= (decision.loss or 0.0) <= 1.3 * made, name


def test_a_weight_of_zeros_stays_one() -> None:
    model, x = Sum(), torch.randn(100, 64)
    with torch.no_grad():
        model.loud.weight.zero_()
    config = mfx.MonarchConfig(nblocks=2, rank=4)
    rewritten = mfx.monarchify(model, example_inputs=x, config=config, calibration=[x])
    assert not mfx.to_dense(rewritten).loud.weight.any()


def test_hidden_tokens_have_no_loss() -> None:
    model, x = Chain().eval(), torch.randn(6, 10, 24)
    mask = torch.ones(6, 10, dtype=torch.long)
    mask[:, 7:] = 0
    loud = x.clone()
    loud[:, 7:] *= 100
    one, other = (
        mfx.calibrate(model, [{"x": x, "attention_mask": mask}], example_inputs=x).statistics["first.weight"]
        for x in (x, loud)
    )
    torch.testing.assert_close(one.inputs, other.inputs)
    torch.testing.assert_close(one.gradients, other.gradients)


@dataclass
class Output:
    loss: torch.Tensor
    features: torch.Tensor


class Wrapped(Chain):
    """Returns what ``wrap`` makes of its output."""

    def __init__(self, wrap: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> object:  # type: ignore[override]
        return self.wrap(super().forward(x))


@pytest.mark.parametrize(
    "wrap", [lambda y: (y.mean(), y), lambda y: {"loss": y.mean(), "y": [y]}, lambda y: Output(y.mean(), y)]
)
def test_outputs_of_several_kinds(wrap: Callable[[torch.Tensor], object]) -> None:
    x = torch.randn(200, 24)
    config = mfx.MonarchConfig(nblocks=2, rank=4, reorder=False)  # which export would show, and a recorded run doesn't
    options = {"example_inputs": x, "config": config, "calibration": [x]}
    plain = Chain()
    other = Wrapped(wrap)
    other.load_state_dict(plain.state_dict())
    wanted, found = mfx.monarchify(plain, **options), mfx.monarchify(other, **options)
    torch.testing.assert_close(found.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    assert mfx.measure_loss(found, other, [x]) == mfx.measure_loss(wanted, plain, [x])
    assert mfx.recover(found, other, [x, x], steps=1) is found


@pytest.mark.parametrize("wrap", [lambda y: y.mean(), lambda y: y.argmax(-1), lambda y: None])
def test_outputs_without_numbers_to_compare(wrap: Callable[[torch.Tensor], object]) -> None:
    model, x = Wrapped(wrap), torch.randn(200, 24)
    with pytest.warns(MonarchWarning, match="can't be differentiated .* has no floating-point tensor with dimensions"):
        made = mfx.monarchify(
            model, config=mfx.MonarchConfig(nblocks=2, rank=4), example_inputs=x, calibration=[x], anchor=[x]
        )
    for compare in (mfx.measure_loss, lambda *data: mfx.recover(*data, steps=1)):
        with pytest.raises(OutputError, match=r"The model's output, a \w+, has no .*: let forward return one"):
            compare(made, model, [x, x])


def test_a_model_that_cannot_be_differentiated_is_planned_by_its_outputs() -> None:
    class Rounded(Sum):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(x)

    model, x = Rounded().eval(), torch.randn(200, 64)
    options = {"example_inputs": x, "config": mfx.MonarchConfig(nblocks=2, rank=8)}
    with pytest.warns(MonarchWarning, match="Rounded can't be differentiated on the calibration data.* depend"):
        rewritten = mfx.monarchify(model, calibration=iter([x, x]), **options)
    report = mfx.report(rewritten)
    assert report.calibrated
    assert report.loss is None
    assert report.plan.error_source == "projections on the calibration inputs"


def test_a_backward_that_fails_leaves_no_loss() -> None:
    class OneWay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: torch.Tensor) -> torch.Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("there is no way back")

    class OneWaySum(Sum):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y if torch.compiler.is_exporting() else OneWay.apply(y)

    x = torch.randn(200, 64)
    with pytest.warns(MonarchWarning, match="there is no way back"):
        calibration = mfx.calibrate(OneWaySum(), [x], example_inputs=x)
    assert calibration.loss is None
    assert all(seen.gradients is None for seen in calibration.statistics.values())


def test_a_number_before_the_output_is_passed_over() -> None:
    class WithNumber(Sum):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = super().forward(x)
            return y.square().mean(), y

    x = torch.randn(200, 64)
    model = WithNumber()
    plain = Sum()
    plain.load_state_dict(model.state_dict())
    found, wanted = (mfx.calibrate(m, [x], example_inputs=x) for m in (model, plain))
    for name, seen in wanted.statistics.items():
        torch.testing.assert_close(found.statistics[name].gradients, seen.gradients)


def test_one_calibration_for_several_plans() -> None:
    model, x = Sum().train(), torch.randn(300, 64)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    calibration = mfx.calibrate(model, [x], example_inputs=x)
    assert torch.equal(torch.rand(1), wanted)  # the user's random numbers go on as before
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    options = {"example_inputs": x, "config": mfx.MonarchConfig(require_speedup=False, rank_multiple=4)}
    for budget in (0.5, 0.7):
        once = mfx.monarchify(model, budget, calibration=calibration, **options)
        again = mfx.monarchify(model, budget, calibration=[x], **options)
        assert mfx.report(once).plan == mfx.report(again).plan
        torch.testing.assert_close(once.state_dict(), again.state_dict())


def test_refusals() -> None:
    x = torch.randn(50, 24)
    calibration = mfx.calibrate(Chain(), [x], example_inputs=x)
    with pytest.raises(ConfigError, match="another architecture than this Classifier"):
        mfx.plan(Classifier(), 0.5, example_inputs=x, include="*", calibration=calibration)
    x[3, 5] = torch.nan
    with pytest.raises(ConfigError, match=r"'first.weight' sees, or .* NaN or infinity"):
        mfx.plan(Chain(), 0.5, example_inputs=x, include="*", calibration=[x])
    with pytest.raises(MetaDeviceError, match="can't run calibration batches"):
        mfx.calibrate(Chain().to("meta"), [x], example_inputs=x)


class Deeper(nn.Module):
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.body, self.neck, self.head = nn.Linear(24, 32), nn.Linear(32, 24), nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        Deeper.runs += 1
        return SimpleNamespace(logits=self.head(torch.tanh(self.neck(torch.tanh(self.body(x))))))


def test_statistics_that_dont_fit_together_are_collected_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Deeper().eval(), [torch.randn(50, 24) for _ in range(3)]
    start = Deeper.runs
    whole = mfx.calibrate(model, batches, example_inputs=batches[0])
    at_once = Deeper.runs - start
    monkeypatch.setattr(calibrate, "_free", lambda device: 2 * 8 * (24**2 + 32**2))  # of one product, in one half
    found = mfx.calibrate(model, iter(batches), example_inputs=batches[0])
    assert Deeper.runs - start == 2 * at_once + len(batches)
    assert found.loss == whole.loss
    assert found.statistics.keys() == whole.statistics.keys() == {"body.weight", "neck.weight"}
    for name, seen in whole.statistics.items():  # the same labels are drawn
        assert torch.equal(seen.inputs, found.statistics[name].inputs)
        assert seen.gradients is not None
        assert torch.equal(seen.gradients, found.statistics[name].gradients)


def test_a_pass_over_products_that_the_output_doesnt_need_leaves_the_others_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Useless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unread, self.read = nn.Linear(24, 32), nn.Linear(24, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.unread(x)
            return self.read(x)

    model, x = Useless().eval(), torch.randn(50, 24)
    monkeypatch.setattr(calibrate, "_free", lambda device: 2 * 8 * (24**2 + 32**2))
    with pytest.warns(MonarchWarning, match="can't be differentiated"):
        found = mfx.calibrate(model, [x], example_inputs=x)
    assert found.loss is not None
    assert found.statistics["unread.weight"].gradients is None
    assert found.statistics["read.weight"].gradients is not None


def test_losses_that_are_not_those_of_all_products_say_so() -> None:
    model, x = Deeper().eval(), torch.randn(200, 24)
    config = mfx.MonarchConfig(nblocks=2, rank=4)
    partly = mfx.calibrate(model, [x], example_inputs=x, include=["body.weight"])
    for calibration, text in ((partly, ", of 1 of 2 products"), ([x], "")):
        made = mfx.report(mfx.monarchify(model, config=config, example_inputs=x, calibration=calibration))
        assert f"+{made.plan.loss:.3g} predicted to second order{text}\n" in str(made.plan)
        assert f"+{made.loss:.3g} to second order, from the factors{text}\n" in str(made)


def test_statistics_larger_than_the_machine_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_memory", lambda: 2**10)
    model, x = Deeper().eval(), torch.randn(8, 24)
    with pytest.raises(ConfigError, match=r"2 products take 2.38e-05 GiB, this machine has 9.54e-07: calibrate fewer"):
        mfx.calibrate(model, [x], example_inputs=x)
    monkeypatch.setattr(calibrate, "_free", lambda device: 2.0**30)  # as of a GPU, where they fit
    assert len(mfx.calibrate(model, [x], example_inputs=x).statistics) == 2
