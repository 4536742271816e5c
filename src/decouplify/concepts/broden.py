"""Read BRODEN, the broadly and densely labelled images of Bau et al., Network Dissection, CVPR 2017.

The directory holds ``index.csv`` (a row per image, with a cell per category), ``label.csv`` (the concepts) and the
pictures under ``images/``. Nothing is downloaded: the images come from five collections with terms of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from decouplify.concepts._files import as_integer, read_pixels, read_table, read_values
from decouplify.concepts.data import IMAGENET, Concept, ConceptImage, Transform, check_concepts

__all__ = ["Broden", "load_broden"]

_FIXED = ("image", "split", "ih", "iw", "sh", "sw")
_IN_CATEGORY = re.compile(r"\s*(.+?)\s*\((\d+)\)\s*")


class _Row(NamedTuple):
    """One line of index.csv: numbers and label pictures by category, and the line they are from."""

    line: int
    image: str
    split: str
    grid: tuple[int, int]
    whole: dict[str, tuple[int, ...]]
    layers: dict[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class Broden:
    """A BRODEN directory as a concept data set.

    Attributes:
        directory: Where it is.
        concepts: Labels of the chosen categories; one that is in several counts for the one it covers most of.
        categories: The chosen categories.
        rows: One entry per image that is labelled for any of them.
        n_dropped: Images of the split that are labelled for none of them.
        transform: See ``ConceptDataset``.
    """

    directory: Path
    concepts: tuple[Concept, ...]
    categories: tuple[str, ...]
    rows: tuple[_Row, ...]
    n_dropped: int
    transform: Transform = IMAGENET

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> ConceptImage:
        row = self.rows[index]
        where = f"{self.directory / 'index.csv'}, line {row.line}"
        names = [name for layers in row.layers.values() for name in layers]
        layers = [self._read_layer(name, row.grid, where) for name in names]
        return ConceptImage(
            pixels=read_pixels(self.directory / "images" / row.image, where),
            masks=np.stack(layers) if layers else np.zeros((0, *row.grid), np.int32),
            whole=tuple(sorted({number for numbers in row.whole.values() for number in numbers})),
            categories=frozenset({*row.whole, *row.layers}),
            name=row.image,
        )

    def __repr__(self) -> str:
        return (
            f"Broden({self.directory.name}: {len(self.rows)} images, {len(self.concepts)} concepts of "
            f"{', '.join(self.categories)}; {self.n_dropped} images without any of them left out)"
        )

    @cached_property
    def _known(self) -> set[int]:
        return {concept.number for concept in self.concepts}

    def _read_layer(self, name: str, grid: tuple[int, int], where: str) -> NDArray[np.int32]:
        path = self.directory / "images" / name
        numbers = decode_labels(read_values(path, where))
        if numbers.shape != grid:
            raise ValueError(f"{path} ({where}) has size {numbers.shape}, the index says (sh, sw) = {grid}")
        if unknown := sorted({int(n) for n in np.unique(numbers)} - {0} - self._known):
            raise ValueError(
                f"{path} ({where}) has the label {unknown[0]}, which label.csv does not list under any of "
                f"{', '.join(self.categories)}"
            )
        return numbers


def load_broden(
    directory: str | os.PathLike[str],
    *,
    categories: Iterable[str] | None = None,
    split: str | None = None,
    transform: Transform = IMAGENET,
) -> Broden:
    """The labelled images of a BRODEN directory.

    Args:
        directory: What the archive unpacks to: the one with ``index.csv`` in it.
        categories: Categories to use; all that the index has if not given. Images that are labelled for none of them
            are left out, so the number of images depends on it.
        split: "train" or "val"; both if not given.
        transform: What turns pixels (H, W, 3) into what the model reads; normalisation as for ImageNet if not given.

    Raises:
        FileNotFoundError: If ``index.csv`` or ``label.csv``, or a picture that the index names, is not there.
        ValueError: If a table or a cell is not as the format wants, a label is unknown, or no image is left. Messages
            name the file and the line.
    """
    root = Path(directory)
    chosen = _choose_categories(root, categories)
    concepts = tuple(_read_concepts(root, chosen))
    check_concepts(concepts)
    known = {concept.number for concept in concepts}
    rows = [row for row in _read_index(root, chosen, known) if split in (None, row.split)]
    labelled = tuple(row for row in rows if row.whole or row.layers)
    if not labelled:
        raise ValueError(
            f"{root / 'index.csv'} has no image labelled for {', '.join(chosen)}" + (f" in {split}" if split else "")
        )
    _check_pictures(root, labelled)
    return Broden(root, concepts, chosen, labelled, len(rows) - len(labelled), transform)


def decode_labels(values: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Concept numbers (h, w) of a label picture: red + 256 green; blue is not used."""
    wide = values.astype(np.int32)  # first: 256 does not fit into the eight bits of a band
    return wide if wide.ndim == 2 else wide[..., 0] + 256 * wide[..., 1]


def _choose_categories(root: Path, wanted: Iterable[str] | None) -> tuple[str, ...]:
    path = root / "index.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give the directory that BRODEN unpacks to, such as broden1_224"
        )
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline().strip().split(",")
    if missing := [name for name in _FIXED if name not in header]:
        raise ValueError(f"{path}, line 1: no column {', '.join(missing)}; found {', '.join(header)}")
    present = tuple(name for name in header if name not in _FIXED)
    chosen = present if wanted is None else tuple([wanted] if isinstance(wanted, str) else wanted)
    if unknown := [name for name in chosen if name not in present]:
        raise ValueError(f"{path}, line 1: no category {', '.join(unknown)}; there are {', '.join(present)}")
    return chosen


def _read_concepts(root: Path, chosen: Sequence[str]) -> Iterator[Concept]:
    """The labels of the chosen categories, each under its main one."""
    path = root / "label.csv"
    coverage: dict[str, dict[int, float]] = {}
    for line, cells in read_table(path, ("number", "name", "category")):
        where = f"{path}, line {line}"
        number = as_integer(cells["number"], "number", where)
        categories = [name for name in _parse_categories(cells["category"], where) if name in chosen]
        if len(categories) > 1:
            for name in categories:
                coverage.setdefault(name, _read_coverage(root, name))
            categories.sort(key=lambda name: -coverage[name].get(number, 0.0))
        if categories:
            yield Concept(number, cells["name"], categories[0])


def _parse_categories(cell: str, where: str) -> list[str]:
    matches = [_IN_CATEGORY.fullmatch(part) for part in cell.split(";")]
    if not all(matches):
        raise ValueError(f"{where}: category is {cell!r}, wanted name(count);name(count)")
    return [match[1] for match in matches if match]


def _read_coverage(root: Path, category: str) -> dict[int, float]:
    """How much of the images each label of a category covers, by number."""
    path = root / f"c_{category}.csv"
    result = {}
    for line, cells in read_table(path, ("number", "coverage")):
        where = f"{path}, line {line}"
        number = as_integer(cells["number"], "number", where)
        try:
            result[number] = float(cells["coverage"])
        except ValueError:
            raise ValueError(f"{where}: coverage is {cells['coverage']!r}, wanted a number") from None
    return result


def _read_index(root: Path, chosen: Sequence[str], known: set[int]) -> Iterator[_Row]:
    path = root / "index.csv"
    for line, cells in read_table(path, (*_FIXED, *chosen)):
        where = f"{path}, line {line}"
        whole, layers = {}, {}
        for category in chosen:
            numbers, pictures = _parse_cell(cells[category], category, where)
            if unknown := [n for n in numbers if n not in known]:
                raise ValueError(
                    f"{where}: {category} has the label {unknown[0]}, which label.csv does not list under any of "
                    f"{', '.join(chosen)}"
                )
            if numbers:
                whole[category] = numbers
            if pictures:
                layers[category] = pictures
        grid = (as_integer(cells["sh"], "sh", where), as_integer(cells["sw"], "sw", where))
        yield _Row(line, cells["image"], cells["split"], grid, whole, layers)


def _parse_cell(cell: str, category: str, where: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Whole-image labels and label pictures of one cell: "314;194" or "a.png;b.png"."""
    parts = [part.strip() for part in cell.split(";") if part.strip()]
    pictures = tuple(part for part in parts if part.endswith(".png"))
    numbers = tuple(as_integer(part, f"an entry of {category}", where) for part in parts if not part.endswith(".png"))
    return numbers, pictures


def _check_pictures(root: Path, rows: Iterable[_Row]) -> None:
    """Raise unless every picture is there: better now than hours into a run."""
    folder = root / "images"
    found = {path.relative_to(folder) for path in folder.rglob("*.*")}
    for row in rows:
        for name in (row.image, *(name for names in row.layers.values() for name in names)):
            if Path(name) not in found:
                raise FileNotFoundError(
                    f"{folder / name} does not exist; it is named by {root / 'index.csv'}, line {row.line}"
                )
