"""Where filters are active and concepts are, on one grid, and how much the two overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from decouplify.concepts.data import Concept, ConceptImage, resize_nearest


class Labels(NamedTuple):
    """The concepts of one image.

    Attributes:
        columns: Positions of the concepts present, int64, shape (t,).
        masks: Where they are, bool, shape (t, h, w).
        annotated: Which categories the image is labelled for, bool, shape (C,).
    """

    columns: Tensor
    masks: Tensor
    annotated: Tensor

    @property
    def flat(self) -> Tensor:
        """The masks as rows of 0 and 1, float32, shape (t, h w): products of rows count places exactly."""
        return self.masks.flatten(1).float()

    def on_grid(self, grid: tuple[int, int]) -> Labels:
        """The same labels on another grid."""
        if tuple(self.masks.shape[1:]) == grid:
            return self
        masks = torch.from_numpy(resize_nearest(self.masks.cpu().numpy(), grid)).to(self.masks.device)
        return Labels(self.columns, masks, self.annotated)


@dataclass(frozen=True)
class Encoder:
    """Turns labelled images into tensors.

    Attributes:
        concepts: All concepts; their positions are the columns.
        device: Where the tensors shall be.
    """

    concepts: Sequence[Concept]
    device: torch.device

    @cached_property
    def categories(self) -> list[str]:
        """All categories, in the order in which the concepts name them first."""
        return list(dict.fromkeys(concept.category for concept in self.concepts))

    @cached_property
    def category_of(self) -> Tensor:
        """Position of each concept's category, shape (T,)."""
        position = {name: i for i, name in enumerate(self.categories)}
        return torch.tensor([position[c.category] for c in self.concepts], device=self.device)

    @cached_property
    def column_of(self) -> Mapping[int, int]:
        """Position of each concept by number."""
        return {concept.number: i for i, concept in enumerate(self.concepts)}

    def __call__(self, image: ConceptImage) -> Labels:
        """The concepts of one image.

        Raises:
            ValueError: If a label is none of the concepts.
        """
        numbers, column_of = image.numbers, self.column_of
        if unknown := [n for n in numbers if n not in column_of]:
            raise ValueError(f"image {image.name!r} has the label {unknown[0]}, which is no concept of its data set")
        columns = torch.tensor([column_of[n] for n in numbers], dtype=torch.int64, device=self.device)
        masks = np.stack([image.mask(n) for n in numbers]) if numbers else np.zeros((0, *image.grid), np.bool_)
        annotated = [image.categories is None or name in image.categories for name in self.categories]
        # A label that counts for another category than it was given for: the image is labelled for that one, too, or
        # an intersection could be larger than its union.
        for n in numbers:
            annotated[self.categories.index(self.concepts[column_of[n]].category)] = True
        return Labels(columns, torch.from_numpy(masks).to(self.device), torch.tensor(annotated, device=self.device))


def active_masks(features: Tensor, thresholds: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which filters are active in an image and where: their maps, scaled up bilinearly, exceed their thresholds.

    Args:
        features: Maps of one image, shape (K, H, W).
        thresholds: Shape (K,).
        grid: Height h and width w of the label maps.

    Returns:
        Indices of the filters that are active anywhere, shape (k,), and where they are, bool, shape (k, h, w).
    """
    # Between places a bilinear map never exceeds its highest value: most filters need not be scaled.
    candidates = (features.amax(dim=(1, 2)) > thresholds).nonzero().flatten()
    if len(candidates) == 0:  # which interpolate refuses
        return candidates, torch.zeros(0, *grid, dtype=torch.bool, device=features.device)
    upper = F.interpolate(features[candidates][None], size=grid, mode="bilinear", align_corners=False)[0]
    masks = upper > thresholds[candidates, None, None]
    active = masks.flatten(1).any(1)
    return candidates[active], masks[active]


def intersections(masks: Tensor, flat_labels: Tensor) -> Tensor:
    """Places that each of k masks (k, h, w) has in common with each of t labels (t, h w), float32, shape (k, t)."""
    return masks.flatten(1).float() @ flat_labels.T


def overlap(masks: Tensor, label: Tensor) -> Tensor:
    """Intersection over union of masks (k, h, w) and one label (h, w), shape (k,), in [0, 1]; 0 for two empty ones."""
    both = (masks & label).sum(dim=(1, 2)).double()
    either = (masks | label).sum(dim=(1, 2)).double()
    return both / either.clamp(min=1)
