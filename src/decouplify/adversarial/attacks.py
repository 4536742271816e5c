"""Attacks with the gradient of the loss: small changes of an image that change its class.

All of them take images in [0, 1] and a model that reads such images, see ``PixelModel``. Any function of (model,
images, labels) that returns images is an ``Attack``; the classes here are the usual ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decouplify.adversarial.pixels import PixelModel, check_labels, check_pixels
from decouplify.modes import eval_mode

__all__ = ["BIM", "FGSM", "MIFGSM", "PGD", "Attack", "CDRPAttack", "attack_named"]

Loss = Callable[[Tensor], Tensor]


class Attack(Protocol):
    """Any function that returns images like the given ones for which the model decides otherwise.

    ``model`` maps images in [0, 1], shape (N, C, H, W), to logits. ``labels``, shape (N,), are the classes to get away
    from, or the classes to reach if the function has an attribute ``targeted`` that is true. An attribute ``name`` is
    used in tables.
    """

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent in an L-infinity ball (Madry et al. 2018, section 2.1).

    x <- project(x + step sign(gradient of the cross entropy)), from a random point of the ball.

    Attributes:
        eps: Radius of the ball, in units of the pixel range, > 0.
        step: How far one step goes.
        n_steps: Number of steps.
        targeted: Descend towards the given classes instead of climbing away from them.
        random_start: Start anywhere in the ball; else at the image.
        decay: Follow the sum of gradients, each scaled to mean magnitude 1, with this share kept from step to step;
            ``None``: follow the gradient.

    Raises:
        ValueError: If eps or step is not positive, or there is no step.
    """

    eps: float = 8 / 255
    step: float = 2 / 255
    n_steps: int = 20
    targeted: bool = False
    random_start: bool = True
    decay: float | None = None

    def __post_init__(self) -> None:
        if not (0 < self.eps < math.inf and 0 < self.step < math.inf and self.n_steps >= 1):
            raise ValueError(f"{self}: eps and step must be positive, n_steps at least 1")

    @property
    def name(self) -> str:
        """``pgd``, or ``pgd, targeted``."""
        return type(self).__name__.lower() + (", targeted" if self.targeted else "")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Images in the ball around ``images`` and in [0, 1]; see ``Attack``."""
        check_attack_input(images, labels, self.name)
        box = Box((images - self.eps).clamp_min(0), (images + self.eps).clamp_max(1))
        start = box.random_point() if self.random_start else images
        with eval_mode(model):
            return climb(
                cross_entropy_of(model, labels, self.targeted), start, box, self.step, self.n_steps, self.decay
            )


@dataclass(frozen=True)
class BIM(PGD):
    """Basic iterative method: the steps of PGD from the image itself (Kurakin et al. 2017)."""

    n_steps: int = 10
    random_start: bool = False


@dataclass(frozen=True)
class FGSM(BIM):
    """Fast gradient sign method: one step to the surface of the ball (Goodfellow et al. 2015).

    ``step`` is ``eps`` unless given.
    """

    step: float = 0.0
    n_steps: int = 1

    def __post_init__(self) -> None:
        if self.step == 0:
            object.__setattr__(self, "step", self.eps)
        super().__post_init__()


@dataclass(frozen=True)
class MIFGSM(BIM):
    """Momentum iterative method (Dong et al. 2018, Algorithm 1). ``step`` is ``eps / n_steps`` unless given."""

    step: float = 0.0
    decay: float | None = 1.0

    def __post_init__(self) -> None:
        if self.step == 0:
            object.__setattr__(self, "step", self.eps / max(self.n_steps, 1))
        super().__post_init__()


@dataclass(frozen=True)
class CDRPAttack:
    """The attack of the published detection code for critical data routing paths (Wang et al. 2018).

    Targeted; ``n_steps`` steps of ``step`` in *normalised* space, no ball, clipped to the range of the image's own
    values there. The largest change of a channel is ``n_steps * step * std`` (5.8/255 for ImageNet's deviations). We
    also clip to [0, 1]. Of a ``PixelModel`` the normalisation is read off, else taken as none.

    Attributes:
        step: Step in normalised units.
        n_steps: Number of steps.
    """

    step: float = 0.01
    n_steps: int = 10

    name = "cdrp"
    targeted = True

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Images that the model takes for ``labels``; see ``Attack``."""
        check_attack_input(images, labels, self.name)
        mean, std = (model.mean, model.std) if isinstance(model, PixelModel) else (torch.zeros(1), torch.ones(1))
        mean, std = mean.to(images), std.to(images)
        values = ((images - mean) / std).flatten(1)
        lowest, highest = (bound[:, None, None, None] for bound in (values.amin(1), values.amax(1)))
        box = Box((lowest * std + mean).clamp_min(0), (highest * std + mean).clamp_max(1))
        with eval_mode(model):
            return climb(cross_entropy_of(model, labels, targeted=True), images, box, self.step * std, self.n_steps)


_PRESETS: dict[str, Attack] = {
    "fgsm": FGSM(),
    "bim": BIM(),
    "pgd": PGD(),
    "mifgsm": MIFGSM(),
    "cdrp": CDRPAttack(),
}


def attack_named(name: str, eps: float | None = None) -> Attack:
    """One of the attacks with its usual numbers: ``fgsm``, ``bim``, ``pgd``, ``mifgsm``, ``cdrp``.

    Args:
        name: Which one.
        eps: Radius of the ball instead of 8/255; steps shrink and grow with it. The cdrp attack has no ball.

    Raises:
        ValueError: If there is no attack of that name, or ``eps`` is given for one without a ball.
    """
    if name not in _PRESETS:
        raise ValueError(f"no attack is called {name!r}; there are {', '.join(_PRESETS)}")
    attack = _PRESETS[name]
    if eps is None:
        return attack
    if not isinstance(attack, PGD):
        raise ValueError(f"the {name} attack has no ball, so eps={eps} means nothing; leave it out")
    return replace(attack, eps=eps, step=attack.step * eps / attack.eps)


def name_of(attack: Attack) -> str:
    """The attack's ``name``, else that of the function or class."""
    return str(getattr(attack, "name", None) or getattr(attack, "__name__", None) or type(attack).__name__)


def is_targeted(attack: Attack) -> bool:
    """Whether labels are classes to reach rather than to leave."""
    return bool(getattr(attack, "targeted", False))


# What attacks are made of ---------------------------------------------------------------------------------------------


def check_attack_input(images: Tensor, labels: Tensor, where: str) -> None:
    """Raise ``ValueError`` unless there are pixels in [0, 1] and a label for each image."""
    check_pixels(images, where)
    check_labels(labels, len(images), where)


@dataclass(frozen=True)
class Box:
    """The images between a lowest and a highest image."""

    lowest: Tensor
    highest: Tensor

    def project(self, x: Tensor) -> Tensor:
        """The nearest image in the box."""
        return torch.clamp(x, self.lowest, self.highest)

    def random_point(self) -> Tensor:
        """Uniform in the box."""
        return self.lowest + torch.rand_like(self.lowest) * (self.highest - self.lowest)


def cross_entropy_of(model: nn.Module, labels: Tensor, targeted: bool = False) -> Loss:
    """What an attack climbs: the cross entropy of each image with its label, negative if that is to be reached."""
    sign = -1 if targeted else 1
    return lambda x: sign * F.cross_entropy(model(x), labels, reduction="sum")


def climb(
    loss: Loss, start: Tensor, box: Box, step: float | Tensor, n_steps: int, decay: float | None = None
) -> Tensor:
    """Steps along the sign of the gradient of a loss that is a sum over images, each projected into the box."""
    x, velocity = start, torch.zeros_like(start)
    for _ in range(n_steps):
        direction = _gradient(loss, x)
        if decay is not None:
            size = direction.abs().mean((1, 2, 3), keepdim=True)
            direction = velocity = decay * velocity + direction / size.clamp_min(torch.finfo(size.dtype).tiny)
        x = box.project(x + step * direction.sign())
    return x


def _gradient(loss: Loss, x: Tensor) -> Tensor:
    """The gradient at x; the gradients of parameters are neither computed nor touched."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x), x)
    return gradient
