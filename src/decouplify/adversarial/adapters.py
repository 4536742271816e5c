"""Attacks of other libraries as ours. None of them is needed otherwise; each is imported by whoever passes it in.

The libraries run backward passes of their own. Parameters keep their gradients and flags all the same, and a model
under ``soft_gates`` gives them gate-aware gradients as it gives them to our attacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decouplify._optional import import_optional
from decouplify.modes import eval_mode

__all__ = ["ArtAttack", "FoolboxAttack", "TorchattacksAttack"]


@dataclass(frozen=True)
class ArtAttack:
    """An evasion attack of the adversarial-robustness-toolbox.

    Attributes:
        make: Maps the estimator that we build around the model to the attack, for instance
            ``lambda classifier: ProjectedGradientDescent(classifier, eps=8 / 255)``.
        targeted: Whether the attack was made with ``targeted=True``.
        name: Name in tables.
    """

    make: Callable[[Any], Any]
    targeted: bool = False
    name: str = "art"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """What the attack generates; see ``Attack``.

        Raises:
            ImportError: If the toolbox is not installed.
        """
        estimators = import_optional("art.estimators.classification", "ArtAttack", extra="attacks")
        with torch.no_grad(), eval_mode(model):
            n_classes = model(images[:1]).shape[1]
        with eval_mode(model), _parameters_left_alone(model):
            classifier = estimators.PyTorchClassifier(
                model,
                loss=nn.CrossEntropyLoss(),
                input_shape=tuple(images.shape[1:]),
                nb_classes=n_classes,
                clip_values=(0.0, 1.0),
                device_type="gpu" if images.is_cuda else "cpu",
            )
            attacked = self.make(classifier).generate(x=images.cpu().numpy(), y=labels.cpu().numpy())
        return torch.from_numpy(attacked).to(images)


@dataclass(frozen=True)
class TorchattacksAttack:
    """An attack of torchattacks.

    Attributes:
        make: Maps the model to the attack, for instance ``lambda model: torchattacks.PGD(model, eps=8 / 255)``.
        targeted: Run it towards the labels.
        name: Name in tables.
    """

    make: Callable[[nn.Module], Any]
    targeted: bool = False
    name: str = "torchattacks"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """What the attack returns; see ``Attack``."""
        with eval_mode(model), _parameters_left_alone(model):
            attack = self.make(model)
            if self.targeted:
                attack.set_mode_targeted_by_label(quiet=True)
            return attack(images, labels)


@dataclass(frozen=True)
class FoolboxAttack:
    """An attack of foolbox.

    Attributes:
        attack: The attack, for instance ``foolbox.attacks.LinfPGD()``.
        eps: Radius of its ball, in units of the pixel range.
        targeted: Run it towards the labels.
        name: Name in tables.
    """

    attack: Any
    eps: float = 8 / 255
    targeted: bool = False
    name: str = "foolbox"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """What the attack returns, clipped to the ball; see ``Attack``.

        Raises:
            ImportError: If foolbox is not installed.
        """
        foolbox = import_optional("foolbox", "FoolboxAttack", extra="attacks")
        aim = foolbox.criteria.TargetedMisclassification if self.targeted else foolbox.criteria.Misclassification
        with eval_mode(model), _parameters_left_alone(model):
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
            _, clipped, _ = self.attack(wrapped, images, aim(labels), epsilons=self.eps)
        return clipped


@contextmanager
def _parameters_left_alone(model: nn.Module) -> Iterator[None]:
    """Keeps flags and gradients of all parameters while somebody else runs backward passes and clears gradients."""
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter, _, _ in kept:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, required, gradient in kept:
            parameter.requires_grad_(required)
            parameter.grad = gradient
