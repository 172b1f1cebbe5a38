"""The weight that stands for a parameter, and MonarchLinear."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import monarch_fx as mfx
from monarch_fx import errors


def test_other_operations_get_the_dense_values_with_a_warning() -> None:
    layer = mfx.MonarchLinear(16, 8, nblocks=2)
    with pytest.warns(errors.DenseFallbackWarning, match="norm"):
        norm = torch.norm(layer.weight)
    torch.testing.assert_close(norm, layer.weight.to_dense().norm())


def test_writing_into_a_weight_is_refused() -> None:
    layer = mfx.MonarchLinear(16, 8, nblocks=2)
    with pytest.raises(errors.StructureError, match="factors R and L"):
        nn.init.zeros_(layer.weight)
    with pytest.raises(errors.StructureError, match="factors R and L"):
        layer.weight.data.zero_()


def test_reading_a_weight_in_another_dtype_does_not_cast_it() -> None:
    layer = mfx.MonarchLinear(16, 8, nblocks=2)
    x = torch.randn(3, 16, dtype=torch.float64)
    y = torch.nn.functional.linear(x, layer.weight.double())
    assert layer.weight.R.dtype == torch.float32
    torch.testing.assert_close(y, x @ layer.weight.to_dense().double().T)


def test_views_reach_the_same_factors() -> None:
    layer = mfx.MonarchLinear(16, 8, nblocks=2, bias=False).double()
    x, z = torch.randn(3, 16, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    dense = layer.weight.to_dense()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(x @ layer.weight.T, x @ dense.T)
        torch.testing.assert_close(z @ layer.weight, z @ dense)
        torch.testing.assert_close(layer.weight @ x.T, dense @ x.T)
        torch.testing.assert_close(torch.einsum("ti,oi->to", x, layer.weight), x @ dense.T)


@pytest.mark.parametrize(("in_features", "out_features"), [(64, 64), (101, 67), (30, 90)])
@pytest.mark.parametrize("nblocks", [1, 2, 4, (4, 1), (3, 5)])
def test_monarch_linear(in_features: int, out_features: int, nblocks: int | tuple[int, int]) -> None:
    layer = mfx.MonarchLinear(in_features, out_features, nblocks=nblocks).double()
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    expected = x @ layer.weight.to_dense().T + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0, 0]), expected[0, 0], rtol=1e-12, atol=1e-12)
