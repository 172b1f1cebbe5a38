"""Projection in the order of the model: each product for what the compressed ones before feed it."""

import _thread
import contextlib
import contextvars
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import monarch_fx as mfx
from monarch_fx.errors import ConfigError, ExampleInputsError
from monarch_fx.projection.activation import DAMPING

CONFIG = mfx.MonarchConfig(nblocks=2, rank=4)


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32)).to(dtype)


def batches(count: int = 3, tokens: int = 100, features: int = 32, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    mix = torch.randn(features, features, dtype=dtype) / features**0.5
    return [torch.randn(tokens + i, features, dtype=dtype) @ mix for i in range(count)]


@pytest.mark.parametrize("calibrated", [False, True])
def test_errors_made_before_are_mended(calibrated: bool) -> None:
    model, data = mlp(), batches()
    options: dict[str, Any] = {"example_inputs": data[0], "config": CONFIG}
    options["calibration"] = mfx.calibrate(model, data) if calibrated else None
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses = []
    for anchor in (None, data):
        compressed = mfx.monarchify(model, anchor=anchor, **options)
        losses.append(mfx.measure_loss(compressed, model, data))
        assert mfx.report(compressed).calibrated == calibrated
    # found: 0.54 of it with calibration, 0.33 without
    assert losses[1] < 0.8 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_product_goes_half_way_to_the_regression_on_what_it_is_fed() -> None:
    """Of full rank it can be all that it is to come near to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 16, bias=False)).double()
    data = batches(features=24, dtype=torch.float64)
    plan = mfx.plan(model, example_inputs=data[0], config=mfx.MonarchConfig(nblocks=1, rank=6))
    plan = plan.with_shape("2.weight", rank=16)
    compressed = mfx.monarchify(model, plan=plan, anchor=data)
    seen, fed = (torch.cat([net[:2](x) for x in data]).detach() for net in (model, compressed))
    C, drift = fed.mT @ fed / len(fed), (seen - fed).mT @ fed / len(fed)
    damped = C + DAMPING * C.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    W = model[2].weight.detach()
    wanted = W + W @ torch.linalg.solve(damped, drift.mT).mT / 2
    made = compressed[2].weight.monarch().to_dense()
    # moments and their inverse in float64: 300 tokens added up, and a condition of 1 / DAMPING
    torch.testing.assert_close(made, wanted, rtol=0, atol=300 / DAMPING * 2**-53 * float(wanted.abs().max()) * 32)
    assert (made - W).norm() > 0.05 * W.norm()


def test_exact_structures_change_nothing() -> None:
    model, data = mlp(torch.float64), batches(dtype=torch.float64)
    plan = mfx.plan(model, example_inputs=data[0], config=mfx.MonarchConfig(nblocks=2, rank=32))
    compressed = mfx.monarchify(model, plan=plan, anchor=data)
    # three products of at most 64 terms, each within the rounding of projections through Grams: the root of epsilon
    torch.testing.assert_close(compressed(data[0]), model(data[0]), rtol=0, atol=3 * 64 * 2**-26)


class Masked(nn.Module):
    """A token looks at no other one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.net(x)


def test_hidden_tokens_do_not_count() -> None:
    model = Masked()
    x = torch.stack([b[:90] for b in batches()])
    mask = torch.ones(3, 90, dtype=torch.long)
    mask[:, 60:] = 0
    garbage = torch.where(mask[..., None].bool(), x, 100.0)
    short = [{"x": x[:, :60], "attention_mask": mask[:, :60]}]
    plan = mfx.plan(model, example_inputs=short[0], config=CONFIG)
    wanted = mfx.monarchify(model, plan=plan, anchor=short)
    made = mfx.monarchify(model, plan=plan, anchor=[{"x": garbage, "attention_mask": mask}])
    for name, value in made.state_dict().items():
        torch.testing.assert_close(value, wanted.state_dict()[name], rtol=1e-3, atol=1e-4)


class Twice(nn.Module):
    """One layer called twice, packed attention, a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.again = nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.tied = nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.again(x))
        x = x + F.gelu(self.again(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return F.gelu(self.tied(x)) @ self.tied.weight


def test_every_form_of_a_product_is_walked() -> None:
    model = Twice()
    data = [b[:96].view(4, 24, 32) for b in batches()]
    plan = mfx.plan(model, example_inputs=data[0], config=mfx.MonarchConfig(nblocks=2, rank=6))
    assert len(plan.rewritten) >= 4
    plain, made = (mfx.monarchify(model, plan=plan, calibration=data, anchor=anchor) for anchor in (None, data))
    torch.testing.assert_close(made.again.weight.R, plain.again.weight.R, rtol=0, atol=0)  # as without
    assert mfx.measure_loss(made, model, data) < mfx.measure_loss(plain, model, data)


class Branching(nn.Module):
    """Decides on data which of two layers a batch goes through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.one, self.other, self.last = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        x = self.one(x) if x.mean() > 0 else self.other(x)
        return self.last(x.tanh())


def test_batches_may_go_different_ways() -> None:
    model = Branching()
    data = [b + shift for b, shift in zip(batches(4), (3.0, -3.0, 3.0, -3.0), strict=True)]
    ways = {bool(model.first(x).tanh().mean() > 0) for x in data}
    assert ways == {True, False}
    plan = mfx.plan(model, example_inputs=data[0], config=CONFIG)
    compressed = mfx.monarchify(model, plan=plan, anchor=data)
    assert {name for name, _ in mfx.report(compressed).errors} == {d.candidate.name for d in plan.rewritten}
    assert torch.isfinite(compressed(data[0])).all()


def test_graphs_and_in_place() -> None:
    model, data = mlp(), batches()
    plan = mfx.plan(model, example_inputs=data[0], config=CONFIG)
    wanted = mfx.monarchify(model, plan=plan, anchor=data)
    traced = torch.fx.symbolic_trace(mlp())
    graph_plan = mfx.plan(traced, example_inputs=data[0], config=CONFIG)
    made = mfx.monarchify(traced, plan=graph_plan, anchor=data, example_inputs=data[0])
    torch.testing.assert_close(made(data[0]), wanted(data[0]))
    inplace = mlp()
    assert mfx.monarchify(inplace, plan=plan, anchor=data, inplace=True) is inplace
    torch.testing.assert_close(inplace(data[0]), wanted(data[0]), rtol=0, atol=0)


def test_half_precision() -> None:
    model, data = mlp(torch.bfloat16), batches(dtype=torch.bfloat16)
    plan = mfx.plan(model, example_inputs=data[0], config=CONFIG)
    plain, made = (mfx.monarchify(model, plan=plan, calibration=data, anchor=anchor) for anchor in (None, data))
    assert made[0].weight.R.dtype == torch.bfloat16
    assert mfx.measure_loss(made, model, data) < mfx.measure_loss(plain, model, data)


def test_interrupted_work_goes_on(tmp_path: Path) -> None:
    model, data = mlp(), batches()
    plan = mfx.plan(model, example_inputs=data[0], config=CONFIG)
    wanted = mfx.monarchify(model, plan=plan, anchor=data, work_dir=tmp_path).state_dict()
    written = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    again = mfx.monarchify(model, plan=plan, anchor=data, work_dir=tmp_path).state_dict()
    torch.testing.assert_close(again, wanted, rtol=0, atol=0)
    assert len(written) == 3
    assert written == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x)
        if len(x) == 102:
            raise ArithmeticError("the third batch")
        return x


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.0])
def test_inputs_that_vary_little_about_a_large_mean(scale: float) -> None:
    """Their covariance, from moments of float32 numbers, has negative eigenvalues."""
    model, x = nn.Sequential(nn.Linear(64, 64)), 100 + scale * torch.randn(4, 8, 64)
    made = mfx.monarchify(model, config=mfx.MonarchConfig(nblocks=2), example_inputs=x, anchor=[x, x])
    with torch.no_grad():
        assert (made(x) - model(x)).norm() < 1e-2 * model(x).norm()


def test_what_fails_in_a_run_is_raised_and_no_thread_stays() -> None:
    model, data = Failing(), batches()
    plan = mfx.plan(model, example_inputs=data[0], config=CONFIG)
    before, threads = {k: v.clone() for k, v in model.state_dict().items()}, threading.active_count()
    with pytest.raises(ExampleInputsError, match=r"Failing can't run on anchor\[2\]: ArithmeticError: the third batch"):
        mfx.monarchify(model, plan=plan, anchor=data, inplace=True)
    assert threading.active_count() == threads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Stateful(nn.Module):
    """Keeps what it needs later in an attribute, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x.mul_(2)
        x = self.first(x).tanh() + self.kept
        self.kept = None
        return self.second(x)


class Stateless(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(2 * x).tanh() + 2 * x)


def test_runs_do_not_disturb_each_other() -> None:
    data, made = batches(), []
    before = [x.clone() for x in data]
    plan = mfx.plan(Stateless(), example_inputs=data[0], config=CONFIG)
    for model in (Stateful(), Stateless()):
        made.append(mfx.monarchify(model, plan=plan, anchor=data).state_dict())
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=0)
    torch.testing.assert_close(data, before, rtol=0, atol=0)


VARIABLE = contextvars.ContextVar("VARIABLE", default=0)
WATCHED: set[Any] = set()


class Watching(nn.Module):
    """Notes what it finds around it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        WATCHED.add((VARIABLE.get(), (x @ x.mT).dtype, torch.empty(0).device.type, torch.is_grad_enabled()))
        return self.net(x)


def test_runs_have_the_surroundings_of_the_caller() -> None:
    model, data = Watching(), batches()
    plan = mfx.plan(model, example_inputs=data[0], config=CONFIG)
    WATCHED.clear()
    token = VARIABLE.set(1)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            compressed = mfx.monarchify(model, plan=plan, anchor=data)
    finally:
        VARIABLE.reset(token)
    assert {(1, torch.bfloat16, "meta", False)} == WATCHED
    wanted = mfx.monarchify(model, plan=plan, anchor=data)
    losses = [mfx.measure_loss(made, model, data) for made in (compressed, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # bfloat16 keeps three digits


class Threaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        found: list[Any] = []

        def work() -> None:
            try:
                found.append(self.net(x))
            except BaseException as error:
                found.append(error)

        if threading.current_thread() is threading.main_thread():
            return self.net(x)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]


def test_threads_of_a_model_are_refused() -> None:
    model, data = Threaded(), batches()
    plan = mfx.plan(model, example_inputs=data[0], config=CONFIG)
    with pytest.raises(ConfigError, match="threads of its own"):
        mfx.monarchify(model, plan=plan, anchor=data)


class Interrupted(nn.Module):
    """Ctrl-C while the third batch runs, in a model that catches whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 102 and threading.current_thread() is not threading.main_thread():
            _thread.interrupt_main()
        for layer in self.net:
            with contextlib.suppress(BaseException):
                x = layer(x)
        return x


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("make", [Failing, Interrupted])
def test_what_fails_in_place_leaves_hidden_features_where_they_are(make: Callable[[], nn.Module]) -> None:
    model, data = make(), batches()
    config = mfx.MonarchConfig(nblocks=2, rank=4)
    plan = mfx.plan(model, example_inputs=data[0], config=config, calibration=data[:2])
    assert plan.orders
    before, threads = {k: v.clone() for k, v in model.state_dict().items()}, threading.active_count()
    with pytest.raises((ExampleInputsError, KeyboardInterrupt)):
        mfx.monarchify(model, plan=plan, anchor=data, inplace=True)
    assert threading.active_count() == threads
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_one_iterator_for_calibration_and_anchor() -> None:
    data, options = batches(), {"budget": 0.5, "config": CONFIG}
    both = iter(data)
    once = mfx.monarchify(mlp(), calibration=both, anchor=both, **options)
    lists = mfx.monarchify(mlp(), calibration=data, anchor=data, **options)
    torch.testing.assert_close(once.state_dict(), lists.state_dict(), rtol=0, atol=0)


def test_bad_anchors_are_refused() -> None:
    model, data = mlp(), batches()
    plan = mfx.plan(model, example_inputs=data[0], config=CONFIG)

    def once() -> Iterator[Tensor]:
        yield from data

    stream = once()
    cases: list[tuple[Any, type[Exception], str]] = [
        (data[0], ConfigError, "single batch into a list"),
        ([], ConfigError, "anchor has no batches"),
        ([(data[0], data[0])], ExampleInputsError, r"anchor\[0\] \(Tensor, Tensor\) can't be passed"),
        ([data[0] * float("nan")], ConfigError, "NaN or infinity"),
    ]
    for anchor, error, message in cases:
        with pytest.raises(error, match=message):
            mfx.monarchify(model, plan=plan, anchor=anchor)
    list(stream)
    with pytest.raises(ConfigError, match="anchor has no batches; an iterator that was read already"):
        mfx.monarchify(model, plan=plan, anchor=stream)
    with pytest.raises(ConfigError, match="calibration and anchor are for"):
        mfx.monarchify(model, plan=plan, anchor=data, init="random")
    program = torch.export.export(model, (data[0],))
    with pytest.raises(ConfigError, match="ExportedProgram"):
        mfx.monarchify(program, 0.5, anchor=data)
