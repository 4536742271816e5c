"""Paths as points in the plane: similar paths near each other, coloured by class.

Source: Li et al., Interpretable Neural Network Decoupling, ECCV 2020, Figure 3 (architecture encoding map): principal
components, then t-SNE. The paper gives pictures only; the numbers reported beside them here are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from decouplify._optional import import_optional, new_axes, write_title
from decouplify.paths._distance import between_within, class_distance_sums, class_members, silhouette, stratified_rows
from decouplify.paths._results import Result
from decouplify.paths._text import plain
from decouplify.paths.pathset import LayerRef, PathSet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PathMap", "path_map"]

_K = 10  # neighbours for the accuracy reported with a map
_MANY_IMAGES = 3000  # from here on t-SNE gains from several threads
_LEGEND_MAX = 20  # classes that can still be told apart by colour


@dataclass(frozen=True, eq=False, repr=False)
class PathMap(Result):
    """A map of paths and the numbers the picture cannot give.

    On a t-SNE map neither the size of a cluster nor the distance between two means anything; read those off the
    numbers, which are computed from the paths themselves.

    Attributes:
        xy: Position of each image, shape (N, 2).
        rows: Which rows of the path set are shown, shape (N,).
        ids: Their ids, shape (N,).
        labels: Their classes, shape (N,), or ``None``.
        method: ``"tsne"``, ``"opentsne"`` or ``"pca"``, what the positions are.
        layers: Names of the layers used.
        explained_variance: Share of the variance each principal component explains, shape (k,).
        perplexity: The perplexity used; NaN without t-SNE.
        kl_divergence: What t-SNE minimised; NaN without t-SNE.
        n_varying: Filters that differ between the images.
        n_distinct: Different paths; equal ones lie on top of each other.
        knn_k: Neighbours used for ``knn_accuracy``.
        knn_accuracy: Leave-one-out class accuracy of the nearest paths, in [0, 1]; see ``PathSet.knn_accuracy``.
        silhouette: Silhouette of the classes (Hamming), in [-1, 1].
        between_within: Mean distance between classes over mean distance within; 1 means classes do not show.
        note: Why the map is not the one asked for, empty if it is.
        model: Name of the model, for titles.

    The three class numbers are NaN without labels, with a single class, or when all paths are equal.
    """

    xy: NDArray[np.float32]
    rows: NDArray[np.intp]
    ids: NDArray[Any]
    labels: NDArray[np.int64] | None
    method: str
    layers: tuple[str, ...]
    explained_variance: NDArray[np.float32]
    perplexity: float
    kl_divergence: float
    n_varying: int
    n_distinct: int
    knn_k: int
    knn_accuracy: float
    silhouette: float
    between_within: float
    note: str = ""
    model: str = ""

    def headline(self) -> str:
        """The numbers in one or two lines."""
        name = {"tsne": "t-SNE", "opentsne": "t-SNE", "pca": "PCA"}[self.method]
        line = f"{name} of {len(self.xy)} images, {self.n_distinct} different paths, {self.n_varying} varying filters"
        if not np.isnan(self.knn_accuracy):
            line += (
                f"\n{self.knn_k}-nearest-neighbour accuracy {100 * self.knn_accuracy:.1f} %, silhouette "
                f"{self.silhouette:.3f}, between / within classes {self.between_within:.2f}"
            )
        return line

    def summary(self) -> str:
        """The numbers, and the note if there is one."""
        explained = 100 * float(self.explained_variance.sum())
        lines = [
            f"Path map{' of ' + self.model if self.model else ''}, {len(self.layers)} layers",
            self.headline(),
            f"{len(self.explained_variance)} principal components explain {explained:.1f} % of the variance",
            *([f"note: {self.note}"] if self.note else []),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"PathMap({self.headline()})".replace("\n", "; ")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        return {name: plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Axes | None = None, *, class_names: Sequence[str] | Mapping[int, str] | None = None) -> Axes:
        """One dot per image, coloured by class.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given. ``ax.figure.savefig(...)`` writes it.
            class_names: Names for the legend, by class value.
        """
        ax = new_axes(7.5, 5.5) if ax is None else ax
        # In random order, or the last class would cover all others where they overlap.
        order = np.random.default_rng(0).permutation(len(self.xy))
        size = float(np.clip(9000 / len(order), 3, 28))
        colors = self._draw_legend(ax, class_names)
        ax.scatter(self.xy[order, 0], self.xy[order, 1], c=colors[order], s=size, alpha=0.8, linewidths=0)
        ax.set_aspect("equal", adjustable="datalim")
        ax.spines[:].set_color("0.7")
        if self.method != "pca":
            ax.set_xticks([])
            ax.set_yticks([])
        else:
            shares = [100 * float(share) for share in self.explained_variance[:2]] + [0.0, 0.0]
            ax.set_xlabel(f"principal component 1 ({shares[0]:.1f} % of the variance)")
            ax.set_ylabel(f"principal component 2 ({shares[1]:.1f} %)")
        write_title(ax, f"Path map{' of ' + self.model if self.model else ''}", self.headline())
        return ax

    def _draw_legend(self, ax: Axes, class_names: Sequence[str] | Mapping[int, str] | None) -> NDArray[Any]:
        """A colour per image, shape (N, 4); the legend is left out where colours cannot be told apart."""
        matplotlib = import_optional("matplotlib", "plotting")
        if self.labels is None:
            return np.tile((0.2, 0.35, 0.5, 1.0), (len(self.xy), 1))
        values, index, _ = class_members(self.labels)
        if len(values) > _LEGEND_MAX:
            palette = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(values)))
            ax.set_title(f"{len(values)} classes", loc="right", fontsize=9, color="0.35")
            return palette[index]
        palette = matplotlib.colormaps["tab10" if len(values) <= 10 else "tab20"](np.arange(len(values)))
        names = [str(value) if class_names is None else class_names[int(value)] for value in values]
        for name, color in zip(names, palette, strict=True):
            ax.scatter([], [], s=30, color=color, linewidths=0, label=name)
        ax.legend(title="class", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        return palette[index]


class _Embedding(NamedTuple):
    xy: NDArray[np.float32]
    explained_variance: NDArray[np.float32]
    method: str
    perplexity: float = float("nan")
    kl_divergence: float = float("nan")
    note: str = ""


def path_map(
    paths: PathSet,
    method: Literal["tsne", "opentsne", "pca"] = "tsne",
    n_components_pca: int = 300,
    perplexity: float = 30.0,
    max_images: int = 10_000,
    seed: int = 0,
    layers: Iterable[LayerRef] | None = None,
) -> PathMap:
    """Paths as points in the plane (the architecture encoding map of the paper, Figure 3).

    Filters that never change are dropped, the rest reduced to principal components (not whitened) and then, with
    t-SNE, to two dimensions. A set too poor for that is not an error: the result says so in ``note``.

    Args:
        paths: The path set; classes are its labels, if it has any.
        method: ``"tsne"``; ``"opentsne"``, the same by a package that is faster from some thousand images on; or
            ``"pca"`` for the first two principal components.
        n_components_pca: Principal components t-SNE starts from, fewer if there are not so many.
        perplexity: Neighbours t-SNE considers, lowered to (N - 1) / 3 for small sets.
        max_images: Show a random subset of this size, classes in proportion, if there are more.
        seed: Seed of the subset, the components and t-SNE.
        layers: Layers to use; all if not given.

    Raises:
        ImportError: If scikit-learn, or openTSNE where asked for, is not installed.
        ValueError: If the method is unknown, a number is not positive, or there are no images.
    """
    if method not in ("tsne", "opentsne", "pca"):
        raise ValueError(f'path_map: method is {method!r}, wanted "tsne", "opentsne" or "pca"')
    if n_components_pca < 1 or perplexity <= 0 or max_images < 1:
        raise ValueError("path_map: n_components_pca, perplexity and max_images must be positive")
    if len(paths) == 0:
        raise ValueError("path_map needs at least 1 image, the path set has none")
    paths = replace(paths, margins=None)  # not needed, and large to copy
    rows = stratified_rows(np.zeros(len(paths)) if paths.labels is None else paths.labels, max_images, seed)
    shown = paths.subset(rows)
    shown = shown if layers is None else shown.select_layers(layers)
    counts = shown.counts()
    varying = shown.unpack()[:, (counts > 0) & (counts < len(shown))]
    embedding = _embed(varying, method, n_components_pca, perplexity, seed)
    n_neighbours, accuracy, silhouette_mean, ratio = _class_numbers(shown, varying)
    return PathMap(
        **embedding._asdict(),
        rows=rows,
        ids=shown.ids,
        labels=shown.labels,
        layers=tuple(layer.name for layer in shown.layers),
        n_varying=varying.shape[1],
        n_distinct=shown.distinct(),
        knn_k=n_neighbours,
        knn_accuracy=accuracy,
        silhouette=silhouette_mean,
        between_within=ratio,
        model=paths.model_name,
    )


def _embed(varying: NDArray[np.bool_], method: str, n_components: int, perplexity: float, seed: int) -> _Embedding:
    n, n_varying = varying.shape
    if n_varying == 0:
        nothing = np.zeros(0, np.float32)
        note = "no filter differs between these images, so all points coincide"
        return _Embedding(np.zeros((n, 2), np.float32), nothing, "pca", note=note)
    k = min(n_components, n_varying, n - 1)
    decomposition = import_optional("sklearn.decomposition", "path_map")
    pca = decomposition.PCA(n_components=k, random_state=seed)
    points = pca.fit_transform(varying.astype(np.float32))
    explained = pca.explained_variance_ratio_.astype(np.float32)
    if method == "pca" or k < 2 or n < 4:
        xy = np.zeros((n, 2), np.float32)
        xy[:, : min(k, 2)] = points[:, :2]
        note = (
            "" if method == "pca" else "too few images or varying filters for t-SNE: positions are principal components"
        )
        return _Embedding(xy, explained, "pca", note=note)
    used = min(perplexity, (n - 1) / 3)
    # A step over few points is too short to share: on a machine with other work, threads waiting for each other made
    # 500 images take 31 s instead of 1.5 s. threadpoolctl comes with scikit-learn.
    limits = 1 if n < _MANY_IMAGES else None
    with import_optional("threadpoolctl", "path_map").threadpool_limits(limits):
        xy, divergence = (_tsne if method == "tsne" else _opentsne)(points, used, seed)
    note = f"perplexity lowered from {perplexity:g} to {used:.3g} for {n} images" if used < perplexity else ""
    return _Embedding(xy.astype(np.float32), explained, method, float(used), divergence, note)


def _tsne(points: NDArray[np.float32], perplexity: float, seed: int) -> tuple[NDArray[Any], float]:
    """Positions and what is left of the divergence, by scikit-learn."""
    tsne = import_optional("sklearn.manifold", "path_map").TSNE(perplexity=perplexity, init="pca", random_state=seed)
    return tsne.fit_transform(points), float(tsne.kl_divergence_)


def _opentsne(points: NDArray[np.float32], perplexity: float, seed: int) -> tuple[NDArray[Any], float]:
    """The same by openTSNE, which starts from principal components by itself."""
    package = import_optional("openTSNE", 'path_map(method="opentsne")', extra="fast")
    n_jobs = 1 if len(points) < _MANY_IMAGES else -1
    fitted = package.TSNE(perplexity=perplexity, random_state=seed, n_jobs=n_jobs).fit(points)
    return np.asarray(fitted), float(fitted.kl_divergence)


def _class_numbers(shown: PathSet, varying: NDArray[np.bool_]) -> tuple[int, float, float, float]:
    """Neighbours used, their accuracy, silhouette, between / within; filters that never change affect no distance."""
    k = min(_K, len(shown) - 1)
    nothing = (k, float("nan"), float("nan"), float("nan"))
    if shown.labels is None or varying.shape[1] == 0:
        return nothing
    _, own_class, sizes = class_members(shown.labels)
    if len(sizes) < 2:
        return nothing
    sums = class_distance_sums(varying, own_class, sizes)
    slim = PathSet.from_gates({"varying": varying}, labels=shown.labels)
    accuracy = slim.knn_accuracy(k, max_images=len(slim))
    return k, accuracy, silhouette(sums, own_class, sizes), between_within(sums, own_class, sizes)
