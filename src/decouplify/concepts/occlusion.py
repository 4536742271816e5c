"""Hide a concept and see which filters switch off.

Source: Li et al., Interpretable Neural Network Decoupling, ECCV 2020, Figures 7 and 8 (semantic concept analysis). The
paper looks at the filters switched off. Here they are told apart: a filter may switch because filters before it did,
and many switch whatever part of the image is hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify._optional import new_axes, write_title
from decouplify.concepts._occlude import (
    Changes,
    Fill,
    Mask,
    Reading,
    changes,
    check_fill,
    hide,
    images_with,
    switches_of,
)
from decouplify.concepts._overlap import active_masks, overlap
from decouplify.concepts._pictures import overlay, picture_grid, show
from decouplify.concepts._switches import check_thresholds, with_sites
from decouplify.concepts.data import Concept, ConceptDataset, ConceptImage, Pixels, find_concept
from decouplify.concepts.features import FeatureTap, order_of
from decouplify.concepts.thresholds import Thresholds, collect_thresholds
from decouplify.decoupling import decoupling_of, is_wrapped
from decouplify.paths._results import Result
from decouplify.paths._text import plain, text_table
from decouplify.paths.states import label_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ConceptOcclusion", "Example", "LayerChanges", "SwitchedFilter", "occlude_concept"]

_N_SHOWN = 3  # filters per example, as in the paper


@dataclass(frozen=True, eq=False)
class LayerChanges:
    """Gates of one layer, image by image. All arrays have shape (n, K) for n images and K filters.

    Attributes:
        name: The layer.
        before: Open for the whole image.
        after: Open with the concept hidden.
        direct: Open with the concept hidden, when all gates of earlier layers are held as they were before.
        control: Open with another part of the image hidden, of the same shape and size.
        margin_before: Gate logits for the whole image, float32; open where positive.
        margin_after: Gate logits with the concept hidden.
        iou: Overlap of filter and concept in the whole image, in [0, 1].
    """

    name: str
    before: NDArray[np.bool_]
    after: NDArray[np.bool_]
    direct: NDArray[np.bool_]
    control: NDArray[np.bool_]
    margin_before: NDArray[np.float32]
    margin_after: NDArray[np.float32]
    iou: NDArray[np.float64]

    @property
    def off(self) -> NDArray[np.bool_]:
        """Switched off by hiding the concept: what the paper looks at."""
        return self.before & ~self.after

    @property
    def on(self) -> NDArray[np.bool_]:
        """Switched on by hiding the concept."""
        return ~self.before & self.after

    @property
    def direct_off(self) -> NDArray[np.bool_]:
        """Would switch off even if no filter before had switched."""
        return self.before & ~self.direct

    @property
    def cascaded_off(self) -> NDArray[np.bool_]:
        """Switched off only because filters before did."""
        return self.off & self.direct

    @property
    def control_off(self) -> NDArray[np.bool_]:
        """Switched off by hiding another part."""
        return self.before & ~self.control

    @property
    def specific_off(self) -> NDArray[np.bool_]:
        """Switched off by hiding the concept and not by hiding the other part."""
        return self.off & self.control

    @property
    def always_off(self) -> list[int]:
        """Filters switched off in every image."""
        return [int(k) for k in np.flatnonzero(self.off.all(axis=0))]


class SwitchedFilter(NamedTuple):
    """A filter that hiding the concept switches off.

    Attributes:
        layer: Its layer.
        filter: Its index.
        off: Share of the images in which it switches off, in [0, 1].
        control: The same when another part is hidden.
        direct: Share in which it would switch off even if no filter before had switched.
        iou: Its overlap with the concept, mean over the images in which it switches off.
    """

    layer: str
    filter: int
    off: float
    control: float
    direct: float
    iou: float


class Example(NamedTuple):
    """One image for the eye.

    Attributes:
        name: The image.
        pixels: The image, shape (H, W, C).
        hidden: The image without the concept.
        filters: The filters switched off that overlap the concept most: layer, index, overlap, and where they are
            active, bool, shape (h, w).
    """

    name: str
    pixels: Pixels
    hidden: Pixels
    filters: tuple[tuple[str, int, float, Mask], ...]


@dataclass(frozen=True, eq=False, repr=False)
class ConceptOcclusion(Result):
    """What hiding a concept does to the paths of some images.

    Attributes:
        concept: The concept.
        layers: The gates, layer by layer.
        images: Names of the images.
        area: Share of each image that was hidden, shape (n,).
        fill: What it was filled with.
        examples: A few images for the eye.
        model: Name of the model, for titles.
    """

    concept: Concept
    layers: tuple[LayerChanges, ...]
    images: tuple[str, ...]
    area: NDArray[np.float64]
    fill: str
    examples: tuple[Example, ...]
    model: str = ""

    def filters(self, n: int = 10) -> list[SwitchedFilter]:
        """The filters switched off most often beyond what the control does, over all layers."""
        found = []
        for layer in self.layers:
            off, control, direct = layer.off.mean(axis=0), layer.control_off.mean(axis=0), layer.direct_off.mean(axis=0)
            for k in np.flatnonzero(off > 0):
                iou = float(layer.iou[layer.off[:, k], k].mean())
                found.append(
                    SwitchedFilter(layer.name, int(k), float(off[k]), float(control[k]), float(direct[k]), iou)
                )
        return sorted(found, key=lambda f: (f.control - f.off, -f.iou))[:n]

    def headline(self) -> str:
        """One line: images, filters switched off by the concept and by the control."""
        off, control = (sum(_mean(getattr(layer, w)) for layer in self.layers) for w in ("off", "control_off"))
        return (
            f"{len(self.images)} images, {self.area.mean():.1%} of each filled with {self.fill}: "
            f"{off:.1f} filters switch off, {control:.1f} when another part is hidden"
        )

    def summary(self) -> str:
        """A table with a row per layer, then the filters switched off most often."""
        kinds = ("before", "off", "direct_off", "cascaded_off", "control_off", "specific_off", "on")
        rows = [
            [layer.name, *(f"{_mean(getattr(layer, kind)):.1f}" for kind in kinds), str(len(layer.always_off))]
            for layer in self.layers
        ]
        header = ["layer", "open", "off", "direct", "cascaded", "control", "specific", "on", "always off"]
        filters = [
            [f.layer, str(f.filter), f"{f.off:.0%}", f"{f.control:.0%}", f"{f.direct:.0%}", f"{f.iou:.2f}"]
            for f in self.filters()
        ]
        columns = ["layer", "filter", "switched off", "by control", "directly", "IoU"]
        lines = [
            f"{self.concept.name} ({self.concept.category}) hidden{' from ' + self.model if self.model else ''}: "
            "filters per image",
            text_table(header, rows),
            text_table(columns, filters) if filters else "no filter switches off",
            self.headline(),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"ConceptOcclusion({self.concept.name}: {self.headline()})"

    def to_dict(self) -> dict[str, Any]:
        """Everything but the examples' pictures as plain lists and numbers."""
        return {
            "concept": vars(self.concept),
            "model": self.model,
            "fill": self.fill,
            "images": list(self.images),
            "area": plain(self.area),
            "layers": [
                {name: plain(value) for name, value in vars(layer).items()} | {"always_off": layer.always_off}
                for layer in self.layers
            ],
            "filters": [filter._asdict() for filter in self.filters()],
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Filters switched off per image and layer, directly and in consequence; a line for the control.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        ax = new_axes(min(16.0, max(6.0, 3 + 0.6 * len(self.layers))), 4.2) if ax is None else ax
        x = np.arange(len(self.layers))
        # What switches off directly, but not in the whole network where gates before it switch too, is in neither bar.
        direct = np.array([_mean(layer.off & layer.direct_off) for layer in self.layers])
        cascaded = np.array([_mean(layer.cascaded_off) for layer in self.layers])
        control = [_mean(layer.control_off) for layer in self.layers]
        ax.bar(x, direct, 0.7, color="#35587f", label="directly")
        ax.bar(x, cascaded, 0.7, bottom=direct, color="#9db7d5", label="because earlier filters did")
        ax.hlines(control, x - 0.4, x + 0.4, color="#e08214", linewidth=2, label="another part hidden")
        label_layers(ax, [layer.name for layer in self.layers])
        ax.set_ylabel("filters switched off per image")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        title = f"{self.concept.name} hidden{' from ' + self.model if self.model else ''}"
        write_title(ax, title, self.headline().replace(": ", ":\n"))
        return ax

    def plot_examples(self) -> Figure:
        """A row per example: the image, the image without the concept, and where the filters it switches off looked.

        Raises:
            ValueError: If there are no examples.
        """
        if not self.examples:
            raise ValueError("plot_examples: there are none; call occlude_concept with n_examples > 0")
        figure, axes = picture_grid(len(self.examples), 2 + _N_SHOWN)
        for row, example in zip(axes, self.examples, strict=True):
            show(row[0], example.pixels, "image")
            show(row[1], example.hidden, f"{self.concept.name} hidden")
            for ax, (layer, index, iou, mask) in zip(row[2:], example.filters, strict=False):
                show(ax, overlay(example.pixels, mask), f"{layer}\nfilter {index}, IoU {iou:.2f}")
        return figure


def occlude_concept(
    model: nn.Module,
    dataset: ConceptDataset,
    concept: str | int | Concept,
    layers: str | Iterable[str] | None = None,
    *,
    indices: Sequence[int] | None = None,
    max_images: int = 20,
    fill: Fill = "black",
    thresholds: Thresholds | None = None,
    threshold_images: int = 1000,
    n_examples: int = 4,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool | None = None,
) -> ConceptOcclusion:
    """Which filters switch off when a concept is hidden, and which would have anyway.

    Every image runs four times: whole, without the concept, without another part of the same shape, and without the
    concept but with the gates of the whole image.

    Args:
        model: A wrapped model; or one without gates, whose filters count as open where their mean response is above
            that of all images (``pseudo_paths``, rule "mean"), in the sites that ``wrap`` would find. There
            every switch is a direct one.
        dataset: The labelled images.
        concept: Name or number of the concept.
        layers: Gated convolutions; the last three if not given, as in the paper.
        indices: Images to use, those of them that have the concept; random ones if not given. An image is passed over
            if the concept covers less than 0.2 or more than 80 % of it.
        max_images: At most so many.
        fill: What to fill the hidden part with, before normalisation: "black" as in the paper, "mean", "blur" or
            "noise".
        thresholds: Of these layers of a wrapped model; collected first if not given.
        threshold_images: At most so many images for that, and for mean responses.
        n_examples: Images kept for ``plot_examples``.
        batch_size: Images per run while collecting thresholds.
        seed: Seed of the choice of images, of controls and of noise.
        progress: Show a progress bar; if not given, only on a terminal and with rich installed.

    Raises:
        ValueError: If the model has no site, there is no such concept, layer or filling, or no image has the
            concept.
        NonFiniteError: If an image or a feature is not finite.
    """
    check_fill(fill, "occlude_concept")
    known = find_concept(dataset, concept)
    name, real, model = type(model).__name__, is_wrapped(model), with_sites(model, dataset)
    check_thresholds(thresholds is None or real, "occlude_concept", name)
    names = [site.name for site in decoupling_of(model, "occlude_concept").plan.sites][-3:]
    names = names if layers is None else [layers] if isinstance(layers, str) else list(layers)
    reading: Reading = {"max_images": threshold_images, "batch_size": batch_size, "seed": seed, "progress": progress}
    switches = switches_of(model, dataset, names, "occlude_concept", real=real, **reading)
    if thresholds is None:
        thresholds = collect_thresholds(model, dataset, names, **reading)
    rng = np.random.default_rng(seed)
    order = order_of(dataset, None, seed, "occlude_concept") if indices is None else list(indices)
    rows = _Rows(known, names, n_examples)
    with FeatureTap(model, names) as tap:
        limits = thresholds.of(names, model, tap.device)
        for image in islice(images_with(dataset, known, order, batch_size, progress), max_images):
            mask = image.mask(known.number)
            maps, by_site = changes(tap, switches, image, [mask], dataset, fill, rng)
            rows.add(image, hide(image.pixels, mask, fill, rng), maps, by_site, limits)
    if not rows.images:
        raise ValueError(
            f"occlude_concept: none of {len(order)} images shows {known.name!r} on 0.2 to 80 % of its area"
        )
    return ConceptOcclusion(
        concept=known,
        layers=tuple(rows.layer(name) for name in names),
        images=tuple(rows.images),
        area=np.array(rows.area),
        fill=fill,
        examples=tuple(rows.examples),
        model=name,
    )


class _Rows:
    """What is kept of each image."""

    def __init__(self, concept: Concept, layers: Sequence[str], n_examples: int) -> None:
        self.concept = concept
        self.n_examples = n_examples
        self.images: list[str] = []
        self.area: list[float] = []
        self.examples: list[Example] = []
        self.changes: dict[str, list[Changes]] = {name: [] for name in layers}
        self.iou: dict[str, list[NDArray[np.float64]]] = {name: [] for name in layers}

    def add(
        self,
        image: ConceptImage,
        hidden: Pixels,
        maps: Mapping[str, Tensor],
        by_site: Mapping[str, Changes],
        limits: Mapping[str, Tensor],
    ) -> None:
        """One image: its features and changes by layer."""
        mask = image.mask(self.concept.number)
        switched = []
        for name, change in by_site.items():
            filters, masks = active_masks(maps[name], limits[name], image.grid)
            values = overlap(masks, torch.from_numpy(mask).to(masks.device)).cpu().numpy()
            iou = np.zeros(len(change.before))
            iou[filters.cpu().numpy()] = values
            self.changes[name].append(change)
            self.iou[name].append(iou)
            off = (change.before & ~change.after[0])[filters].cpu().numpy()
            switched += [(name, int(filters[i]), float(values[i]), masks[i]) for i in np.flatnonzero(off)]
        self.images.append(image.name)
        self.area.append(float(mask.mean()))
        if len(self.examples) < self.n_examples:
            best = sorted(switched, key=lambda entry: -entry[2])[:_N_SHOWN]
            shown = tuple((layer, k, value, where.cpu().numpy()) for layer, k, value, where in best)
            self.examples.append(Example(image.name, image.pixels, hidden, shown))

    def layer(self, name: str) -> LayerChanges:
        """All images of one layer."""
        rows = self.changes[name]
        return LayerChanges(
            name=name,
            before=np.stack([r.before.cpu().numpy() for r in rows]),
            after=np.stack([r.after[0].cpu().numpy() for r in rows]),
            direct=np.stack([r.direct[0].cpu().numpy() for r in rows]),
            control=np.stack([r.control[0].cpu().numpy() for r in rows]),
            margin_before=np.stack([r.margin_before.cpu().numpy() for r in rows]),
            margin_after=np.stack([r.margin_after[0].cpu().numpy() for r in rows]),
            iou=np.stack(self.iou[name]),
        )


def _mean(gates: NDArray[np.bool_]) -> float:
    """Filters per image."""
    return float(gates.sum(axis=1).mean())
