"""What a concept is, and what a data set must offer so that filters can be compared with concepts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from decouplify.data import Normalise

__all__ = ["IMAGENET", "Concept", "ConceptDataset", "ConceptImage", "ConceptImages", "Scaled", "find_concept"]

Pixels: TypeAlias = NDArray[np.uint8]
Transform: TypeAlias = Callable[[Pixels], Tensor]

IMAGENET = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What networks trained on ImageNet expect; the readers' default."""


@dataclass(frozen=True)
class Scaled:
    """A transform that brings images to the size a network reads, for label sets that come in another.

    Attributes:
        size: What the network reads, (C, H, W) with C = 1 or 3.
        normalise: What follows.
    """

    size: tuple[int, int, int]
    normalise: Normalise = IMAGENET

    def __call__(self, pixels: Pixels) -> Tensor:
        """Float32 image (C, H, W) of pixels (H', W', C')."""
        image = torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, 0)[None].float()
        image = F.interpolate(image, size=self.size[1:], mode="bilinear", align_corners=False, antialias=True)[0]
        image = image.mean(0, keepdim=True) if self.size[0] == 1 else image.expand(self.size)
        return self.normalise(image.round().clamp(0, 255).to(torch.uint8).movedim(0, -1).numpy())


@dataclass(frozen=True)
class Concept:
    """Something that images are labelled with.

    Attributes:
        number: The number that stands for it in label maps, at least 1.
        name: Its name, such as "wheel".
        category: What kind of concept it is, such as "part"; in BRODEN one of color, object, material, part, scene and
            texture.
    """

    number: int
    name: str
    category: str


@dataclass(frozen=True, eq=False)
class ConceptImage:
    """One image and its labels. The grid of the labels may be coarser than the image.

    Attributes:
        pixels: The image before any normalisation, uint8, shape (H, W, C).
        masks: Label maps, integers, shape (L, h, w): concept numbers, 0 where nothing is labelled. A place may carry
            up to L labels. With L = 0 the shape still says the grid.
        whole: Numbers of the concepts that hold for the image as a whole.
        categories: Categories for which this image was labelled, or ``None`` if for all of them. A concept of another
            category may be in the image all the same: its absence from ``masks`` says nothing.
        name: What identifies the image, for messages.
    """

    pixels: Pixels
    masks: NDArray[np.integer[Any]]
    whole: tuple[int, ...] = ()
    categories: frozenset[str] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        pixels, masks = self.pixels, self.masks
        if pixels.dtype != np.uint8 or pixels.ndim != 3:
            raise ValueError(
                f"image {self.name!r}: pixels are {pixels.dtype} of shape {pixels.shape}, wanted uint8 (H, W, C)"
            )
        if masks.dtype.kind not in "iu" or masks.ndim != 3 or 0 in masks.shape[1:]:
            raise ValueError(
                f"image {self.name!r}: masks are {masks.dtype} of shape {masks.shape}, wanted integers (L, h, w)"
            )

    @property
    def numbers(self) -> list[int]:
        """Numbers of all concepts in the image, sorted."""
        return sorted({int(n) for n in np.unique(self.masks)} - {0} | set(self.whole))

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the label maps."""
        return self.masks.shape[1], self.masks.shape[2]

    def mask(self, number: int) -> NDArray[np.bool_]:
        """Where a concept is, shape (h, w)."""
        if number in self.whole:
            return np.ones(self.grid, dtype=np.bool_)
        where: NDArray[np.bool_] = (self.masks == number).any(axis=0)
        return where


class ConceptDataset(Protocol):
    """Images labelled with concepts; ``load_broden`` and its siblings return some, and a class of your own may be one.

    ``dataset[i]`` for i from 0 to ``len(dataset) - 1`` is read once or twice per analysis and not kept.
    """

    @property
    def concepts(self) -> Sequence[Concept]:
        """All concepts that may occur, each with a number of its own."""

    @property
    def transform(self) -> Transform:
        """What turns the pixels of one image (H, W, C) into what the model reads, (C, H', W').

        It may scale the image as a whole; label maps would not follow a crop or a flip.
        """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ConceptImage: ...


@dataclass(frozen=True, eq=False, repr=False)
class ConceptImages:
    """A data set held in memory.

    Attributes:
        concepts: The concepts.
        images: The images.
        transform: See ``ConceptDataset``.

    Raises:
        ValueError: If two concepts share a number, or a number is less than 1.
    """

    concepts: tuple[Concept, ...]
    images: Sequence[ConceptImage]
    transform: Transform = IMAGENET

    def __post_init__(self) -> None:
        check_concepts(self.concepts)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ConceptImage:
        return self.images[index]

    def __repr__(self) -> str:
        return f"ConceptImages({len(self.images)} images, {len(self.concepts)} concepts)"


def check_concepts(concepts: Sequence[Concept]) -> None:
    """Raise ``ValueError`` unless there are concepts, numbered apart and from 1."""
    if not concepts:
        raise ValueError("a concept data set needs at least one concept, got none")
    by_number: dict[int, Concept] = {}
    for concept in concepts:
        if concept.number < 1:
            raise ValueError(f"concept {concept.name!r} has number {concept.number}; 0 means unlabelled, wanted >= 1")
        other = by_number.setdefault(concept.number, concept)
        if other is not concept:
            raise ValueError(f"concepts {other.name!r} and {concept.name!r} share the number {concept.number}")


def find_concept(dataset: ConceptDataset, concept: str | int | Concept) -> Concept:
    """The concept of that name or number.

    Raises:
        ValueError: If the data set has none, or several of that name.
    """
    if isinstance(concept, Concept):
        concept = concept.number
    found = [c for c in dataset.concepts if concept in (c.number, c.name)]
    if len(found) == 1:
        return found[0]
    if found:
        numbers = ", ".join(f"{c.number} ({c.category})" for c in found)
        raise ValueError(f"several concepts are called {concept!r}; give one of the numbers {numbers}")
    near = difflib.get_close_matches(str(concept), [c.name for c in dataset.concepts], n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"no concept {concept!r} among the {len(dataset.concepts)} of the data set{hint}")


def resize_nearest(maps: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Maps (..., h, w) on another grid (..., H, W), each place taking the value of the nearest old one."""
    height, width = maps.shape[-2:]
    rows = ((2 * np.arange(size[0]) + 1) * height) // (2 * size[0])
    columns = ((2 * np.arange(size[1]) + 1) * width) // (2 * size[1])
    return maps[..., rows[:, None], columns[None, :]]
