"""Accuracy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from decouplify.modes import eval_mode

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Top-1 accuracy in [0, 1] in eval mode.

    Args:
        model: A classifier: a module, whose modes are kept, or any function from images to logits.
        images: Normalised images, shape (N, C, H, W).
        labels: Class indices, shape (N,).
        batch_size: Images per forward.
    """
    if isinstance(model, nn.Module) and model.training:
        with eval_mode(model):
            return evaluate(model, images, labels, batch_size)
    n_right = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        n_right += int((model(x).argmax(1) == y).sum())
    return n_right / max(len(labels), 1)
