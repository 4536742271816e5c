"""How well one filter, and several together, cover a concept.

Source: Li et al., Interpretable Neural Network Decoupling, ECCV 2020, Figure 6 (representation ability of single and
multiple filters). The single filter is the one that overlaps the concept most. The multiple ones are those that switch
off when the concept is hidden, taken together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from decouplify._optional import new_axes, write_title
from decouplify.concepts._occlude import Changes, Fill, Reading, changes, check_fill, is_hideable, switches_of
from decouplify.concepts._overlap import active_masks, overlap
from decouplify.concepts._switches import check_thresholds, with_sites
from decouplify.concepts.data import Concept, ConceptDataset, ConceptImage
from decouplify.concepts.features import FeatureTap, layers_or_default, order_of, stream
from decouplify.concepts.thresholds import Thresholds, collect_thresholds
from decouplify.decoupling import is_wrapped
from decouplify.paths._results import Result
from decouplify.paths._text import plain, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ConceptCover", "Representation", "representation_ability"]

_COLORS = {"single": "#c9ced6", "multiple": "#35587f"}


class ConceptCover(NamedTuple):
    """How well the filters of one layer cover one concept. All overlaps are in [0, 1].

    Attributes:
        layer: The layer.
        concept: The concept.
        n_images: Images looked at; the same for all numbers.
        single_max: Overlap of the best filter in its best image (the paper's single-filter number).
        single_mean: Overlap of each image's best filter, mean over the images.
        multiple_max: Overlap of the filters switched off, together, in the best image.
        multiple_mean: The same, mean over the images; 0 where none switches off.
        control_mean: The same for the filters that switch off when another part of the image is hidden.
        n_off: Filters switched off, mean over the images.
        n_specific: Those among them that the control leaves on.
    """

    layer: str
    concept: Concept
    n_images: int
    single_max: float
    single_mean: float
    multiple_max: float
    multiple_mean: float
    control_mean: float
    n_off: float
    n_specific: float


@dataclass(frozen=True, eq=False, repr=False)
class Representation(Result):
    """Single and multiple filters against the concepts of some categories.

    The paper compares the largest overlaps. The largest of single filters is taken over all filters and images, that of
    the multiple ones over the images only, and both grow with the number of images, so the means say more.

    Attributes:
        covers: One entry per layer and concept.
        layers: The layers, in the order given.
        n_images: Images looked at.
        fill: What concepts were filled with to hide them.
        model: Name of the model, for titles.
    """

    covers: tuple[ConceptCover, ...]
    layers: tuple[str, ...]
    n_images: int
    fill: str
    model: str = ""

    @property
    def categories(self) -> list[str]:
        """Categories of the concepts, sorted."""
        return sorted({cover.concept.category for cover in self.covers})

    def mean(self, number: str, layer: str, category: str) -> float:
        """Mean over the concepts of a category; NaN if there are none.

        Args:
            number: A field of ``ConceptCover``, such as "multiple_mean".
            layer: Layer.
            category: Category.
        """
        found = [getattr(c, number) for c in self.covers if c.layer == layer and c.concept.category == category]
        return float(np.mean(found)) if found else float("nan")

    def headline(self) -> str:
        """One line: images, concepts, mean overlaps."""
        n_concepts = len({cover.concept.number for cover in self.covers})
        numbers = ("single_mean", "multiple_mean", "control_mean")
        single, multiple, control = (np.mean([getattr(cover, n) for cover in self.covers]) for n in numbers)
        return (
            f"{n_concepts} concepts in {self.n_images} images, mean overlap: best single filter {single:.3f}, "
            f"filters switched off together {multiple:.3f}, by control {control:.3f}"
        )

    def summary(self) -> str:
        """A table with a row per layer and category."""
        numbers = ConceptCover._fields[3:]
        rows = [
            [layer, category, *(f"{self.mean(number, layer, category):.3f}" for number in numbers)]
            for layer in self.layers
            for category in self.categories
        ]
        header = ["layer", "category", *(number.replace("_", " ") for number in numbers)]
        title = f"Representation ability{' of ' + self.model if self.model else ''}: means over concepts"
        return f"{title}\n{text_table(header, rows, left=2)}\n{self.headline()}"

    def __repr__(self) -> str:
        return f"Representation({self.headline()})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        covers = [{**cover._asdict(), "concept": vars(cover.concept)} for cover in self.covers]
        return {name: plain(value) for name, value in vars(self).items()} | {"covers": covers}

    def plot(self, ax: Axes | None = None, *, reduce: Literal["mean", "max"] = "mean") -> Axes:
        """Single and multiple filters side by side for every category and layer; a line for the control.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
            reduce: "mean" over the images, or "max" as in the paper.

        Raises:
            ValueError: If ``reduce`` is neither.
        """
        if reduce not in ("mean", "max"):
            raise ValueError(f'plot: reduce is {reduce!r}, wanted "mean" or "max"')
        places = [(category, layer) for category in self.categories for layer in self.layers]
        ax = new_axes(min(16.0, max(6.0, 2.5 + 0.6 * len(places))), 4.4) if ax is None else ax
        # A gap between categories.
        x = np.array([i + 0.7 * (i // len(self.layers)) for i in range(len(places))])
        for which, shift in (("single", -0.2), ("multiple", 0.2)):
            heights = [self.mean(f"{which}_{reduce}", layer, category) for category, layer in places]
            label = "best single filter" if which == "single" else "filters switched off, together"
            ax.bar(x + shift, heights, 0.37, color=_COLORS[which], label=label)
        control = [self.mean("control_mean", layer, category) for category, layer in places]
        if reduce == "mean":
            ax.hlines(control, x, x + 0.4, color="#e08214", linewidth=2, label="the same by control")
        ax.set_xticks(x, [layer for _, layer in places], rotation=90, fontsize=8)
        for i, category in enumerate(self.categories):
            middle = x[i * len(self.layers) : (i + 1) * len(self.layers)].mean()
            ax.annotate(category, (middle, 1.0), xycoords=("data", "axes fraction"), ha="center", va="top")
        ax.margins(y=0.15)
        ax.set_ylabel(f"overlap with the concept ({reduce} over images)", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        title = f"Representation ability{' of ' + self.model if self.model else ''}"
        write_title(ax, title, self.headline().replace(": ", ":\n"))
        return ax


def representation_ability(
    model: nn.Module,
    dataset: ConceptDataset,
    layers: str | Iterable[str] | None = None,
    *,
    categories: Iterable[str] = ("object", "part", "material"),
    images_per_concept: int = 20,
    max_images: int = 500,
    fill: Fill = "black",
    thresholds: Thresholds | None = None,
    threshold_images: int = 1000,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool | None = None,
) -> Representation:
    """How well the best filter, and the filters that hiding a concept switches off, cover the concept.

    Args:
        model: A wrapped model; or one without gates, whose filters count as open where their mean response is above
            that of all images (``pseudo_paths``, rule "mean"), in the sites that ``wrap`` would find.
        dataset: The labelled images.
        layers: Gated convolutions; the last one of every resolution if not given.
        categories: Categories of concepts to look at. Concepts of whole images cannot be hidden.
        images_per_concept: Images looked at for each concept, if there are so many.
        max_images: Images looked at in all.
        fill: What to fill the hidden part with, before normalisation: "black", "mean", "blur" or "noise".
        thresholds: Of these layers of a wrapped model; collected first if not given.
        threshold_images: At most so many images for that, and for mean responses.
        batch_size: Images per run while collecting thresholds, and images read at a time.
        seed: Seed of the choice of images, of controls and of noise.
        progress: Show a progress bar; if not given, only on a terminal and with rich installed.

    Raises:
        ValueError: If the model has no site, there is no such layer or filling, or no image has a concept of the
            categories.
        NonFiniteError: If an image or a feature is not finite.
    """
    check_fill(fill, "representation_ability")
    if images_per_concept < 1:
        raise ValueError(f"representation_ability: images_per_concept is {images_per_concept}, wanted at least 1")
    wanted = (categories,) if isinstance(categories, str) else tuple(categories)
    name, real, model = type(model).__name__, is_wrapped(model), with_sites(model, dataset)
    check_thresholds(thresholds is None or real, "representation_ability", name)
    names = layers_or_default(model, layers, dataset, "representation_ability")
    reading: Reading = {"max_images": threshold_images, "batch_size": batch_size, "seed": seed, "progress": progress}
    switches = switches_of(model, dataset, names, "representation_ability", real=real, **reading)
    order = order_of(dataset, max_images, seed, "representation_ability")
    if thresholds is None:
        thresholds = collect_thresholds(model, dataset, names, **reading)
    rng = np.random.default_rng(seed)
    rows = _Rows([c for c in dataset.concepts if c.category in wanted], images_per_concept)
    with FeatureTap(model, names) as tap:
        limits = thresholds.of(names, model, tap.device)
        batches = stream(dataset, order, "representation", batch_size=batch_size, progress=progress)
        for image in (image for images in batches for image in images):
            if concepts := rows.wanted(image):
                masks = [image.mask(concept.number) for concept in concepts]
                maps, by_site = changes(tap, switches, image, masks, dataset, fill, rng)
                rows.add(image, concepts, maps, by_site, limits)
    if not rows.seen:
        raise ValueError(
            f"representation_ability: none of {len(order)} images has a concept of {', '.join(wanted)} on 0.2 to 80 % "
            "of its area"
        )
    return Representation(rows.covers(names), tuple(names), rows.n_images, fill, name)


class _Row(NamedTuple):
    """One layer, concept and image."""

    single: float
    multiple: float
    control: float
    n_off: int
    n_specific: int


class _Rows:
    """What is kept of each image.

    Attributes:
        seen: Per layer and concept number, one entry per image.
        n_images: Images looked at.
    """

    def __init__(self, concepts: Sequence[Concept], images_per_concept: int) -> None:
        self.concepts = concepts
        self.images_per_concept = images_per_concept
        self.seen: dict[tuple[str, int], list[_Row]] = defaultdict(list)
        self.n_seen: dict[int, int] = defaultdict(int)
        self.n_images = 0

    def wanted(self, image: ConceptImage) -> list[Concept]:
        """Concepts of the image of which more images are wanted."""
        few = [c for c in self.concepts if self.n_seen[c.number] < self.images_per_concept]
        return [c for c in few if c.number not in image.whole and is_hideable(image, c.number)]

    def add(
        self,
        image: ConceptImage,
        concepts: Sequence[Concept],
        maps: Mapping[str, Tensor],
        by_site: Mapping[str, Changes],
        limits: Mapping[str, Tensor],
    ) -> None:
        """One image: its features by layer, and what hiding each of its concepts changed."""
        self.n_images += 1
        for concept in concepts:
            self.n_seen[concept.number] += 1
        for name, change in by_site.items():
            filters, masks = active_masks(maps[name], limits[name], image.grid)
            off = change.before & ~change.after  # (m, K)
            control = change.before & ~change.control
            for i, concept in enumerate(concepts):
                label = torch.from_numpy(image.mask(concept.number)).to(masks.device)
                row = _Row(
                    single=float(overlap(masks, label).max()) if len(masks) else 0.0,
                    multiple=_together(masks[off[i, filters]], label),
                    control=_together(masks[control[i, filters]], label),
                    n_off=int(off[i].sum()),
                    n_specific=int((off[i] & ~control[i]).sum()),
                )
                self.seen[name, concept.number].append(row)

    def covers(self, layers: Sequence[str]) -> tuple[ConceptCover, ...]:
        """Means and maxima over the images."""
        return tuple(
            _cover(layer, concept, self.seen[layer, concept.number])
            for layer in layers
            for concept in self.concepts
            if (layer, concept.number) in self.seen
        )


def _together(masks: Tensor, label: Tensor) -> float:
    """Overlap of a concept with the places where any of the filters is active; 0 for no filter."""
    return float(overlap(masks.any(0, keepdim=True), label)[0])


def _cover(layer: str, concept: Concept, rows: Sequence[_Row]) -> ConceptCover:
    table = np.array(rows, dtype=np.float64)  # columns in the order of _Row
    single, multiple, control, n_off, n_specific = table.mean(axis=0).tolist()
    return ConceptCover(
        layer=layer,
        concept=concept,
        n_images=len(rows),
        single_max=float(table[:, 0].max()),
        single_mean=single,
        multiple_max=float(table[:, 1].max()),
        multiple_mean=multiple,
        control_mean=control,
        n_off=n_off,
        n_specific=n_specific,
    )
