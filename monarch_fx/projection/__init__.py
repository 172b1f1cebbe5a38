"""Dense weight -> Monarch factors, and the error that this costs."""

from monarch_fx.projection.activation import energy, output_error, project_on_inputs, projected_error2, relative_error
from monarch_fx.projection.closed_form import project
from monarch_fx.projection.permutation import feature_order, read_features, written_features
from monarch_fx.projection.prior import PRIOR_DOUBT, prior_tail
from monarch_fx.projection.spectra import expected_seconds, tail_errors

__all__ = [
    "PRIOR_DOUBT",
    "energy",
    "expected_seconds",
    "feature_order",
    "output_error",
    "prior_tail",
    "project",
    "project_on_inputs",
    "projected_error2",
    "read_features",
    "relative_error",
    "tail_errors",
    "written_features",
]
