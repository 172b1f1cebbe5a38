"""MonarchLinear: the layer by itself."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from monarch_fx.config import MonarchConfig
from monarch_fx.errors import ConfigError
from monarch_fx.layers.weight import MonarchWeight
from monarch_fx.structure import Monarch, MonarchShape
from monarch_fx.views import StridedView


class MonarchLinear(nn.Linear):
    """A linear layer whose weight is a Monarch matrix; y = x W^T + b, W (out_features, in_features).

    A rewritten ``nn.Linear`` stays an ``nn.Linear`` and has the same kind of ``weight``.

    Args:
        in_features: Size of each input row.
        out_features: Size of each output row.
        nblocks: Blocks in both directions, or the pair (nblocks_out, nblocks_in).
        rank: Rank of every block; default ``min(in_features, out_features) // nblocks**2``, at least 1, the
            ``MonarchLinear(nblocks)`` of the authors (Dao et al. 2022, section 3.1).
        bias: Whether a bias is learned.
        device: Of the factors.
        dtype: Of the factors.

    Raises:
        ConfigError: ``nblocks`` or ``rank`` is not positive.
        StructureError: The grid has more blocks than the matrix has rows or columns.
    """

    weight: MonarchWeight  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int | tuple[int, int] = 4,
        rank: int | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        pair = nblocks if isinstance(nblocks, tuple) else (nblocks, nblocks)
        if len(pair) != 2:
            raise ConfigError(f"nblocks must be one count or (nblocks_out, nblocks_in), got {nblocks!r}.")
        config = MonarchConfig(nblocks_out=pair[0], nblocks_in=pair[1], rank=rank)
        rank = config.rank or max(1, min(in_features, out_features) // (pair[0] * pair[1]))
        shape = MonarchShape(in_features, out_features, pair[0], pair[1], rank)
        self.in_features = in_features
        self.out_features = out_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        monarch = Monarch.empty(shape, **factory)
        view = StridedView.whole((out_features, in_features)).matrix(out=[0], inp=[1])
        self.weight = MonarchWeight((out_features, in_features), [(view, monarch)])
        self.weight.behind = ("bias",)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **factory))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The product's entries get the variance that ``nn.Linear`` gives a dense weight, 1 / (3 in_features)."""
        monarch = self.weight.monarch()
        assert monarch is not None
        init_factors(monarch, 1 / math.sqrt(3 * self.in_features))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)


def init_factors(monarch: Monarch, std: float) -> None:
    """Draws factors, in place, so that every entry of the dense matrix has mean 0 and standard deviation ``std``.

    An entry is a sum of ``rank`` products of independent entries of L and R: its variance is rank * var(L) * var(R).
    Entries are uncorrelated, so that outputs and input gradients have the variance that a dense matrix of independent
    entries gives them. With ``std`` 0 only L is 0: else no gradient would reach either factor.
    """
    each = math.sqrt(std / math.sqrt(monarch.shape.rank))
    with torch.no_grad():
        monarch.R.normal_(0.0, each or 1 / math.sqrt(monarch.shape.p))
        monarch.L.normal_(0.0, each)
