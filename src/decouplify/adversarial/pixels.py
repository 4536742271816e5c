"""Classifiers of pixels: attacks move in [0, 1], so the normalisation belongs inside the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["PixelModel"]

_ROUNDING = 1e-6  # how far an adapter's arithmetic may leave [0, 1]


class PixelModel(nn.Module):
    """A classifier that reads pixels in [0, 1]: normalises them, then runs the given model.

    Parameters, gates and hooks stay those of the model, which is found at ``.module``; to record paths of pixels, call
    ``decouplify.record(pixel_model.module, [pixel_model.normalise(images)])``.

    Args:
        model: A classifier of normalised images, wrapped or not.
        mean: Mean per channel that its images were normalised with; 0 for models that normalise themselves.
        std: Standard deviation per channel, > 0.

    Raises:
        ValueError: If mean and std differ in length, or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(
                f"PixelModel: mean {tuple(mean)} and std {tuple(std)} given, one number each per channel and std "
                "above 0 wanted"
            )
        self.module = model
        first = next(model.parameters(), torch.empty(0))
        for name, values in (("mean", mean), ("std", std)):
            # Not persistent: the state_dict stays that of the model, with "module." in front.
            tensor = torch.tensor(values, dtype=torch.float32, device=first.device).view(1, -1, 1, 1)
            self.register_buffer(name, tensor, persistent=False)
        self.train(model.training)

    def normalise(self, x: Tensor) -> Tensor:
        """What the model reads of pixels (N, C, H, W)."""
        return (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of pixels (N, C, H, W)."""
        return self.module(self.normalise(x))


def check_pixels(images: Tensor, where: str) -> None:
    """Raise ``ValueError`` unless the tensor holds images (N, C, H, W) with values in [0, 1]."""
    if images.dim() != 4 or len(images) == 0 or not images.is_floating_point():
        raise ValueError(
            f"{where}: images of shape {tuple(images.shape)} and type {images.dtype} given, floating point "
            "(N, C, H, W) with N > 0 wanted"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # also where they are NaN
        raise ValueError(
            f"{where}: pixels from {low:.3g} to {high:.3g} given, [0, 1] wanted; undo the normalisation of the images "
            "and put it into the model with PixelModel(model, mean, std)"
        )


def check_labels(labels: Tensor, n_images: int, where: str) -> None:
    """Raise ``ValueError`` unless there is one integer per image."""
    if labels.shape != (n_images,) or labels.is_floating_point():
        raise ValueError(
            f"{where}: labels of shape {tuple(labels.shape)} and type {labels.dtype} given, integers of shape "
            f"({n_images},) wanted, one per image"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device
