"""Read annotations in COCO's JSON format: polygons and run lengths, per object."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decouplify._optional import import_optional
from decouplify.concepts._files import Size, read_pixels
from decouplify.concepts.data import IMAGENET, Concept, ConceptImage, Transform, check_concepts, resize_nearest
from decouplify.concepts.masks import as_size

__all__ = ["CocoImages", "load_coco"]


@dataclass(frozen=True, eq=False, repr=False)
class CocoImages:
    """Images with COCO annotations, as a concept data set.

    Attributes:
        file: The JSON file, for messages.
        directory: Folder of the pictures.
        concepts: The concepts, one per COCO category.
        images: The image entries of the file that have an annotation.
        annotations: Their annotations, as the file has them, by image id.
        size: Height and width that images are scaled to, ``None`` for their own.
        mask_size: Grid of the label maps, ``None`` for the size of the image.
        transform: See ``ConceptDataset``.
    """

    file: Path
    directory: Path
    concepts: tuple[Concept, ...]
    images: tuple[Mapping[str, Any], ...]
    annotations: Mapping[int, Sequence[Mapping[str, Any]]]
    size: Size | None
    mask_size: Size | None
    transform: Transform = IMAGENET

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ConceptImage:
        entry = self.images[index]
        pixels = read_pixels(self.directory / entry["file_name"], f"{self.file}, image {entry['id']}", self.size)
        own = (int(entry["height"]), int(entry["width"]))
        by_concept: dict[int, NDArray[np.bool_]] = {}
        for annotation in self.annotations[entry["id"]]:
            mask = _rasterise(annotation["segmentation"], own, f"{self.file}, annotation {annotation.get('id')}")
            number = annotation["category_id"]
            by_concept[number] = by_concept.get(number, np.zeros(own, np.bool_)) | mask
        grid = self.mask_size or self.size or own
        return ConceptImage(pixels, resize_nearest(_stack(by_concept, own), grid), name=str(entry["file_name"]))

    def __repr__(self) -> str:
        return f"CocoImages({self.file.name}: {len(self.images)} images, {len(self.concepts)} concepts)"


def load_coco(
    file: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    category: str = "object",
    size: int | Size | None = 224,
    mask_size: int | Size | None = None,
    transform: Transform = IMAGENET,
) -> CocoImages:
    """The annotated images of a COCO file; those without an annotation are left out.

    Args:
        file: A JSON file with ``images``, ``annotations`` and ``categories``, such as ``instances_val2017.json``.
        images: Folder of the pictures.
        category: Category of the concepts. COCO's super-categories are kinds of objects, not kinds of labels.
        size: Height and width that everything is scaled to, so that images fit into batches; ``None`` leaves them.
        mask_size: Grid of the label maps; that of the images if not given. Half of it makes analyses four times faster.
        transform: What turns pixels (H, W, 3) into what the model reads; normalisation as for ImageNet if not given.

    Raises:
        FileNotFoundError: If the file, or a picture it names, is not there.
        ValueError: If the file is not in the format; the message names the line or the entry.
    """
    path, directory = Path(file), Path(images)
    document = _read_json(path)
    concepts = tuple(Concept(int(c["id"]), str(c["name"]), category) for c in _entries(path, document, "categories"))
    check_concepts(concepts)
    known_images = {entry["id"]: entry for entry in _entries(path, document, "images")}
    known = {concept.number for concept in concepts}
    by_image: dict[int, list[Mapping[str, Any]]] = {}
    for position, annotation in enumerate(_entries(path, document, "annotations")):
        where = f"{path}, annotations[{position}]"
        if annotation["image_id"] not in known_images:
            raise ValueError(f"{where} names image {annotation['image_id']}, which is not among the images")
        if annotation["category_id"] not in known:
            raise ValueError(f"{where} names category {annotation['category_id']}, which is not among the categories")
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    used = tuple(entry for number, entry in known_images.items() if number in by_image)
    if not used:
        raise ValueError(f"{path} has no annotated image")
    for entry in used:
        if not (directory / entry["file_name"]).is_file():
            raise FileNotFoundError(f"{directory / entry['file_name']} does not exist; {path}, image {entry['id']}")
    return CocoImages(path, directory, concepts, used, by_image, as_size(size), as_size(mask_size), transform)


_WANTED = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "segmentation"),
}


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}, wanted an object with {', '.join(_WANTED)}")
    return document


def _entries(path: Path, document: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    entries = document.get(key)
    if not isinstance(entries, list):
        raise ValueError(f"{path} has no list {key!r}; an instances file has {', '.join(_WANTED)}")
    for position, entry in enumerate(entries):
        if missing := [name for name in _WANTED[key] if name not in entry]:
            raise ValueError(f"{path}, {key}[{position}] has no {', '.join(missing)}")
        yield entry


def _stack(by_concept: Mapping[int, NDArray[np.bool_]], size: Size) -> NDArray[np.int32]:
    """Label maps (L, h, w) with as few layers as greedy filling needs: concepts may overlap."""
    layers: list[NDArray[np.int32]] = []
    for number, mask in sorted(by_concept.items()):
        layer = next((layer for layer in layers if not layer[mask].any()), None)
        if layer is None:
            layer = np.zeros(size, np.int32)
            layers.append(layer)
        layer[mask] = number
    return np.stack(layers)


def _rasterise(segmentation: Any, size: Size, where: str) -> NDArray[np.bool_]:
    """The pixels of one object, shape ``size``."""
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        runs = _unpack_runs(counts) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or sum(runs) != size[0] * size[1] or min(runs) < 0:
            raise ValueError(f"{where}: the run lengths do not add up to {size[0]} x {size[1]} pixels")
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return flat.reshape(size, order="F")  # runs go down the columns
    if not isinstance(segmentation, list) or not all(len(polygon) >= 6 for polygon in segmentation):
        raise ValueError(f"{where}: segmentation is neither polygons of at least 3 points nor run lengths")
    canvas = import_optional("PIL.Image", "reading COCO").new("1", size[::-1])
    draw = import_optional("PIL.ImageDraw", "reading COCO").Draw(canvas)
    for polygon in segmentation:
        draw.polygon([float(value) for value in polygon], fill=1)
    return np.asarray(canvas, dtype=np.bool_)


def _unpack_runs(text: str) -> list[int]:
    """Run lengths of COCO's compressed form.

    Each number takes characters of six bits, five of payload with the lowest first, and from the third on it is a
    difference to the number two before (as ``maskApi.c`` of the COCO tools writes them).
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
