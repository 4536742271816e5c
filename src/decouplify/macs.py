"""Count the multiply-accumulates that given images need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from decouplify.decoupling import decoupling_of
from decouplify.errors import NonFiniteError
from decouplify.modes import eval_mode

__all__ = ["MacCount", "count_macs"]


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates (MACs) of convolutions, linear layers and controllers.

    Attributes:
        dense: MACs of the original network for one image.
        executed: MACs under each image's own gates, controllers included, int64, shape (N,).
        controllers: The part of ``executed`` that the controllers need, the same for every image.
    """

    dense: int
    executed: Tensor
    controllers: int

    @property
    def reduction(self) -> float:
        """Dense MACs / mean executed MACs, dimensionless; above 1 means saved."""
        return self.dense / float(self.executed.double().mean())

    def __str__(self) -> str:
        mean = float(self.executed.double().mean())
        return (
            f"{self.reduction:.2f}x fewer MACs: {self.dense / 1e6:.1f} M dense, {mean / 1e6:.1f} M executed (mean of "
            f"{len(self.executed)} images, {self.controllers / 1e6:.2f} M of it in controllers)"
        )


@torch.no_grad()
def count_macs(model: nn.Module, images: Tensor) -> MacCount:
    """What the sparse form of a wrapped model executes for each image, counted from its gates.

    Counts are those of the plan's input size; images of another size would need other counts, and are refused.

    Args:
        model: A wrapped model; its modes are kept.
        images: Shape (N, C, H, W), on the model's device.

    Raises:
        ValueError: If the model is not wrapped, or the images have another size.
        NonFiniteError: If the images are not finite.
    """
    decoupling = decoupling_of(model, "count_macs")
    if tuple(images.shape[1:]) != tuple(decoupling.plan.input_size):
        raise ValueError(
            f"count_macs: images of size {tuple(images.shape[1:])} given, the model was wrapped for "
            f"{tuple(decoupling.plan.input_size)}; wrap it with input_size={tuple(images.shape[1:])}"
        )
    if not bool(images.isfinite().all()):
        raise NonFiniteError(f"count_macs: {int((~images.isfinite()).sum())} values of the images are NaN or infinite")
    with eval_mode(model):
        model(images)
    path = decoupling.path().double()  # counts are exact up to 2**53
    executed = decoupling.costs.executed(path).round().long()
    return MacCount(decoupling.costs.n_dense, executed, decoupling.costs.n_controllers)
