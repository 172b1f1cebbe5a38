"""The Triton kernels in Triton's interpreter, or on a GPU where there is one, against float64."""

from __future__ import annotations

import pytest
import torch

import monarch_fx as mfx

pytest.importorskip("triton")
two_pass = pytest.importorskip("monarch_fx.kernels.two_pass")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# tokens, n_in, n_out, rank, p, s: one row, ragged tiles, ranks and blocks that no tile divides, a single row of blocks
SHAPES = [(1, 2, 3, 8, 40, 24), (3, 4, 1, 16, 70, 33), (63, 3, 2, 20, 33, 50), (130, 2, 2, 16, 64, 140)]


@pytest.mark.parametrize("shape", SHAPES)
def test_two_passes(shape: tuple[int, ...]) -> None:
    tokens, n_in, n_out, rank, p, s = shape
    R = torch.randn(n_in, n_out, rank, p, dtype=torch.float16, device=DEVICE)
    L = torch.randn(n_out, n_in, rank, s, dtype=torch.float16, device=DEVICE)
    x = torch.randn(tokens, n_in * p + 8, dtype=torch.float16, device=DEVICE)[:, : n_in * p]  # rows lie apart
    t = torch.full((n_out, tokens, n_in * rank), float("nan"), dtype=torch.float16, device=DEVICE)
    y = torch.full((tokens, n_out * s), float("nan"), dtype=torch.float16, device=DEVICE)
    two_pass.first_pass(x, R, t)
    two_pass.second_pass(t, L, y)
    exact = mfx.Monarch(R.double(), L.double())(x.double())
    # both results are rounded to half precision, sums in float32
    scale = mfx.Monarch(R.double().abs(), L.double().abs())(x.double().abs())
    assert ((y.double() - exact).abs() <= 2 * torch.finfo(torch.float16).eps * scale).all()
