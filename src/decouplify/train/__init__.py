"""A small trainer: dense training, then decoupling.

Nothing here is needed to use the library in a loop of one's own; it is what the command line and the examples run. In
the order of the story: ``recipe`` (how), ``batches`` (on what), ``objective`` (the loss of one batch), ``step`` (one
update), ``run`` (schedules, epochs, resuming), ``finish`` (norms and thresholds for evaluation), ``log``.
"""

from decouplify.train.batches import LoaderBatches, TensorBatches
from decouplify.train.evaluation import evaluate
from decouplify.train.finish import calibrate, executed_share, reestimate_norms
from decouplify.train.log import json_lines, progress_bar, tensorboard, together
from decouplify.train.objective import distillation
from decouplify.train.recipe import DecouplingRecipe, Recipe
from decouplify.train.run import History, decouple, train_dense

__all__ = [
    "DecouplingRecipe",
    "History",
    "LoaderBatches",
    "Recipe",
    "TensorBatches",
    "calibrate",
    "decouple",
    "distillation",
    "evaluate",
    "executed_share",
    "json_lines",
    "progress_bar",
    "reestimate_norms",
    "tensorboard",
    "together",
    "train_dense",
]
