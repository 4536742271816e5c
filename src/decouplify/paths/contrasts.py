"""Why this class and not that one: the filters that tell two classes, or two images, apart, and what they decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify._optional import new_axes, write_title
from decouplify.decoupling import decoupling_of
from decouplify.modes import eval_mode
from decouplify.paths._layout import LayerSpec, filter_slices
from decouplify.paths._results import LayeredResult, Result
from decouplify.paths._text import percent, plain, text_table
from decouplify.paths.information import information_of
from decouplify.paths.interventions import force_all
from decouplify.paths.pathset import PathSet
from decouplify.paths.states import label_layers, layers_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Contrast", "Counterfactual", "contrast", "counterfactual"]


@dataclass(frozen=True, eq=False, repr=False)
class Contrast(LayeredResult):
    """Which filters are open for A rather than for B.

    Attributes:
        a: Class value or id of A.
        b: Class value or id of B.
        layers: The layers, in execution order; arrays of length F hold them side by side.
        rate_a: Share of A's images for which the filter is open, shape (F,), in [0, 1].
        rate_b: The same for B.
        p_value: Probability of a difference this large if there were none (G test), shape (F,); NaN for two images.
        n_images: Images of A and of B.
        names: What to call A and B.
    """

    a: Any
    b: Any
    layers: tuple[LayerSpec, ...]
    rate_a: NDArray[np.float64]
    rate_b: NDArray[np.float64]
    p_value: NDArray[np.float64]
    n_images: tuple[int, int]
    names: tuple[str, str]

    @property
    def difference(self) -> NDArray[np.float64]:
        """Rate of A minus rate of B, shape (F,), in [-1, 1]."""
        return self.rate_a - self.rate_b

    def filters(self, n: int | None = None) -> list[tuple[str, int, float]]:
        """Filters by how much they tell A from B: layer name, index in the layer, difference; equal ones left out.

        Args:
            n: Only the first n.
        """
        order = np.argsort(-np.abs(self.difference), kind="stable")
        order = order[self.difference[order] != 0][:n]
        owner = np.repeat(np.arange(len(self.layers)), [layer.n_filters for layer in self.layers])
        starts = [part.start for part in filter_slices(self.layers)]
        return [(self.layers[owner[i]].name, int(i) - starts[owner[i]], float(self.difference[i])) for i in order]

    def headline(self) -> str:
        """One line: how many filters differ, and the most telling one."""
        found = self.filters()
        if not found:
            return f"{self.names[0]} and {self.names[1]} open the same filters"
        name, index, difference = found[0]
        side = self.names[0] if difference > 0 else self.names[1]
        return (
            f"{len(found)} of {len(self.rate_a)} filters differ, most of all {name}, filter {index}: "
            f"open for {side} ({100 * abs(difference):.0f} % of the images apart)"
        )

    def summary(self) -> str:
        """The headline and the ten most telling filters."""
        rows = [
            [name, str(index), f"{self._rates(name, index)[0]:.2f}", f"{self._rates(name, index)[1]:.2f}"]
            for name, index, _ in self.filters(10)
        ]
        sizes = f"{self.names[0]} ({self.n_images[0]} images) and {self.names[1]} ({self.n_images[1]})"
        table = text_table(["layer", "filter", f"open for {self.names[0]}", f"for {self.names[1]}"], rows)
        return f"Why {sizes} differ: {self.headline()}\n{table}"

    def _rates(self, name: str, index: int) -> tuple[float, float]:
        parts = {layer.name: part for layer, part in zip(self.layers, filter_slices(self.layers), strict=True)}
        column = parts[name].start + index
        return float(self.rate_a[column]), float(self.rate_b[column])

    def __repr__(self) -> str:
        return f"Contrast({self.headline()})"

    def plot(self, ax: Axes | None = None) -> Axes:
        """One dot per filter that differs: its layer across, its difference upwards.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        n_layers = len(self.layers)
        ax = new_axes(layers_width(n_layers), 4.5) if ax is None else ax
        rng = np.random.default_rng(0)
        for x, part in enumerate(filter_slices(self.layers)):
            heights = self.difference[part][self.difference[part] != 0]
            colors = np.where(heights > 0, "#35587f", "#e08214")
            ax.scatter(x + rng.uniform(-0.3, 0.3, len(heights)), heights, s=10, c=colors, alpha=0.7, linewidths=0)
        ax.axhline(0, color="0.4", linewidth=0.8)
        label_layers(ax, [layer.name for layer in self.layers])
        ax.set_ylabel(f"open for {self.names[0]} - open for {self.names[1]}")
        ax.set_xlim(-0.6, n_layers - 0.4)
        ax.spines[["top", "right"]].set_visible(False)
        write_title(ax, f"{self.names[0]} against {self.names[1]}", self.headline())
        return ax


def contrast(
    paths: PathSet,
    a: Any,
    b: Any,
    *,
    by: Literal["labels", "preds", "ids"] = "labels",
    class_names: Sequence[str] | Mapping[int, str] | None = None,
) -> Contrast:
    """Which filters tell A from B.

    Args:
        paths: The path set.
        a: A class value, or with ``by="ids"`` the id of an image.
        b: Another one.
        by: What ``a`` and ``b`` are.
        class_names: Names for printing, by class value.

    Raises:
        ValueError: If there are no images of ``a`` or ``b``, or they are the same.
    """
    values = paths.ids if by == "ids" else paths.groups(by)
    if a == b:
        raise ValueError(f"contrast: a and b are both {a!r}, wanted two different ones")
    sides = [paths.subset(values == value) for value in (a, b)]
    for value, side in zip((a, b), sides, strict=True):
        if len(side) == 0:
            raise ValueError(f"contrast: {paths!r} has no image with {by} {value!r}")
    n_open, n_images = np.stack([side.counts() for side in sides]), np.array([len(side) for side in sides])
    single = n_images.max() == 1
    p_value = np.full(paths.n_filters, np.nan) if single else information_of(n_open, n_images)[3]
    rate_a, rate_b = n_open / n_images[:, None]
    names = [str(v) if class_names is None or by == "ids" else class_names[int(v)] for v in (a, b)]
    return Contrast(
        a, b, paths.layers, rate_a, rate_b, p_value, (int(n_images[0]), int(n_images[1])), (names[0], names[1])
    )


@dataclass(frozen=True, eq=False, repr=False)
class Counterfactual(Result):
    """What becomes of A's images when their most telling filters are set as B has them.

    Attributes:
        n_switched: How many filters were set, shape (steps,), increasing, from 0.
        margin: Logit of A minus logit of B, mean over the images, shape (steps,).
        control: The same when as many random filters of the same layers are set to the opposite of A's habit; mean of
            several draws.
        flipped: Share of the images for which B's logit is then the higher one, shape (steps,).
        control_flipped: The same for the random filters.
        n_images: Number of images.
        names: What A and B are called.
    """

    n_switched: NDArray[np.int64]
    margin: NDArray[np.float64]
    control: NDArray[np.float64]
    flipped: NDArray[np.float64]
    control_flipped: NDArray[np.float64]
    n_images: int
    names: tuple[str, str]

    def headline(self) -> str:
        """One line: the margin at the start and with most filters switched."""
        return (
            f"{self.n_images} images: margin {self.margin[0]:.2f} becomes {self.margin[-1]:.2f} with "
            f"{self.n_switched[-1]} filters switched (random ones: {self.control[-1]:.2f}); "
            f"{percent(self.flipped[-1], 1)} go to {self.names[1]} "
            f"(random ones: {percent(self.control_flipped[-1], 1)})"
        )

    def summary(self) -> str:
        """A table with a row per number of filters."""
        header = ["filters", "margin", f"to {self.names[1]}", "margin, random", "to, random"]
        rows = [
            [str(n), f"{m:+.2f}", percent(f, 1), f"{c:+.2f}", percent(cf, 1)]
            for n, m, f, c, cf in zip(
                self.n_switched, self.margin, self.flipped, self.control, self.control_flipped, strict=True
            )
        ]
        title = f"{self.names[0]} with the filters of {self.names[1]}: {self.headline()}"
        return f"{title}\n{text_table(header, rows, left=0)}"

    def __repr__(self) -> str:
        return f"Counterfactual({self.headline()})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        return {name: plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Margin over the number of filters switched, telling ones and random ones.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        ax = new_axes(6.0, 4.0) if ax is None else ax
        ax.plot(self.n_switched, self.margin, "o-", color="#35587f", label=f"those of {self.names[1]}")
        ax.plot(self.n_switched, self.control, "o--", color="0.6", label="random ones")
        ax.axhline(0, color="0.4", linewidth=0.8)
        ax.set_xlabel("filters switched")
        ax.set_ylabel(f"logit of {self.names[0]} - logit of {self.names[1]}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
        write_title(ax, f"Why {self.names[0]} and not {self.names[1]}", self.headline())
        return ax


def counterfactual(
    model: nn.Module,
    images: Tensor,
    found: Contrast,
    *,
    classes: tuple[int, int] | None = None,
    n_switched: Sequence[int] = (0, 1, 2, 5, 10, 20, 50, 100),
    n_random: int = 5,
    seed: int = 0,
) -> Counterfactual:
    """Set the filters that tell A from B as B has them, more and more of them, and watch the logits of A's images.

    The statistics of a contrast only say what goes together; this says what the filters decide. A control switches as
    many random filters of the same layers against A's habit: a network may break under any large change.

    Args:
        model: The wrapped model the paths were recorded with; (N, C) logits.
        images: Images of A, shape (N, C, H, W), on the model's device.
        found: What ``contrast`` found.
        classes: Indices of the logits of A and B; by default the class values of the contrast.
        n_switched: How many filters to switch; numbers above those that differ are left out.
        n_random: Draws of random filters, at least 1.
        seed: Seed of the random filters.

    Raises:
        ValueError: If the model is not wrapped, has other layers, or ``classes`` is needed and missing.
    """
    decoupling = decoupling_of(model, "counterfactual")
    ours = [(gate.name, gate.n_filters) for gate in decoupling.plan.gates]
    if ours != [(layer.name, layer.n_filters) for layer in found.layers]:
        raise ValueError(f"counterfactual: the contrast has other layers than this {decoupling.plan.model}")
    if classes is None and not (isinstance(found.a, int | np.integer) and np.isfinite(found.p_value).any()):
        raise ValueError("counterfactual: the contrast is one of images; say which logits to compare with classes=")
    a, b = (int(found.a), int(found.b)) if classes is None else classes
    telling = found.filters()
    steps = [n for n in sorted({0, *n_switched}) if n <= len(telling)]
    rng = np.random.default_rng(seed)
    rows = []
    for n in steps:
        draws = [_random_like(telling[:n], found, rng) for _ in range(n_random)]
        control = np.mean([_margin(model, images, draw, (a, b)) for draw in draws], axis=0)
        rows.append([*_margin(model, images, telling[:n], (a, b)), *control])
    margin, flipped, random_margin, random_flipped = np.array(rows).T
    return Counterfactual(np.array(steps), margin, random_margin, flipped, random_flipped, len(images), found.names)


@torch.no_grad()
def _margin(
    model: nn.Module, images: Tensor, switched: Sequence[tuple[str, int, float]], classes: tuple[int, int]
) -> tuple[float, float]:
    """Mean margin, and share of the images where it is negative; filters of A are closed, those of B opened."""
    by_site: dict[str, tuple[list[int], list[int]]] = {}
    for name, index, difference in switched:
        on, off = by_site.setdefault(name, ([], []))
        (off if difference > 0 else on).append(index)
    with eval_mode(model), force_all(model, by_site):
        logits = model(images).double()
    margin = logits[:, classes[0]] - logits[:, classes[1]]
    return float(margin.mean()), float((margin < 0).double().mean())


def _random_like(
    telling: Sequence[tuple[str, int, float]], found: Contrast, rng: np.random.Generator
) -> list[tuple[str, int, float]]:
    """As many other filters of the same layers where there are so many, to be set against the habit of A."""
    chosen = []
    for layer, part in zip(found.layers, filter_slices(found.layers), strict=True):
        taken = {index for name, index, _ in telling if name == layer.name}
        free = rng.permutation([index for index in range(layer.n_filters) if index not in taken])[: len(taken)]
        rates = found.rate_a[part]
        chosen += [(layer.name, int(index), 1.0 if rates[index] > 0.5 else -1.0) for index in free]
    return chosen
