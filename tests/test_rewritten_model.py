"""The rewritten model is the model that it was: its class, its copies, its training, its tools."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import zoo
from torch import nn
from zoo import HALF_GRID, mlp

import monarch_fx as mfx


def test_generates_with_a_cache(gpt2: tuple) -> None:
    _, rewritten, ids = gpt2
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = rewritten.generate(ids, **settings)
    assert torch.equal(tokens, rewritten.generate(ids, use_cache=False, **settings))
    assert torch.equal(tokens, mfx.to_dense(rewritten).generate(ids, **settings))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_and_pickles(gpt2: tuple, clone) -> None:
    _, rewritten, ids = gpt2
    assert torch.equal(clone(rewritten)(ids).logits, rewritten(ids).logits)
    assert str(mfx.report(clone(rewritten))) == str(mfx.report(rewritten))


def test_state_dict_round_trip(gpt2: tuple) -> None:
    model, rewritten, ids = gpt2
    other = mfx.monarchify(model, plan=mfx.report(rewritten).plan, init="random")
    assert not torch.equal(other(ids).logits, rewritten(ids).logits)
    other.load_state_dict(rewritten.state_dict())
    assert torch.equal(other(ids).logits, rewritten(ids).logits)


def test_replay_gives_equal_bits_on_another_copy(gpt2: tuple) -> None:
    model, rewritten, _ids = gpt2
    plan = mfx.Plan.from_json(mfx.report(rewritten).plan.to_json())
    assert plan == mfx.report(rewritten).plan
    again = mfx.monarchify(copy.deepcopy(model), plan=plan)
    for (name, a), (_, b) in zip(again.named_parameters(), rewritten.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_trains_and_casts_without_touching_the_argument(gpt2: tuple) -> None:
    model, rewritten, ids = gpt2
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = copy.deepcopy(rewritten).train()
    trained.loss_type = "ForCausalLM"
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trained.parameters())
    optimizer.step()
    trained.bfloat16()
    assert trained(ids).logits.dtype == torch.bfloat16
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_factors_inherit_dtype_and_requires_grad() -> None:
    model = mlp().half()
    model[0].weight.requires_grad_(False)
    rewritten = mfx.monarchify(model, config=HALF_GRID, example_inputs=torch.randn(5, 64).half())
    assert not rewritten[0].weight.R.requires_grad
    assert rewritten[2].weight.L.requires_grad
    assert {p.dtype for p in rewritten.parameters()} == {torch.float16}


def test_a_rewritten_layer_is_the_layer_it_was() -> None:
    model = mlp()
    calls = []
    model[0].register_forward_hook(lambda module, args, output: calls.append(output.shape))
    rewritten = mfx.monarchify(model, config=HALF_GRID)
    calls.clear()
    rewritten(torch.randn(5, 64))
    assert calls == [(5, 256)]
    layer = rewritten[0]
    assert type(layer) is nn.Linear
    assert (layer.in_features, layer.out_features) == (64, 256)
    assert torch.equal(layer.bias, model[0].bias)
    assert layer.weight.shape == (256, 64)
    assert layer.weight.dtype == torch.float32
    assert "grid 2x2" in repr(layer)


def test_modes_survive() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32))
    model[1].eval()
    rewritten = mfx.monarchify(model, config=HALF_GRID, example_inputs=torch.randn(4, 32))
    assert model[0].training
    assert not model[1].training
    assert rewritten[0].training
    assert not rewritten[1].training


def test_inplace_is_the_argument_itself() -> None:
    model = mlp()
    x = torch.randn(5, 64)
    expected = mfx.monarchify(model, config=HALF_GRID)(x)
    assert mfx.monarchify(model, config=HALF_GRID, inplace=True) is model
    assert torch.equal(model(x), expected)


def test_to_dense_gives_plain_parameters_and_the_same_outputs() -> None:
    rewritten = mfx.monarchify(mlp().double(), config=HALF_GRID)
    dense = mfx.to_dense(rewritten)
    assert isinstance(dense[0].weight, nn.Parameter)
    assert set(dense.state_dict()) == set(mlp().state_dict())
    x = torch.randn(5, 64, dtype=torch.float64)
    torch.testing.assert_close(dense(x), rewritten(x), rtol=1e-12, atol=1e-12)


def test_ties_stay_ties(gpt2: tuple) -> None:
    _, rewritten, _ = gpt2
    assert rewritten.lm_head.weight is rewritten.transformer.wte.weight


def test_transformer_fast_path_does_not_run_dense() -> None:
    encoder, (x,) = zoo.torch_encoder()
    encoder.eval()
    rewritten = mfx.monarchify(encoder, config=HALF_GRID, example_inputs=x)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        with torch.autograd.profiler.profile() as profile:
            y = rewritten(x, src_key_padding_mask=padding)
        dense = mfx.to_dense(rewritten).train()  # the slow path, with its dropout off
        for module in dense.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        expected = dense(x, src_key_padding_mask=padding)
    assert sum(e.name == "monarch_fx::monarch_bmm" for e in profile.function_events) == 8
    torch.testing.assert_close(y[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("settings", [{}, {"kdim": 24, "vdim": 40}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(batch_first: bool, settings: dict, need_weights: bool) -> None:
    """Every form of attention against PyTorch's own arithmetic on the same weights."""
    attention = nn.MultiheadAttention(32, 4, batch_first=batch_first, **settings).double().eval()
    shape = (2, 5) if batch_first else (5, 2)
    q = torch.randn(*shape, 32, dtype=torch.float64)
    k = torch.randn(*shape, settings.get("kdim", 32), dtype=torch.float64)
    v = torch.randn(*shape, settings.get("vdim", 32), dtype=torch.float64)
    rewritten = mfx.monarchify(attention, config=HALF_GRID, example_inputs=(q, k, v))
    assert mfx.report(rewritten).plan.rewritten_share == 1.0
    dense = mfx.to_dense(rewritten)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 4] = True
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    hint = {"attn_mask": causal, "is_causal": True}  # which hides added keys, too, where PyTorch takes it
    for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": causal}, {"attn_mask": causal < 0}, hint):
        y, weights = rewritten(q, k, v, need_weights=need_weights, **masks)
        expected, expected_weights = dense(q, k, v, need_weights=need_weights, **masks)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-10, atol=1e-12)
