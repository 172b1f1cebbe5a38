"""Dense weight -> Monarch factors, and the error that this costs."""

from monarch_fx.projection.closed_form import project
from monarch_fx.projection.prior import prior_tail
from monarch_fx.projection.spectra import expected_seconds, tail_errors

__all__ = ["expected_seconds", "prior_tail", "project", "tail_errors"]
