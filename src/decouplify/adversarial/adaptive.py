"""The attack that knows the detector: it changes the class and makes the path look like one of the new class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decouplify.adversarial.attacks import Box, Loss, check_attack_input, climb
from decouplify.adversarial.gradients import soft_gates
from decouplify.decoupling import decoupling_of
from decouplify.modes import eval_mode

__all__ = ["AdaptiveAttack"]


@dataclass(frozen=True, eq=False)
class AdaptiveAttack:
    """PGD on cross entropy and path at once, towards the class that is second best for the clean image.

    It descends ``CE(f(x), t) + weight * mean_f (z_f(x) - rates[t, f])^2`` for the target class t. Up to a constant the
    second term is the mean squared distance to the clean paths of class t, so the attacked path becomes one that a
    detector knows from clean images. The gates z are binary and have the gradient of ``soft_gates``: those that agree
    with the class already are left alone, which soft gates in their place would not be.

    Attributes:
        rates: How often each filter is open for clean images of each class, shape (classes, F), in [0, 1]: the
            ``rates`` of ``PathSet.rates(by="preds")``.
        weight: Weight of the path; 0 is a gate-aware PGD.
        eps: Radius of the L-infinity ball.
        step: How far one step goes.
        n_steps: Number of steps.
        slope: See ``soft_gates``.
    """

    rates: Tensor
    weight: float = 5.0
    eps: float = 8 / 255
    step: float = 2 / 255
    n_steps: int = 20
    slope: float = 1.0

    name = "adaptive"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Images in the ball that the model takes for another class than ``labels``; see ``Attack``.

        Raises:
            ValueError: If the model is not wrapped, or ``rates`` do not fit its filters and classes.
        """
        check_attack_input(images, labels, self.name)
        box = Box((images - self.eps).clamp_min(0), (images + self.eps).clamp_max(1))
        with eval_mode(model), soft_gates(model, self.slope):
            targets = self._second_best(model, images, labels)
            return climb(self._loss(model, targets), box.random_point(), box, self.step, self.n_steps)

    def _second_best(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(images)
        n_filters = decoupling_of(model).plan.n_filters
        if tuple(self.rates.shape) != (logits.shape[1], n_filters):
            raise ValueError(
                f"adaptive attack: rates of shape {tuple(self.rates.shape)} given, ({logits.shape[1]}, {n_filters}) "
                "wanted: the model's classes and filters"
            )
        return logits.scatter(1, labels[:, None], -torch.inf).argmax(1)

    def _loss(self, model: nn.Module, targets: Tensor) -> Loss:
        decoupling = decoupling_of(model)
        wanted = self.rates.to(targets.device, torch.float32)[targets]

        def loss(x: Tensor) -> Tensor:
            cross_entropy = F.cross_entropy(model(x), targets, reduction="sum")
            distance = (decoupling.path() - wanted).square().mean(1).sum()
            return -(cross_entropy + self.weight * distance)

        return loss
