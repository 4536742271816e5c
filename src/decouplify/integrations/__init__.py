"""Training gates in other people's loops: a Lightning callback, and a criterion for loops in timm's style."""

from decouplify.integrations.criterion import GatedCriterion
from decouplify.integrations.lightning import decoupling_callback

__all__ = ["GatedCriterion", "decoupling_callback"]
