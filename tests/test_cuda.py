"""The same on a GPU, where there is one."""

from __future__ import annotations

import pytest
import torch
import zoo

import monarch_fx as mfx

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_planned_projected_and_compiled_on_the_device() -> None:
    pytest.importorskip("transformers")
    model, inputs = zoo.gpt2()
    model.cuda().eval()
    ids = inputs["input_ids"].cuda()
    rewritten = mfx.monarchify(model, config=mfx.MonarchConfig(nblocks=2))
    assert {p.device.type for p in rewritten.parameters()} == {"cuda"}
    with torch.no_grad():
        eager = rewritten(ids).logits
        # float32 through eight products, summed in another order
        torch.testing.assert_close(mfx.to_dense(rewritten)(ids).logits, eager, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.compile(rewritten, fullgraph=True)(ids).logits, eager, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_op_on_the_device(dtype: torch.dtype) -> None:
    layer = mfx.MonarchLinear(256, 512, nblocks=4, device="cuda", dtype=dtype)
    x = torch.randn(3, 50, 256, device="cuda", dtype=dtype)
    R, L = (factor.double() for factor in (layer.weight.R, layer.weight.L))
    exact = mfx.Monarch(R, L)(x.double()) + layer.bias.double()
    # intermediate, result and sum with the bias are rounded, and cuBLAS may add partial sums in the factors' dtype
    scale = mfx.Monarch(R.abs(), L.abs())(x.double().abs()) + layer.bias.double().abs()
    assert ((layer(x).double() - exact).abs() <= 4 * torch.finfo(dtype).eps * scale).all()


def test_device_profile_is_found_and_measured() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4096, 4096)).cuda()
    profile = mfx.measure_device("cuda")
    assert mfx.plan(model, budget=0.5).device == profile.name
