"""At which layer the paths of which classes part: a decision tree over layers.

Source: Li et al., Interpretable Neural Network Decoupling, ECCV 2020, Figure 9: layer after layer a Hopkins statistic
says whether the paths of a node's images form groups; if so, 2-means divides them. The paper's statistic is replaced by
one that is valid for bits (see ``hopkins``), unless the customary form is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from decouplify._optional import import_optional, new_axes, write_title
from decouplify.paths._distance import class_members
from decouplify.paths._progress import progress_bar
from decouplify.paths._results import Result
from decouplify.paths._text import plain
from decouplify.paths.clustering import Hopkins, Method, hopkins
from decouplify.paths.information import discoveries
from decouplify.paths.pathset import By, LayerRef, PathSet
from decouplify.paths.states import label_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DecisionTree", "TreeNode", "decision_tree"]

ClassNames = Sequence[str] | Mapping[int, str]

_WORDS = 2.7  # inches that the words at a split take
_PAPER: dict[str, Any] = {
    "boxstyle": "square,pad=0.1",
    "facecolor": "white",
    "edgecolor": "none",
    "alpha": 0.85,
}  # behind words


@dataclass(frozen=True)
class TreeNode:
    """Classes that share their path so far, and the layer at which they part.

    Attributes:
        classes: Class values.
        n_images: Images of these classes.
        layer: Name of the layer where they part; ``None`` at the end of a branch.
        depth: Position of that layer, -1 at the end of a branch.
        hopkins: The test there, or ``None``.
        purity: Share of the images that 2-means put on the side of their class, in [0.5, 1]; NaN at the end.
        children: Two nodes, or none.
    """

    classes: tuple[Any, ...]
    n_images: int
    layer: str | None = None
    depth: int = -1
    hopkins: Hopkins | None = None
    purity: float = float("nan")
    children: tuple[TreeNode, ...] = ()

    def walk(self) -> Iterator[TreeNode]:
        """This node and all below it, parents first, branches in order."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True, eq=False, repr=False)
class DecisionTree(Result):
    """At which layer which classes part.

    Attributes:
        root: The node with all classes.
        layers: Names of the layers looked at, in execution order.
        depths: Their positions in the network.
        method: ``"permutation"`` or ``"classic"``, see ``hopkins``.
        n_images: Images looked at.
        class_names: Names for printing, by class value.
        model: Name of the model, for titles.
    """

    root: TreeNode
    layers: tuple[str, ...]
    depths: tuple[int, ...]
    method: str
    n_images: int
    class_names: Mapping[Any, str]
    model: str = ""

    @property
    def splits(self) -> tuple[TreeNode, ...]:
        """Nodes at which classes part, parents first."""
        return tuple(node for node in self.root.walk() if node.children)

    def headline(self) -> str:
        """One line: how many classes, how many splits, the first layer of all."""
        n_classes, n_ends = len(self.root.classes), sum(not node.children for node in self.root.walk())
        if not self.splits:
            return f"no layer divides the {n_classes} classes ({self.n_images} images)"
        first = self.splits[0]
        return (
            f"{n_classes} classes in {n_ends} branches ({self.n_images} images); the first to divide them is "
            f"{first.layer}, layer {first.depth}"
        )

    def summary(self) -> str:
        """The tree as indented lines."""
        lines = [f"Decision tree over layers{' of ' + self.model if self.model else ''}: {self.headline()}"]

        def add(node: TreeNode, indent: str) -> None:
            lines.append(f"{indent}{self._names(node)}{' - ' + _split_words(node) if node.children else ''}")
            for child in node.children:
                add(child, indent + "  ")

        add(self.root, "")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"DecisionTree({self.headline()})"

    def _names(self, node: TreeNode) -> str:
        return ", ".join(self.class_names[value] for value in node.classes)

    def to_dict(self) -> dict[str, Any]:
        """The tree as nested plain data."""
        return {
            "model": self.model,
            "method": self.method,
            "n_images": self.n_images,
            "layers": list(self.layers),
            "depths": list(self.depths),
            "class_names": {str(value): name for value, name in self.class_names.items()},
            "root": _node_dict(self.root),
        }

    def to_dot(self) -> str:
        """The tree in the DOT language of Graphviz, left to right."""
        lines = ["digraph paths {", "  rankdir=LR;", '  node [shape=box, fontname="sans-serif"];']
        nodes = list(self.root.walk())
        number = {id(node): index for index, node in enumerate(nodes)}
        for index, node in enumerate(nodes):
            words = f"{node.layer}\\n{_split_words(node)}" if node.children else self._names(node)
            lines.append(f'  n{index} [label="{_escaped(words)}"];')
            lines += [f"  n{index} -> n{number[id(child)]};" for child in node.children]
        return "\n".join([*lines, "}"]) + "\n"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Left to right: layers across, classes at the right, a dot where classes part.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        placed = place(self)
        n_layers = len(self.layers)
        size = min(11.0, max(6.0, 4 + 0.25 * n_layers)), max(2.5, 0.9 + 0.42 * len(placed.ends))
        ax = new_axes(*size) if ax is None else ax
        for xs, ys in placed.branches:
            ax.plot(xs, ys, color="0.6", linewidth=1.4, zorder=1, solid_joinstyle="round")
        for node, (x, y) in placed.splits:
            ax.plot([x], [y], "o", color="#e08214", markersize=7, zorder=2)
            # Between the branches there is room to the right, but not near the end, where the names of classes are.
            beside = x < n_layers * (1 - _WORDS / (size[0] - 1.2))
            ax.annotate(
                _split_words(node),
                (x, y),
                xytext=(7, 0) if beside else (0, 6),
                textcoords="offset points",
                ha="left" if beside else "right",
                va="center" if beside else "baseline",
                fontsize=7.5,
                bbox=_PAPER,
            )
        for node, (x, y) in placed.ends:
            ax.annotate(self._names(node), (x, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
        ax.set_xlim(-1.2, n_layers)
        ax.margins(y=0.12)
        ax.set_yticks([])
        label_layers(ax, self.layers)
        ax.spines[["top", "right", "left"]].set_visible(False)
        write_title(ax, f"Where paths part{' in ' + self.model if self.model else ''}", self.headline())
        return ax


@dataclass(frozen=True)
class Placed:
    """A tree in the plane: x is the position among the layers, y the order of the branches.

    Attributes:
        branches: The x and y of one elbow each.
        splits: Nodes at which classes part, and where.
        ends: Nodes at the end of a branch, and where.
    """

    branches: list[tuple[list[float], list[float]]]
    splits: list[tuple[TreeNode, tuple[float, float]]]
    ends: list[tuple[TreeNode, tuple[float, float]]]


def place(tree: DecisionTree) -> Placed:
    """Positions of all nodes: ends on lines of their own, parents between their children."""
    x_of = {depth: float(position) for position, depth in enumerate(tree.depths)}
    right = len(tree.layers) - 0.3
    placed = Placed([], [], [])

    def visit(node: TreeNode) -> float:
        if not node.children:
            y = -float(len(placed.ends))
            placed.ends.append((node, (right, y)))
            return y
        heights = [visit(child) for child in node.children]
        x, y = x_of[node.depth], sum(heights) / 2
        placed.splits.append((node, (x, y)))
        for child, height in zip(node.children, heights, strict=True):
            end = x_of[child.depth] if child.children else right
            placed.branches.append(([x, x, end], [y, height, height]))
        return y

    top = visit(tree.root)
    stem = x_of[tree.root.depth] if tree.root.children else right
    placed.branches.append(([-1.0, stem], [top, top]))
    return placed


def decision_tree(
    paths: PathSet,
    by: By = "labels",
    *,
    classes: Sequence[Any] | None = None,
    class_names: ClassNames | None = None,
    layers: Sequence[LayerRef] | None = None,
    method: Method = "permutation",
    threshold: float = 0.7,
    false_share: float = 0.05,
    min_effect: float = 0.005,
    min_purity: float = 0.75,
    max_per_class: int = 50,
    n_null: int = 50,
    seed: int = 0,
    progress: bool | None = None,
) -> DecisionTree:
    """At which layer the paths of which classes part (Figure 9 of the paper).

    A node is a set of classes. From its layer on, the first layer divides it at which its images form groups and
    2-means on the layer's gates puts classes on different sides; every class goes where most of its images are. Both
    parts go on from the next layer.

    Args:
        paths: The path set; some 50 images per class are enough.
        by: What the classes are; see ``PathSet.groups``.
        classes: Class values to look at; all if not given. A figure stays readable with eight to twenty.
        class_names: Names for printing, by class value.
        layers: Layers to look at; all if not given.
        method: ``"permutation"``: groups are there if the Hopkins statistic is higher than for shuffled paths by at
            least ``min_effect``, with a share of ``false_share`` wrong discoveries among a node's layers
            (Benjamini-Hochberg). ``"classic"``: if the uniform form, as customary, is above ``threshold``.
        threshold: For ``"classic"``, in [0, 1].
        false_share: For ``"permutation"``, in (0, 1).
        min_effect: For ``"permutation"``: least difference to the statistic of shuffled paths.
        min_purity: Least share of the images on the side of their class, in [0.5, 1]: what divides images and not
            classes, such as their brightness, stays near 0.5.
        max_per_class: Use a random subset of a class if it has more images.
        n_null: Shufflings per test.
        seed: Seed of all draws.
        progress: Show a progress bar; if not given, only on a terminal and with rich installed.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there are fewer than two classes, a class has no images, or a number is out of range.
    """
    if not 0.5 <= min_purity <= 1 or max_per_class < 2:
        raise ValueError(
            f"decision_tree: min_purity={min_purity}, max_per_class={max_per_class}; wanted [0.5, 1], >= 2"
        )
    rows = _rows_of_classes(paths, paths.groups(by), classes, max_per_class, seed)
    shown = replace(paths, margins=None).subset(rows)
    shown = shown if layers is None else shown.select_layers(layers)
    grower = _Grower(
        shown, paths.groups(by)[rows], method, threshold, false_share, min_effect, min_purity, n_null, seed
    )
    values, _, _ = class_members(grower.groups)
    with progress_bar(progress, "decision tree", len(values)) as advance:
        root = grower.grow(np.arange(len(shown)), 0, advance)
    names = {value: str(value) if class_names is None else class_names[int(value)] for value in values.tolist()}
    depths = tuple(layer.depth for layer in shown.layers)
    layer_names = tuple(layer.name for layer in shown.layers)
    return DecisionTree(root, layer_names, depths, method, len(shown), names, paths.model_name)


def _rows_of_classes(
    paths: PathSet, groups: NDArray[Any], classes: Sequence[Any] | None, max_per_class: int, seed: int
) -> NDArray[np.intp]:
    wanted = np.unique(groups) if classes is None else np.unique(np.asarray(classes))
    if missing := sorted(set(wanted.tolist()) - set(groups.tolist())):
        raise ValueError(f"decision_tree: {paths!r} has no images of class {', '.join(map(str, missing))}")
    if len(wanted) < 2:
        raise ValueError(f"decision_tree needs at least 2 classes, {len(wanted)} given")
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(groups == value))[:max_per_class] for value in wanted]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class _Grower:
    """The rules of one call of ``decision_tree``."""

    paths: PathSet
    groups: NDArray[Any]
    method: Method
    threshold: float
    false_share: float
    min_effect: float
    min_purity: float
    n_null: int
    seed: int

    def grow(self, rows: NDArray[np.intp], start: int, advance: Any) -> TreeNode:
        """The node of these rows, and all below it; looks at layers from ``start`` on."""
        values, index, _ = class_members(self.groups[rows])
        classes = tuple(values.tolist())
        found = self._first_split(rows, index, len(values), start) if len(values) > 1 else None
        if found is None:
            advance(len(values))
            return TreeNode(classes, len(rows))
        layer, test, side, purity = found
        children = tuple(self.grow(rows[side[index] == s], layer + 1, advance) for s in (False, True))
        spec = self.paths.layers[layer]
        return TreeNode(classes, len(rows), spec.name, spec.depth, test, purity, children)

    def _first_split(
        self, rows: NDArray[np.intp], index: NDArray[np.intp], n_classes: int, start: int
    ) -> tuple[int, Hopkins, NDArray[np.bool_], float] | None:
        """Layer, test, side of each class, purity."""
        layers = list(range(start, len(self.paths.layers)))
        gates = {layer: self.paths.unpack(layer, rows) for layer in layers}
        tests = [hopkins(gates[layer], method=self.method, n_null=self.n_null, seed=self.seed) for layer in layers]
        for layer, test, grouped in zip(layers, tests, self._grouped(tests), strict=True):
            if not grouped:
                continue
            side, purity = _divide(gates[layer], index, n_classes, self.seed)
            if side.any() and not side.all() and purity >= self.min_purity:
                return layer, test, side, purity
        return None

    def _grouped(self, tests: Sequence[Hopkins]) -> NDArray[np.bool_]:
        """At which layers the images form groups."""
        defined = np.array([not test.note for test in tests], np.bool_)
        if self.method == "classic":
            return defined & np.array([test.value > self.threshold for test in tests], np.bool_)
        p_values = np.array([1.0 if test.note else test.p_value for test in tests])
        strong = np.array([test.effect > self.min_effect for test in tests], np.bool_)
        return defined & discoveries(p_values, self.false_share) & strong


def _divide(
    gates: NDArray[np.bool_], index: NDArray[np.intp], n_classes: int, seed: int
) -> tuple[NDArray[np.bool_], float]:
    """Side of each class by the majority of its images, shape (C,), and the share of images on their class's side."""
    varying = gates[:, gates.any(axis=0) & ~gates.all(axis=0)]
    kmeans = import_optional("sklearn.cluster", "decision_tree").KMeans(2, n_init=10, random_state=seed)
    with import_optional("threadpoolctl", "decision_tree").threadpool_limits(1):  # small data: threads only wait
        cluster = kmeans.fit_predict(varying.astype(np.float32))
    on_right = np.bincount(index, weights=cluster, minlength=n_classes) / np.bincount(index, minlength=n_classes)
    side = on_right > 0.5
    if side[0]:  # which cluster is called 1 is chance; the class that sorts first goes first
        side, cluster = ~side, 1 - cluster
    return side, float((side[index] == (cluster == 1)).mean())


def _split_words(node: TreeNode) -> str:
    assert node.hopkins is not None
    return f"{node.layer}: H {node.hopkins.value:.2f}{p_words(node.hopkins)}, purity {100 * node.purity:.0f} %"


def p_words(test: Hopkins) -> str:
    """The p-value, if there is one; beyond a thousandth the normal distribution says little."""
    if np.isnan(test.p_value):
        return ""
    return ", p < 0.001" if test.p_value < 0.001 else f", p {test.p_value:.1g}"


def _node_dict(node: TreeNode) -> dict[str, Any]:
    return {
        "classes": plain(node.classes),
        "n_images": node.n_images,
        "layer": node.layer,
        "depth": node.depth,
        "hopkins": None if node.hopkins is None else plain(vars(node.hopkins)),
        "purity": plain(node.purity),
        "children": [_node_dict(child) for child in node.children],
    }


def _escaped(text: str) -> str:
    return text.replace('"', '\\"')
