"""The images that excite a filter most, with the places where it looked (receptive-field overlays)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify._optional import new_axes, write_title
from decouplify.concepts._overlap import active_masks
from decouplify.concepts._pictures import overlay, picture_grid, show
from decouplify.concepts.data import ConceptDataset, Pixels
from decouplify.concepts.features import FeatureTap, order_of, stream, to_input
from decouplify.concepts.scores import FilterConcept
from decouplify.concepts.thresholds import Thresholds, collect_thresholds
from decouplify.paths._results import Result
from decouplify.paths._text import plain, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CardImage", "FilterCard", "FilterCards", "filter_cards"]

_Ref: TypeAlias = tuple[str, int]  # layer and index
FilterRef: TypeAlias = FilterConcept | _Ref


class CardImage(NamedTuple):
    """One image of a card.

    Attributes:
        name: The image.
        value: Highest activation of the filter in it.
        pixels: The image, shape (H, W, C).
        mask: Where the filter exceeds its threshold, bool, shape (h, w).
    """

    name: str
    value: float
    pixels: Pixels
    mask: NDArray[np.bool_]


class FilterCard(NamedTuple):
    """One filter and the images that excite it most, strongest first; fewer than asked for if it was active in fewer.

    Attributes:
        layer: Its layer.
        filter: Its index.
        title: What is known about it.
        images: The images.
    """

    layer: str
    filter: int
    title: str
    images: tuple[CardImage, ...]


@dataclass(frozen=True, eq=False, repr=False)
class FilterCards(Result):
    """Cards of some filters.

    Attributes:
        cards: One per filter, in the order given.
        n_images: Images looked at.
        top: Images per card asked for.
        model: Name of the model, for titles.
    """

    cards: tuple[FilterCard, ...]
    n_images: int
    top: int
    model: str = ""

    def headline(self) -> str:
        """One line: filters, images."""
        return f"{len(self.cards)} filters, up to {self.top} of {self.n_images} images each"

    def summary(self) -> str:
        """A table with a row per filter."""
        rows = [
            [c.layer, str(c.filter), c.title, f"{c.images[0].name} ({c.images[0].value:.3g})" if c.images else "none"]
            for c in self.cards
        ]
        return f"{text_table(['layer', 'filter', 'concept', 'strongest in'], rows, left=4)}\n{self.headline()}"

    def __repr__(self) -> str:
        return f"FilterCards({self.headline()})"

    def to_dict(self) -> dict[str, Any]:
        """Everything but pixels and masks as plain lists and numbers."""
        cards = [
            {**card._asdict(), "images": [{"name": i.name, "value": plain(i.value)} for i in card.images]}
            for card in self.cards
        ]
        return {name: plain(value) for name, value in vars(self).items() if name != "cards"} | {"cards": cards}

    def plot(self, ax: Axes | None = None) -> Axes:
        """All cards in one picture, a row per filter: the image, dark where the filter is not active.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        ax = new_axes(1.5 * self.top + 3, 1.5 * len(self.cards) + 1) if ax is None else ax
        for row, card in enumerate(self.cards):
            for column, image in enumerate(card.images):
                extent = (column - 0.48, column + 0.48, row + 0.48, row - 0.48)
                ax.imshow(overlay(image.pixels, image.mask), extent=extent)
        ax.set_xlim(-0.5, self.top - 0.5)
        ax.set_ylim(len(self.cards) - 0.5, -0.5)
        ax.set_xticks([])
        ax.set_yticks(
            range(len(self.cards)), [f"{c.layer}\nfilter {c.filter}\n{c.title}" for c in self.cards], fontsize=8
        )
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        write_title(ax, f"What filters{' of ' + self.model if self.model else ''} look at", self.headline())
        return ax

    def plot_card(self, index: int) -> Figure:
        """One card: its images above, the same with the places lit below."""
        card = self.cards[index]
        figure, axes = picture_grid(2, max(1, len(card.images)))
        for column, image in enumerate(card.images):
            show(axes[0, column], image.pixels, f"{image.value:.3g}")
            show(axes[1, column], overlay(image.pixels, image.mask))
        figure.suptitle(f"{card.layer}, filter {card.filter} {card.title}", fontsize=10)
        return figure


def filter_cards(
    model: nn.Module,
    dataset: ConceptDataset,
    filters: Sequence[FilterRef],
    *,
    top: int = 5,
    thresholds: Thresholds | None = None,
    max_images: int | None = 5000,
    batch_size: int = 32,
    num_workers: int = 0,
    seed: int = 0,
    progress: bool | None = None,
) -> FilterCards:
    """The images that excite given filters most, and where.

    Args:
        model: A wrapped model, or any other if the layers are modules.
        dataset: The images; labels are not needed here.
        filters: Layer and index of each filter, or what ``Interpretability.ranking`` returns.
        top: Images per filter.
        thresholds: Of these layers; collected on the same images first if not given.
        max_images: Use a random subset of this size; ``None`` for all images.
        batch_size: Images per run.
        num_workers: Processes that load images.
        seed: Seed of the subset.
        progress: Show a progress bar; if not given, only on a terminal and with rich installed.

    Raises:
        ValueError: If no filter is given, there is no such layer or filter, or there are no images.
        NonFiniteError: If an image or a feature is not finite.
    """
    if not filters or top < 1:
        raise ValueError(f"filter_cards: {len(filters)} filters and top={top} given, wanted at least 1 each")
    refs = [(ref[0], ref[1]) for ref in filters]
    layers = list(dict.fromkeys(layer for layer, _ in refs))
    order = order_of(dataset, max_images, seed, "filter_cards")
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers, "progress": progress}
    if thresholds is None:
        thresholds = collect_thresholds(model, dataset, layers, max_images=max_images, seed=seed, **options)
    with FeatureTap(model, layers) as tap:
        limits = thresholds.of(layers, model, tap.device)
        _check_filters(refs, limits)
        strongest: dict[_Ref, list[tuple[float, int]]] = {ref: [] for ref in refs}
        indices = iter(order)
        for images in stream(dataset, order, "strongest images", **options):
            maps = tap(to_input(images, dataset.transform, tap.device))
            _keep_strongest(strongest, maps, limits, list(islice(indices, len(images))), top)
        cards = tuple(
            FilterCard(*ref, _title(given), _card_images(tap, dataset, ref, strongest[ref], limits))
            for given, ref in zip(filters, refs, strict=True)
        )
    return FilterCards(cards, len(order), top, type(model).__name__)


def _keep_strongest(
    strongest: Mapping[_Ref, list[tuple[float, int]]],
    maps: Mapping[str, Tensor],
    limits: Mapping[str, Tensor],
    indices: Sequence[int],
    top: int,
) -> None:
    """Add the images of one batch to each filter's highest activations and their indices, and keep ``top`` of them."""
    for (layer, k), found in strongest.items():
        peaks = maps[layer][:, k].amax(dim=(1, 2))
        above = (peaks > limits[layer][k]).nonzero().flatten().tolist()
        found.extend((float(peaks[i]), indices[i]) for i in above)
        found.sort(key=lambda entry: (-entry[0], entry[1]))
        del found[top:]


def _card_images(
    tap: FeatureTap,
    dataset: ConceptDataset,
    ref: _Ref,
    strongest: Iterable[tuple[float, int]],
    limits: Mapping[str, Tensor],
) -> tuple[CardImage, ...]:
    layer, k = ref
    found = []
    for value, index in strongest:
        image = dataset[index]
        features = tap(to_input([image], dataset.transform, tap.device))[layer][0, k : k + 1]
        _, masks = active_masks(features, limits[layer][k : k + 1], image.grid)
        where = masks[0].cpu().numpy() if len(masks) else np.zeros(image.grid, np.bool_)
        found.append(CardImage(image.name, value, image.pixels, where))
    return tuple(found)


def _title(given: FilterRef) -> str:
    return given.concept.name if isinstance(given, FilterConcept) else ""


def _check_filters(refs: Iterable[_Ref], limits: Mapping[str, Tensor]) -> None:
    for layer, k in refs:
        if not 0 <= k < len(limits[layer]):
            raise ValueError(f"filter_cards: layer {layer!r} has {len(limits[layer])} filters, there is no filter {k}")
