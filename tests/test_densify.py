"""densify(): factors become dense weights in mid-training, and training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn
from zoo import HALF_GRID

import monarch_fx as mfx
from monarch_fx import errors

# (in, out, nblocks_out, nblocks_in, rank): square, ragged, low rank, tall grids, full rank, a block that is all padding
SHAPES = [
    (12, 8, 2, 2, 2),
    (13, 7, 3, 2, 2),
    (16, 16, 1, 1, 3),
    (20, 30, 4, 1, 3),
    (30, 20, 1, 4, 5),
    (12, 8, 2, 2, 6),
    (5, 9, 3, 4, 1),
]


def layer(in_features: int, out_features: int, n_out: int, n_in: int, rank: int) -> mfx.MonarchLinear:
    return mfx.MonarchLinear(in_features, out_features, (n_out, n_in), rank, dtype=torch.float64)


def mlp() -> nn.Module:
    return mfx.monarchify(zoo.mlp(), config=HALF_GRID, init="random", example_inputs=torch.randn(4, 64))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
    state = {id(p): {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    return {name: (id(p), p.clone()) for name, p in model.named_parameters()}, state, groups


def unchanged(before: tuple, after: tuple) -> bool:
    same = all(
        a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(before[0].values(), after[0].values(), strict=True)
    )
    states = all(torch.equal(v, after[1][p][k]) for p, state in before[1].items() for k, v in state.items())
    return same and states and before[0].keys() == after[0].keys() and before[2] == after[2]


@pytest.mark.parametrize("build", [zoo.gpt2, zoo.raw, zoo.mixtral_batched], ids=lambda build: build.__name__)
def test_outputs_are_continuous(build: Callable) -> None:
    """Transposed weights, packed weights and einsums, experts."""
    pytest.importorskip("transformers")
    model, inputs = build()
    inputs = zoo.as_double(inputs)
    model = mfx.monarchify(model.double().eval(), config=HALF_GRID, init="random", example_inputs=inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        zoo.run(model, inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = zoo.run(model, inputs)
    mfx.densify(model, optimizer)
    torch.testing.assert_close(zoo.run(model, inputs), expected, rtol=1e-9, atol=1e-9)
    assert {id(p) for p in model.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    for p in model.parameters():
        assert all(v.shape == p.shape for k, v in optimizer.state[p].items() if k != "step")
    zoo.run(model, inputs).square().mean().backward()
    optimizer.step()


def blocks(matrix: Tensor, shape: mfx.MonarchShape) -> dict[tuple[int, int], Tensor]:
    grid = [(j, k) for j in range(shape.nblocks_out) for k in range(shape.nblocks_in)]
    return {(j, k): matrix[j * shape.s : (j + 1) * shape.s, k * shape.p : (k + 1) * shape.p] for j, k in grid}


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_momentum_is_the_part_of_the_gradient_that_factors_see(size: tuple) -> None:
    """P_L G + G P_R - P_L G P_R in every block, with P_L and P_R onto the column and row space of the block."""
    linear = layer(*size)
    dense = linear.weight.to_dense().detach().requires_grad_()
    x, target = torch.randn(50, size[0], dtype=torch.float64), torch.randn(50, size[1], dtype=torch.float64)
    nn.functional.mse_loss(x @ dense.T + linear.bias, target).backward()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.0, momentum=0.9)
    nn.functional.mse_loss(linear(x), target).backward()
    optimizer.step()
    shape = linear.weight.monarch().shape
    mfx.densify(linear, optimizer)

    momentum = blocks(optimizer.state[linear.weight]["momentum_buffer"], shape)
    gradient, weight = blocks(dense.grad, shape), blocks(dense.detach(), shape)
    for place, G in gradient.items():
        if G.numel() == 0:
            continue
        U, _, Vh = torch.linalg.svd(weight[place], full_matrices=False)
        rank = shape.rank
        P_L, P_R = U[:, :rank] @ U[:, :rank].T, Vh[:rank].T @ Vh[:rank]
        torch.testing.assert_close(momentum[place], P_L @ G + G @ P_R - P_L @ G @ P_R, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_second_moments_of_uncorrelated_entries_are_exact(size: tuple, amsgrad: bool) -> None:
    """Variances of rank one in every block, and what factors then have: at R L^2 V, at L R^2 V^T."""
    linear = layer(*size)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.0, amsgrad=amsgrad)
    step(linear, optimizer, torch.randn(3, size[0], dtype=torch.float64))
    monarch = linear.weight.monarch()
    shape = monarch.shape
    variances = torch.zeros(shape.nblocks_out * shape.s, shape.nblocks_in * shape.p, dtype=torch.float64)
    for (j, k), block in blocks(variances, shape).items():
        rows, columns = torch.rand(block.shape[0], 1).double() + 0.1, torch.rand(1, block.shape[1]).double() + 0.1
        block.copy_(1e-9 * 10.0 ** (j - k) * rows * columns)
    variances[size[1] :], variances[:, size[0] :] = 0.0, 0.0
    for name in ["exp_avg_sq", "max_exp_avg_sq"] if amsgrad else ["exp_avg_sq"]:
        for (j, k), block in blocks(variances, shape).items():
            L, R = monarch.L[j, k].detach(), monarch.R[k, j].detach()
            optimizer.state[linear.weight.R][name][k, j] = L.square() @ block
            optimizer.state[linear.weight.L][name][j, k] = R.square() @ block.T
    mfx.densify(linear, optimizer)
    for name in ["exp_avg_sq", "max_exp_avg_sq"] if amsgrad else ["exp_avg_sq"]:
        torch.testing.assert_close(
            optimizer.state[linear.weight][name], variances[: size[1], : size[0]], rtol=1e-12, atol=0.0
        )


def test_second_moments_of_gradients_in_a_run() -> None:
    """Those of i.i.d. gradients come out at their variance, 4, up to the noise of 400 averaged steps."""
    linear = mfx.MonarchLinear(32, 24, nblocks=2, rank=4, bias=False)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.0, betas=(0.9, 0.9999))
    for _ in range(400):
        (linear.weight.to_dense() * 2 * torch.randn(24, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    mfx.densify(linear, optimizer)
    found = optimizer.state[linear.weight]["exp_avg_sq"] / (1 - 0.9999**400)
    # A sum of squares of n normal numbers has relative deviation (2/n)^0.5: of a row or column, and of the whole block
    noise = (2 / 400) ** 0.5
    assert found.sub(4).abs().max() < 4 * 6 * noise
    assert abs(found.mean().item() - 4) < 4 * 3 * noise / 4


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), set()),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), {"momentum_buffer"}),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True), {"step", "exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True), {"step", "exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.NAdam(p, lr=1e-3), {"step", "mu_product", "exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.RAdam(p, lr=1e-3), {"step", "exp_avg", "exp_avg_sq"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_carried_over_and_others_keep_theirs(make: Callable, kept: set, dtype: torch.dtype) -> None:
    model, x = mlp().to(dtype), torch.randn(8, 64, dtype=dtype)
    optimizer = make(model.parameters())
    losses = [step(model, optimizer, x) for _ in range(3)]
    bias = model[0].bias
    states = {id(p): optimizer.state[p] for p in (bias, model[3].weight)}
    values = {id(p): p.clone() for p in (bias, model[3].weight)}
    assert mfx.densify(model, optimizer) == (model, optimizer)
    for p in (model[0].bias, model[3].weight):
        assert optimizer.state[p] is states[id(p)]
        assert torch.equal(p, values[id(p)])
    state = optimizer.state[model[0].weight]
    assert set(state) == kept
    assert all(v.dtype == dtype and v.shape == (256, 64) for k, v in state.items() if k not in ("step", "mu_product"))
    if "step" in kept:
        assert state["step"] == 3
        assert state["step"] is not optimizer.state[bias]["step"]
    losses += [step(model, optimizer, x) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)


def test_restart() -> None:
    model, x = mlp(), torch.randn(8, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer, x)
    mfx.densify(model, optimizer, state="restart")
    assert model[0].weight not in optimizer.state
    assert optimizer.state[model[0].bias]["step"] == 1
    step(model, optimizer, x)
    assert optimizer.state[model[0].weight]["step"] == 1


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.RMSprop])
def test_another_state_starts_again_with_a_warning(kind: type) -> None:
    model, x = mlp(), torch.randn(8, 64)
    optimizer = kind(model.parameters(), lr=1e-3)
    step(model, optimizer, x)
    with pytest.warns(errors.OptimizerStateWarning, match=r"0\.weight, 2\.weight can't be carried over"):
        mfx.densify(model, optimizer)
    assert optimizer.state[model[0].bias]["step"] == 1
    step(model, optimizer, x)


def test_complex_factors_start_again() -> None:
    linear = mfx.MonarchLinear(8, 8, nblocks=2, dtype=torch.complex64)
    optimizer = torch.optim.Adam(linear.parameters())
    x = torch.randn(4, 8, dtype=torch.complex64)
    linear(x).abs().mean().backward()
    optimizer.step()
    expected = linear(x)
    with pytest.warns(errors.OptimizerStateWarning, match="factors are complex"):
        mfx.densify(linear, optimizer)
    torch.testing.assert_close(linear(x), expected)
    assert linear.weight not in optimizer.state


def test_factors_that_were_not_updated_equally_often_start_again() -> None:
    model, x = mlp(), torch.randn(8, 64)
    optimizer = torch.optim.Adam(model.parameters())
    model[0].weight.L.requires_grad_(False)
    step(model, optimizer, x)
    with pytest.warns(errors.OptimizerStateWarning, match="not updated equally often"):
        mfx.densify(model, optimizer)
    assert model[0].weight not in optimizer.state
    assert "exp_avg" in optimizer.state[model[2].weight]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
    ],
)
def test_schedulers_go_on(schedule: Callable) -> None:
    def rates(switch: bool) -> list:
        model = mlp()
        optimizer = torch.optim.SGD(mfx.parameter_groups(model, lr=0.1, weight_decay=0.1, factor_lr=2.0))
        scheduler = schedule(optimizer)
        seen = []
        for i in range(6):
            if switch and i == 3:
                mfx.densify(model, optimizer)
            step(model, optimizer, torch.randn(4, 64))
            scheduler.step()
            seen.append([group["lr"] for group in optimizer.param_groups])
        return seen

    assert rates(True) == rates(False)


def test_products_take_the_place_of_their_first_factor() -> None:
    model = mlp()
    first, second = model[0].weight, model[2].weight
    groups = [
        {"params": [("a", model[0].bias), ("0.weight.R", first.R), ("2.weight.L", second.L)], "lr": 0.1},
        {"params": [("0.weight.L", first.L), ("2.weight.R", second.R), ("b", model[2].bias)], "lr": 0.2},
        {"params": [("3.weight", model[3].weight)], "lr": 0.3},
    ]
    optimizer = torch.optim.SGD(groups)
    held = [group["params"] for group in optimizer.param_groups]
    mfx.densify(model, optimizer)
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["0.weight", "a", "2.weight"], ["b"], ["3.weight"]]  # in the dense model's order
    assert all(group["params"] is list_ for group, list_ in zip(optimizer.param_groups, held, strict=True))
    assert len({id(p) for group in held for p in group}) == 5


def test_products_leave_the_group_of_factors() -> None:
    model = mlp()
    groups = mfx.parameter_groups(model, lr=0.1, weight_decay=0.2, factor_lr=0.5)
    optimizer = torch.optim.AdamW(groups, fused=True)
    step(model, optimizer, torch.randn(4, 64))
    mfx.densify(model, optimizer)
    assert [group["monarch"] for group in optimizer.param_groups] == ["matrices", "vectors", "factors"]
    matrices, _, factors = optimizer.param_groups
    assert {id(p) for p in matrices["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert (matrices["lr"], matrices["weight_decay"]) == (0.1, 0.2)
    assert factors["params"] == []
    step(model, optimizer, torch.randn(4, 64))


def test_an_optimizer_made_for_the_dense_model_loads_the_state() -> None:
    encoder, (x,) = zoo.torch_encoder()
    rewritten = mfx.monarchify(encoder, config=HALF_GRID, example_inputs=x)
    optimizer = torch.optim.AdamW(rewritten.parameters(), lr=1e-3)
    step(rewritten, optimizer, x)
    again = mfx.monarchify(encoder, config=HALF_GRID, example_inputs=x)
    mfx.densify(rewritten, optimizer)

    mfx.densify(again)
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-3)
    again.load_state_dict(rewritten.state_dict())
    fresh.load_state_dict(optimizer.state_dict())
    for a, b in zip(rewritten.named_parameters(), again.named_parameters(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(optimizer.state[a[1]]["exp_avg"], fresh.state[b[1]]["exp_avg"]), a[0]


def test_averaged_model_goes_on() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    x = torch.randn(8, 64)
    for _ in range(3):
        step(model, optimizer, x)
        average.update_parameters(model)
    expected = average(x)
    mfx.densify(model, optimizer)
    assert mfx.densify(average) == (average, None)
    torch.testing.assert_close(average(x), expected, rtol=1e-4, atol=1e-5)
    before = average.module[0].weight.clone()
    step(model, optimizer, x)
    average.update_parameters(model)
    torch.testing.assert_close(average.module[0].weight, (before + model[0].weight) / 2)
    assert average.n_averaged == 4


def test_ties_stay_ties() -> None:
    linear, other = mfx.MonarchLinear(16, 16, nblocks=2), mfx.MonarchLinear(16, 16, nblocks=2)
    other.weight = linear.weight
    model = nn.Sequential(linear, other)
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, torch.randn(4, 16))
    mfx.densify(model, optimizer)
    assert type(linear) is nn.Linear
    assert linear.weight is other.weight
    step(model, optimizer, torch.randn(4, 16))


def test_frozen_weights_stay_frozen() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    step(model, optimizer, torch.randn(4, 64))
    mfx.densify(model, optimizer)
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad
    assert not any(p is model[0].weight for group in optimizer.param_groups for p in group["params"])


def test_parts_of_a_model_with_optimizers_of_their_own() -> None:
    model, x = mlp(), torch.randn(8, 64)
    first, second = torch.optim.Adam(model[0].parameters()), torch.optim.SGD(model[1:].parameters(), momentum=0.9)
    model(x).square().mean().backward()
    first.step()
    second.step()
    mfx.densify(model[0], first)
    assert isinstance(model[0].weight, nn.Parameter)
    assert not isinstance(model[2].weight, nn.Parameter)
    mfx.densify(model[1:], second)
    assert set(first.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(second.state[model[2].weight]) == {"momentum_buffer"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "options", [{"fused": True}, {"capturable": True}, {"foreach": True, "amsgrad": True}], ids=str
)
def test_on_a_gpu(options: dict) -> None:
    """Compiled, in half precision with a scaler; counters and moments stay where they were."""
    model, x = mlp().cuda(), torch.randn(8, 64, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    scaler = torch.amp.GradScaler()
    compiled = torch.compile(model, fullgraph=True)
    losses = []
    for i in range(8):
        if i == 4:
            before = {key: value.device for key, value in optimizer.state[model[0].weight.R].items()}
            mfx.densify(model, optimizer)
            assert {key: value.device for key, value in optimizer.state[model[0].weight].items()} == before
        with torch.autocast("cuda", torch.float16):
            loss = compiled(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[4] < losses[0]


def test_a_compiled_model_goes_on() -> None:
    model, x = mlp(), torch.randn(8, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    step(compiled, optimizer, x)
    expected = compiled(x)
    assert mfx.densify(compiled, optimizer) == (compiled, optimizer)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    before = model[0].weight.clone()
    step(compiled, optimizer, x)
    assert not torch.equal(model[0].weight, before)


def test_a_graph_module_goes_on() -> None:
    traced = torch.fx.symbolic_trace(zoo.mlp().double())
    x = torch.randn(8, 64, dtype=torch.float64)
    model = mfx.monarchify(traced, config=HALF_GRID, example_inputs=x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer, x)
    expected = model(x)
    mfx.densify(model, optimizer)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    step(model, optimizer, x)
    assert "monarch_bmm" not in model.code


def test_the_report_is_gone() -> None:
    model = mlp()
    mfx.densify(model)
    with pytest.raises(errors.MonarchError, match="no report"):
        mfx.report(model)


def _without_a_factor(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for name, p in model.named_parameters() if name != "2.weight.L"])


def _factor_twice(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.param_groups[0]["params"].append(model[0].weight.R)
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: torch.optim.Adam(copy.deepcopy(model).parameters()), r"doesn't hold 0\.weight\.R"),
        (_without_a_factor, r"doesn't hold 2\.weight\.L"),
        (_factor_twice, r"holds 0\.weight\.R 2 times"),
        (lambda model: torch.optim.Adagrad(model.parameters()), "state of Adagrad can't be changed"),
        (lambda model: torch.optim.LBFGS(model.parameters()), "state of LBFGS can't be changed"),
    ],
)
def test_optimizers_that_do_not_fit_are_refused(make: Callable, message: str) -> None:
    model = mlp()
    optimizer = make(model)
    before = snapshot(model, optimizer)
    with pytest.raises(errors.OptimizerError, match=message):
        mfx.densify(model, optimizer)
    assert unchanged(before, snapshot(model, optimizer))


def test_bad_arguments_are_refused() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    before = snapshot(model, optimizer)
    with pytest.raises(errors.ConfigError, match='"transport" or "restart", got \'keep\''):
        mfx.densify(model, optimizer, state="keep")
    with pytest.raises(errors.WrappedModelError, match=r"pass model\.module"):
        mfx.densify(nn.DataParallel(mlp()), optimizer)  # which moves its model to a GPU
    with pytest.raises(errors.NotAModuleError, match="list"):
        mfx.densify([model], optimizer)
    assert unchanged(before, snapshot(model, optimizer))
    with pytest.raises(errors.ConfigError, match="Sequential has no Monarch weight"):
        mfx.densify(zoo.mlp(), optimizer)
