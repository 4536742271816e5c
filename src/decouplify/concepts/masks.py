"""Read a folder of pictures and a folder of label pictures, as PASCAL VOC has them: one class index per pixel."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from decouplify.concepts._files import Size, read_pixels, read_values
from decouplify.concepts.data import (
    IMAGENET,
    Concept,
    ConceptImage,
    Transform,
    check_concepts,
    resize_nearest,
)

__all__ = ["VOC_CLASSES", "MaskFolder", "load_masks", "load_voc"]

_VOC = "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant"
VOC_CLASSES = (*_VOC.split(), "sheep", "sofa", "train", "tvmonitor")
"""The twenty classes of PASCAL VOC, numbered from 1."""

_VOID = 255  # the borders of VOC's objects
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


@dataclass(frozen=True, eq=False, repr=False)
class MaskFolder:
    """Pictures with a label picture each, as a concept data set.

    Attributes:
        concepts: The concepts.
        files: Picture and label picture of each image.
        size: Height and width that images and label maps are scaled to, ``None`` for their own.
        mask_size: Grid of the label maps, ``None`` for the size of the image.
        ignore: Value of pixels that are not labelled, besides 0.
        transform: See ``ConceptDataset``.
    """

    concepts: tuple[Concept, ...]
    files: tuple[tuple[Path, Path], ...]
    size: Size | None
    mask_size: Size | None
    ignore: int = _VOID
    transform: Transform = IMAGENET

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> ConceptImage:
        image, mask = self.files[index]
        pixels = read_pixels(image, f"the mask {mask.name}", self.size)
        labels = self._read_labels(mask, f"the labels of {image.name}")
        grid = self.mask_size or self.size or pixels.shape[:2]
        return ConceptImage(pixels, resize_nearest(labels, (grid[0], grid[1]))[None], name=image.name)

    def __repr__(self) -> str:
        return f"MaskFolder({len(self.files)} images, {len(self.concepts)} concepts)"

    def _read_labels(self, path: Path, where: str) -> NDArray[np.int32]:
        values = read_values(path, where)
        if values.ndim != 2:
            raise ValueError(
                f"{path} has {values.shape[-1]} bands, wanted one class index per pixel (a grey or palette picture)"
            )
        labels = values.astype(np.int32)
        labels[labels == self.ignore] = 0
        known = {concept.number for concept in self.concepts}
        if unknown := sorted({int(n) for n in np.unique(labels)} - {0} - known):
            raise ValueError(f"{path} has the class index {unknown[0]}; the classes given are {sorted(known)}")
        return labels


def load_masks(
    images: str | os.PathLike[str],
    masks: str | os.PathLike[str],
    names: Sequence[str] | Mapping[int, str],
    *,
    ids: Iterable[str] | None = None,
    category: str = "object",
    size: int | Size | None = 224,
    mask_size: int | Size | None = None,
    ignore: int = _VOID,
    transform: Transform = IMAGENET,
) -> MaskFolder:
    """A folder of pictures and a folder of label pictures with the same names.

    Args:
        images: Folder of the pictures.
        masks: Folder of the label pictures (``.png``), whose pixel values are class indices, 0 for none.
        names: Names of the classes: a mapping from the index, or a sequence that starts with index 1.
        ids: Names of the pictures to use, without suffix; all that have a label picture if not given.
        category: Category of the concepts.
        size: Height and width that everything is scaled to, so that images fit into batches; ``None`` leaves them.
        mask_size: Grid of the label maps; that of the images if not given. Half of it makes analyses four times faster.
        ignore: Pixel value that means "not labelled", besides 0.
        transform: What turns pixels (H, W, 3) into what the model reads; normalisation as for ImageNet if not given.

    Raises:
        FileNotFoundError: If a folder, or a picture that belongs to a label picture, is not there.
        ValueError: If no image is found.
    """
    numbered = names if isinstance(names, Mapping) else dict(enumerate(names, start=1))
    concepts = tuple(Concept(number, name, category) for number, name in numbered.items())
    check_concepts(concepts)
    folder = Path(masks)
    found = _list_pictures(Path(images)), _list_pictures(folder)
    stems = sorted(found[1]) if ids is None else list(ids)
    if not stems:
        raise ValueError(f"{folder} has no label pictures ({', '.join(_SUFFIXES)})")
    for folder_of, there in ((images, found[0]), (masks, found[1])):
        if missing := [stem for stem in stems if stem not in there]:
            raise FileNotFoundError(f"{folder_of} has no picture {missing[0]!r} ({', '.join(_SUFFIXES)})")
    files = tuple((found[0][stem], found[1][stem]) for stem in stems)
    return MaskFolder(concepts, files, as_size(size), as_size(mask_size), ignore, transform)


def load_voc(
    directory: str | os.PathLike[str],
    split: str = "val",
    *,
    size: int | Size | None = 224,
    mask_size: int | Size | None = None,
    transform: Transform = IMAGENET,
) -> MaskFolder:
    """The segmented images of a PASCAL VOC directory, such as ``VOCdevkit/VOC2012``.

    Args:
        directory: The one with ``JPEGImages``, ``SegmentationClass`` and ``ImageSets`` in it.
        split: Name of a list in ``ImageSets/Segmentation``.
        size: See ``load_masks``, as for ``mask_size`` and ``transform``.
        mask_size: Grid of the label maps.
        transform: What turns pixels into what the model reads.

    Raises:
        FileNotFoundError: If the list or a picture is not there.
        ValueError: If the list is empty.
    """
    root = Path(directory)
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listed.is_file():
        raise FileNotFoundError(
            f"{listed} does not exist; give the directory with JPEGImages in it, and a split it has"
        )
    ids = listed.read_text().split()
    if not ids:
        raise ValueError(f"{listed} lists no image")
    options = {"size": size, "mask_size": mask_size, "transform": transform}
    return load_masks(root / "JPEGImages", root / "SegmentationClass", VOC_CLASSES, ids=ids, **options)  # type: ignore[arg-type]  # of one type each


def as_size(size: int | Size | None) -> Size | None:
    """Height and width; a single number means a square."""
    return (size, size) if isinstance(size, int) else size


def _list_pictures(folder: Path) -> dict[str, Path]:
    """Pictures of a folder by name without suffix."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory")
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in _SUFFIXES}
