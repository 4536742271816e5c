"""Gradients that know that the path depends on the image.

A gate of evaluation is ``1[g > 0]``: its gradient is zero, so a gradient attack takes the path of an image for fixed
and sees half of the network's freedom. That is gradient masking, and a defence must not be measured with it alone
(Tramer et al. 2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decouplify.adversarial.attacks import Attack, is_targeted, name_of
from decouplify.decoupling import decoupling_of

__all__ = ["GateAware", "soft_gates"]


@contextmanager
def soft_gates(model: nn.Module, slope: float = 1.0) -> Iterator[None]:
    """While the context lasts, gates in eval mode have the gradient of ``sigmoid(slope * g)``; outputs do not change.

    The straight-through estimator (Bengio et al. 2013), used as backward pass differentiable approximation (Athalye et
    al. 2018). The clipped sigmoid of training is flat beyond |g| = 2.4; this one is nowhere flat.

    Args:
        model: A wrapped model, or a ``PixelModel`` of one.
        slope: Steepness in 1 / logit, > 0; the larger, the more the gates near their threshold count.

    Raises:
        ValueError: If the model is not wrapped, or the slope is not positive.
    """
    if not slope > 0:
        raise ValueError(f"soft_gates: slope is {slope}, wanted above 0")
    with decoupling_of(model, "soft_gates").differentiable(lambda g: torch.sigmoid(slope * g)):
        yield


@dataclass(frozen=True)
class GateAware:
    """An attack that is run with ``soft_gates``.

    Attributes:
        attack: Any attack.
        slope: See ``soft_gates``.
    """

    attack: Attack
    slope: float = 1.0

    @property
    def name(self) -> str:
        """The attack's name with "gate-aware" before it."""
        return f"gate-aware {name_of(self.attack)}"

    @property
    def targeted(self) -> bool:
        """Whether the attack is."""
        return is_targeted(self.attack)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """What the attack returns; see ``Attack``."""
        with soft_gates(model, self.slope):
            return self.attack(model, images, labels)
