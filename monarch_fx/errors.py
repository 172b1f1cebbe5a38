"""Every error and warning that monarch_fx raises on purpose."""


class MonarchError(Exception):
    """Base of all errors of this library."""


class ConfigError(MonarchError, ValueError):
    """An argument or a config field has a value that can't be used."""


class StructureError(MonarchError, ValueError):
    """Factors, grid and rank don't make a Monarch matrix of the stated size."""


class NotAModuleError(MonarchError, TypeError):
    """What was passed as the model is not a torch.nn.Module (or GraphModule, or ExportedProgram)."""


class WrappedModelError(MonarchError, TypeError):
    """The model is compiled or wrapped (DDP, FSDP); the plain model must be passed."""


class CaptureError(MonarchError, RuntimeError):
    """No graph of the model could be captured."""


class ExampleInputsError(CaptureError):
    """The example inputs don't fit the model's forward."""


class OutputError(MonarchError, RuntimeError):
    """A model's output has no tensor that a loss could be taken of."""


class NoEligibleProductError(MonarchError, ValueError):
    """The model has no matrix product that may be rewritten."""


class SelectionError(MonarchError, ValueError):
    """An ``include`` or ``exclude`` pattern matches no product."""


class WeightError(MonarchError, ValueError):
    """A weight holds NaN or infinity, or its dtype or layout can't be projected."""


class RecoveryError(MonarchError, ValueError):
    """A matrix is not a product of Monarch matrices, or its factors can't be told to the accuracy asked for."""


class MetaDeviceError(MonarchError, RuntimeError):
    """The model, or a part of it, is on the meta device where values are needed."""


class PlanMismatchError(MonarchError, ValueError):
    """A plan was made for another architecture, or its JSON can't be read."""


class BudgetError(MonarchError, ValueError):
    """The budget can't be reached and ``strict=True`` was given."""


class DeviceProfileError(MonarchError, ValueError):
    """An unknown device profile, or a measurement that can't be used."""


class OptimizerError(MonarchError, ValueError):
    """An optimizer doesn't hold the factors that are to be replaced, or can't have parameters replaced."""


class MonarchWarning(UserWarning):
    """Base of all warnings of this library."""


class BudgetWarning(MonarchWarning):
    """The budget could not be reached; the closest point was taken."""


class DenseFallbackWarning(MonarchWarning):
    """A rewritten weight was multiplied out because an operation other than a product read it."""


class OptimizerStateWarning(MonarchWarning):
    """The optimizer state of a weight's factors could not be carried over to its dense weight."""


class DisconnectedInputsWarning(MonarchWarning):
    """An imported layer ignores some of its inputs."""
