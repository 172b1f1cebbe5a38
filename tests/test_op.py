"""monarch_bmm and monarch_grouped_mm: values, derivatives and transforms against the dense matrix in float64."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from monarch_fx import monarch_bmm
from monarch_fx.errors import StructureError
from monarch_fx.kernels import reference
from monarch_fx.kernels.op import monarch_grouped_mm

# PyTorch 2.14 scripts its own decompositions at the first forward-mode AD; opcheck reads .grad of what it made.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

GRIDS = [(1, 1), (2, 2), (1, 3), (3, 1), (4, 2), (2, 3)]  # (nblocks_out, nblocks_in)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]


def factors(
    n_out: int, n_in: int, rank: int, p: int, s: int, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    R = torch.randn(*batch, n_in, n_out, rank, p, dtype=dtype)
    L = torch.randn(*batch, n_out, n_in, rank, s, dtype=dtype)
    return R, L


def dense(R: Tensor, L: Tensor, in_features: int | None = None, out_features: int | None = None) -> Tensor:
    """W (..., out, in) in double precision, written block by block."""
    double = torch.promote_types(R.dtype, torch.float64)
    R, L = R.to(double), L.to(double)
    n_in, n_out, _, p = R.shape[-4:]
    s = L.shape[-1]
    W = R.new_zeros(*R.shape[:-4], n_out * s, n_in * p)
    for j in range(n_out):
        for k in range(n_in):
            block = torch.einsum("...rs,...rp->...sp", L[..., j, k, :, :], R[..., k, j, :, :])
            W[..., j * s : (j + 1) * s, k * p : (k + 1) * p] = block
    return W[..., :out_features, :in_features]


def assert_product(y: Tensor, x: Tensor, W: Tensor, terms: int, size: Tensor, bias: Tensor | float = 0.0) -> None:
    """``y`` is ``x W^T + bias`` up to the rounding of two sums of ``terms`` in all, whose terms add up to ``size``."""
    exact = x.to(W.dtype) @ W.mT + bias
    assert y.shape == exact.shape
    bound = 4 * torch.finfo(y.dtype).eps * (1 + math.sqrt(terms)) * (size + abs(exact) + 1)
    assert ((y.to(W.dtype) - exact).abs() <= bound).all()


def sizes(x: Tensor, R: Tensor, L: Tensor, out_features: int | None = None) -> Tensor:
    """What the terms of every sum add up to without cancellation: |x| |R|^T |L|."""
    return x.abs().double() @ dense(R.abs(), L.abs(), x.shape[-1], out_features).mT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values(grid: tuple[int, int], dtype: torch.dtype) -> None:
    n_out, n_in = grid
    for rank, lead, with_bias in ((1, (5,), True), (3, (2, 4), False), (4, (), True), (2, (2, 1, 3), True)):
        R, L = factors(n_out, n_in, rank, 6, 5, dtype)
        x = torch.randn(*lead, n_in * 6, dtype=dtype)
        bias = torch.randn(n_out * 5, dtype=dtype) if with_bias else None
        y = monarch_bmm(x, R, L, bias)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert_product(y, x, dense(R, L), 6 + rank * n_in, sizes(x, R, L), 0.0 if bias is None else bias)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_padding_of_inputs_and_outputs(grid: tuple[int, int], with_bias: bool) -> None:
    n_out, n_in = grid
    R, L = factors(n_out, n_in, 3, 5, 4)
    for cut_in in range(n_in):
        for cut_out in range(n_out):
            x = torch.randn(7, n_in * 5 - cut_in, dtype=torch.float64)
            out = n_out * 4 - cut_out
            bias = torch.randn(out, dtype=torch.float64) if with_bias else None
            y = monarch_bmm(x, R, L, bias, out_features=out)
            assert y.is_contiguous()
            W = dense(R, L, x.shape[-1], out)
            assert_product(y, x, W, 5 + 3 * n_in, sizes(x, R, L, out), 0.0 if bias is None else bias)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_batched_factors(grid: tuple[int, int]) -> None:
    n_out, n_in = grid
    R, L = factors(n_out, n_in, 2, 5, 4, batch=(3,))
    x = torch.randn(3, 7, n_in * 5 - (n_in > 1), dtype=torch.float64)
    for bias in (None, torch.randn(n_out * 4).double(), torch.randn(3, 1, n_out * 4).double()):
        y = monarch_bmm(x, R, L, bias)
        assert y.is_contiguous()
        each = [monarch_bmm(x[b], R[b], L[b]) for b in range(3)]
        torch.testing.assert_close(y, torch.stack(each) + (0 if bias is None else bias))


def test_bias_broadcasts() -> None:
    R, L = factors(1, 2, 3, 4, 5)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    plain = monarch_bmm(x, R, L)
    for shape in ((), (1,), (6, 5), (2, 1, 5), (2, 6, 1)):
        bias = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(monarch_bmm(x, R, L, bias), plain + bias)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_tokens(grid: tuple[int, int]) -> None:
    R, L = factors(*grid, 3, 4, 5)
    out = grid[0] * 5
    for lead in ((0,), (2, 0), (0, 3)):
        x = torch.randn(*lead, grid[1] * 4, dtype=torch.float64)
        assert monarch_bmm(x, R, L, torch.zeros(out).double()).shape == (*lead, out)
    R, L = factors(*grid, 3, 4, 5, batch=(0,))
    assert monarch_bmm(torch.zeros(0, 7, grid[1] * 4).double(), R, L).shape == (0, 7, out)


def test_non_contiguous_arguments() -> None:
    R, L = factors(3, 2, 4, 5, 6)
    x = torch.randn(10, 3, 4, dtype=torch.float64).permute(2, 1, 0)  # (4, 3, 10)
    bias = torch.randn(36, dtype=torch.float64)[::2]
    strided = [t.mT.contiguous().mT for t in (R, L)]
    expected = monarch_bmm(x.contiguous(), R, L, bias.contiguous())
    torch.testing.assert_close(monarch_bmm(x, *strided, bias), expected)
    row = torch.randn(10, dtype=torch.float64)
    torch.testing.assert_close(monarch_bmm(row.expand(7, 10), R, L), monarch_bmm(row, R, L).expand(7, 18))


# --- refused ----------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_named() -> None:
    R, L = factors(3, 2, 4, 5, 6)
    x = torch.randn(7, 10, dtype=torch.float64)
    batch_R, batch_L = factors(3, 2, 4, 5, 6, batch=(2,))
    for arguments, named in (
        ((x, R[0], L), r"\(3, 4, 5\)"),
        ((x, R, L.transpose(0, 1)), r"L must be \(3, 2, 4, s\), got \(2, 3, 4, 6\)"),
        ((x, R, L[:, :, :3]), "rank 4"),
        ((x[:, :8], R, L), r"9 to 10 input features, got x of shape \(7, 8\)"),
        ((torch.zeros(7, 11).double(), R, L), "9 to 10"),
        ((x[0, 0], R, L), r"shape \(\)"),
        ((x, R, L, torch.zeros(17).double()), "18 output features"),
        ((x, batch_R, batch_L), r"\(2, tokens, in_features\), got \(7, 10\)"),
        ((x.expand(3, 7, 10), batch_R, batch_L), "A batch of 2"),
        ((x, batch_R, L), "batch dimension"),
    ):
        with pytest.raises(StructureError, match=named):
            monarch_bmm(*arguments)
    for out in (15, 19):
        with pytest.raises(StructureError, match="16 to 18 output features"):
            monarch_bmm(x, R, L, out_features=out)


def test_mixed_dtypes_are_refused_outside_autocast() -> None:
    R, L = factors(2, 2, 3, 4, 5)
    with pytest.raises(StructureError, match=r"float32, torch\.float64"):
        monarch_bmm(torch.randn(7, 8), R, L)
    with pytest.raises(StructureError, match="bfloat16"):
        monarch_bmm(torch.randn(7, 8).double(), R, L, torch.zeros(10, dtype=torch.bfloat16))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_autocast_leaves_float64_and_complex_numbers_alone(dtype: torch.dtype, recompute: bool) -> None:
    R, L = (t.requires_grad_() for t in factors(2, 2, 3, 4, 5, dtype))
    x = torch.randn(7, 8, dtype=dtype)
    exact = monarch_bmm(x, R, L)
    with torch.autocast("cpu", torch.bfloat16):
        y = monarch_bmm(x, R, L, recompute=recompute)
        with pytest.raises(StructureError, match=r"that autocast leaves alone, got .*bfloat16"):
            monarch_bmm(x.real.float(), R, L)
    torch.testing.assert_close(y, exact, rtol=0, atol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_meta_device(recompute: bool) -> None:
    R, L = (torch.empty(size, device="meta", requires_grad=True) for size in ((2, 2, 3, 4), (2, 2, 3, 5)))
    assert monarch_bmm(torch.empty(7, 8, device="meta"), R, L, recompute=recompute).shape == (7, 10)
    with pytest.raises(StructureError, match="one dtype outside autocast"):
        monarch_bmm(torch.empty(7, 8, device="meta", dtype=torch.float16), R, L)


# --- derivatives and transforms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (2, 3)], ids=str)
def test_gradients_to_second_order(grid: tuple[int, int], dtype: torch.dtype) -> None:
    R, L = factors(*grid, 2, 3, 2, dtype)
    x = torch.randn(2, grid[1] * 3 - (grid[1] > 1), dtype=dtype)
    arguments = [t.requires_grad_() for t in (x, R, L, torch.randn(grid[0] * 2, dtype=dtype))]
    assert torch.autograd.gradcheck(monarch_bmm, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(monarch_bmm, arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gradients_added_up_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU (``tests/test_cuda.py``)."""
    R, L = factors(2, 3, 2, 3, 2, dtype)
    x = torch.randn(4, 9, dtype=dtype)
    arguments = [t.requires_grad_() for t in (x, R, L)]
    plain = monarch_bmm(*arguments)
    monkeypatch.setattr(reference, "_parts", lambda x, weight: 2)
    torch.testing.assert_close(monarch_bmm(*arguments), plain)
    assert torch.autograd.gradcheck(monarch_bmm, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(monarch_bmm, arguments)


@pytest.mark.parametrize("grid", [(1, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_factors_are_not_copied_into_wholes(grid: tuple[int, int], with_bias: bool) -> None:
    """As those of an index are, where the plain products of one row of blocks take parts of the factors."""
    arguments = [t.requires_grad_() for t in (torch.randn(7, 12), *factors(*grid, 2, 12 // grid[1], 5, torch.float32))]
    y = monarch_bmm(*arguments, torch.randn(5) if with_bias else None)
    upstream = torch.randn_like(y)
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        torch.autograd.grad(y, arguments, upstream)
    ran = {event.key for event in backward.key_averages()}
    assert "aten::mm" in ran
    assert not ran & {"aten::select_backward", "aten::slice_backward"}


@pytest.mark.parametrize("batch", [(), (2,)], ids=["plain", "batched"])
def test_opcheck(batch: tuple[int, ...]) -> None:
    R, L = factors(2, 3, 2, 4, 5, torch.float32, batch)
    x = torch.randn(*(batch or (2,)), 6, 11)
    arguments = [t.requires_grad_() for t in (x, R, L, torch.randn(9))]
    torch.library.opcheck(torch.ops.monarch_fx.monarch_bmm.default, arguments, {"out_features": 9})


def test_vmap_over_rows_factors_and_bias() -> None:
    R, L = factors(2, 3, 2, 4, 5, batch=(6,))
    x, bias = torch.randn(6, 7, 12).double(), torch.randn(6, 10).double()
    expected = torch.stack([monarch_bmm(x[i], R[i], L[i], bias[i]) for i in range(6)])
    torch.testing.assert_close(vmap(monarch_bmm)(x, R, L, bias), expected)
    expected = monarch_bmm(x, R[0], L[0], bias[0])
    torch.testing.assert_close(
        vmap(monarch_bmm, in_dims=(1, None, None, None), out_dims=1)(x, R[0], L[0], bias[0]), expected
    )


def test_vmap_takes_products_apart(capfd: pytest.CaptureFixture[str]) -> None:
    """Else PyTorch runs them one by one, and says so."""
    R, L = factors(2, 3, 2, 4, 5)
    x, offs = torch.randn(6, 7, 12).double(), torch.tensor([3, 7], dtype=torch.int32)
    found = vmap(lambda x: monarch_bmm(x, R, L))(x)
    grouped = vmap(lambda x: monarch_grouped_mm(x, torch.stack([R, 2 * R]), torch.stack([L, L]), offs))(x)
    assert "batching rule" not in capfd.readouterr().err
    torch.testing.assert_close(found, monarch_bmm(x, R, L))
    torch.testing.assert_close(grouped, torch.cat([found[:, :3], 2 * found[:, 3:]], 1))


def test_jvp_is_the_derivative() -> None:
    R, L = factors(2, 3, 2, 4, 5)
    x = torch.randn(7, 12, dtype=torch.float64)
    tangents = tuple(torch.randn_like(t) for t in (x, R, L))
    _, got = jvp(monarch_bmm, (x, R, L), tangents)
    dx, dR, dL = tangents
    torch.testing.assert_close(got, monarch_bmm(dx, R, L) + monarch_bmm(x, dR, L) + monarch_bmm(x, R, dL))


def test_per_sample_gradients() -> None:
    R, L = factors(2, 2, 3, 4, 5)
    x = torch.randn(6, 8, dtype=torch.float64)

    def loss(R: Tensor, L: Tensor, row: Tensor) -> Tensor:
        return monarch_bmm(row, R, L).square().sum()

    got = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(R, L, x)
    for i in range(6):
        one = torch.autograd.functional.jacobian(lambda R, L, i=i: loss(R, L, x[i]), (R, L))
        torch.testing.assert_close(tuple(g[i] for g in got), one)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2)], ids=str)
def test_autocast_gives_its_dtype_and_float32_gradients(grid: tuple[int, int]) -> None:
    R, L = (t.requires_grad_() for t in factors(*grid, 4, 8, 8, torch.float32))
    x, bias = torch.randn(5, grid[1] * 8), torch.randn(grid[0] * 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = monarch_bmm(x, R, L, bias)
        narrow = monarch_bmm(x.bfloat16(), R, L, bias)
    assert y.dtype == narrow.dtype == torch.bfloat16
    with torch.no_grad():
        # operands are rounded, too: one more eps for each of the three
        assert_product(y, x, dense(R, L), 16 * (8 + 4 * grid[1]), sizes(x, R, L), bias)
    y.float().sum().backward()
    assert {t.grad.dtype for t in (R, L, bias) if t.grad is not None} == {torch.float32}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_flops_are_counted_exactly(grid: tuple[int, int]) -> None:
    n_out, n_in = grid
    R, L = factors(n_out, n_in, 3, 4, 5)
    with FlopCounterMode(display=False) as counter:
        monarch_bmm(torch.randn(2, 7, n_in * 4).double(), R, L, torch.zeros(n_out * 5).double())
    assert counter.get_total_flops() == 2 * 14 * n_in * n_out * 3 * (4 + 5)


# --- rows sorted by expert --------------------------------------------------------------------------------------------


def grouped_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rows for experts 0, 2 and 3 of four, the last row for none."""
    R, L = factors(2, 3, 2, 4, 3, dtype, batch=(4,))
    return torch.randn(10, 11, dtype=dtype), R, L, torch.tensor([2, 2, 5, 9], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_values(dtype: torch.dtype) -> None:
    x, R, L, offs = grouped_case(dtype)
    y = monarch_grouped_mm(x, R, L, offs, out_features=5)
    assert y.dtype == dtype
    for expert, rows in ((0, slice(0, 2)), (2, slice(2, 5)), (3, slice(5, 9))):
        W = dense(R[expert], L[expert], 11, 5)
        assert_product(y[rows], x[rows], W, 4 + 6, sizes(x[rows], R[expert], L[expert], 5))
    assert (y[9] == 0).all()
    assert monarch_grouped_mm(x[:0], R, L, torch.zeros_like(offs)).shape == (0, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_grouped_gradients_to_second_order(dtype: torch.dtype) -> None:
    x, R, L, offs = grouped_case(dtype)
    arguments = [t.requires_grad_() for t in (x, R, L)]

    def product(x: Tensor, R: Tensor, L: Tensor) -> Tensor:
        return monarch_grouped_mm(x, R, L, offs)

    assert torch.autograd.gradcheck(product, arguments, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, arguments, fast_mode=True)


def test_grouped_opcheck() -> None:
    x, R, L, offs = grouped_case()
    arguments = [t.requires_grad_() for t in (x, R, L)]
    torch.library.opcheck(torch.ops.monarch_fx.monarch_grouped_mm.default, (*arguments, offs))
    weight = torch.randn(4, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(3, 10, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.monarch_fx_kernels.grouped_bmm.default, (rows, weight, offs))
    torch.library.opcheck(torch.ops.monarch_fx_kernels.grouped_outer.default, (rows, rows.detach(), offs))


def test_grouped_transforms() -> None:
    x, R, L, offs = grouped_case()
    expected = torch.stack([monarch_grouped_mm(x * i, R, L, offs) for i in range(3)])
    scaled = torch.arange(3).view(3, 1, 1) * x
    torch.testing.assert_close(vmap(lambda x: monarch_grouped_mm(x, R, L, offs))(scaled), expected)
    tangent = torch.randn_like(x)
    _, got = jvp(lambda x: monarch_grouped_mm(x, R, L, offs), (x,), (tangent,))
    torch.testing.assert_close(got, monarch_grouped_mm(tangent, R, L, offs))


def test_grouped_arguments_that_do_not_fit() -> None:
    x, R, L, offs = grouped_case()
    for arguments in ((x[0], R, L, offs), (x, R[0], L[0], offs), (x, R, L, offs[:3])):
        with pytest.raises(StructureError, match="Grouped products take"):
            monarch_grouped_mm(*arguments)


# --- import -----------------------------------------------------------------------------------------------------------


def test_import_needs_neither_triton_nor_transformers() -> None:
    """In a process where both are missing, the op is there and computes."""
    code = """
import sys
sys.modules["triton"] = sys.modules["transformers"] = None  # importing them raises ImportError
import torch
from monarch_fx.kernels.op import monarch_bmm
print(monarch_bmm(torch.ones(2, 4), torch.ones(2, 2, 1, 2), torch.ones(2, 2, 1, 3)).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == 2 * 6 * 4


def test_functional_call_reaches_the_factors() -> None:
    import monarch_fx as mfx

    layer = mfx.MonarchLinear(8, 6, nblocks=2, rank=2)
    changed = {name: 2 * value for name, value in layer.named_parameters()}
    x = torch.randn(3, 8)
    expected = monarch_bmm(x, changed["weight.R"], changed["weight.L"], changed["bias"])
    torch.testing.assert_close(functional_call(layer, changed, (x,)), expected)
