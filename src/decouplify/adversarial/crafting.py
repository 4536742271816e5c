"""Attack many images, and see which attacks had success."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decouplify.adversarial.attacks import Attack, check_attack_input, is_targeted, name_of
from decouplify.adversarial.pixels import check_pixels, device_of
from decouplify.modes import eval_mode, frozen

__all__ = ["Crafted", "craft", "target_classes"]


@dataclass(frozen=True, eq=False)
class Crafted:
    """What an attack made of some images.

    Attributes:
        name: Name of the attack.
        images: Attacked images, shape (N, C, H, W), on the CPU.
        preds: What the model takes them for, shape (N,).
        success: Where it decides as the attack wanted: another class than the label, or the target, shape (N,).
    """

    name: str
    images: Tensor
    preds: Tensor
    success: Tensor


def craft(
    attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 128, seed: int = 0
) -> Crafted:
    """Run an attack on many images, batch by batch.

    Targeted attacks aim at ``target_classes``. Meanwhile the model's parameters need no gradients. Torch's generators
    are left as they were.

    Args:
        attack: The attack.
        model: Maps pixels in [0, 1] to logits.
        images: Shape (N, C, H, W), in [0, 1].
        labels: True classes, shape (N,).
        batch_size: Images at a time.
        seed: Of the attack's randomness and of the targets.

    Raises:
        ValueError: If images or labels are not as described, or the attack returns something else than images in
            [0, 1] of the same shape.
    """
    name = name_of(attack)
    check_attack_input(images, labels, name)
    device = device_of(model)
    parts: list[Tensor] = []
    preds: list[Tensor] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []), eval_mode(model), frozen(model):
        torch.manual_seed(seed)
        aims = _aims(attack, model, images, labels, seed)
        for x, aim in zip(images.split(batch_size), aims.split(batch_size), strict=True):
            attacked = attack(model, x.to(device), aim.to(device)).detach()
            _check_attacked(attacked, x, name)
            parts.append(attacked.cpu().clamp(0, 1))
            with torch.no_grad():
                preds.append(model(attacked).argmax(1).cpu())
    found = torch.cat(preds)
    success = found == aims if is_targeted(attack) else found != labels.cpu()
    return Crafted(name, torch.cat(parts), found, success)


def target_classes(labels: Tensor, n_classes: int, seed: int = 0) -> Tensor:
    """A wrong class for each image: one fixed random cycle through all classes, so that no class is its own target.

    Args:
        labels: True classes, shape (N,), in [0, n_classes).
        n_classes: Number of classes, at least 2.
        seed: Of the cycle.
    """
    order = torch.randperm(n_classes, generator=torch.Generator().manual_seed(seed))
    successor = torch.empty(n_classes, dtype=torch.long)
    successor[order] = order.roll(-1)
    return successor[labels.cpu()]


def _aims(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    if not is_targeted(attack):
        return labels.cpu()
    with torch.no_grad():
        n_classes = model(images[:1].to(device_of(model))).shape[1]
    return target_classes(labels, n_classes, seed)


def _check_attacked(attacked: Tensor, images: Tensor, name: str) -> None:
    if attacked.shape != images.shape:
        raise ValueError(f"attack {name}: returned shape {tuple(attacked.shape)}, {tuple(images.shape)} wanted")
    check_pixels(attacked, f"attack {name}: returned images")
