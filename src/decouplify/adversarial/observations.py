"""What detectors look at: paths, and what one could look at instead of them.

One forward gives path, logits and pooled features of an image. Pseudo-paths and critical data routing paths are read
off the network as it was before it was wrapped, which costs passes of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify.adversarial.pixels import PixelModel, device_of
from decouplify.decoupling import decoupling_of
from decouplify.modes import eval_mode
from decouplify.paths import PseudoThresholds, pseudo_paths, pseudo_thresholds
from decouplify.plan import End
from decouplify.surgery import unwrap

__all__ = ["OF_ONE_FORWARD", "OF_PATHS", "Observation", "Original", "observe"]

Features = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Observation:
    """What one forward of a wrapped model shows of N images.

    Attributes:
        path: Gates, 0 or 1, shape (N, F).
        margins: Their logits, shape (N, F); a gate is 1 where its logit is positive.
        logits: Shape (N, classes).
        pooled: Mean over space of every gated value, shape (N, F'); F' > F where convolutions share a gate.
    """

    path: Features
    margins: Features
    logits: Features
    pooled: Features

    def __len__(self) -> int:
        return len(self.logits)

    def rows(self, index: NDArray[np.intp]) -> Observation:
        """The chosen images."""
        return Observation(self.path[index], self.margins[index], self.logits[index], self.pooled[index])

    @property
    def preds(self) -> NDArray[np.int64]:
        """Predicted class, shape (N,)."""
        return self.logits.argmax(1)

    @property
    def max_softmax(self) -> Features:
        """Probability of the predicted class, shape (N, 1)."""
        shifted = np.exp(self.logits - self.logits.max(1, keepdims=True))
        return (1 / shifted.sum(1, keepdims=True)).astype(np.float32)


# What a path is looked at as: its bits, as in the paper, or how far each gate is from switching.
OF_PATHS: dict[str, Callable[[Observation], Features]] = {
    "paths": lambda seen: seen.path,
    "margins": lambda seen: seen.margins,
}
# The baselines that need nothing beyond the forward that gave the path.
OF_ONE_FORWARD: dict[str, Callable[[Observation], Features]] = {
    "softmax": lambda seen: seen.max_softmax,
    "logits": lambda seen: seen.logits,
    "features": lambda seen: seen.pooled,
}


def observe(model: nn.Module, images: Tensor, batch_size: int = 128) -> Observation:
    """Run a wrapped model over images in eval mode.

    Args:
        model: Maps the images to logits.
        images: Shape (N, C, H, W), on any device.
        batch_size: Images at a time.

    Raises:
        ValueError: If the model is not wrapped.
    """
    decoupling = decoupling_of(model, "observe")
    rows: list[tuple[Tensor, ...]] = []
    pooled: list[Tensor] = []

    def pool(gate: str, end: End, features: Tensor) -> None:
        pooled.append(features.float().mean((2, 3) if end.axis == 1 else (1, 2)))

    with eval_mode(model), torch.no_grad(), decoupling.observed(pool):
        for x in images.split(batch_size):
            pooled.clear()
            logits = model(x.to(device_of(model)))
            margins = torch.cat(list(decoupling.margins().values()), 1)
            rows.append((decoupling.path(), margins.float(), logits.float(), torch.cat(pooled, 1)))
    return Observation(*(torch.cat(parts).cpu().numpy() for parts in zip(*rows, strict=True)))


class Original:
    """The network as it was before it was wrapped, seen through pseudo-paths.

    Args:
        wrapped: The wrapped model, or a ``PixelModel`` of it; its normalisation and its sites are used.
        original: The network before wrapping. By default the wrapped one without its gates, which has the weights that
            were trained together with the gates.
        clean: Clean images that say from which response on a filter counts as open.
        batch_size: Images at a time.
    """

    def __init__(self, wrapped: nn.Module, original: nn.Module | None, clean: Tensor, batch_size: int) -> None:
        self.pixels = wrapped if isinstance(wrapped, PixelModel) else PixelModel(wrapped)
        self.wrapped, self.batch_size = self.pixels.module, batch_size
        self.network = unwrap(copy.deepcopy(self.wrapped)) if original is None else original
        self.thresholds: PseudoThresholds = pseudo_thresholds(
            self.network, list(self._batches(clean)), like=self.wrapped, progress=False
        )

    def pseudo(self, images: Tensor) -> Features:
        """Where a filter's pooled response is above its mean, 0 or 1, shape (N, F)."""
        paths = pseudo_paths(
            self.network, self._batches(images), thresholds=self.thresholds, like=self.wrapped, progress=False
        )
        return paths.unpack().astype(np.float32)

    def critical(self, images: Tensor) -> Features:
        """Factors of the critical data routing path, >= 0, shape (N, F); thirty forward and backward passes."""
        batches = self._batches(images)
        paths = pseudo_paths(self.network, batches, rule="cdrp", like=self.wrapped, margins=True, progress=False)
        assert paths.margins is not None
        return paths.margins.astype(np.float32)

    def _batches(self, images: Tensor) -> Iterator[Tensor]:
        where = self.pixels.mean.device
        return (self.pixels.normalise(x.to(where)) for x in images.split(self.batch_size))
