"""What a filter's gate says about the class, in bits, and the typical path of a class.

The mutual-information loss of Li et al., Interpretable Neural Network Decoupling, ECCV 2020, Equation 9, raises a bound
on the information between a whole layer's gates and the class. Here it is measured directly, filter by filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from decouplify._optional import new_axes, write_title
from decouplify.paths._layout import LayerSpec, filter_slices
from decouplify.paths._results import LayeredResult
from decouplify.paths._text import text_table
from decouplify.paths.pathset import By, PathSet
from decouplify.paths.states import label_layers, layers_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ClassInformation", "class_information", "class_prototypes"]

_COLUMNS = 2048  # filters tested at a time: with a thousand classes a block takes 33 MB
_Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, eq=False, repr=False)
class ClassInformation(LayeredResult):
    """How much each filter's gate tells about the class.

    Attributes:
        layers: The layers, in execution order; arrays of length F hold them side by side.
        values: Class values, sorted, shape (C,).
        n_images: Images per class, shape (C,).
        class_entropy: Entropy of the class in bits: the most any gate could tell, besides its own limit of 1 bit.
        information: Mutual information of class and gate in bits, shape (F,), corrected for the bias of small samples
            (Miller-Madow), so a little below 0 for gates that tell nothing.
        low: Lower end of the 95 % interval of the information (delta method), shape (F,), at least 0.
        high: Upper end.
        p_value: Probability of at least this much information if gate and class were independent (G test), shape (F,).
            Where classes have only a handful of images it is too small.
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
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p_value: NDArray[np.float64]
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

    def telling(self, false_share: float = 0.05) -> NDArray[np.bool_]:
        """Filters that tell something about the class, shape (F,).

        Args:
            false_share: Share of them, in (0, 1), that may be there by chance (Benjamini and Hochberg 1995).
        """
        return discoveries(self.p_value, false_share)

    def headline(self) -> str:
        """One line: images, classes, mean and best information."""
        name, index, bits = self.best(1)[0]
        return (
            f"{int(self.n_images.sum())} images of {len(self.values)} classes ({self.class_entropy:.2f} bits): filters "
            f"tell {self.information.mean():.4f} bits on average, at most {bits:.3f} ({name}, filter {index}); "
            f"{int(self.telling().sum())} of {len(self.information)} tell more than chance"
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

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bits per filter, one box per layer: quartiles, 5th and 95th percentile as whiskers, the best filter as a dot.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        n_layers = len(self.layers)
        ax = new_axes(layers_width(n_layers), 4.5) if ax is None else ax
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
        ax.plot([], [], color="#e08214", linewidth=2, label="median")
        ax.plot(
            range(n_layers), [bits.max() for bits in per_layer], "o", color="#35587f", markersize=4, label="best filter"
        )
        ax.legend(loc="upper left", frameon=False)
        ax.margins(x=0.01)
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
    information, low, high, p_value = information_of(groups.counts, groups.n_images)
    return ClassInformation(
        layers=paths.layers,
        values=groups.values,
        n_images=groups.n_images,
        class_entropy=float(_entropy(groups.n_images[:, None])[0]),
        information=information,
        low=low,
        high=high,
        p_value=p_value,
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


def information_of(n_open: NDArray[np.int64], n_images: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    """Corrected bits, both ends of their interval, and p-values, shape (F,) each, some filters at a time."""
    n_filters = n_open.shape[1]
    parts = [_block(n_open[:, start : start + _COLUMNS], n_images) for start in range(0, n_filters, _COLUMNS)]
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def _block(n_open: NDArray[np.int64], n_images: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    """As ``information_of``. Every entropy gains (occupied cells - 1) / 2N nats (Miller 1955).

    Args:
        n_open: Images of each class for which the filter is open, shape (C, F).
        n_images: Images per class, shape (C,).
    """
    n = int(n_images.sum())
    n_closed = n_images[:, None] - n_open
    gate = np.stack([n_open.sum(axis=0), n_closed.sum(axis=0)])  # (2, F)
    both = np.concatenate([n_open, n_closed])  # (2 C, F)
    plug_in, spread = _pointwise(both, np.tile(n_images, 2)[:, None], np.repeat(gate, len(n_images), axis=0), n)
    n_cells = (n_images > 0).sum() + (gate > 0).sum(axis=0) - (both > 0).sum(axis=0) - 1
    corrected = plug_in + n_cells / (2 * n * np.log(2))
    half = _Z_95 * spread / np.sqrt(n)
    freedom = ((gate > 0).sum(axis=0) - 1) * ((n_images > 0).sum() - 1)
    p_value = np.where(freedom > 0, _chi_square_tail(2 * n * np.log(2) * plug_in, np.maximum(freedom, 1)), 1.0)
    return corrected, np.maximum(corrected - half, 0), np.maximum(corrected + half, 0), p_value


def _pointwise(
    cells: NDArray[np.int64], rows: NDArray[np.int64], columns: NDArray[np.int64], n: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over the images of log2 p(x, y) / p(x) p(y), which is the information in bits, and its spread."""
    p = cells / n
    expected = np.where(cells > 0, rows * columns, 1) / n
    ratio = np.log2(np.where(cells > 0, cells, expected) / expected)
    mean = (p * ratio).sum(axis=0)
    variance = (p * ratio**2).sum(axis=0) - mean**2
    return mean, np.sqrt(np.maximum(variance, 0))


def _chi_square_tail(x: NDArray[np.float64], freedom: NDArray[np.int64]) -> NDArray[np.float64]:
    """P(X >= x) of a chi-square variable; from torch, so that SciPy need not be there."""
    half = torch.from_numpy(freedom / 2), torch.from_numpy(np.maximum(x, 0) / 2)
    return torch.special.gammaincc(*half).numpy()


def discoveries(p_values: NDArray[np.float64], false_share: float) -> NDArray[np.bool_]:
    """Which null hypotheses to reject so that at most this share is rejected wrongly (Benjamini and Hochberg 1995).

    Args:
        p_values: Shape (n,), in [0, 1].
        false_share: In (0, 1).
    """
    if not 0 < false_share < 1:
        raise ValueError(f"the share of false discoveries is {false_share}, wanted a number in (0, 1)")
    ordered = np.sort(p_values)
    passed = np.flatnonzero(ordered <= false_share * np.arange(1, len(ordered) + 1) / max(len(ordered), 1))
    return p_values <= ordered[passed[-1]] if len(passed) else np.zeros(len(p_values), np.bool_)


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
