"""The network before and after it learned to choose: the same analyses on its pseudo-paths and on its paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from decouplify._optional import import_optional, new_axes, write_title
from decouplify.paths._layout import filter_slices
from decouplify.paths._results import Result
from decouplify.paths._text import plain, text_table
from decouplify.paths.information import ClassInformation, class_information
from decouplify.paths.maps import PathMap, path_map
from decouplify.paths.pathset import PathSet
from decouplify.paths.pseudo import Rule, pseudo_paths
from decouplify.paths.recording import record
from decouplify.paths.states import label_layers, layers_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BeforeAfter", "before_after"]


@dataclass(frozen=True, eq=False, repr=False)
class BeforeAfter(Result):
    """One network without and with gates on the same images, in the same layers.

    What compares are the numbers about classes: whether paths of a class are alike, how much single filters tell.
    Filter states do not, as the rule of a pseudo-path decides how often filters are open.

    Attributes:
        before: Pseudo-paths of the network without gates.
        after: Paths of the wrapped network.
        maps: Map of each.
        information: What single filters tell about the class, of each.
    """

    before: PathSet
    after: PathSet
    maps: tuple[PathMap, PathMap]
    information: tuple[ClassInformation, ClassInformation]

    @property
    def numbers(self) -> dict[str, tuple[float, float]]:
        """What can be compared: name to the value before and after."""
        bits = [information.information for information in self.information]
        telling = [information.telling() for information in self.information]
        return {
            "top-1 accuracy": (_accuracy(self.before), _accuracy(self.after)),
            "class accuracy of the nearest paths": (self.maps[0].knn_accuracy, self.maps[1].knn_accuracy),
            "silhouette of the classes": (self.maps[0].silhouette, self.maps[1].silhouette),
            "distance between / within classes": (self.maps[0].between_within, self.maps[1].between_within),
            "bits per filter, mean": (bits[0].mean(), bits[1].mean()),
            "bits per filter, most": (bits[0].max(), bits[1].max()),
            "filters that tell the class": (telling[0].mean(), telling[1].mean()),
        }

    def headline(self) -> str:
        """One line: class accuracy of paths before and after."""
        before, after = self.numbers["class accuracy of the nearest paths"]
        n = len(self.after)
        return f"paths tell the class of {100 * before:.1f} % before and {100 * after:.1f} % after, {n} images"

    def summary(self) -> str:
        """A table: what compares, before and after."""
        rows = [[name, f"{before:.3f}", f"{after:.3f}"] for name, (before, after) in self.numbers.items()]
        rule = self.before.manifest["pseudo"]["rule"]
        return f"Before (pseudo-paths, rule {rule}) and after decoupling\n{text_table(['', 'before', 'after'], rows)}"

    def __repr__(self) -> str:
        return f"BeforeAfter({self.headline()})"

    def to_dict(self) -> dict[str, Any]:
        """The numbers and both maps as plain data."""
        return {
            "n_images": len(self.after),
            "numbers": {name: plain(pair) for name, pair in self.numbers.items()},
            "maps": [map_.to_dict() for map_ in self.maps],
            "information": [information.to_dict() for information in self.information],
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """What single filters tell about the class, mean per layer, before and after.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        layers = self.after.layers
        ax = new_axes(layers_width(len(layers)), 4.5) if ax is None else ax
        x = np.arange(len(layers))
        for shift, information, color, name in zip(
            (-0.2, 0.2), self.information, ("#8a93a0", "#35587f"), ("before", "after"), strict=True
        ):
            bits = [information.information[part].mean() for part in filter_slices(layers)]
            ax.bar(x + shift, bits, 0.4, color=color, label=name)
        ax.margins(x=0.01)
        label_layers(ax, [layer.name for layer in layers])
        ax.set_ylabel("information about the class, bits per filter")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        write_title(ax, "What filters tell about the class", self.headline())
        return ax

    def plot_maps(self, class_names: Sequence[str] | Mapping[int, str] | None = None) -> tuple[Axes, Axes]:
        """Both maps side by side (Figure 3 of the paper before and after), as the two axes of one new figure."""
        figure = import_optional("matplotlib.figure", "plotting").Figure(figsize=(14, 5.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for ax, shown, title in ((left, self.maps[0], "Before"), (right, self.maps[1], "After")):
            shown.plot(ax, class_names=class_names)
            write_title(ax, title, shown.headline())
        if left.get_legend() is not None:
            left.get_legend().remove()
        return left, right


def before_after(
    original: nn.Module,
    wrapped: nn.Module,
    loader: Iterable[Any],
    *,
    rule: Rule = "mean",
    method: Literal["tsne", "opentsne", "pca"] = "tsne",
    max_images: int | None = None,
    seed: int = 0,
) -> BeforeAfter:
    """Compare a network with itself before it was wrapped and trained.

    Args:
        original: The network without gates, with the weights it had then; its own if nothing else is at hand:
            ``decouplify.unwrap(copy.deepcopy(wrapped))`` keeps the trained ones.
        wrapped: The wrapped network.
        loader: As for ``decouplify.record``, with labels; it is read two or three times.
        rule: What counts as open before; see ``pseudo_paths``.
        method: See ``path_map``.
        max_images: Stop after this many images.
        seed: Seed of the maps.

    Raises:
        ValueError: If there are no labels.
    """
    before = pseudo_paths(original, loader, rule=rule, like=wrapped, max_images=max_images)
    after = record(wrapped, loader, max_images=max_images)
    maps = path_map(before, method, seed=seed), path_map(after, method, seed=seed)
    return BeforeAfter(before, after, maps, (class_information(before), class_information(after)))


def _accuracy(paths: PathSet) -> float:
    known = paths.labels is not None and (paths.preds >= 0).all()
    return float((paths.preds == paths.labels).mean()) if known else float("nan")
