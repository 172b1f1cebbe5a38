"""monarch_fx: a compiler pass that replaces dense matrix products by Monarch matrices."""

from monarch_fx import transforms
from monarch_fx.api import calibrate, monarchify, plan
from monarch_fx.config import MonarchConfig
from monarch_fx.costs import DeviceProfile, measure_device
from monarch_fx.kernels.op import monarch_bmm
from monarch_fx.layers import MonarchLinear
from monarch_fx.passes.calibrate import Calibration
from monarch_fx.projection.recovery import recover_factors
from monarch_fx.records import Plan, Recovery, Report, TrainingSummary
from monarch_fx.rewritten import measure_loss, print_graph, report, to_dense
from monarch_fx.structure import Monarch, MonarchShape
from monarch_fx.training import densify, parameter_groups, recompute_intermediates, recover, training_summary

__all__ = [
    "Calibration",
    "DeviceProfile",
    "Monarch",
    "MonarchConfig",
    "MonarchLinear",
    "MonarchShape",
    "Plan",
    "Recovery",
    "Report",
    "TrainingSummary",
    "calibrate",
    "densify",
    "measure_device",
    "measure_loss",
    "monarch_bmm",
    "monarchify",
    "parameter_groups",
    "plan",
    "print_graph",
    "recompute_intermediates",
    "recover",
    "recover_factors",
    "report",
    "to_dense",
    "training_summary",
    "transforms",
]
__version__ = "0.1.0"
