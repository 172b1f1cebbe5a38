"""Candidates, costs, errors and a budget -> one decision per product."""

from monarch_fx.planning.decide import OBJECTIVES, decide
from monarch_fx.planning.options import Option, grids

__all__ = ["OBJECTIVES", "Option", "decide", "grids"]
