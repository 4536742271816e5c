"""What a filter's gate says about the class, in bits, and the typical path of a class.

The mutual-information loss of Li et al., Interpretable Neural Network Decoupling, ECCV 2020, Equation 9, raises a bound
on the information between a whole layer's gates and the class. Here it is measured directly, filter by filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from decouplify._optional import new_axes, write_title
from decouplify.paths._layout import LayerSpec, filter_slices
from decouplify.paths._text import plain, text_table
from decouplify.paths.pathset import By, PathSet
from decouplify.paths.states import label_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ClassInformation", "class_information", "class_prototypes"]


@dataclass(frozen=True, eq=False, repr=False)
class ClassInformation:
    """How much each filter's gate tells about the class.

    Attributes:
        layers: The layers, in execution order; arrays of length F hold them side by side.
        values: Class values, sorted, shape (C,).
        n_images: Images per class, shape (C,).
        class_entropy: Entropy of the class in bits: the most any gate could tell, besides its own limit of 1 bit.
        information: Mutual information of class and gate in bits, shape (F,), corrected for the bias of small samples
            (Miller-Madow), so a little below 0 for gates that tell nothing.
        rates: Share of a class's images for which the filter is open, shape (C, F), in [0, 1].
        prototypes: Filters open for more than half of a class's images, shape (C, F).
        selectivity: (highest class rate - mean of the other classes) / (their sum), shape (F,), in [0, 1]; NaN for
            silent filters (Morcos et al. 2018).
        model: Name of the model, for titles.
    """

    layers: tuple[LayerSpec, ...]
    values: NDArray[Any]
    n_images: NDArray[np.int64]
    class_entropy: float
    information: NDArray[np.float64]
    rates: NDArray[np.float64]
    prototypes: NDArray[np.bool_]
    selectivity: NDArray[np.float64]
    model: str = ""

    def best(self, n: int = 10) -> list[tuple[str, int, float]]:
        """The filters that tell most about the class: layer name, index of the filter in its layer, bits."""
        order = np.argsort(-self.information, kind="stable")[:n]
        owner = np.repeat(np.arange(len(self.layers)), [layer.n_filters for layer in self.layers])
        starts = [part.start for part in filter_slices(self.layers)]
        return [(self.layers[owner[i]].name, int(i) - starts[owner[i]], float(self.information[i])) for i in order]

    def headline(self) -> str:
        """One line: images, classes, mean and best information."""
        name, index, bits = self.best(1)[0]
        return (
            f"{int(self.n_images.sum())} images of {len(self.values)} classes ({self.class_entropy:.2f} bits): filters "
            f"tell {self.information.mean():.4f} bits on average, at most {bits:.3f} ({name}, filter {index})"
        )

    def summary(self) -> str:
        """A table with a row per layer, ending with the headline."""
        rows = []
        for layer, part in zip(self.layers, filter_slices(self.layers), strict=True):
            bits = self.information[part]
            rows.append([str(layer.depth), layer.name, str(layer.n_filters), _four(bits.mean()), _four(bits.max())])
        table = text_table(["depth", "layer", "filters", "mean bits", "max bits"], rows, left=2)
        return f"Information of single gates about the class\n{table}\n{self.headline()}"

    def __repr__(self) -> str:
        return f"ClassInformation({self.headline()})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        layers = [{"name": layer.name, "depth": layer.depth, "n_filters": layer.n_filters} for layer in self.layers]
        return {name: plain(value) for name, value in vars(self).items()} | {"layers": layers}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bits per filter, one box per layer: quartiles, 5th and 95th percentile as whiskers, the best filter as a dot.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        n_layers = len(self.layers)
        ax = new_axes(min(16.0, max(5.0, 2.5 + 0.35 * n_layers)), 4.5) if ax is None else ax
        per_layer = [self.information[part] for part in filter_slices(self.layers)]
        line = {"color": "#35587f"}
        ax.boxplot(
            per_layer,
            positions=range(n_layers),
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": "#c9d8ea", **line},
            medianprops={"color": "#e08214", "linewidth": 2},
            whiskerprops=line,
            capprops=line,
            manage_ticks=False,
        )
        ax.plot(range(n_layers), [bits.max() for bits in per_layer], "o", color="#35587f", markersize=4)
        label_layers(ax, [layer.name for layer in self.layers])
        ax.set_ylabel("information about the class, bits")
        ax.spines[["top", "right"]].set_visible(False)
        write_title(
            ax, f"What single gates{' of ' + self.model if self.model else ''} tell about the class", self.headline()
        )
        return ax


def class_information(paths: PathSet, by: By = "labels") -> ClassInformation:
    """Mutual information between the class and each filter's gate.

    Args:
        paths: The path set.
        by: What the classes are: ``"labels"``, ``"preds"``, or one value per image.

    Raises:
        ValueError: If there are no labels or fewer than two classes.
    """
    groups = paths.rates(by=by)
    if len(groups.values) < 2:
        raise ValueError(f"class_information needs at least 2 classes, {paths!r} has {len(groups.values)}")
    return ClassInformation(
        layers=paths.layers,
        values=groups.values,
        n_images=groups.n_images,
        class_entropy=float(_entropy(groups.n_images[:, None])[0]),
        information=_mutual_information(groups.counts, groups.n_images),
        rates=groups.rates,
        prototypes=groups.rates > 0.5,
        selectivity=_selectivity(groups.rates),
        model=paths.model_name,
    )


def class_prototypes(paths: PathSet, by: By = "labels") -> PathSet:
    """The typical path of each class: filters open for more than half of its images.

    It is a path set with the classes as ids, so ``paths.hamming(class_prototypes(paths))`` is the distance of every
    image to every class, shape (N, C).

    Args:
        paths: The path set.
        by: What the classes are: ``"labels"``, ``"preds"``, or one value per image.
    """
    groups = paths.rates(by=by)
    open_filters = groups.rates > 0.5
    return PathSet.from_gates(
        {name: open_filters[:, columns] for name, columns in paths.filter_slices.items()},
        ids=groups.values,
        labels=groups.values if groups.values.dtype.kind in "iu" else None,
        manifest={"model": paths.model_name, "prototypes_of_images": len(paths)},
    )


def _mutual_information(n_open: NDArray[np.int64], n_images: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bits per filter, Miller-Madow corrected: every entropy gains (occupied cells - 1) / 2N nats (Miller 1955).

    Args:
        n_open: Images of each class for which the filter is open, shape (C, F).
        n_images: Images per class, shape (C,).
    """
    n = int(n_images.sum())
    n_closed = n_images[:, None] - n_open
    gate = np.stack([n_open.sum(axis=0), n_closed.sum(axis=0)])  # (2, F)
    both = np.concatenate([n_open, n_closed])  # (2 C, F)
    plug_in = _entropy(n_images[:, None]) + _entropy(gate) - _entropy(both)
    n_cells = (n_images > 0).sum() + (gate > 0).sum(axis=0) - (both > 0).sum(axis=0) - 1
    information: NDArray[np.float64] = plug_in + n_cells / (2 * n * np.log(2))
    return information


def _entropy(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Entropy in bits of each column of counts, shape (cells, F) to (F,)."""
    p = counts / counts.sum(axis=0)
    return -(p * np.log2(np.where(p > 0, p, 1))).sum(axis=0)


def _four(bits: float) -> str:
    return f"{round(bits, 4) + 0.0:.4f}"  # adding 0 turns -0.0000 into 0.0000


def _selectivity(rates: NDArray[np.float64]) -> NDArray[np.float64]:
    highest = rates.max(axis=0)
    others = (rates.sum(axis=0) - highest) / (len(rates) - 1)
    total = highest + others
    return np.where(total > 0, (highest - others) / np.where(total > 0, total, 1), np.nan)
