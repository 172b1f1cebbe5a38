"""What a training run does with a rewritten model."""

from monarch_fx.training.densify import densify
from monarch_fx.training.groups import parameter_groups
from monarch_fx.training.intermediates import recompute_intermediates
from monarch_fx.training.recover import recover
from monarch_fx.training.summary import training_summary

__all__ = ["densify", "parameter_groups", "recompute_intermediates", "recover", "training_summary"]
