"""The errors a caller may want to catch by name; all of them are ``ValueError`` or ``RuntimeError``."""

from __future__ import annotations

__all__ = ["CheckpointError", "NonFiniteError", "PlanError", "TraceError", "VerificationError"]


class TraceError(ValueError):
    """The model could not be recorded: it does not run on the given size, or its control flow reads values.

    The message ends with what to do: usually give ``input_size=(channels, height, width)``, or wrap the backbone
    instead of the whole model.
    """


class PlanError(ValueError):
    """Nothing could be gated, or the request does not fit the model. The model was not changed."""


class CheckpointError(ValueError):
    """A file is not a decouplify checkpoint, or does not fit the model. The model was not changed."""


class NonFiniteError(ValueError):
    """NaN or infinity where finite numbers are needed."""


class VerificationError(RuntimeError):
    """The sparse form and the masked form disagree; ``report`` holds the comparison layer by layer."""

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report
