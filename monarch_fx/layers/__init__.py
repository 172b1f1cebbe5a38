"""Modules that hold Monarch matrices."""

from monarch_fx.layers.dense_like import DenseLike
from monarch_fx.layers.linear import MonarchLinear, init_factors
from monarch_fx.layers.weight import MonarchWeight

__all__ = ["DenseLike", "MonarchLinear", "MonarchWeight", "init_factors"]
