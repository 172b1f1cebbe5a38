"""Training rewritten models from scratch: initialisation, gradients, PyTorch's training tools, groups, summary."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import HALF_GRID

import monarch_fx as mfx
from examples import training
from monarch_fx import errors
from monarch_fx.costs.shipped import SHIPPED

# (in, out, nblocks_out, nblocks_in, rank): square, ragged, tall and wide, rank one, ranks beyond a block's
SHAPES = [
    (32, 48, 1, 1, 4),
    (48, 32, 2, 2, 8),
    (37, 29, 3, 2, 3),
    (29, 37, 4, 5, 1),
    (64, 16, 1, 8, 2),
    (16, 64, 8, 1, 2),
    (24, 24, 4, 4, 12),
]


def expected_within_noise(samples: Tensor, expected: float) -> None:
    """The mean of independent samples, to five of its own standard errors, which are at most a twentieth."""
    error = (samples.std() / math.sqrt(len(samples))).item()
    assert error < expected / 20, "too few samples to tell"
    assert abs(samples.mean().item() - expected) < 5 * error


def variances(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean squares of outputs for inputs of variance 1, and of input gradients for output gradients of variance 1."""
    outputs = torch.stack([w.square().sum(1).mean() for w in weights])
    inputs = torch.stack([w.square().sum(0).mean() for w in weights])
    return outputs, inputs


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_monarch_linear_starts_with_the_variances_of_linear(size: tuple) -> None:
    """Of nn.Linear: 1 / (3 in) for every entry, so 1/3 for outputs and out / (3 in) for input gradients."""
    in_features, out_features, n_out, n_in, rank = size
    layer = mfx.MonarchLinear(in_features, out_features, (n_out, n_in), rank)
    drawn = []
    for _ in range(1500):
        layer.reset_parameters()
        drawn.append(layer.weight.to_dense().detach())
    outputs, inputs = variances(drawn)
    expected_within_noise(outputs, 1 / 3)
    expected_within_noise(inputs, out_features / (3 * in_features))


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_random_factors_have_the_variances_of_the_weight_they_replace(size: tuple) -> None:
    in_features, out_features, n_out, n_in, rank = size
    dense = nn.Sequential(nn.Linear(in_features, out_features))
    nn.init.normal_(dense[0].weight, mean=0.01, std=0.02)
    config = mfx.MonarchConfig(
        nblocks_out=n_out, nblocks_in=n_in, rank=min(rank, in_features // n_in, out_features // n_out)
    )
    plan = mfx.plan(dense, config=config, example_inputs=torch.randn(4, in_features))
    drawn = [mfx.monarchify(dense, plan=plan, init="random")[0].weight.to_dense().detach() for _ in range(1000)]
    (outputs,), (inputs,) = variances([dense[0].weight.detach()])
    found_outputs, found_inputs = variances(drawn)
    expected_within_noise(found_outputs, outputs.item())
    expected_within_noise(found_inputs, inputs.item())


def test_entries_are_uncorrelated() -> None:
    """Also for inputs that are not: outputs then have the variance that independent entries give."""
    layer = mfx.MonarchLinear(12, 8, nblocks=2, rank=3)
    x = torch.ones(12)
    drawn = []
    for _ in range(4000):
        layer.reset_parameters()
        drawn.append((layer.weight.to_dense() @ x).detach().square().mean())
    expected_within_noise(torch.stack(drawn), 1 / 3)


def test_a_layer_that_starts_at_zero_does_so_and_learns() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    x = torch.randn(16, 32)
    rewritten = mfx.monarchify(model, config=HALF_GRID, init="random", example_inputs=x)
    assert torch.equal(rewritten(x), torch.zeros(16, 32))
    optimizer = torch.optim.SGD(rewritten.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = (rewritten(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


def pair() -> tuple[nn.Module, nn.Module]:
    """A rewritten model in float64, and the same with dense weights."""
    model = nn.Sequential(nn.Linear(30, 50), nn.GELU(), nn.Linear(50, 50), nn.GELU(), nn.Linear(50, 20)).double()
    inputs = torch.randn(4, 30, dtype=torch.float64)
    sparse = mfx.monarchify(model, config=mfx.MonarchConfig(nblocks=4), init="random", example_inputs=inputs)
    return sparse, mfx.to_dense(sparse)


def gradients_agree(sparse: nn.Module, dense: nn.Module) -> None:
    """Those of the factors are those of the dense weight by the chain rule through the product."""
    for name, module in sparse.named_modules():
        if isinstance(module, nn.Linear):
            product, R, L = module.weight.to_dense(), module.weight.R, module.weight.L
            at_R, at_L = torch.autograd.grad(product, (R, L), dense.get_submodule(name).weight.grad)
            torch.testing.assert_close(R.grad, at_R, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(L.grad, at_L, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(module.bias.grad, dense.get_submodule(name).bias.grad, rtol=1e-11, atol=1e-13)


def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
    for module in model:
        x = checkpoint(module, x, use_reentrant=False)
    return x


@pytest.mark.parametrize("way", ["eager", "checkpointed", "compiled", "accumulated"])
def test_gradients_are_those_of_the_dense_weights(way: str) -> None:
    sparse, dense = pair()
    x, target = torch.randn(12, 30, dtype=torch.float64), torch.randn(12, 20, dtype=torch.float64)
    nn.functional.mse_loss(dense(x), target).backward()
    if way == "accumulated":
        for part, wanted in zip(x.chunk(3), target.chunk(3), strict=True):
            (nn.functional.mse_loss(sparse(part), wanted) / 3).backward()
    elif way == "compiled":
        compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
        nn.functional.mse_loss(compiled(x), target).backward()
    else:
        y = checkpointed(sparse, x.requires_grad_()) if way == "checkpointed" else sparse(x)
        nn.functional.mse_loss(y, target).backward()
    gradients_agree(sparse, dense)


def test_gradients_under_autocast() -> None:
    """Within bfloat16's rounding, 2^-8, of all that is multiplied and of what is stored between."""
    torch.manual_seed(0)
    sparse, _ = pair()
    exact = copy.deepcopy(sparse)
    sparse = sparse.float()
    x, target = torch.randn(64, 30), torch.randn(64, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.bfloat16
    nn.functional.mse_loss(y.float(), target).backward()
    nn.functional.mse_loss(exact(x.double()), target.double()).backward()
    roundings = 2 * 3 * 4  # forward and backward, three layers, x, two factors and what is between them
    for (name, a), b in zip(sparse.named_parameters(), exact.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < roundings * 2**-8 * b.grad.norm(), name


def test_trains_compiled_with_everything_on() -> None:
    """Mixed precision, checkpointing, clipping and a fused optimizer, in one graph."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(2)))
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpointed(self.blocks, x))

    x, target = torch.randn(64, 32), torch.randint(4, (64,))
    model = mfx.monarchify(Net(), config=mfx.MonarchConfig(nblocks=2), init="random", example_inputs=x)
    optimizer = torch.optim.AdamW(mfx.parameter_groups(model, lr=1e-2, weight_decay=0.1), fused=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(compiled(x), target)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        assert norm > 1e-2
        clipped = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        torch.testing.assert_close(clipped, torch.tensor(1e-2), rtol=1e-3, atol=0.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_weight_decay_acts_on_the_product() -> None:
    """Without gradients n steps shrink a product as they shrink a dense weight: (1 - lr decay)^n, to first order."""
    lr, decay, steps = 1e-2, 0.1, 50
    for factor_lr in (0.5, 1.0, 3.0):
        model = mfx.monarchify(zoo.mlp().double(), config=HALF_GRID, init="random")
        before = [model[0].weight.to_dense(), model[0].bias.clone()]
        optimizer = torch.optim.AdamW(mfx.parameter_groups(model, lr=lr, weight_decay=decay, factor_lr=factor_lr))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(steps):
            optimizer.step()
        shrunk = (1 - lr * decay) ** steps
        second_order = steps * (lr * decay) ** 2  # (1 - a/2)^2 = 1 - a + a^2 / 4
        torch.testing.assert_close(model[0].weight.to_dense(), before[0] * shrunk, rtol=second_order, atol=0.0)
        assert torch.equal(model[0].bias, before[1])


def test_groups_hold_every_trained_parameter_once() -> None:
    model = mfx.monarchify(zoo.mlp(), config=HALF_GRID, init="random", exclude=["2.weight"])
    model[0].bias.requires_grad_(False)
    groups = {group["monarch"]: group for group in mfx.parameter_groups(model, lr=0.1, weight_decay=0.2, factor_lr=2.0)}
    assert [len(groups[kind]["params"]) for kind in ("matrices", "vectors", "factors")] == [1, 3, 2]
    assert groups["matrices"]["params"][0] is model[2].weight
    assert groups["factors"]["params"] == [model[0].weight.R, model[0].weight.L]
    assert [groups[kind]["lr"] for kind in ("matrices", "vectors", "factors")] == [0.1, 0.1, 0.2]
    assert [groups[kind]["weight_decay"] for kind in ("matrices", "vectors", "factors")] == [0.2, 0.0, 0.05]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be more than 0, got 0.0"),
        ({"lr": 0.1, "factor_lr": -1.0}, "factor_lr must be more than 0, got -1.0"),
        ({"lr": 0.1, "weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
    ],
)
def test_rates_without_a_meaning_are_refused(options: dict, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        mfx.parameter_groups(zoo.mlp(), **options)


def test_summary_counts_forward_and_both_gradients() -> None:
    """Against PyTorch's own counter; its first layer has no input gradient to compute."""
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 64, bias=False))
    x = torch.randn(10, 64, requires_grad=True)
    config = mfx.MonarchConfig(nblocks=2, rank=8)
    rewritten = mfx.monarchify(model, config=config, init="random", example_inputs=x, device="h100")
    summary = mfx.training_summary(rewritten)

    def counted(module: nn.Module) -> int:
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        return counter.get_total_flops()

    assert summary.dense_flops == counted(model)
    assert summary.flops == counted(rewritten)
    assert summary.params_before == sum(p.numel() for p in model.parameters())
    assert summary.params_after == sum(p.numel() for p in rewritten.parameters())
    trained = mfx.plan(model, config=config, example_inputs=x, device="h100", workload="training")
    assert summary.dense_s == pytest.approx(sum(d.dense_s for d in trained.decisions))
    assert summary.time_s == pytest.approx(sum(d.time_s for d in trained.decisions))
    assert "for h100, float32, 10 tokens" in str(summary)
    assert f"{summary.flops / summary.dense_flops:.2f}" in str(summary)


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Of the activations that a backward pass needs."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("form", ["modules", "graph"])
def test_intermediates_can_be_recomputed(form: str) -> None:
    """What is kept is what the summary says, gradients are the same, and so is what it does in a graph."""
    dense: nn.Module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    x = torch.randn(10, 64, requires_grad=True)
    if form == "graph":
        dense = torch.fx.symbolic_trace(dense)
    config = mfx.MonarchConfig(nblocks=2, rank=8)
    model = mfx.monarchify(dense, config=config, example_inputs=x, device="h100")
    summary = mfx.training_summary(model)
    assert summary.dense_kept_bytes == 4 * 10 * (64 + 128) == kept_bytes(dense, x)
    assert summary.kept_bytes == 4 * 10 * (64 + 128 + 2 * 4 * 8) == kept_bytes(model, x)
    compiled = torch.compile(model, backend="aot_eager")
    wanted = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))

    assert mfx.recompute_intermediates(model) is model
    again = mfx.training_summary(model)
    assert again.kept_bytes == summary.dense_kept_bytes == kept_bytes(model, x)
    assert again.time_s > summary.time_s
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert again.flops == counter.get_total_flops() > summary.flops
    assert "1.00" in str(again)
    for run in (model, compiled):
        found = torch.autograd.grad(run(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(found, wanted)
    assert kept_bytes(mfx.recompute_intermediates(model, enabled=False), x) == summary.kept_bytes
    with pytest.raises(errors.MonarchError, match="no Monarch weight"):
        mfx.recompute_intermediates(dense)


def test_summary_is_of_the_device_that_was_planned_for() -> None:
    """Not of the one that the model is on; what can't be known is asked for."""
    mine = dataclasses.replace(SHIPPED["h100"], name="mine")
    rewritten = mfx.monarchify(zoo.mlp(), config=HALF_GRID, init="random", device=mine)
    with pytest.raises(errors.DeviceProfileError, match="Unknown device profile 'mine'"):
        mfx.training_summary(rewritten)
    summary = mfx.training_summary(rewritten, mine)
    assert summary.device == "mine"
    assert summary.time_s == mfx.training_summary(rewritten, "h100").time_s
    assert summary.time_s != mfx.training_summary(rewritten, "cpu").time_s


def test_a_model_that_was_not_rewritten_has_no_summary() -> None:
    with pytest.raises(errors.MonarchError, match="no report"):
        mfx.training_summary(zoo.mlp())


@pytest.mark.parametrize("stopped", [14, 35])
def test_a_stopped_example_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    """Before and after its weights become dense, with dropout."""

    class Stop(Exception):  # noqa: N818
        pass

    rows, targets = torch.randn(100, 64), torch.randint(8, (100,))
    start = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1), nn.GELU(), nn.Linear(64, 8))
    start = mfx.monarchify(start, config=HALF_GRID, init="random", example_inputs=rows)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)

    def run(folder: str, until: int | None = None) -> tuple[nn.Module, training.Curve]:
        def batch(step: int) -> tuple[Tensor, Tensor]:
            if step == until:
                raise Stop
            picked = training.picks(100, 16, step, seed=0)
            return rows[picked], targets[picked]

        model = copy.deepcopy(start)
        settings = training.Settings(tmp_path / folder, steps=48, lr=1e-2, densify_at=30)
        curve = training.train("run", model, loss, batch, settings, lambda m: {"loss": loss(m, (rows, targets)).item()})
        return model, curve

    model, curve = run("whole")
    with pytest.raises(Stop):
        run("stopped", until=stopped)
    assert (tmp_path / "stopped" / "run.pt").exists()
    again, found = run("stopped")
    assert (found.figures, found.evaluated, found.densified) == (curve.figures, curve.evaluated, 30)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
