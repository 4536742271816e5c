"""Everything a page tells about a network, computed in one pass over the images and a few minutes of statistics."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from decouplify.decoupling import decoupling_of
from decouplify.macs import MacCount
from decouplify.paths import (
    ActivationHistogram,
    ClassInformation,
    DecisionTree,
    FilterStates,
    PathMap,
    PathSet,
    class_information,
    decision_tree,
    macs_of_paths,
    path_map,
    record,
)
from decouplify.plan import Plan
from decouplify.reporting.pictures import Watched

__all__ = ["Fact", "Findings", "TellingFilter", "headline_facts", "study"]

_MAP_IMAGES = 2000  # more dots hide each other, and every dot brings a picture
_TREE_CLASSES = 20
_NEIGHBOURS = 10
_N_TELLING, _N_TOP = 8, 6  # filters shown, images for each


class Fact(NamedTuple):
    """One line of the page's first table: what is stated, the number, and what one must know to read it."""

    name: str
    value: str
    note: str = ""


class TellingFilter(NamedTuple):
    """A filter that tells much about the class: its layer, its number there and among all, its top images."""

    layer: str
    number: int
    column: int
    top_rows: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Findings:
    """What is known about a wrapped network on N images.

    Attributes:
        plan: What was gated.
        paths: The paths, without margins.
        macs: Multiply-accumulates per image.
        states: States of the filters.
        histogram: How often the filters of the last layer are open.
        map: The paths as a map.
        information: What single filters tell about the class; ``None`` without at least two classes.
        telling: The most telling filters with the images that open them widest.
        tree: At which layer classes part; ``None`` without at least two classes.
        pictures: Small pictures of the images, shape (N, H, W, C); ``None`` if they differ in size.
        class_names: Names of the classes, by index.
        left_out: Section to the reason why it is missing.
    """

    plan: Plan
    paths: PathSet
    macs: MacCount
    states: FilterStates
    histogram: ActivationHistogram
    map: PathMap
    information: ClassInformation | None
    telling: tuple[TellingFilter, ...]
    tree: DecisionTree | None
    pictures: NDArray[np.uint8] | None
    class_names: Sequence[str]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def name(self, c: int) -> str:
        """Name of a class, its number where there is no name."""
        return self.class_names[c] if 0 <= c < len(self.class_names) else str(c)

    def words(self, row: int) -> str:
        """What an image shows, and what it was taken for if for something else."""
        pred = int(self.paths.preds[row])
        if self.paths.labels is None:
            return f"taken for {self.name(pred)}" if pred >= 0 else f"image {self.paths.ids[row]}"
        label = int(self.paths.labels[row])
        return self.name(label) if pred in (-1, label) else f"{self.name(label)}, taken for {self.name(pred)}"


def study(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_images: int | None = 10_000,
    seed: int = 0,
    progress: bool | None = None,
) -> Findings:
    """Record the paths of the images and compute what a page shows; see ``report`` for the arguments.

    Pictures of 64 by 64 pixels stay in memory, 12 kB per image; gate logits go to a temporary file.
    """
    decoupling = decoupling_of(model, "report")
    watched = Watched(loader, mean, std)
    with tempfile.TemporaryDirectory(prefix="decouplify-") as folder:
        recorded = record(
            model, watched, out=Path(folder) / "paths", margins=True, max_images=max_images, progress=progress
        )
        information = _information(recorded)
        telling = _telling(recorded, information)
        paths = PathSet(
            np.array(recorded.bits), recorded.layers, recorded.ids, recorded.labels, recorded.preds, recorded.conf,
            manifest=recorded.manifest,
        )  # fmt: skip
        del recorded  # its files disappear with the folder
    tree, why_no_tree = _tree(paths, class_names, seed, progress)
    no_classes = "the images have no labels" if paths.labels is None else "all images have the same label"
    left_out = {"filters": no_classes} if information is None else {}
    return Findings(
        plan=decoupling.plan,
        paths=paths,
        macs=macs_of_paths(model, paths),
        states=paths.filter_states(),
        histogram=paths.activation_histogram(),
        map=path_map(paths, max_images=_MAP_IMAGES, seed=seed),
        information=information,
        telling=telling,
        tree=tree,
        pictures=watched.pictures(len(paths)),
        class_names=list(class_names or ()),
        left_out=left_out | ({"tree": why_no_tree} if why_no_tree else {}),
    )


def headline_facts(paths: PathSet, macs: MacCount) -> list[Fact]:
    """The first numbers to look at, each with what it was measured on.

    Args:
        paths: Recorded paths, at least one.
        macs: Their multiply-accumulates.
    """
    n = len(paths)
    facts = [Fact("Images", f"{n:,}")]
    if paths.labels is not None and (paths.preds >= 0).all():
        facts.append(
            Fact("Accuracy", f"{100 * (paths.preds == paths.labels).mean():.1f} %", "each image on its own path")
        )
    executed = macs.executed.double() / macs.dense
    facts.append(
        Fact(
            "MAC reduction",
            f"{macs.reduction:.2f}x",
            f"{_millions(macs.dense)} dense, {_millions(float(macs.executed.double().mean()))} executed on average, "
            f"from {100 * float(executed.min()):.1f} % to {100 * float(executed.max()):.1f} % of dense by image",
        )
    )
    states = paths.filter_states()
    facts.append(
        Fact("Filters", states.headline().removesuffix(f" on {n} images"), f"{states.n_filters:,} on {n:,} images")
    )
    facts.append(Fact("Distinct paths", f"{paths.distinct():,} of {n:,}"))
    return [*facts, *_neighbour_fact(paths)]


def _neighbour_fact(paths: PathSet) -> Iterable[Fact]:
    if paths.labels is None or len(paths) < 3 or paths.distinct() == 1:  # one path for all tells nothing
        return
    k = min(_NEIGHBOURS, len(paths) - 1)
    largest = np.unique(paths.labels, return_counts=True)[1].max() / len(paths)
    yield Fact(
        "Class told by the path",
        f"{100 * paths.knn_accuracy(k):.1f} %",
        f"vote of the {k} nearest other paths; the largest class holds {100 * largest:.1f} % of the images",
    )


def _information(paths: PathSet) -> ClassInformation | None:
    several = paths.labels is not None and len(np.unique(paths.labels)) > 1
    return class_information(paths) if several else None


def _telling(paths: PathSet, information: ClassInformation | None) -> tuple[TellingFilter, ...]:
    if information is None:
        return ()
    assert paths.margins is not None
    columns = paths.filter_slices
    found = []
    for layer, index, bits in information.best(_N_TELLING):
        column = columns[layer].start + index
        if bits > 0:
            widest = np.argsort(-paths.margins[:, column].astype(np.float32), kind="stable")[:_N_TOP]
            found.append(TellingFilter(layer, index, column, tuple(widest.tolist())))
    return tuple(found)


def _tree(
    paths: PathSet, class_names: Sequence[str] | None, seed: int, progress: bool | None
) -> tuple[DecisionTree | None, str]:
    """The tree, or why there is none. With very many classes, the largest ones."""
    if paths.labels is None:
        return None, "the images have no labels"
    values, sizes = np.unique(paths.labels, return_counts=True)
    if len(values) < 2:
        return None, "all images have the same label"
    largest = np.sort(values[np.argsort(-sizes, kind="stable")[:_TREE_CLASSES]])
    known = {c: class_names[c] if class_names and c < len(class_names) else str(c) for c in largest.tolist()}
    return decision_tree(paths, classes=largest.tolist(), class_names=known, seed=seed, progress=progress), ""


def _millions(n: float) -> str:
    return f"{n / 1e9:.2f} G" if n >= 1e9 else f"{n / 1e6:.2f} M"
