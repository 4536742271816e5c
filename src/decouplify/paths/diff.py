"""What changed between two recordings of the same images, filter by filter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from decouplify._optional import new_axes, write_title
from decouplify.paths._layout import LayerSpec, filter_slices
from decouplify.paths._results import LayeredResult
from decouplify.paths._text import percent, text_table
from decouplify.paths.states import label_layers, layers_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PathDiff"]


@dataclass(frozen=True, eq=False, repr=False)
class PathDiff(LayeredResult):
    """Filters that were switched on or off between two recordings of the same N images.

    Attributes:
        layers: The layers, in execution order; arrays of length F hold them side by side.
        ids: The images, shape (N,).
        turned_on: Images for which the filter is open only afterwards, shape (F,), in [0, N].
        turned_off: Images for which it is open only before, shape (F,).
        n_changed: Filters that changed, per image, shape (N,), in [0, F].
    """

    layers: tuple[LayerSpec, ...]
    ids: NDArray[Any]
    turned_on: NDArray[np.int64]
    turned_off: NDArray[np.int64]
    n_changed: NDArray[np.int64]

    @property
    def n_images(self) -> int:
        """Number of images N."""
        return len(self.ids)

    def filters(self, turned: str = "off", at_least: float = 1.0) -> dict[str, NDArray[np.intp]]:
        """Filters that turned on or off in a share of the images, layers without one left out.

        Args:
            turned: ``"on"`` or ``"off"``.
            at_least: Share of the images, in (0, 1]; 1 means all of them.
        """
        if turned not in ("on", "off") or not 0 < at_least <= 1:
            raise ValueError(f'filters: turned={turned!r}, at_least={at_least}; wanted "on" or "off", and (0, 1]')
        counts = self.turned_on if turned == "on" else self.turned_off
        enough = counts >= at_least * self.n_images
        found = {
            layer.name: np.flatnonzero(enough[part])
            for layer, part in zip(self.layers, filter_slices(self.layers), strict=True)
        }
        return {name: filters for name, filters in found.items() if len(filters)}

    def headline(self) -> str:
        """One line: how many filters change per image."""
        n_filters = len(self.turned_on)
        if self.n_images == 0:
            return "no images"
        return (
            f"{self.n_changed.mean():.1f} of {n_filters} filters change per image: "
            f"{self.turned_on.sum() / self.n_images:.1f} turn on, {self.turned_off.sum() / self.n_images:.1f} turn off "
            f"({self.n_images} images)"
        )

    def summary(self) -> str:
        """A table with a row per layer: filters that change per image, and those that do so in every image."""
        rows = []
        for layer, part in zip(self.layers, filter_slices(self.layers), strict=True):
            on, off = self.turned_on[part], self.turned_off[part]
            always = [str(int((counts == self.n_images).sum())) for counts in (on, off)]
            shares = [percent(counts.sum(), layer.n_filters * max(self.n_images, 1)) for counts in (on, off)]
            rows.append([str(layer.depth), layer.name, str(layer.n_filters), *shares, *always])
        header = ["depth", "layer", "filters", "turn on", "turn off", "always on", "always off"]
        return f"Filters switched between two recordings\n{text_table(header, rows, left=2)}\n{self.headline()}"

    def __repr__(self) -> str:
        return f"PathDiff({self.headline()})"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Filters per image that turn on (up) and off (down), a bar per layer.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        n_layers, n = len(self.layers), max(self.n_images, 1)
        ax = new_axes(layers_width(n_layers), 4.5) if ax is None else ax
        parts = filter_slices(self.layers)
        for counts, sign, color, name in (
            (self.turned_on, 1, "#35587f", "on"),
            (self.turned_off, -1, "#e08214", "off"),
        ):
            heights = [sign * counts[part].sum() / n for part in parts]
            ax.bar(range(n_layers), heights, width=0.85, color=color, label=f"turned {name}")
        ax.axhline(0, color="0.4", linewidth=0.8)
        ax.margins(x=0.01)
        label_layers(ax, [layer.name for layer in self.layers])
        ax.set_ylabel("filters per image")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        write_title(ax, "Filters switched between two recordings", self.headline())
        return ax
