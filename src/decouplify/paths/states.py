"""Which filters never run, sometimes run, always run: per layer, and as a histogram of one layer.

Source: Li et al., Interpretable Neural Network Decoupling, ECCV 2020, Section 4 (Figures 4 and 5, Table 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from decouplify._optional import new_axes, write_title
from decouplify.paths._layout import LayerSpec, filter_slices
from decouplify.paths._results import Result
from decouplify.paths._text import percent, plain, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DYNAMIC", "ENERGETIC", "SILENT", "ActivationHistogram", "FilterStates", "LayerStates"]

SILENT, DYNAMIC, ENERGETIC = 0, 1, 2
_NAMES = ("silent", "dynamic", "energetic")
# Distinguishable in greyscale and with the common colour deficiencies.
_COLORS = ("#c9ced6", "#e08214", "#35587f")
_Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class LayerStates:
    """How many filters of one layer are in each state.

    Attributes:
        name: Layer name.
        depth: Position in execution order, from 0.
        n_silent: Filters open for none of the images.
        n_dynamic: Filters open for some.
        n_energetic: Filters open for all.
    """

    name: str
    depth: int
    n_silent: int
    n_dynamic: int
    n_energetic: int

    @property
    def n_filters(self) -> int:
        """Filters of the layer."""
        return self.n_silent + self.n_dynamic + self.n_energetic


@dataclass(frozen=True, eq=False, repr=False)
class FilterStates(Result):
    """The state of every filter on the images looked at.

    A state is a statement about these N images: with more images, silent and energetic filters can only turn dynamic.
    ``low`` and ``high`` say how far the observed rate pins down the true one.

    Attributes:
        layers: Per layer, how many filters are in each state, in execution order.
        n_images: Number of images N.
        tol: Share of the images that may contradict "none" or "all", in [0, 0.5); 0 is the paper's rule.
        state: ``SILENT`` (0), ``DYNAMIC`` (1) or ``ENERGETIC`` (2) per filter, shape (F,), layers side by side.
        rate: Share of the images for which the filter is open, shape (F,), in [0, 1].
        low: Lower end of the Wilson 95 % interval of the rate, shape (F,).
        high: Upper end.
        model: Name of the model, for titles.
    """

    layers: tuple[LayerStates, ...]
    n_images: int
    tol: float
    state: NDArray[np.int8]
    rate: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    model: str = ""

    @property
    def n_filters(self) -> int:
        """Filters of all layers."""
        return len(self.state)

    @property
    def totals(self) -> dict[str, int]:
        """Number of filters per state over all layers."""
        return {name: int((self.state == code).sum()) for code, name in enumerate(_NAMES)}

    @property
    def depth_correlation(self) -> float:
        """Spearman correlation of depth and dynamic share, in [-1, 1]; NaN when it is not defined.

        The paper reports a dynamic share that rises with depth (Figure 4).
        """
        return _spearman([s.depth for s in self.layers], [s.n_dynamic / s.n_filters for s in self.layers])

    def headline(self) -> str:
        """One line with the three shares and the number of images they were seen on."""
        totals = self.totals
        shares = [f"{name} {percent(totals[name], self.n_filters)}" for name in ("dynamic", "silent", "energetic")]
        return f"{' / '.join(shares)} on {self.n_images} images"

    def summary(self) -> str:
        """A table with a row per layer, ending with the shares over all layers."""
        starts = np.cumsum([0, *(layer.n_filters for layer in self.layers)])
        rows = [
            _table_row(str(s.depth), s.name, (s.n_dynamic, s.n_silent, s.n_energetic), self.rate[a:b])
            for s, a, b in zip(self.layers, starts, starts[1:], strict=False)
        ]
        totals = self.totals
        all_layers = (totals["dynamic"], totals["silent"], totals["energetic"])
        rows.append(_table_row("", "all layers", all_layers, self.rate))
        header = ["depth", "layer", "filters", "dynamic", "silent", "energetic", "mean rate"]
        bound = 100 * float(_wilson(np.zeros(1, dtype=np.int64), self.n_images)[1][0])
        lines = [
            f"Filter states{' of ' + self.model if self.model else ''}: silent = open for none of the images, "
            "dynamic = some, energetic = all",
            *([f"(up to {self.tol:.2%} of the images may contradict none or all)"] if self.tol else []),
            f"(a filter seen open 0 times in {self.n_images} may still be open for up to {bound:.2g} % of all images: "
            "95 % interval)",
            text_table(header, rows, left=2),
            self.headline(),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"FilterStates({len(self.layers)} layers, {self.n_filters} filters: {self.headline()})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        return {
            "model": self.model,
            "n_images": self.n_images,
            "tol": self.tol,
            "totals": self.totals,
            "depth_correlation": plain(self.depth_correlation),
            "layers": [{"n_filters": layer.n_filters, **vars(layer)} for layer in self.layers],
            "state": plain(self.state),
            "rate": plain(self.rate),
            "low": plain(self.low),
            "high": plain(self.high),
        }

    def plot(self, ax: Axes | None = None, *, counts: bool = False) -> Axes:
        """One stacked bar per layer, in execution order (Figure 4 of the paper).

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given. ``ax.figure.savefig(...)`` writes it.
            counts: Draw numbers of filters instead of shares of the layer.
        """
        n_layers = len(self.layers)
        ax = new_axes(layers_width(n_layers), 4.5) if ax is None else ax
        sizes = np.array([layer.n_filters for layer in self.layers])
        heights = np.array([(s.n_silent, s.n_dynamic, s.n_energetic) for s in self.layers])
        shown = heights if counts else 100 * heights / sizes[:, None]
        floor = np.zeros(n_layers)
        for code in (ENERGETIC, DYNAMIC, SILENT):
            ax.bar(range(n_layers), shown[:, code], bottom=floor, width=0.85, color=_COLORS[code], label=_NAMES[code])
            floor = floor + shown[:, code]
        label_layers(ax, [layer.name for layer in self.layers])
        ax.set_ylabel("filters" if counts else "filters of the layer, %")
        ax.margins(x=0.01, y=0)
        ax.spines[["top", "right"]].set_visible(False)
        handles, names = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        write_title(ax, f"Filter states{' of ' + self.model if self.model else ''}", self.headline())
        return ax


@dataclass(frozen=True, eq=False, repr=False)
class ActivationHistogram(Result):
    """How many filters are open for how many images (Figure 5 of the paper).

    Filters open for none and for all of the images are counted apart: they are often the tallest bars, and an ordinary
    histogram would merge the latter into its last bin.

    Attributes:
        name: The layer, or "all layers".
        n_images: Number of images N.
        n_silent: Filters open for 0 images.
        n_energetic: Filters open for N images.
        edges: Bin edges between 0.5 and N - 0.5 images, shape (bins + 1,).
        counts: Filters per bin, shape (bins,).
    """

    name: str
    n_images: int
    n_silent: int
    n_energetic: int
    edges: NDArray[np.float64]
    counts: NDArray[np.int64]

    @property
    def n_filters(self) -> int:
        """Filters counted."""
        return self.n_silent + self.n_energetic + int(self.counts.sum())

    def headline(self) -> str:
        """One line with the end bars, which need no reading off."""
        ends = f"{self.n_silent} never open, {self.n_energetic} always open"
        return f"{self.n_filters} filters, {ends}, {int(self.counts.sum())} between, on {self.n_images} images"

    def summary(self) -> str:
        """A table of all bins, the exact end bins included."""
        inner = [
            (f"{np.ceil(a):.0f} to {np.ceil(b) - 1:.0f}", str(n))
            for a, b, n in zip(self.edges, self.edges[1:], self.counts, strict=False)
        ]
        rows = [("0", str(self.n_silent)), *inner, (str(self.n_images), str(self.n_energetic))]
        return f"{self.name}: {self.headline()}\n{text_table(['open for images', 'filters'], rows)}"

    def __repr__(self) -> str:
        return f"ActivationHistogram({self.name}: {self.headline()})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        return {name: plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Filters over the number of images they are open for; the exact end bars in their own colours.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        ax = new_axes(7.0, 4.0) if ax is None else ax
        # The end bars stand beside the range of the bins, one bin wide, so that they hide none.
        width = self.n_images / max(1, len(self.counts))
        left, right = -0.75 * width, self.n_images + 0.75 * width
        none = ax.bar([left], [self.n_silent], 0.92 * width, color=_COLORS[SILENT], label="none (silent)")
        if len(self.counts):
            inner = np.diff(self.edges) * 0.92
            ax.bar(self.edges[:-1], self.counts, inner, align="edge", color=_COLORS[DYNAMIC], label="some (dynamic)")
        every = ax.bar([right], [self.n_energetic], 0.92 * width, color=_COLORS[ENERGETIC], label="all (energetic)")
        for bar in (none, every):
            ax.bar_label(bar, fontsize=9, padding=2)
        ax.margins(y=0.1)
        inner_ticks = [tick for tick in ax.get_xticks() if 0 < tick < self.n_images]
        ticks = [left, *inner_ticks, right]
        ax.set_xticks(ticks, ["0", *(f"{tick:g}" for tick in inner_ticks), f"{self.n_images}"])
        ax.set_xlabel("images the filter is open for")
        ax.set_ylabel("filters")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(title="open for", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        write_title(ax, f"How often filters are open: {self.name}", self.headline())
        return ax


def filter_states(
    counts: NDArray[np.int64], n_images: int, layers: Sequence[LayerSpec], tol: float, model: str
) -> FilterStates:
    """States from the number of images each filter is open for.

    Args:
        counts: Shape (F,), each in [0, n_images].
        n_images: Number of images N, at least 1.
        layers: Layers in the order of ``counts``.
        tol: Silent if count <= tol N, energetic if count >= (1 - tol) N; in [0, 0.5).
        model: Name of the model, for titles.

    Raises:
        ValueError: If ``tol`` is out of range or there are no images.
    """
    if n_images < 1:
        raise ValueError("filter states need at least 1 image, the path set has none")
    if not 0 <= tol < 0.5:
        raise ValueError(f"filter states: tol is {tol}, wanted a share of the images in [0, 0.5)")
    # A whole number of images, the same for both ends; the small term undoes 0.29 * 100 = 28.999....
    limit = int(tol * n_images + 1e-9)
    state = np.full(len(counts), DYNAMIC, dtype=np.int8)
    state[counts <= limit] = SILENT
    state[counts >= n_images - limit] = ENERGETIC
    per_layer = []
    for layer, columns in zip(layers, filter_slices(layers), strict=True):
        n_silent, n_dynamic, n_energetic = np.bincount(state[columns], minlength=3).tolist()
        per_layer.append(LayerStates(layer.name, layer.depth, n_silent, n_dynamic, n_energetic))
    low, high = _wilson(counts, n_images)
    return FilterStates(tuple(per_layer), n_images, tol, state, counts / n_images, low, high, model)


def activation_histogram(counts: NDArray[np.int64], n_images: int, name: str, n_bins: int = 20) -> ActivationHistogram:
    """Histogram of the number of images each filter is open for.

    Args:
        counts: Shape (K,), each in [0, n_images].
        n_images: Number of images N, at least 1.
        name: What was counted, for titles.
        n_bins: Equal bins between the exact end bins; fewer if there are fewer numbers between 0 and N.

    Raises:
        ValueError: If there are no images.
    """
    if n_images < 1:
        raise ValueError("an activation histogram needs at least 1 image, the path set has none")
    bins = min(n_bins, n_images - 1)
    # Between 0 and N but not touching them: the filters of the end bins fall outside.
    edges = np.linspace(0.5, n_images - 0.5, bins + 1)
    inside = np.histogram(counts, edges)[0] if bins else np.zeros(0)
    n_silent, n_energetic = int((counts == 0).sum()), int((counts == n_images).sum())
    return ActivationHistogram(name, n_images, n_silent, n_energetic, edges, inside.astype(np.int64))


def _wilson(counts: NDArray[np.int64], n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wilson score interval of a rate, 95 %: unlike the normal one it is not empty at 0 and N (Wilson 1927)."""
    rate = counts / n
    shrink = 1 + _Z_95**2 / n
    center = (rate + _Z_95**2 / (2 * n)) / shrink
    half = _Z_95 * np.sqrt(rate * (1 - rate) / n + _Z_95**2 / (4 * n**2)) / shrink
    # At the ends one side is exactly 0 or 1; rounding must not move it.
    low = np.where(counts == 0, 0.0, center - half)
    high = np.where(counts == n, 1.0, center + half)
    return low, high


def _spearman(x: Sequence[float], y: Sequence[float]) -> float:
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return float("nan")
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Ranks from 0, tied values sharing their mean rank."""
    _, index, sizes = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    first = np.cumsum(sizes) - sizes
    ranks: NDArray[np.float64] = (first + (sizes - 1) / 2)[index]
    return ranks


def _table_row(depth: str, name: str, states: tuple[int, int, int], rate: NDArray[np.float64]) -> list[str]:
    return [depth, name, str(sum(states)), *map(str, states), f"{rate.mean():.3f}"]


def layers_width(n_layers: int) -> float:
    """Inches of a figure with something per layer; no more than leaves the text legible in the column of a page."""
    return min(11.0, max(5.0, 2.5 + 0.35 * n_layers))


def label_layers(ax: Axes, names: Sequence[str]) -> None:
    """Layer names under the bars while they can be read, else every few depths."""
    if len(names) <= 40:
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    else:
        step = -(-len(names) // 25)
        ticks = range(0, len(names), step)
        ax.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
        ax.set_xlabel("layer, in execution order")
