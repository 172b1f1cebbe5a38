"""The same on a GPU, where there is one."""

from __future__ import annotations

import pytest
import torch
import zoo

import monarch_fx as mfx

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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
    exact = x.double() @ layer.weight.to_dense().double().mT + layer.bias.double()
    # two roundings of the intermediate and the result, over sums of a few hundred terms
    torch.testing.assert_close(
        layer(x).double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=0.05 * torch.finfo(dtype).eps ** 0.5
    )


def test_device_profile_is_found_and_measured() -> None:
    model = mfx.MonarchLinear(64, 64).cuda()
    assert model.weight.device.type == "cuda"
    plan = mfx.plan(torch.nn.Sequential(torch.nn.Linear(4096, 4096)).cuda(), budget=0.5)
    assert plan.device
    profile = mfx.measure_device("cuda")
    assert profile.name
