"""A small trainer: dense training, then decoupling.

Nothing here is needed to use the library in a loop of one's own; it is what the command line and the examples run. In
the order of the story: ``recipe`` (how), ``batches`` (on what), ``features`` (what a teacher returns on the way to its
answers), ``objective`` (the loss of one batch), ``step`` (one update), ``schedule`` (noise, targets), ``importance``
(which gates start closed), ``prediction`` (which for which image), ``moments``, ``replay`` and ``reconstruct`` (weights
for what is left), ``start`` (which of these a recipe asks for), ``run`` (epochs, resuming), ``finish`` (norms and
thresholds for evaluation), ``log``.
"""

from decouplify.train.batches import LoaderBatches, TensorBatches
from decouplify.train.evaluation import evaluate
from decouplify.train.features import feature_distance
from decouplify.train.finish import calibrate, executed_share, reestimate_norms
from decouplify.train.importance import close_in_rounds, close_least_important, importance
from decouplify.train.log import json_lines, progress_bar, tensorboard, together
from decouplify.train.objective import distillation
from decouplify.train.prediction import predict_worth
from decouplify.train.recipe import DecouplingRecipe, Recipe
from decouplify.train.reconstruct import Reconstruction
from decouplify.train.run import History, decouple, train_dense
from decouplify.train.schedule import GateSchedule

__all__ = [
    "DecouplingRecipe",
    "GateSchedule",
    "History",
    "LoaderBatches",
    "Recipe",
    "Reconstruction",
    "TensorBatches",
    "calibrate",
    "close_in_rounds",
    "close_least_important",
    "decouple",
    "distillation",
    "evaluate",
    "executed_share",
    "feature_distance",
    "importance",
    "json_lines",
    "predict_worth",
    "progress_bar",
    "reestimate_norms",
    "tensorboard",
    "together",
    "train_dense",
]
