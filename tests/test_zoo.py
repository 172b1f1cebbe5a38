"""Every product of every architecture: found, counted, rewritten, and right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import monarch_fx as mfx

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.mv.default,
}
EXACT = mfx.MonarchConfig(nblocks=2, rank=10**9)  # capped at min(s, p), where blocks are exact
REDUCED = mfx.MonarchConfig(nblocks=2)


class CountStaticProducts(TorchDispatchMode):
    """Counts products below every composite op, where one operand shares the storage of a parameter matrix."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters() if p.ndim > 1}
        self.chosen: list[Tensor] = []  # experts' weights that an index copied; kept, so that no storage is used again
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            operands = args[1:3] if func in (aten.addmm.default, aten.baddbmm.default) else args[:2]
            self.count += any(self.is_weight(x) for x in operands)
        value = func(*args, **(kwargs or {}))
        if func is aten.index.Tensor and self.is_weight(args[0]):
            self.weights.add(value.untyped_storage().data_ptr())
            self.chosen.append(value)
        return value

    def is_weight(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self.weights


def static_products(model: nn.Module, inputs: Any) -> int:
    """How many products with a parameter one run executes; PyTorch's fused attention would hide some."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with CountStaticProducts(model) as counter:
            zoo.run(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.count


def monarch_products(model: nn.Module, inputs: Any) -> tuple[int, Tensor]:
    """How many Monarch ops one run executes, by PyTorch's own profiler; and the output."""
    with torch.autograd.profiler.profile() as profile:
        value = zoo.run(model, inputs)
    return sum(event.name.startswith("monarch_fx::") for event in profile.function_events), value


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(params=[*zoo.PLAIN, *zoo.TRANSFORMERS, *zoo.TIMM], ids=lambda build: build.__name__)
def built(request: pytest.FixtureRequest) -> zoo.Built:
    build: Callable[[], zoo.Built] = request.param
    if build in zoo.TIMM:
        pytest.importorskip("timm")
    if build in zoo.TRANSFORMERS:
        pytest.importorskip("transformers")
    model, inputs = build()
    return model.double().eval(), zoo.as_double(inputs)


def test_zoo(built: zoo.Built) -> None:
    model, inputs = built
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        dense = zoo.run(model, inputs)

        exact = mfx.monarchify(model, config=EXACT, example_inputs=inputs, include="*")
        plan = mfx.report(exact).plan
        declined = [d for d in plan.declined if not d.name.startswith("buffer ")]
        found = sum(len(d.candidate.calls) for d in plan.decisions) + sum(d.calls for d in declined)
        assert found == static_products(model, inputs)

        # Every block is reproduced to a few eps; activations pass some ten layers.
        assert relative(zoo.run(exact, inputs), dense) < 1e-11

        reduced = mfx.monarchify(model, config=REDUCED, example_inputs=inputs)
        plan = mfx.report(reduced).plan
        count, structured = monarch_products(reduced, inputs)
        assert count == plan.monarch_calls > 0
        assert relative(structured, dense) > 1e-3
        assert relative(structured, zoo.run(mfx.to_dense(reduced), inputs)) < 1e-11

    expected = ("by default", "tied to", "matrix product")  # depthwise and overlapping convolutions are no products
    dense_rows = [d for d in plan.declined if not any(words in d.reason for words in expected)]
    rewritten = sum(d.candidate.params for d in plan.rewritten)
    assert rewritten >= 0.95 * (rewritten + sum(d.params for d in dense_rows)), dense_rows
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert type(reduced) is type(model)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in reduced.parameters()}


def test_experts_in_groups() -> None:
    """The default path of transformers' mixtures of experts: rows sorted by expert, one grouped product."""
    pytest.importorskip("transformers")
    model, inputs = zoo._mixtral("grouped_mm")
    model.eval()
    with torch.no_grad():
        exact = mfx.monarchify(model, config=EXACT, example_inputs=inputs)
        # float32, with routing decided by the same numbers up to rounding
        assert relative(zoo.run(exact, inputs), zoo.run(model, inputs)) < 1e-4
        reduced = mfx.monarchify(model, config=REDUCED, example_inputs=inputs)
        count, structured = monarch_products(reduced, inputs)
        assert count == mfx.report(reduced).plan.monarch_calls
        assert relative(structured, zoo.run(mfx.to_dense(reduced), inputs)) < 1e-4


def test_no_dense_fallback(built: zoo.Built) -> None:
    """A rewritten model never multiplies a weight out."""
    model, inputs = built
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", mfx.errors.DenseFallbackWarning)
        zoo.run(mfx.monarchify(model, config=REDUCED, example_inputs=inputs), inputs)


def test_a_model_of_timm_describes_its_inputs_in_half_precision() -> None:
    pytest.importorskip("timm")
    model, _ = zoo.timm_vit()
    model.default_cfg = {"input_size": (3, 224, 224)}
    assert "torch.export" in mfx.plan(model.bfloat16(), config=REDUCED).capture
