"""The interactive charts of a page, as plotly figures.

Colours that depend on the reader's light or dark mode are names of CSS variables in ``meta``; the page's script puts in
the colours, and redraws when the mode changes.
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decouplify._optional import import_optional
from decouplify.paths._layout import filter_slices
from decouplify.paths.tree import p_words, place
from decouplify.reporting.findings import Findings

__all__ = ["Chart", "charts_of", "plotly_source"]

# Ten hues that can be told apart on white and on near-black.
_PALETTE = (
    "#4e79a7",
    "#f28e2b",
    "#e15759",
    "#76b7b2",
    "#59a14f",
    "#edc948",
    "#b07aa1",
    "#ff9da7",
    "#9c755f",
    "#8f9aa8",
)
_LEGEND_MAX = 10
_STATES = ("energetic", "dynamic", "silent")


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: Its id on the page.
        figure: Plotly's ``data`` and ``layout`` as JSON.
        caption: The numbers, in words.
        alt: What is to be seen, for those who cannot.
        height: In rem.
        width: Least width in rem; narrower screens scroll.
    """

    name: str
    figure: str
    caption: str
    alt: str
    height: float
    width: float = 0.0


def charts_of(found: Findings, tiles: dict[int, int]) -> dict[str, Chart]:
    """All charts by name.

    Args:
        found: What to draw.
        tiles: Row of the path set to the place of its picture.
    """
    charts = [_map(found, tiles), _states(found), _histogram(found), _macs(found)]
    if found.information is not None:
        charts.append(_information(found))
    if found.tree is not None:
        charts.append(_tree(found))
    return {chart.name: chart for chart in charts}


def plotly_source() -> str:
    """The plotting library as JavaScript.

    Raises:
        ImportError: If plotly is not installed.
    """
    source: str = import_optional("plotly.offline", "a report", extra="report").get_plotlyjs()
    return source


def _go() -> Any:
    return import_optional("plotly.graph_objects", "a report", extra="report")


def _figure(traces: list[Any], **layout: Any) -> str:
    figure = _go().Figure(traces)
    layout = {"margin": {"l": 56, "r": 12, "t": 8, "b": 52}, **layout}
    figure.update_layout(template="none", dragmode=False, **layout)
    content = json.loads(figure.to_json())
    return json.dumps({"data": content["data"], "layout": content["layout"]})


def _text(name: str) -> str:
    """Plotly reads some HTML in names; these are to stay as they are."""
    return html.escape(name, quote=False)


def _themed(variable: str) -> dict[str, str]:
    return {"color": variable}


def _map(found: Findings, tiles: dict[int, int]) -> Chart:
    shown = found.map
    right = np.ones(len(shown.rows), np.bool_)
    if shown.labels is not None:
        right = found.paths.preds[shown.rows] == shown.labels
    details = [[tiles.get(int(row), -1), found.words(int(row))] for row in shown.rows]
    size = float(np.clip(260 / np.sqrt(max(len(shown.rows), 1)), 5, 11))
    parts = _by_class(found)
    rows_of = {name: rows for rows, name, _ in parts}

    def dots(chosen: NDArray[Any], name: str, color: Any, symbol: str) -> Any:
        color = color if isinstance(color, str) else [color[i] for i in chosen]
        return _go().Scatter(
            x=shown.xy[chosen, 0].tolist(),
            y=shown.xy[chosen, 1].tolist(),
            mode="markers",
            name=_text(name),
            legendgroup=name,
            # Once per class, also where all of its images are crosses.
            showlegend=(symbol == "circle" or not right[rows_of[name]].any()) and len(rows_of) > 1,
            marker={"size": size, "color": color, "symbol": symbol, "opacity": 0.85, "line": {"width": 0}},
            customdata=[details[i] for i in chosen],
            hoverinfo="none",
        )

    traces = [dots(rows[right[rows]], name, color, "circle") for rows, name, color in parts if right[rows].any()]
    traces += [dots(rows[~right[rows]], name, color, "x") for rows, name, color in parts if not right[rows].all()]
    hidden = {"visible": False}
    legend = {"orientation": "h", "x": 0, "y": -0.02, "yanchor": "top", "itemsizing": "constant"}
    figure = _figure(
        traces,
        xaxis=hidden,
        yaxis={**hidden, "scaleanchor": "x"},
        hovermode="closest",
        legend=legend,
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
    )
    caption = shown.headline() + (f"\nNote: {shown.note}" if shown.note else "")
    caption += "" if right.all() else "\nCrosses were classified wrongly."
    return Chart("map", figure, caption, f"Scatter plot of paths, coloured by class. {caption}", 34)


def _by_class(found: Findings) -> list[tuple[NDArray[Any], str, Any]]:
    """Positions, name and colour of each class; one shaded group where classes cannot be told apart by colour."""
    labels = found.map.labels
    if labels is None:
        return [(np.arange(len(found.map.rows)), "images", _PALETTE[0])]
    values, index = np.unique(labels, return_inverse=True)
    if len(values) <= _LEGEND_MAX:
        return [(np.flatnonzero(index == i), found.name(int(v)), _PALETTE[i]) for i, v in enumerate(values)]
    hues = [f"hsl({360 * i / len(values):.0f},60%,{(50, 62)[i % 2]}%)" for i in index]
    return [(np.arange(len(labels)), f"{len(values)} classes", hues)]


def _states(found: Findings) -> Chart:
    names = [layer.name for layer in found.states.layers]
    sizes = [layer.n_filters for layer in found.states.layers]
    traces = []
    for state in _STATES:
        counts = [getattr(layer, f"n_{state}") for layer in found.states.layers]
        traces.append(
            _go().Bar(
                x=names,
                y=[100 * n / size for n, size in zip(counts, sizes, strict=True)],
                name=state,
                customdata=list(zip(counts, sizes, strict=True)),
                hovertemplate="%{x}<br>%{customdata[0]} of %{customdata[1]} filters<extra>" + state + "</extra>",
                meta=_themed(f"--{state}"),
            )
        )
    layout = {"barmode": "stack", "bargap": 0.15, "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"}}
    axis = {"title": {"text": "filters of the layer, %"}, "range": [0, 100]}
    figure = _figure(traces, **layout, xaxis={"type": "category", "automargin": True}, yaxis=axis)
    caption = f"Per layer, in execution order. Together: {found.states.headline()}"
    alt = f"Stacked bars of silent, dynamic and energetic filters per layer. {found.states.headline()}"
    return Chart("states", figure, caption, alt, 22, min(80.0, 1.0 * len(names) + 5))


def _histogram(found: Findings) -> Chart:
    counted = found.histogram
    centers = (counted.edges[:-1] + counted.edges[1:]) / 2
    spans = [
        f"{np.ceil(a):.0f} to {np.ceil(b) - 1:.0f}" for a, b in zip(counted.edges, counted.edges[1:], strict=False)
    ]
    width = counted.n_images / max(1, len(counted.counts))
    groups = [
        ("never", [-0.75 * width], [counted.n_silent], ["0"], "--silent"),
        ("sometimes", centers.tolist(), counted.counts.tolist(), spans, "--dynamic"),
        ("always", [counted.n_images + 0.75 * width], [counted.n_energetic], [str(counted.n_images)], "--energetic"),
    ]
    hover = "open for %{text} images: %{y} filters<extra></extra>"
    traces = [
        _go().Bar(
            x=x,
            y=y,
            name=name,
            text=text,
            textposition="none",
            width=0.92 * width,
            hovertemplate=hover,
            meta=_themed(c),
        )
        for name, x, y, text, c in groups
    ]
    layout = {"legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"}, "bargap": 0}
    axes = {
        "xaxis": {"title": {"text": "images the filter is open for"}},
        "yaxis": {"title": {"text": "filters"}},
    }
    figure = _figure(traces, **layout, **axes)
    caption = f"{counted.name}: {counted.headline()}"
    return Chart("histogram", figure, caption, f"Histogram of how often filters are open. {caption}", 20)


def _macs(found: Findings) -> Chart:
    share = 100 * found.macs.executed.double().numpy() / found.macs.dense
    counts, edges = np.histogram(share, bins=min(40, max(5, len(share) // 10)))
    spans = [f"{a:.1f} to {b:.1f} %" for a, b in pairwise(edges)]
    bars = _go().Bar(
        x=((edges[:-1] + edges[1:]) / 2).tolist(),
        y=counts.tolist(),
        width=(0.94 * np.diff(edges)).tolist(),
        text=spans,
        textposition="none",
        hovertemplate="%{text}: %{y} images<extra></extra>",
        meta=_themed("--energetic"),
    )
    mean = {"type": "line", "x0": share.mean(), "x1": share.mean(), "y0": 0, "y1": 1, "yref": "paper"}
    axes = {
        "xaxis": {"title": {"text": "executed MACs, % of dense"}},
        "yaxis": {"title": {"text": "images"}},
    }
    line = {"color": "#e08214", "width": 2}
    figure = _figure([bars], **axes, shapes=[{**mean, "line": line}], showlegend=False)
    caption = (
        f"Mean {share.mean():.1f} % (line), from {share.min():.1f} % to {share.max():.1f} %; controllers alone "
        f"{100 * found.macs.controllers / found.macs.dense:.2f} %"
    )
    return Chart("macs", figure, caption, f"Histogram of executed MACs over images. {caption}", 18)


def _information(found: Findings) -> Chart:
    information = found.information
    assert information is not None
    parts = [information.information[part] for part in filter_slices(information.layers)]
    names = [layer.name for layer in information.layers]
    mean = _go().Bar(
        x=names,
        y=[bits.mean() for bits in parts],
        name="mean of the filters",
        hovertemplate="%{x}<br>mean %{y:.4f} bits<extra></extra>",
        meta=_themed("--energetic"),
    )
    best = _go().Scatter(
        x=names,
        y=[bits.max() for bits in parts],
        customdata=[int(bits.argmax()) for bits in parts],
        mode="markers",
        marker={"size": 8},
        name="best filter",
        hovertemplate="%{x}<br>filter %{customdata}: %{y:.3f} bits<extra></extra>",
        meta=_themed("--dynamic"),
    )
    layout = {"legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"}}
    axes = {
        # Or the dots would ask for room on both sides.
        "xaxis": {"type": "category", "automargin": True, "range": [-0.6, len(names) - 0.4]},
        "yaxis": {"title": {"text": "bits about the class"}, "rangemode": "tozero"},
    }
    figure = _figure([mean, best], **layout, **axes)
    caption = information.headline()
    alt = f"What filters tell about the class, per layer. {caption}"
    return Chart("information", figure, caption, alt, 20, min(80.0, 1.0 * len(names) + 5))


def _tree(found: Findings) -> Chart:
    tree = found.tree
    assert tree is not None
    placed = place(tree)
    xs: list[float | None] = []
    ys: list[float | None] = []
    for branch_x, branch_y in placed.branches:
        xs += [*branch_x, None]
        ys += [*branch_y, None]
    lines = _go().Scatter(x=xs, y=ys, mode="lines", line={"width": 2}, hoverinfo="skip", meta=_themed("--quiet"))
    splits = _go().Scatter(
        x=[x for _, (x, _) in placed.splits],
        y=[y for _, (_, y) in placed.splits],
        mode="markers",
        marker={"size": 12},
        text=[_split_words(found, node) for node, _ in placed.splits],
        hovertemplate="%{text}<extra></extra>",
        meta=_themed("--dynamic"),
    )
    ends = _go().Scatter(
        x=[x for _, (x, _) in placed.ends],
        y=[y for _, (_, y) in placed.ends],
        mode="text",
        text=["  " + _text(", ".join(tree.class_names[v] for v in node.classes)) for node, _ in placed.ends],
        textposition="middle right",
        hoverinfo="skip",
        cliponaxis=False,
    )
    longest = max(len(text) for text in ends.text)
    step = max(1, len(tree.layers) // 18)
    ticks = list(range(0, len(tree.layers), step))
    axes = {
        "xaxis": {
            "tickvals": ticks,
            "ticktext": [tree.layers[i] for i in ticks],
            "range": [-1.1, len(tree.layers) - 0.2],
            "automargin": True,
            "zeroline": False,
        },
        "yaxis": {"visible": False},
    }
    margin = {"l": 8, "r": min(260, 16 + 7.2 * longest), "t": 12, "b": 52}
    figure = _figure([lines, splits, ends], **axes, showlegend=False, hovermode="closest", margin=margin)
    caption = tree.headline()
    alt = f"Tree of classes over layers. {tree.summary()}"
    width = min(60.0, 1.4 * len(tree.layers) + 0.45 * longest + 8)
    return Chart("tree", figure, caption, alt, 5 + 1.9 * len(placed.ends), width)


def _split_words(found: Findings, node: Any) -> str:
    sides = ["<br>".join(_wrapped([_text(found.name(c)) for c in child.classes])) for child in node.children]
    test = node.hopkins
    return (
        f"<b>{node.layer}</b><br>{sides[0]}<br>against<br>{sides[1]}<br>Hopkins {test.value:.2f} (shuffled "
        f"{test.null:.2f}{_text(p_words(test))}), purity {100 * node.purity:.0f} %, {node.n_images} images"
    )


def _wrapped(names: list[str], per_line: int = 5) -> list[str]:
    return [", ".join(names[start : start + per_line]) for start in range(0, len(names), per_line)]
