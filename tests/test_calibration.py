"""Calibration data: the projection keeps outputs, and the plan knows what they cost."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import monarch_fx as mfx
from monarch_fx.errors import ConfigError, ExampleInputsError, MetaDeviceError, MonarchWarning, StructureError
from monarch_fx.projection import activation, output_error, project, project_on_inputs, tail_errors

# grid (nblocks_out, nblocks_in) and rank for a weight (120, 96); the last two are padded
CASES = [((1, 1), 20), ((3, 1), 16), ((1, 3), 10), ((2, 2), 12), ((4, 4), 6), ((5, 7), 4), ((7, 1), 9)]


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(120, 96)


@pytest.fixture
def inputs() -> torch.Tensor:
    """Correlated, of energies over two orders of magnitude, as activations are."""
    return torch.randn(2000, 96) @ (torch.randn(96, 96) * torch.logspace(0, -2, 96))


def mean_gram(x: torch.Tensor) -> torch.Tensor:
    return x.double().mT @ x.double() / len(x)


def structure(grid: tuple[int, int], rank: int) -> mfx.MonarchShape:
    return mfx.MonarchShape(96, 120, *grid, rank)


class TestProjection:
    @pytest.mark.parametrize(("grid", "rank"), CASES)
    def test_outputs_are_kept_better_than_by_the_nearest_weight(
        self, weight: torch.Tensor, inputs: torch.Tensor, grid: tuple[int, int], rank: int
    ) -> None:
        gram, shape = mean_gram(inputs), structure(grid, rank)
        plain, ours = project(weight, shape), project_on_inputs(weight, shape, gram)
        assert ours.shape == shape
        y = inputs.double() @ weight.double().mT
        for monarch in (plain, ours):  # the error that is stated is that of the outputs
            wrong = y - inputs.double() @ monarch.to_dense().double().mT
            assert output_error(weight, monarch, gram) == pytest.approx(float(wrong.norm() / y.norm()), rel=1e-6)
        assert output_error(weight, ours, gram) < 0.8 * output_error(weight, plain, gram)

    @pytest.mark.parametrize("grid", [(1, 1), (3, 1), (7, 1)])
    def test_a_single_column_of_blocks_is_solved_exactly(
        self, weight: torch.Tensor, inputs: torch.Tensor, grid: tuple[int, int]
    ) -> None:
        """Eckart and Young, in the norm of the damped Gram matrix; ``tail_errors`` foretells it."""
        C = activation.damped(mean_gram(inputs), 96)
        E = weight.double() - project_on_inputs(weight, structure(grid, 9), mean_gram(inputs)).to_dense().double()
        root = torch.linalg.cholesky(C)
        blocks = weight.double().tensor_split([], 0) if grid == (1, 1) else weight.double().split(-(-120 // grid[0]))
        best = sum(torch.linalg.svdvals(block @ root)[9:].square().sum() for block in blocks)
        energy = (weight.double() @ root).square().sum()
        # factors are rounded to float32
        assert float((E @ root).square().sum() / energy) == pytest.approx(float(best / energy), rel=1e-4)
        assert float(tail_errors(weight, [grid], mean_gram(inputs))[grid][9]) == pytest.approx(
            float(best / energy), rel=1e-3
        )

    @pytest.mark.parametrize("grid", [(2, 2), (1, 4), (5, 7)])
    def test_every_sweep_lowers_the_error(
        self, weight: torch.Tensor, inputs: torch.Tensor, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        C, errors = activation.damped(mean_gram(inputs), 96), []
        monkeypatch.setattr(activation, "ENOUGH", -1.0)
        for sweeps in (0, 1, 3, 7):
            monkeypatch.setattr(activation, "SWEEPS", sweeps)
            E = weight.double() - project_on_inputs(weight.double(), structure(grid, 5), mean_gram(inputs)).to_dense()
            errors.append(float(((E @ C) * E).sum()))
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.98 * errors[0]

    def test_inputs_from_a_small_space_need_no_higher_rank(self, weight: torch.Tensor) -> None:
        inputs = torch.randn(500, 8) @ torch.randn(8, 96)
        gram, shape = mean_gram(inputs), structure((1, 1), 8)
        # W on that space is exact there: what is found costs no more than that does in the damped norm, lambda ||W||^2
        damping = float((activation.damped(gram, 96) - gram).diagonal().mean())
        energy = ((weight.double() @ gram) * weight.double()).sum()
        bound = float((damping * weight.double().square().sum() / energy).sqrt())
        assert output_error(weight, project_on_inputs(weight, shape, gram), gram) < bound < 0.05
        assert output_error(weight, project(weight, shape), gram) > 0.5

    @pytest.mark.parametrize(
        "gram",
        [torch.zeros(96, 96), torch.diag(torch.cat([torch.zeros(40), torch.ones(56)])), torch.ones(96, 96) * 1e-30],
    )
    @pytest.mark.parametrize("grid", [(1, 1), (4, 4), (5, 7)])
    def test_features_that_are_dead_or_alike(
        self, weight: torch.Tensor, gram: torch.Tensor, grid: tuple[int, int]
    ) -> None:
        found = project_on_inputs(weight, structure(grid, 4), gram)
        assert torch.isfinite(found.to_dense()).all()
        plain = project(weight, structure(grid, 4))
        assert output_error(weight, found, gram) <= output_error(weight, plain, gram) * (1 + 1e-9)

    def test_batches_and_half_precision(self, inputs: torch.Tensor) -> None:
        weights = torch.randn(3, 120, 96).bfloat16()
        found = project_on_inputs(weights, structure((2, 2), 12), mean_gram(inputs))
        assert found.R.dtype == torch.bfloat16
        for i, single in enumerate(weights):
            alone = project_on_inputs(single, structure((2, 2), 12), mean_gram(inputs))
            torch.testing.assert_close(found.R[i], alone.R)

    def test_a_gram_of_another_size_is_refused(self, weight: torch.Tensor) -> None:
        with pytest.raises(StructureError, match=r"96 features is square, got shape \(95, 95\)"):
            project_on_inputs(weight, structure((1, 1), 4), torch.eye(95))


class Mixed(nn.Module):
    """A linear layer, a raw product, and packed attention weights, all reading correlated activations."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 64)
        self.first = nn.Linear(64, 64)
        self.raw = nn.Parameter(torch.randn(64, 64) / 8)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.first(torch.tanh(2 * self.mix(x))).relu() @ self.raw
        hidden = None if attention_mask is None else ~attention_mask.bool()
        return x + self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]


@pytest.fixture
def model() -> nn.Module:
    return Mixed().eval()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return [torch.randn(4, 10, 8) for _ in range(8)]


# weights are compared by their entries, so that hidden features have to stay where they are
HALF = {"config": mfx.MonarchConfig(nblocks=2, rank=16, reorder=False), "exclude": "mix*"}


def outputs(model: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


def test_a_whole_model(model: nn.Module, batches: list[torch.Tensor]) -> None:
    before = copy.deepcopy(model.state_dict())
    plain = mfx.monarchify(model, example_inputs=batches[0], **HALF)
    ours = mfx.monarchify(model, example_inputs=batches[0], calibration=batches, **HALF)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(model.raw) is nn.Parameter
    report = mfx.report(ours)
    assert len(report.errors) == 4
    assert (
        report.plan.error_source
        == "projections on the calibration inputs, in the norm of half the relative squared error of its output"
    )
    assert "of outputs on the calibration inputs" in str(report)
    exact = outputs(model, batches)
    fresh = [torch.randn(4, 10, 8) for _ in range(8)]
    for seen in (batches, fresh):
        exact = outputs(model, seen)
        assert (outputs(ours, seen) - exact).norm() < 0.5 * (outputs(plain, seen) - exact).norm()


def test_the_errors_reported_are_those_of_the_outputs(model: nn.Module, batches: list[torch.Tensor]) -> None:
    ours = mfx.monarchify(model, example_inputs=batches[0], calibration=batches, **HALF)
    seen: list[torch.Tensor] = []
    handle = model.first.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    outputs(model, batches)
    handle.remove()
    x = torch.cat(seen).double()
    W, M = model.first.weight.detach().double(), ours.first.weight.to_dense_root().detach().double()
    exact = (x @ (W - M).mT).norm() / (x @ W.mT).norm()
    assert dict(mfx.report(ours).errors)["first.weight"] == pytest.approx(float(exact), rel=1e-4)


@pytest.mark.parametrize("form", [lambda x, mask: {"x": x, "attention_mask": mask}, lambda x, mask: (x, mask)])
def test_hidden_tokens_do_not_count(
    model: nn.Module, batches: list[torch.Tensor], form: Callable[[torch.Tensor, torch.Tensor], Any]
) -> None:
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[:, 6:] = 0
    masked = [form(batch, mask) for batch in batches]
    garbage = [form(torch.cat([batch[:, :6], torch.full((4, 4, 8), 1e3)], 1), mask) for batch in batches]
    plan = mfx.plan(model, example_inputs=masked[0], **HALF)
    one, other = (mfx.monarchify(model, plan=plan, calibration=data) for data in (masked, garbage))
    torch.testing.assert_close(one.first.weight.R, other.first.weight.R)


def test_any_iterable_and_a_plan_made_before(model: nn.Module, batches: list[torch.Tensor]) -> None:
    def once() -> Iterator[tuple[torch.Tensor]]:
        yield from ((batch,) for batch in batches)

    loader = torch.utils.data.DataLoader(torch.cat(batches), batch_size=4)
    plan = mfx.plan(model, example_inputs=batches[0], **HALF)
    made = [mfx.monarchify(model, plan=plan, calibration=data) for data in (batches, once(), loader)]
    made.append(mfx.monarchify(model, example_inputs=batches[0], calibration=once(), **HALF))
    for other in made[1:]:
        torch.testing.assert_close(other.first.weight.R, made[0].first.weight.R)


@pytest.mark.parametrize("which", ["calibration", "anchor"])
def test_the_first_batch_gives_the_graph_where_nothing_else_does(
    model: nn.Module, batches: list[torch.Tensor], which: str
) -> None:
    """Without it only layers of known types would be found; how many tokens a run has is not told by it."""
    wanted = mfx.monarchify(model, example_inputs=batches[0], **{which: batches}, **HALF)
    for data in (batches, iter(batches)):
        made = mfx.monarchify(model, **{which: data}, **HALF)
        plan = mfx.report(made).plan
        assert [d.candidate.name for d in plan.rewritten] == [
            d.candidate.name for d in mfx.report(wanted).plan.rewritten
        ]
        assert (plan.tokens, plan.capture) == (((4096, 1.0),), "torch.export with symbolic sizes")
        torch.testing.assert_close(made.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    assert set(mfx.calibrate(model, iter(batches), exclude="mix*").statistics) == {
        d.candidate.name for d in mfx.report(wanted).plan.decisions
    }


def test_dummy_inputs_of_another_kind_give_way_to_the_first_batch() -> None:
    """transformers' are token ids where a class doesn't say otherwise, as for raw audio."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (32,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**sizes, **convolutions, **positions)).eval()
    plan = mfx.plan(model, config=mfx.MonarchConfig(nblocks=2, rank=4), calibration=[torch.randn(2, 200)])
    assert plan.capture == "torch.export with symbolic sizes"


class Crossed(nn.Module):
    """Packed attention weights that are read in parts, and that a symbolic trace doesn't come to."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x) > 0
        return self.attention(x, x.relu(), x.tanh())[0]


def test_a_calibration_of_another_graph() -> None:
    model, batches = Crossed().eval(), [torch.randn(4, 10, 64) for _ in range(3)]
    calibration, config = mfx.calibrate(model, batches), mfx.MonarchConfig(nblocks=2, rank=8)
    message = r"tells of 'attention.in_proj_weight\[.*the graph has 'attention.in_proj_weight': give .* example_inputs"
    with pytest.raises(ConfigError, match=message):
        mfx.monarchify(model, config=config, calibration=calibration)
    options = {"config": config, "example_inputs": batches[0]}
    made, wanted = (mfx.monarchify(model, calibration=data, **options) for data in (calibration, batches))
    torch.testing.assert_close(made.state_dict(), wanted.state_dict(), rtol=0, atol=0)


def test_in_place_and_in_training_mode(model: nn.Module, batches: list[torch.Tensor]) -> None:
    copied = mfx.monarchify(model, example_inputs=batches[0], calibration=batches, **HALF)
    model.train()
    rewritten = mfx.monarchify(model, example_inputs=batches[0], calibration=batches, inplace=True, **HALF)
    assert rewritten is model
    assert model.training
    torch.testing.assert_close(model.first.weight.R, copied.first.weight.R)


def test_the_plan_weighs_outputs(batches: list[torch.Tensor]) -> None:
    """Of two equal weights the one whose inputs lie in a small space is cut further, or both to the same error."""
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    options = {"budget": 0.6, "exclude": "0*", "config": mfx.MonarchConfig(require_speedup=False, rank_multiple=4)}
    plan = mfx.plan(model, example_inputs=batches[0], calibration=batches, **options)
    assert plan["1.weight"].params < plan["3.weight"].params


@pytest.mark.parametrize("reorder", [False, True])
def test_inputs_that_are_pruned(reorder: bool) -> None:
    """Blocks of zeros get factors of zeros, however little the loss feels them."""
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10)).eval()
    model[0].weight.data[:, :16] = 0
    batches = [torch.cat([torch.zeros(64, 16), torch.randn(64, 16)], 1) for _ in range(3)]
    config = mfx.MonarchConfig(nblocks=2, rank=4, reorder=reorder)
    made = mfx.monarchify(model, example_inputs=batches[0], config=config, calibration=batches)
    assert torch.isfinite(made(batches[0])).all()
    assert all(error > 0.01 for _, error in mfx.report(made).errors)  # ranks of 4 can't be exact


def test_a_product_that_no_batch_reaches_is_projected_plainly(model: nn.Module) -> None:
    """And batches that can be read only once are not asked for again."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model.first

        def forward(self, x: torch.Tensor, times: int = 1) -> torch.Tensor:
            for _ in range(times):
                x = self.inner(x)
            return x

    gated, x = Gated().eval(), torch.randn(5, 64)
    options = {"example_inputs": (x,), "config": mfx.MonarchConfig(nblocks=2, rank=16)}
    with pytest.warns(MonarchWarning, match="doesn't depend on any product"):
        unseen = mfx.monarchify(gated, calibration=iter([{"x": x, "times": 0}]), **options)
    plain = mfx.monarchify(gated, **options)
    torch.testing.assert_close(unseen.inner.weight.R, plain.inner.weight.R)
    assert not mfx.report(unseen).calibrated


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [torch.device("meta"), default_dtype(torch.float64)], ids=["device", "dtype"])
def test_other_defaults(default: contextlib.AbstractContextManager[None]) -> None:
    """What the library makes for itself is where, and as wide as, it is everywhere."""
    model, x = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), torch.randn(40, 64)
    options = {"example_inputs": x, "config": mfx.MonarchConfig(nblocks=2, rank=8), "calibration": [x, 2 * x]}

    def made() -> nn.Module:
        rewritten = mfx.monarchify(model, anchor=[x], **options)
        assert mfx.report(rewritten).plan.orders
        return mfx.recover(rewritten, model, [x, 2 * x], steps=3)

    wanted = made().state_dict()
    with default:
        found = made().state_dict()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("made", ["outside", "inside"])
def test_under_inference_mode(model: nn.Module, batches: list[torch.Tensor], made: str) -> None:
    """The rewritten model can be trained nevertheless, and what the loss feels is known, also of batches made there."""
    wanted = mfx.monarchify(model, example_inputs=batches[0], calibration=batches, **HALF)
    with torch.inference_mode():
        data = [batch.clone() for batch in batches] if made == "inside" else batches
        ours = mfx.monarchify(model, example_inputs=data[0], calibration=data, **HALF)
    torch.testing.assert_close(ours.state_dict(), wanted.state_dict(), rtol=0, atol=0)
    assert mfx.report(ours).loss == mfx.report(wanted).loss
    ours(batches[0]).sum().backward()
    with torch.inference_mode():
        mfx.recover(ours, model, data, steps=2)


def test_refusals(model: nn.Module, batches: list[torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"iterable of batches.*got a Tensor.*into a list"):
        mfx.plan(model, example_inputs=batches[0], calibration=batches[0], **HALF)
    with pytest.raises(ConfigError, match="no token that counts"):
        mfx.plan(nn.Linear(8, 64), config=mfx.MonarchConfig(nblocks=2), calibration=[torch.zeros(0, 8)])
    with pytest.raises(ConfigError, match="has no batches"):
        mfx.plan(model, example_inputs=batches[0], calibration=[], **HALF)
    with pytest.raises(ExampleInputsError, match=r"calibration\[1\] \(y\) can't be passed to Mixed\.forward"):
        mfx.plan(model, example_inputs=batches[0], calibration=[batches[0], {"y": batches[0]}], **HALF)
    for wrong in (batches[0][..., 1:], batches[0].double()):
        with pytest.raises(ExampleInputsError, match=r"Mixed can't run on calibration\[0\]: RuntimeError: "):
            mfx.plan(model, example_inputs=batches[0], calibration=[wrong], **HALF)
    with pytest.raises(ConfigError, match=r"calibration is an iterable of batches.*got a str"):
        mfx.plan(model, example_inputs=batches[0], calibration="seen.safetensors", **HALF)
    with pytest.raises(ConfigError, match="calibration and anchor are for init="):
        mfx.monarchify(model, example_inputs=batches[0], calibration=batches, init="random", **HALF)
    with pytest.raises(MetaDeviceError, match="can't run calibration batches"):
        mfx.plan(copy.deepcopy(model).to("meta"), example_inputs=batches[0], calibration=batches, **HALF)
    program = torch.export.export(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64)), (batches[0],))
    with pytest.raises(ConfigError, match="An ExportedProgram can't be calibrated"):
        mfx.plan(program, 0.5, calibration=batches)


def test_outputs_that_are_all_alike_have_gradients() -> None:
    """As a last normalisation makes them of inputs that are."""
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    calibration = mfx.calibrate(model, [torch.ones(4, 8)])
    assert all(seen.gradients.isfinite().all() for seen in calibration.statistics.values())


def test_a_batch_without_tokens_costs_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64))
    made = mfx.monarchify(model, config=mfx.MonarchConfig(nblocks=2), example_inputs=torch.randn(4, 8))
    assert mfx.measure_loss(made, model, [torch.zeros(0, 8)]) == 0


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(64, 8)), nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.tanh(nn.functional.linear(x, self.a)), self.b)


def test_a_graph_module(batches: list[torch.Tensor]) -> None:
    model = Functional().eval()
    options = {"example_inputs": batches[0], "exclude": "a", "config": mfx.MonarchConfig(nblocks=2, rank=16)}
    ours = mfx.monarchify(torch.fx.symbolic_trace(model), calibration=batches, **options)
    assert mfx.report(ours).calibrated
    assert any("monarch_bmm" in str(node.target) for node in ours.graph.nodes)
    expected = mfx.monarchify(model, calibration=batches, **options)
    torch.testing.assert_close(outputs(ours, batches), outputs(expected, batches))
