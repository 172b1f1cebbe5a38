"""conv(x, W, b) whose windows don't overlap  ->  monarch_bmm(patches(x), R, L, b)"""

from collections.abc import Sequence
from typing import Any

from monarch_fx.rules.base import Product, Refusal, Static, ndim


def convolution(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Product | Refusal | None:
    """``conv1d/2d/3d`` with a static kernel (out, in, *k): a matrix product where k is 1, or where stride equals k."""
    if not isinstance(weight, Static):
        return None
    dims = weight.ndim - 2
    kernel = weight.view.sizes[2:]
    steps = _per_dim(stride, dims)
    if groups != 1:
        return Refusal(f"a convolution in {groups} groups is no single matrix product")
    if padding == "same" or padding == "valid":
        padding = 0 if padding == "valid" or set(kernel) == {1} else 1
    if any(n != 0 for n in _per_dim(padding, dims)):
        return Refusal("a padded convolution is no matrix product")
    pointwise = all(k == 1 for k in kernel)
    if not pointwise and (kernel != steps or any(n != 1 for n in _per_dim(dilation, dims))):
        size = "x".join(str(k) for k in kernel)
        return Refusal(f"the windows of a {size} convolution overlap: no matrix product")
    if isinstance(bias, Static):
        return Refusal("its bias is a view of a rewritten parameter")
    matrix = weight.matrix(out=[0], inp=list(range(1, weight.ndim)))
    channel = -dims - 1

    def rewrite(multiply: Any) -> Any:
        rows = _subsample(input, steps).movedim(channel, -1) if pointwise else _patches(input, kernel)
        return multiply(rows, bias).movedim(-1, channel)

    thin = 1
    for step in steps if pointwise else ():
        thin *= step
    return Product(matrix, input, rewrite, thin, bias=bias)


def conv_any(
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Product | Refusal | None:
    """``aten.convolution``: the same with a flag for the transposed one."""
    if isinstance(weight, Static) and transposed:
        return Refusal("a transposed convolution is no matrix product")
    return convolution(input, weight, bias, stride, padding, dilation, groups)


def conv_transpose(input: Any, weight: Any, *args: Any, **kwargs: Any) -> Product | Refusal | None:
    """``conv_transpose1d/2d/3d``."""
    return Refusal("a transposed convolution is no matrix product") if isinstance(weight, Static) else None


def _per_dim(value: Any, dims: int) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * dims if len(values) == 1 else values


def _subsample(x: Any, steps: tuple[int, ...]) -> Any:
    if all(step == 1 for step in steps):
        return x
    return x[(..., *[slice(None, None, step) for step in steps])]


def _patches(x: Any, kernel: tuple[int, ...]) -> Any:
    """x (*, in, *space) as rows (*, *space / kernel, in * kernel); what a last partial window covers is dropped."""
    dims = len(kernel)
    channel = ndim(x) - dims - 1
    for d, k in enumerate(kernel):
        at = channel + 1 + 2 * d
        windows = x.shape[at] // k
        x = x.narrow(at, 0, windows * k).unflatten(at, (windows, k))
    lead = list(range(channel))
    places = [channel + 1 + 2 * d for d in range(dims)]
    inside = [channel + 2 + 2 * d for d in range(dims)]
    return x.permute([*lead, *places, channel, *inside]).flatten(len(lead) + dims)
