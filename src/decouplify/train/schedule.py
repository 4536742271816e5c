"""What moves with a run's progress apart from learning rates: noise, hard gates, targets and weights of losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from decouplify.decoupling import decoupling_of
from decouplify.losses import DecouplingLoss
from decouplify.train.recipe import DecouplingRecipe

__all__ = ["GateSchedule", "put"]


class GateSchedule:
    """Sets gates and losses for a moment of the run; for loops of one's own, call it before each step.

        schedule = GateSchedule(model, criterion, DecouplingRecipe(epochs))
        schedule.set(step / n_steps)

    Args:
        model: A wrapped model.
        criterion: Its loss.
        recipe: When what happens.

    Attributes:
        aim: How much farther than the target to steer, around 1; ``correct`` moves it.
    """

    def __init__(self, model: nn.Module, criterion: DecouplingLoss, recipe: DecouplingRecipe) -> None:
        self._gates, self._criterion, self._recipe = decoupling_of(model, "GateSchedule"), criterion, recipe
        self.aim = 1.0

    def on_device(self, device: torch.device) -> None:
        """From now on keep numbers as tensors, which recorded CUDA graphs read anew at each step."""
        scalars = torch.ones(3, device=device)
        self._gates.noise, self._criterion.target_scale, self._criterion.information_scale = scalars.unbind()

    def set(self, progress: float) -> bool:
        """Set everything for a share ``progress`` of the run, in [0, 1]; returns whether gates are hard."""
        self._gates.hard = self._recipe.is_hard(progress)
        put(vars(self._gates), "noise", self._recipe.noise(progress))
        put(vars(self._criterion), "target_scale", self.aim * self._recipe.target_scale(progress))
        put(vars(self._criterion), "information_scale", self._recipe.information_scale(progress))
        return self._gates.hard

    def correct(self, progress: float, measured: float) -> None:
        """Aim higher or lower, from the share of MACs that evaluation executes.

        Noise, and norms that see the batch, make training gates execute other MACs than evaluation does.
        """
        target = self._criterion.target_macs
        if target is None or target == 1 or self._recipe.target_scale(progress) < 1:
            return
        self.aim = min(1.3, max(0.7, self.aim + 0.25 * (measured - target) / (1 - target)))

    def end(self) -> None:
        """Gates as a fresh model has them."""
        self._gates.noise, self._gates.hard = 1.0, False


def put(owner: dict[str, Any], name: str, value: float) -> None:
    """Set a number, in place where it lives on a device."""
    if isinstance(owner[name], Tensor):
        owner[name].fill_(value)
    else:
        owner[name] = value
