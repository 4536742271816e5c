"""How well single filters stand for concepts.

Source: Li et al., Interpretable Neural Network Decoupling, ECCV 2020, Table 1: the share of *all* images in which
filter and concept overlap by more than 0.01, for the filter's best concept. That number cannot exceed the share of
images that contain the concept, so it favours whatever is everywhere, and filters that know nothing score well above
zero. It is kept beside two that mean more: the same share among the images *with* the concept, and intersection over
union summed over the data set (Bau et al., Network Dissection, CVPR 2017). All three come with what they are when
images and labels are paired at random.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify._optional import new_axes, write_title
from decouplify.concepts._overlap import Encoder, Labels, active_masks, intersections
from decouplify.concepts.data import Concept, ConceptDataset
from decouplify.concepts.features import FeatureTap, layers_or_default, order_of, stream, to_input
from decouplify.concepts.thresholds import Thresholds, collect_thresholds
from decouplify.paths._results import Result
from decouplify.paths._text import percent, plain, text_table
from decouplify.paths.states import label_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FilterConcept", "Interpretability", "LayerScores", "Measure", "interpretability"]

Measure: TypeAlias = Literal["iou", "conditional", "paper"]
MEASURES: tuple[Measure, ...] = ("iou", "conditional", "paper")
_LABELS = {
    "iou": "intersection over union with the best concept",
    "conditional": "share of the concept's images that overlap",
    "paper": "share of all images that overlap",
}
_COLORS = ("#35587f", "#c9ced6")


class FilterConcept(NamedTuple):
    """A filter, the concept it fits best, and how well.

    Attributes:
        layer: Layer of the filter.
        filter: Its index.
        concept: The concept.
        value: The measure, in [0, 1].
        null: Mean of the filter's best value when images and labels are paired at random.
        p_value: (1 + random pairings that do as well) / (1 + random pairings).
    """

    layer: str
    filter: int
    concept: Concept
    value: float
    null: float
    p_value: float


@dataclass(frozen=True, eq=False)
class LayerScores:
    """The filters of one layer against all concepts: what was counted, and the measures made of it.

    Attributes:
        name: The layer.
        thresholds: Value above which each filter counts as active, shape (K,).
        n_fired: Images in which it is active anywhere, shape (K,).
        hits: Images in which it overlaps a concept by more than the limit, shape (K, T).
        measures: Per measure its value for every filter and concept, shape (K, T), in [0, 1]; NaN where the concept is
            in too few images.
        null: Per measure the best value of every filter over the concepts, in each random pairing, shape (B, K).
    """

    name: str
    thresholds: NDArray[np.float32]
    n_fired: NDArray[np.int64]
    hits: NDArray[np.int64]
    measures: Mapping[Measure, NDArray[np.float64]]
    null: Mapping[Measure, NDArray[np.float64]]

    @property
    def n_filters(self) -> int:
        """Filters K."""
        return len(self.n_fired)

    def best(self, measure: Measure = "iou") -> NDArray[np.float64]:
        """Every filter's value for its best concept, shape (K,); NaN if no concept is in enough images."""
        return _best(self.measures[measure])

    def mean(self, measure: Measure = "iou", include_silent: bool = True) -> float:
        """Mean over the filters; those never active count 0, as in the paper, or not at all. NaN if none is left."""
        values = self.best(measure)
        kept = values if include_silent else values[self.n_fired > 0]
        return float(kept.mean()) if len(kept) else float("nan")

    def p_values(self, measure: Measure = "iou") -> NDArray[np.float64]:
        """(1 + random pairings that do as well) / (1 + B) per filter, shape (K,); NaN where there is no score."""
        null, best = self.null[measure], self.best(measure)
        as_well = (null >= best).sum(axis=0)
        return np.where(np.isnan(best), np.nan, (1 + as_well) / (1 + len(null)))


@dataclass(frozen=True, eq=False, repr=False)
class Interpretability(Result):
    """How well the filters of some layers stand for concepts.

    Three measures, each for a filter and its best concept:

    - ``"iou"``: places where both are over places where either is, over the images labelled for the concept's
      category.
    - ``"conditional"``: share of the images *with* the concept in which the two overlap by more than
      ``iou_threshold``.
    - ``"paper"``: the same count over *all* images, the number of the paper's Table 1. At most the concept's frequency.

    Attributes:
        layers: One entry per layer.
        concepts: The concepts, in the order of the columns.
        n_present: Images with each concept, shape (T,).
        n_images: All images N.
        iou_threshold: Overlap in one image that counts, 0.01 in the paper.
        min_images: Images a concept must be in for "iou" and "conditional".
        quantile: Share of the places at which a filter exceeds its threshold.
        model: Name of the model, for titles.
    """

    layers: tuple[LayerScores, ...]
    concepts: tuple[Concept, ...]
    n_present: NDArray[np.int64]
    n_images: int
    iou_threshold: float
    min_images: int
    quantile: float
    model: str = ""

    @property
    def n_permutations(self) -> int:
        """Random pairings B of the null."""
        return len(self.layers[0].null["iou"])

    def layer(self, name: str) -> LayerScores:
        """The layer of that name.

        Raises:
            KeyError: If there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r} was scored; there are {', '.join(layer.name for layer in self.layers)}")

    def ranking(self, n: int = 10, *, measure: Measure = "iou", category: str | None = None) -> list[FilterConcept]:
        """The filters that fit a concept best, over all layers.

        Args:
            n: How many.
            measure: The measure.
            category: Consider concepts of this category only. The null stays that of the best of all concepts.

        Raises:
            ValueError: If there is no such measure or category.
        """
        _check_measure(measure)
        columns = [i for i, concept in enumerate(self.concepts) if category in (None, concept.category)]
        if not columns:
            known = sorted({concept.category for concept in self.concepts})
            raise ValueError(f"ranking: no category {category!r}; there are {', '.join(known)}")
        found = [entry for layer in self.layers for entry in self._rank_layer(layer, measure, columns)]
        return sorted(found, key=lambda entry: -entry.value)[:n]

    def _rank_layer(self, layer: LayerScores, measure: Measure, columns: Sequence[int]) -> Iterator[FilterConcept]:
        values = np.nan_to_num(layer.measures[measure][:, columns], nan=-1.0)
        best = values.argmax(axis=1)
        null = layer.null[measure].mean(axis=0)
        p_values = layer.p_values(measure)
        for k in np.flatnonzero(values.max(axis=1) > 0):
            concept = self.concepts[columns[best[k]]]
            yield FilterConcept(
                layer.name, int(k), concept, float(values[k, best[k]]), float(null[k]), float(p_values[k])
            )

    def headline(self) -> str:
        """One line: images, concepts, filters beyond chance."""
        n_filters = sum(layer.n_filters for layer in self.layers)
        beyond = sum(_n_beyond(layer, "iou") for layer in self.layers)
        chance = n_filters / (self.n_permutations + 1)
        n_usable = int((self.n_present >= self.min_images).sum())
        return (
            f"{n_filters} filters, {n_usable} concepts in at least {self.min_images} of {self.n_images} images: "
            f"{beyond} filters fit one better than by chance ({chance:.1f} expected)"
        )

    def summary(self) -> str:
        """A table with a row per layer, then the best filters."""
        rows = []
        for layer in self.layers:
            means = [f"{layer.mean(m):.4f} ({layer.null[m].mean():.4f})" for m in MEASURES]
            silent = percent(int((layer.n_fired == 0).sum()), layer.n_filters)
            rows.append([layer.name, str(layer.n_filters), silent, *means, str(_n_beyond(layer, "iou"))])
        header = ["layer", "filters", "never active", "IoU (null)", "conditional (null)", "paper (null)", "beyond null"]
        best = [
            [f.layer, str(f.filter), f.concept.name, f.concept.category, f"{f.value:.3f}", f"{f.null:.3f}"]
            for f in self.ranking()
        ]
        lines = [
            f"Interpretability{' of ' + self.model if self.model else ''}: means over the filters, in brackets the "
            "same with images and labels paired at random",
            text_table(header, rows),
            text_table(["layer", "filter", "concept", "category", "IoU", "null"], best, left=4),
            self.headline(),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Interpretability({self.headline()})"

    def to_dict(self) -> dict[str, Any]:
        """Numbers per layer and per filter, and the concepts; not the counts of every pair of filter and concept."""
        document = {name: plain(value) for name, value in vars(self).items() if name not in ("layers", "concepts")}
        document["n_permutations"] = self.n_permutations
        document["concepts"] = [vars(concept) for concept in self.concepts]
        document["layers"] = [self._layer_dict(layer) for layer in self.layers]
        return document

    def _layer_dict(self, layer: LayerScores) -> dict[str, Any]:
        document = {"name": layer.name, "thresholds": plain(layer.thresholds), "n_fired": plain(layer.n_fired)}
        for measure in MEASURES:
            values = np.nan_to_num(layer.measures[measure], nan=-1.0)
            document[measure] = {
                "mean": plain(layer.mean(measure)),
                "mean_of_active": plain(layer.mean(measure, include_silent=False)),
                "best": plain(layer.best(measure)),
                "concept": [self.concepts[i].number for i in values.argmax(axis=1)],
                "null_mean": plain(layer.null[measure].mean(axis=0)),
                "p_value": plain(layer.p_values(measure)),
            }
        return document

    def plot(self, ax: Axes | None = None, *, measure: Measure = "iou", before: Interpretability | None = None) -> Axes:
        """Mean score per layer as bars, chance as a line across each.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
            measure: "iou", "conditional" or "paper" (Table 1 of the paper).
            before: Scores of as many layers of another network, drawn beside these: the network before decoupling.

        Raises:
            ValueError: If there is no such measure, or ``before`` has another number of layers.
        """
        _check_measure(measure)
        if before is not None and len(before.layers) != len(self.layers):
            raise ValueError(f"plot: before has {len(before.layers)} layers, wanted {len(self.layers)}")
        ax = new_axes(min(16.0, max(5.5, 2.5 + 0.8 * len(self.layers))), 4.2) if ax is None else ax
        shown = [("decoupled", self, _COLORS[0])] if before is not None else [("", self, _COLORS[0])]
        if before is not None:
            shown.insert(0, ("before", before, _COLORS[1]))
        width = 0.8 / len(shown)
        for i, (label, scores, color) in enumerate(shown):
            x = np.arange(len(scores.layers)) + (i - (len(shown) - 1) / 2) * width
            ax.bar(x, [layer.mean(measure) for layer in scores.layers], 0.92 * width, color=color, label=label)
            null = [float(layer.null[measure].mean()) for layer in scores.layers]
            ax.hlines(null, x - width / 2, x + width / 2, color="#e08214", linewidth=2, label="chance" if not i else "")
        label_layers(ax, [layer.name for layer in self.layers])
        ax.set_ylabel(_LABELS[measure], fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        title = f"Interpretability{' of ' + self.model if self.model else ''}"
        write_title(ax, title, self.headline().replace(": ", ":\n"))
        return ax


def interpretability(
    model: nn.Module,
    dataset: ConceptDataset,
    layers: str | Iterable[str] | None = None,
    *,
    thresholds: Thresholds | None = None,
    quantile: float = 0.005,
    iou_threshold: float = 0.01,
    n_permutations: int = 20,
    min_images: int = 50,
    max_images: int | None = 5000,
    batch_size: int = 32,
    num_workers: int = 0,
    seed: int = 0,
    progress: bool | None = None,
) -> Interpretability:
    """How well every filter of some layers stands for a concept.

    Two passes over the images: thresholds, then overlaps. Feature maps are used and forgotten. What is kept grows with
    filters times concepts times permutations: 400 MB for a layer of 512 filters with 1200 concepts.

    Args:
        model: A wrapped model, or any other if ``layers`` names modules.
        dataset: The labelled images.
        layers: Gated convolutions, or other modules that return feature maps; by default the last gated convolution of
            every resolution.
        thresholds: Of these layers; collected on the same images first if not given.
        quantile: For thresholds: share of the places at which a filter exceeds its own.
        iou_threshold: Overlap in one image that counts.
        n_permutations: Random pairings of images and labels for the null; at most one less than there are images.
        min_images: A concept must be in so many images for "iou" and "conditional".
        max_images: Use a random subset of this size; ``None`` for all images.
        batch_size: Images per run.
        num_workers: Processes that load images.
        seed: Seed of the subset and of the random pairings.
        progress: Show a progress bar; if not given, only on a terminal and with rich installed.

    Raises:
        ValueError: If a number is out of range, there are fewer than 2 images, there is no such layer, a label is
            unknown, or the thresholds belong to other weights.
        NonFiniteError: If an image or a feature is not finite.

    Examples:
        A network with one filter, which answers to red, on pictures of coloured shapes:

        >>> from decouplify.concepts import planted_concepts
        >>> network = nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU())
        >>> _ = nn.init.constant_(network[0].bias, -1.0)
        >>> _ = network[0].weight.data.copy_(torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1))
        >>> scores = interpretability(network, planted_concepts(60, 32), "1", quantile=0.03, min_images=5)
        >>> scores.ranking(1)[0].concept.name
        'red-c'
    """
    if n_permutations < 1 or min_images < 1 or not 0 <= iou_threshold < 1:
        raise ValueError(
            f"interpretability: n_permutations={n_permutations}, min_images={min_images} and iou_threshold="
            f"{iou_threshold} given; wanted at least 1, at least 1, and a number in [0, 1)"
        )
    order = order_of(dataset, max_images, seed, "interpretability")
    if len(order) < 2:
        raise ValueError("interpretability needs at least 2 images: its null pairs images with each other's labels")
    chosen = layers_or_default(model, layers, dataset, "interpretability")
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}
    if thresholds is None:
        thresholds = collect_thresholds(
            model, dataset, chosen, quantile=quantile, max_images=max_images, seed=seed, **options
        )
    n_shifts = min(n_permutations, len(order) - 1)
    with FeatureTap(model, chosen) as tap:
        encode = Encoder(tuple(dataset.concepts), tap.device)
        limits = thresholds.of(chosen, model, tap.device)
        tally = _Tally(encode, limits, n_shifts, iou_threshold)
        # Images come in random order, so pairing each with the labels of the one s before is a random permutation.
        tally.previous.extend(encode(dataset[i]) for i in order[-n_shifts:])
        for images in stream(dataset, order, "concepts", **options):
            maps = tap(to_input(images, dataset.transform, tap.device))
            for i, image in enumerate(images):
                tally.add({name: features[i] for name, features in maps.items()}, encode(image))
    return Interpretability(
        layers=tuple(tally.scores(name, min_images) for name in chosen),
        concepts=tuple(dataset.concepts),
        n_present=tally.n_present.cpu().numpy(),
        n_images=len(order),
        iou_threshold=iou_threshold,
        min_images=min_images,
        quantile=thresholds.quantile,
        model=type(model).__name__,
    )


class _Counts:
    """Overlaps of one layer with the labels, in B + 1 pairings: the true one first, then the random ones."""

    def __init__(self, encode: Encoder, n_pairings: int, n_filters: int) -> None:
        n_concepts, n_categories, device = len(encode.concepts), len(encode.categories), encode.device
        self.hits = torch.zeros(n_pairings, n_filters, n_concepts, dtype=torch.int32, device=device)
        self.both = torch.zeros(n_pairings, n_filters, n_concepts, dtype=torch.int64, device=device)
        self.active = torch.zeros(n_pairings, n_filters, n_categories, dtype=torch.int64, device=device)
        self.n_fired = torch.zeros(n_filters, dtype=torch.int64, device=device)

    def add(self, filters: Tensor, masks: Tensor, pairings: Sequence[Labels], iou_threshold: float) -> None:
        """One image: its active filters, where they are, and the labels of each pairing on the same grid."""
        self.n_fired[filters] += 1
        areas = masks.flatten(1).sum(1)  # (k,)
        flat = torch.cat([labels.flat for labels in pairings])
        inside = intersections(masks, flat)  # (k, sum of t)
        hit = inside / (areas[:, None] + flat.sum(1) - inside) > iou_threshold
        start = 0
        for b, labels in enumerate(pairings):
            part = slice(start, start + len(labels.columns))
            start = part.stop
            where = (filters[:, None], labels.columns[None, :])
            self.hits[b].index_put_(where, hit[:, part].int(), accumulate=True)
            self.both[b].index_put_(where, inside[:, part].long(), accumulate=True)
            self.active[b, filters] += areas[:, None] * labels.annotated


class _Tally:
    """Everything counted during the pass.

    Attributes:
        previous: Labels of the last B images, oldest first.
        n_present: Images with each concept, shape (T,).
    """

    def __init__(self, encode: Encoder, limits: Mapping[str, Tensor], n_shifts: int, iou_threshold: float) -> None:
        self.encode = encode
        self.limits = limits
        self.iou_threshold = iou_threshold
        self.previous: deque[Labels] = deque(maxlen=n_shifts)
        self.counts = {name: _Counts(encode, n_shifts + 1, len(limit)) for name, limit in limits.items()}
        self.n_images = 0
        self.n_present = torch.zeros(len(encode.concepts), dtype=torch.int64, device=encode.device)
        self.covered = torch.zeros_like(self.n_present)  # places labelled with each concept

    def add(self, maps: Mapping[str, Tensor], labels: Labels) -> None:
        """Count one image, given its features by layer, shape (K, H, W)."""
        grid = (int(labels.masks.shape[1]), int(labels.masks.shape[2]))
        pairings = [labels, *(other.on_grid(grid) for other in reversed(self.previous))]
        for name, features in maps.items():
            filters, masks = active_masks(features, self.limits[name], grid)
            self.counts[name].add(filters, masks, pairings, self.iou_threshold)
        self.n_images += 1
        self.n_present[labels.columns] += 1
        self.covered[labels.columns] += labels.masks.flatten(1).sum(1)
        self.previous.append(labels)

    def scores(self, name: str, min_images: int) -> LayerScores:
        """The measures of one layer."""
        counts = self.counts[name]
        rare = self.n_present < min_images
        true, null = {}, {}
        for measure in MEASURES:
            values = self._measure(counts, measure)
            if measure != "paper":
                values[:, :, rare] = torch.nan
            array = values.cpu().numpy()
            true[measure], null[measure] = array[0], _best(array[1:])
        return LayerScores(
            name=name,
            thresholds=self.limits[name].cpu().numpy(),
            n_fired=counts.n_fired.cpu().numpy(),
            hits=counts.hits[0].long().cpu().numpy(),
            measures=true,
            null=null,
        )

    def _measure(self, counts: _Counts, measure: Measure) -> Tensor:
        """One measure in all pairings, float64, shape (B + 1, K, T)."""
        if measure == "paper":
            return counts.hits.double() / self.n_images
        if measure == "conditional":
            return counts.hits.double() / self.n_present.clamp(min=1)
        either = counts.active[:, :, self.encode.category_of] + self.covered - counts.both
        return counts.both.double() / either.clamp(min=1)


def _best(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest along the last axis, NaN only where all are."""
    filled = np.where(np.isnan(values), -np.inf, values).max(axis=-1)
    return np.where(np.isneginf(filled), np.nan, filled)


def _n_beyond(layer: LayerScores, measure: Measure) -> int:
    """Filters whose best value no random pairing reaches."""
    best = layer.best(measure)
    return int(((layer.null[measure] < best).all(axis=0) & (best > 0)).sum())


def _check_measure(measure: str) -> None:
    if measure not in MEASURES:
        raise ValueError(f"measure is {measure!r}, wanted one of {', '.join(map(repr, MEASURES))}")
