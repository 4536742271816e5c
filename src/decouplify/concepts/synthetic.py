"""Small pictures of coloured shapes with known concepts: to try the analyses, and to test them.

Every picture shows one of three objects, a *ball*, a *box* or a *kite*, in one of three colours, often with a part on
it (a *spot* or a *door*), sometimes behind a *pole*, on the ground of a *day* or a *night*. The colour tells nothing
about the object.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decouplify._optional import import_optional
from decouplify.concepts.data import Concept, ConceptImage, ConceptImages
from decouplify.data import Normalise

__all__ = ["OBJECTS", "planted_concepts", "write_mini_broden"]

OBJECTS = ("ball", "box", "kite")
"""The objects of the synthetic pictures; each picture shows exactly one."""

# Numbers beyond 255 need the second band of a label picture.
_CONCEPTS = (
    Concept(1, "red-c", "color"),
    Concept(2, "green-c", "color"),
    Concept(3, "blue-c", "color"),
    Concept(254, "ball", "object"),
    Concept(255, "box", "object"),
    Concept(256, "kite", "object"),
    Concept(257, "pole", "object"),
    Concept(300, "spot", "part"),
    Concept(301, "door", "part"),
    Concept(514, "day-s", "scene"),
    Concept(515, "night-s", "scene"),
    Concept(700, "grainy", "texture"),
)
_NUMBER = {concept.name: concept.number for concept in _CONCEPTS}
_PIXEL_CATEGORIES = ("color", "object", "part")
_WHOLE_CATEGORIES = ("scene", "texture")
_GREY = Normalise((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
Mask = NDArray[np.bool_]


def planted_concepts(n_images: int = 200, size: int = 64, seed: int = 0) -> ConceptImages:
    """Synthetic pictures in memory, labelled without error, normalised by mean 0.5 and standard deviation 0.25.

    Args:
        n_images: How many.
        size: Height and width; the labels have half of it.
        seed: Seed of all that is random.

    Raises:
        ValueError: If the pictures would be too small to show anything, or of an odd size.
    """
    _check(n_images, size, "planted_concepts")
    rng = np.random.default_rng(seed)
    images = [_draw(rng, size, f"scene_{i:04d}.png") for i in range(n_images)]
    return ConceptImages(_CONCEPTS, [image for image, _ in images], _GREY)


def write_mini_broden(directory: str | os.PathLike[str], n_images: int = 20, size: int = 64, seed: int = 0) -> Path:
    """Synthetic pictures on disk, in the format of BRODEN with all its oddities; ``load_broden`` reads them.

    There are label pictures of two layers, labels for whole images, numbers beyond 255, cells without labels and images
    without any, a tenth of each.

    Args:
        directory: Where to; created if needed, must be empty.
        n_images: How many images, 70 % of them in the split "train".
        size: Height and width of the images; label pictures have half of it.
        seed: Seed of all that is random.

    Returns:
        The directory.

    Raises:
        FileExistsError: If the directory holds anything.
        ValueError: If the pictures would be too small to show anything, or of an odd size.
    """
    _check(n_images, size, "write_mini_broden")
    root = Path(directory)
    (root / "images" / "synthetic").mkdir(parents=True, exist_ok=True)
    if sorted(path.name for path in root.iterdir()) != ["images"]:
        raise FileExistsError(f"{root} is not empty; give another directory")
    pillow = import_optional("PIL.Image", "writing pictures")
    rng = np.random.default_rng(seed)
    rows, drawn = [], []
    for i in range(n_images):
        image, layers = _draw(rng, size, f"synthetic/scene_{i:04d}.png")
        split = "train" if i < 0.7 * n_images else "val"
        pillow.fromarray(image.pixels).save(root / "images" / image.name)
        cells = _write_labels(root, image, layers) if i % 10 != 9 else {}
        if i % 10 == 4:
            cells["part"] = ""  # not labelled for parts, whether it has some or not
        rows.append([image.name, split, size, size, size // 2, size // 2, *(cells.get(c, "") for c in _categories())])
        drawn.append(image)
    _write_csv(root / "index.csv", ["image", "split", "ih", "iw", "sh", "sw", *_categories()], rows)
    _write_tables(root, drawn)
    return root


def _check(n_images: int, size: int, caller: str) -> None:
    if n_images < 1 or size < 16 or size % 2:
        raise ValueError(
            f"{caller}: {n_images} images of size {size} asked for, wanted at least 1, of an even size >= 16"
        )


def _categories() -> tuple[str, ...]:
    return _PIXEL_CATEGORIES + _WHOLE_CATEGORIES


def _draw(rng: np.random.Generator, size: int, name: str) -> tuple[ConceptImage, dict[str, list[NDArray[np.int32]]]]:
    """One picture and its label maps by category, on the half grid, dominant first."""
    day, grainy = rng.random() < 0.5, rng.random() < 0.3
    canvas = np.full((size, size, 3), 150.0 if day else 60.0) + rng.normal(0, 25 if grainy else 8, (size, size, 1))
    kind, color = OBJECTS[rng.integers(3)], int(rng.integers(3))
    radius = size * rng.uniform(0.18, 0.3)
    center = rng.uniform(radius, size - radius, 2)
    body = _shape(kind, size, center, radius)
    canvas[body] = np.eye(3)[color] * rng.uniform(170, 255) + 20
    part = rng.random() < 0.7
    inner = _shape("ball" if kind == "ball" else "box", size, center, radius * 0.45) & body & part
    canvas[inner] = 230.0
    pole = _pole(rng, size) if rng.random() < 0.3 else np.zeros_like(body)
    canvas[pole] = 20.0
    visible, part_visible = body & ~pole, inner & ~pole
    object_labels, pole_labels = _labels(_NUMBER[kind], body), _labels(_NUMBER["pole"], pole)
    layers = {
        "color": [_labels(_NUMBER[("red-c", "green-c", "blue-c")[color]], visible & ~inner)],
        # The pole stands before the object; what it hides of it is a second label there.
        "object": [np.where(pole_labels, pole_labels, object_labels), np.where(pole_labels, object_labels, 0)],
        "part": [_labels(_NUMBER["spot" if kind == "ball" else "door"], part_visible)],
    }
    layers = {category: [m for m in maps if m.any()] for category, maps in layers.items()}
    whole = (_NUMBER["day-s" if day else "night-s"], *((_NUMBER["grainy"],) if grainy else ()))
    stacked = [m for maps in layers.values() for m in maps]
    pixels = canvas.clip(0, 255).astype(np.uint8)
    return ConceptImage(pixels, np.stack(stacked), whole, name=name), layers


def _shape(kind: str, size: int, center: NDArray[np.float64], radius: float) -> Mask:
    y, x = np.abs(np.mgrid[:size, :size] - center[:, None, None])
    if kind == "ball":
        inside: Mask = x**2 + y**2 <= radius**2
    elif kind == "box":
        inside = np.maximum(x, y) <= 0.85 * radius
    else:
        inside = x + y <= radius
    return inside


def _pole(rng: np.random.Generator, size: int) -> Mask:
    start, width = rng.integers(0, size - size // 12), size // 12
    columns = np.arange(size)
    return np.broadcast_to((columns >= start) & (columns < start + width), (size, size))


def _labels(number: int, where: Mask) -> NDArray[np.int32]:
    """A label map on the half grid: labelled where at least half of the four pixels are."""
    height, width = where.shape
    n_inside = where.reshape(height // 2, 2, width // 2, 2).sum(axis=(1, 3))
    return np.where(n_inside >= 2, number, 0).astype(np.int32)


def _write_labels(root: Path, image: ConceptImage, layers: dict[str, list[NDArray[np.int32]]]) -> dict[str, str]:
    """Write the label pictures; the cells of the index by category."""
    pillow = import_optional("PIL.Image", "writing pictures")
    cells = {}
    for category, maps in layers.items():
        names = []
        for depth, numbers in enumerate(maps):
            names.append(image.name.replace(".png", f"_{category}{depth + 1 if depth else ''}.png"))
            bands = np.stack([numbers % 256, numbers // 256, np.zeros_like(numbers)], axis=-1)
            pillow.fromarray(bands.astype(np.uint8)).save(root / "images" / names[-1])
        cells[category] = ";".join(names)
    for category in _WHOLE_CATEGORIES:
        numbers_of = [c.number for c in _CONCEPTS if c.category == category and c.number in image.whole]
        cells[category] = ";".join(map(str, numbers_of))
    return cells


def _write_tables(root: Path, images: Sequence[ConceptImage]) -> None:
    """``label.csv``, ``category.csv`` and the ``c_*.csv``."""
    frequency = {c.number: sum(c.number in image.numbers for image in images) for c in _CONCEPTS}
    coverage = {c.number: sum(float(image.mask(c.number).mean()) for image in images) for c in _CONCEPTS}
    labels = [
        [c.number, c.name, f"{c.category}({frequency[c.number]})", frequency[c.number], f"{coverage[c.number]:.6f}", ""]
        for c in _CONCEPTS
    ]
    _write_csv(root / "label.csv", ["number", "name", "category", "frequency", "coverage", "syns"], labels)
    categories = []
    for category in _categories():
        members = [c for c in _CONCEPTS if c.category == category]
        rows = [
            [code, c.number, c.name, frequency[c.number], f"{coverage[c.number]:.6f}"]
            for code, c in enumerate(members, start=1)
        ]
        _write_csv(root / f"c_{category}.csv", ["code", "number", "name", "frequency", "coverage"], rows)
        total = sum(frequency[c.number] for c in members)
        categories.append([category, members[0].number, members[-1].number, len(members), total])
    _write_csv(root / "category.csv", ["name", "first", "last", "count", "frequency"], categories)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
