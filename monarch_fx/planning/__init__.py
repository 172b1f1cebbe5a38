"""Candidates, costs, errors and a budget -> one decision per product."""

from monarch_fx.planning.decide import OBJECTIVES, check_choices, decide
from monarch_fx.planning.options import Option, grids

__all__ = ["OBJECTIVES", "Option", "check_choices", "decide", "grids"]
