"""Where the paths of attacked images lie between those of the class they come from and the class they are taken for.

Source: Li et al., Interpretable Neural Network Decoupling, ECCV 2020, Figure 10: paths of dogs, of trucks, and of dogs
attacked to be taken for trucks form three groups. The picture is theirs, the distances are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from decouplify.paths import PathMap, PathSet, class_prototypes, path_map
from decouplify.paths._results import Result
from decouplify.paths._text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["AdversarialMap", "adversarial_map"]

_USUAL = 0.95  # share of a class's own images within the distance that counts as usual for it


@dataclass(frozen=True, eq=False, repr=False)
class AdversarialMap(Result):
    """Clean paths of two classes and the paths of images attacked from one to the other.

    Distances are Hamming distances to a class's prototype, the filters open for more than half of its clean images.

    Attributes:
        map: The three groups in the plane; its labels are 0 for source, 1 for target, 2 for attacked images.
        source: Class the attacked images come from.
        target: Class they are taken for.
        to_source: Distance of every attacked image to the source's prototype, shape (N,).
        to_target: Distance to the target's prototype, shape (N,).
        usual_source: Distance to its own prototype within which 95 % of the source's clean images lie.
        usual_target: The same for the target.
    """

    map: PathMap
    source: int
    target: int
    to_source: NDArray[np.int32]
    to_target: NDArray[np.int32]
    usual_source: float
    usual_target: float

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the attacked images, adding up to 1.

        ``"neither"``: farther from both prototypes than is usual for the classes' own images; the others are nearer to
        ``"source"`` or to ``"target"``, or ``"equal"``.
        """
        neither = (self.to_source > self.usual_source) & (self.to_target > self.usual_target)
        found = {
            "source": ~neither & (self.to_source < self.to_target),
            "target": ~neither & (self.to_target < self.to_source),
            "equal": ~neither & (self.to_target == self.to_source),
            "neither": neither,
        }
        return {name: float(where.mean()) for name, where in found.items()}

    def headline(self) -> str:
        """The distances and shares in two lines."""
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in self.shares.items())
        return (
            f"{len(self.to_source)} attacked images, distance to source {self.to_source.mean():.0f} (usual up to "
            f"{self.usual_source:.0f}), to target {self.to_target.mean():.0f} (usual up to {self.usual_target:.0f})\n"
            f"nearer to: {shares}; {self.map.knn_k} nearest paths tell the group of {100 * self.map.knn_accuracy:.0f} %"
        )

    def summary(self) -> str:
        """The numbers in words."""
        return f"Class {self.source} attacked to be taken for class {self.target}\n{self.headline()}"

    def __repr__(self) -> str:
        return f"AdversarialMap({self.source} -> {self.target}: {self.headline()})".replace("\n", "; ")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        return plain({**vars(self), "map": self.map.to_dict(), "shares": self.shares})

    def plot(self, ax: Axes | None = None, *, class_names: Sequence[str] | Mapping[int, str] | None = None) -> Axes:
        """One dot per image, coloured by group (Figure 10 of the paper).

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
            class_names: Names of all classes by number, for the legend.
        """
        source, target = (f"class {c}" if class_names is None else class_names[c] for c in (self.source, self.target))
        return self.map.plot(ax, class_names=[source, target, f"{source} attacked\nto be {target}"])


def adversarial_map(
    clean: PathSet,
    attacked: PathSet,
    source: int,
    target: int,
    *,
    method: Literal["tsne", "pca"] = "tsne",
    perplexity: float = 30.0,
    seed: int = 0,
) -> AdversarialMap:
    """Put clean and attacked paths on one map and measure how far they are from each other.

    Args:
        clean: Paths of clean images with labels, of the same model; all of them make the prototypes.
        attacked: Paths of attacked images, with true labels. Used are those with label ``source`` that the model takes
            for ``target``.
        source: Class the attacked images come from.
        target: Class they are taken for.
        method: See ``path_map``.
        perplexity: See ``path_map``.
        seed: See ``path_map``.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If the layers differ, labels are missing, or one of the three groups is empty.
    """
    of_source, of_target = (clean.subset(np.flatnonzero(clean.groups() == c)) for c in (source, target))
    moved = attacked.subset(np.flatnonzero((attacked.groups() == source) & (attacked.preds == target)))
    groups = {f"clean of class {source}": of_source, f"clean of class {target}": of_target}
    groups[f"attacked from {source} to {target}"] = moved
    if empty := [name for name, part in groups.items() if not len(part)]:
        raise ValueError(f"adversarial_map: there are no images {empty[0]}, all of {', '.join(groups)} are wanted")
    prototypes = class_prototypes(clean)
    source_path, target_path = (prototypes.subset(np.flatnonzero(prototypes.ids == c)) for c in (source, target))
    joint = path_map(_together(list(groups.values())), method, perplexity=perplexity, seed=seed)
    return AdversarialMap(
        map=joint,
        source=source,
        target=target,
        to_source=moved.hamming(source_path)[:, 0],
        to_target=moved.hamming(target_path)[:, 0],
        usual_source=float(np.quantile(of_source.hamming(source_path), _USUAL)),
        usual_target=float(np.quantile(of_target.hamming(target_path), _USUAL)),
    )


def _together(parts: Sequence[PathSet]) -> PathSet:
    """One path set, labelled with the number of the part; ids start anew, since an image is in several parts."""
    bits, preds, conf = (np.concatenate([getattr(part, name) for part in parts]) for name in ("bits", "preds", "conf"))
    numbers = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    ids = np.arange(len(numbers))
    return replace(parts[0], bits=bits, preds=preds, conf=conf, ids=ids, labels=numbers, margins=None)
