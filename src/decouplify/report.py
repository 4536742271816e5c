"""One HTML page about a wrapped network on given images: what it costs, which filters it uses, how its paths lie.

The page is one file: styles and pictures are in it, scripts are not, and nothing is fetched.
"""

from __future__ import annotations

import base64
import html
import io
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify._optional import import_optional, new_axes
from decouplify._version import __version__
from decouplify.decoupling import decoupling_of
from decouplify.macs import MacCount
from decouplify.paths import FilterStates, PathMap, PathSet, path_map, record
from decouplify.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Fact", "headline_facts", "macs_of_paths", "report"]

_BATCH = 256
_N_SHOWN = 6  # cheapest and dearest images
_MAP_IMAGES = 3000  # t-SNE of more takes minutes
_NEIGHBOURS = 10
_SMALL = 96  # pixels; smaller pictures are enlarged without smoothing


class Fact(NamedTuple):
    """One line of the page's first table: what is stated, the number, and what one must know to read it."""

    name: str
    value: str
    note: str = ""


def report(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    out: str | os.PathLike[str],
    *,
    title: str = "Calculation paths",
    class_names: Sequence[str] | None = None,
    paths: PathSet | None = None,
    timings: Mapping[str, float] | None = None,
    timing_note: str = "",
    facts: Mapping[str, str] | None = None,
    pictures: NDArray[np.uint8] | None = None,
) -> Path:
    """Write the page.

    Args:
        model: A wrapped model.
        images: What the model reads, shape (N, C, H, W), on any device.
        labels: Class of each image, shape (N,).
        out: The HTML file, which appears whole or not at all.
        title: Its heading.
        class_names: Names of the classes, by index; the indices themselves if not given.
        paths: Paths of these images in this order; recorded now if not given.
        timings: Milliseconds per image by name, for the first table.
        timing_note: On what, how and how often it was timed.
        facts: More lines for the first table, name to text.
        pictures: The images for the eye, uint8, shape (N, H, W, C) with C = 1 or 3; the model's input, stretched to
            the range of grey or colour, if not given.

    Returns:
        The absolute path of the file.

    Raises:
        ImportError: If matplotlib or scikit-learn is not installed.
        ValueError: If the model is not wrapped, or images, labels, paths and pictures do not fit each other.
    """
    plan = decoupling_of(model, "report").plan
    n_given = {"images": len(images), "labels": len(labels), "paths": len(images if paths is None else paths)}
    n_given["pictures"] = len(images if pictures is None else pictures)
    if len(set(n_given.values())) > 1 or len(images) == 0:
        given = ", ".join(f"{n} {what}" for what, n in n_given.items())
        raise ValueError(f"report: {given} given; equally many, at least 1, wanted")
    if paths is None:
        paths = record(model, list(zip(images.split(_BATCH), labels.split(_BATCH), strict=True)))
    elif paths.labels is None:
        paths = replace(paths, labels=labels.cpu().numpy().astype(np.int64))
    macs = macs_of_paths(model, paths)
    names = class_names if class_names is not None else [str(c) for c in range(int(labels.max()) + 1)]
    first_table = headline_facts(paths, macs)
    first_table += [Fact(name, value) for name, value in (facts or {}).items()]
    if timings:
        first_table.append(
            Fact("Time per image", ", ".join(f"{k} {v:.2f} ms" for k, v in timings.items()), timing_note)
        )
    thumbnails = _Thumbnails(pictures if pictures is not None else _stretched(images), paths, macs, names)
    states = paths.filter_states()
    page = _template().substitute(
        title=html.escape(title),
        subtitle=html.escape(_subtitle(plan)),
        n_images=len(paths),
        facts="\n".join(_fact_row(fact) for fact in first_table),
        maps="\n".join(
            _map_figure(path_map(paths, method, max_images=_MAP_IMAGES), names) for method in ("pca", "tsne")
        ),
        states=_states_figure(states),
        sites=_site_table(plan, states),
        refused=_refused(plan),
        macs=_macs_figure(macs) + thumbnails.row("cheapest") + thumbnails.row("dearest"),
        version=__version__,
    )
    return _write(Path(out), page)


def macs_of_paths(model: nn.Module, paths: PathSet) -> MacCount:
    """What the sparse form executes for recorded images, without running the model again.

    Args:
        model: The wrapped model the paths were recorded with.
        paths: Paths with all of its gates.

    Raises:
        ValueError: If the model is not wrapped, or the paths have other layers.
    """
    decoupling = decoupling_of(model, "macs_of_paths")
    ours = [(gate.name, gate.n_filters) for gate in decoupling.plan.gates]
    theirs = [(layer.name, layer.n_filters) for layer in paths.layers]
    if ours != theirs:
        raise ValueError(
            f"{paths!r} does not belong to this {decoupling.plan.model}: the model has {len(ours)} gates and "
            f"{decoupling.plan.n_filters} filters, and all must be there, in order"
        )
    chunks = [np.arange(start, min(start + _BATCH, len(paths))) for start in range(0, len(paths), _BATCH)]
    costs = decoupling.costs
    executed = [costs.executed(torch.from_numpy(paths.unpack(rows=rows)).double()) for rows in chunks]
    return MacCount(costs.n_dense, torch.cat(executed).round().long(), costs.n_controllers)


def headline_facts(paths: PathSet, macs: MacCount) -> list[Fact]:
    """The first numbers to look at, each with what it was measured on.

    Args:
        paths: Recorded paths, at least one.
        macs: Their multiply-accumulates.
    """
    n = len(paths)
    facts = [Fact("Images", f"{n:,}")]
    if paths.labels is not None and (paths.preds >= 0).all():
        facts.append(
            Fact("Accuracy", f"{100 * (paths.preds == paths.labels).mean():.1f} %", "each image on its own path")
        )
    executed = macs.executed.double() / macs.dense
    facts.append(
        Fact(
            "MAC reduction",
            f"{macs.reduction:.2f}x",
            f"{_millions(macs.dense)} dense, {_millions(float(macs.executed.double().mean()))} executed on average, "
            f"from {100 * float(executed.min()):.1f} % to {100 * float(executed.max()):.1f} % of dense by image",
        )
    )
    states = paths.filter_states()
    facts.append(
        Fact("Filters", states.headline().removesuffix(f" on {n} images"), f"{states.n_filters:,} on {n:,} images")
    )
    facts.append(Fact("Distinct paths", f"{paths.distinct():,} of {n:,}"))
    return [*facts, *_neighbour_fact(paths)]


def _neighbour_fact(paths: PathSet) -> Iterable[Fact]:
    if paths.labels is None or len(paths) < 3 or paths.distinct() == 1:  # one path for all tells nothing
        return
    k = min(_NEIGHBOURS, len(paths) - 1)
    largest = np.unique(paths.labels, return_counts=True)[1].max() / len(paths)
    yield Fact(
        "Class told by the path",
        f"{100 * paths.knn_accuracy(k):.1f} %",
        f"vote of the {k} nearest other paths; the largest class holds {100 * largest:.1f} % of the images",
    )


# Parts of the page ----------------------------------------------------------------------------------------------------


def _template() -> Template:
    return Template(resources.files("decouplify").joinpath("report_template.html").read_text(encoding="utf-8"))


def _subtitle(plan: Plan) -> str:
    size = " x ".join(map(str, plan.input_size))
    n_convs = len(plan.sites) + len(plan.refused)
    return (
        f"{plan.model} on {size} images: {len(plan.sites)} of {n_convs} convolutions gated by {len(plan.gates)} "
        f"controllers, {plan.n_filters:,} filters, {100 * plan.gated_share:.1f} % of the multiply-accumulates"
    )


def _fact_row(fact: Fact) -> str:
    note = f"<small>{html.escape(fact.note)}</small>" if fact.note else ""
    return f'<tr><th scope="row">{html.escape(fact.name)}</th><td>{html.escape(fact.value)}{note}</td></tr>'


def _map_figure(path_map: PathMap, class_names: Sequence[str]) -> str:
    ax = new_axes(5.0, 4.6)
    path_map.plot(ax, class_names=class_names)
    legend = ax.get_legend()
    if legend is not None:
        handles, names = ax.get_legend_handles_labels()
        below = (0.5, -0.01 if path_map.method == "tsne" else -0.13)  # under the axis labels, if there are any
        n_columns = max(1, min(5, 60 // (4 + max(len(name) for name in names))))  # about 60 letters fit side by side
        ax.legend(handles, names, loc="upper center", bbox_to_anchor=below, ncols=n_columns, frameon=False, fontsize=9)
    caption = path_map.headline() + (f"\nNote: {path_map.note}" if path_map.note else "")
    return _figure(ax, f"Scatter plot of paths, coloured by class. {caption}", caption)


def _states_figure(states: FilterStates) -> str:
    inches = float(np.clip(1.5 + 0.3 * len(states.layers), 4, 14))
    ax = new_axes(inches, 3.8)
    states.plot(ax)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    caption = f"Per layer, in execution order. Together: {states.headline()}"
    alt = f"Stacked bars of silent, dynamic and energetic filters per layer. {states.headline()}"
    # A fixed width keeps the layer names readable: narrow screens scroll.
    return _scrolling(_figure(ax, alt, caption, 5.5 * inches), "States of the filters per layer")


def _macs_figure(macs: MacCount) -> str:
    share = 100 * macs.executed.double().numpy() / macs.dense
    ax = new_axes(4.8, 3.0)
    ax.hist(share, bins=min(40, max(5, len(share) // 10)), color="#35587f")
    ax.axvline(share.mean(), color="#e08214", linewidth=2)
    ax.set_xlabel("executed MACs, % of dense")
    ax.set_ylabel("images")
    ax.spines[["top", "right"]].set_visible(False)
    caption = (
        f"Mean {share.mean():.1f} % (line), from {share.min():.1f} % to {share.max():.1f} %; controllers alone "
        f"{100 * macs.controllers / macs.dense:.2f} %"
    )
    return f'<div class="narrow">{_figure(ax, f"Histogram of executed MACs over images. {caption}", caption)}</div>'


def _figure(ax: Axes, alt: str, caption: str, width: float | None = None) -> str:
    """A drawing whose words stand in the caption, where they can be read, scaled and copied.

    It fills the space there is, or has a width in rem.
    """
    for place in ("left", "center"):
        ax.set_title("", loc=place)
    for text in list(ax.texts):
        text.remove()
    file = io.BytesIO()
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(file, format="png", dpi=144, transparent=True)
    words = html.escape(caption).replace("\n", "<br>")
    style = "" if width is None else f' style="width:{width:.1f}rem"'
    image = f'<img class="drawing"{style} src="{_data_url(file)}" alt="{html.escape(alt)}">'
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>"


def _data_url(file: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _site_table(plan: Plan, states: FilterStates) -> str:
    by_gate = {layer.name: (layer, part) for layer, part in zip(states.layers, _parts(states), strict=True)}
    rows = []
    for site in plan.sites:
        layer, part = by_gate[site.gate]
        counts = {"dynamic": layer.n_dynamic, "silent": layer.n_silent, "energetic": layer.n_energetic}
        shared = "" if site.gate == site.name else f'<br><small class="quiet">gate of {html.escape(site.gate)}</small>'
        rows.append(
            f'<tr><th scope="row">{html.escape(site.name)}{shared}</th><td>{html.escape(site.description)}</td>'
            f'<td class="number">{100 * site.n_macs / max(plan.n_macs, 1):.1f}</td>'
            f'<td class="number">{100 * float(states.rate[part].mean()):.0f}</td>'
            + "".join(f'<td class="number">{n}</td>' for n in counts.values())
            + f"<td>{_bar(counts)}</td></tr>"
        )
    keys = "".join(f'<span class="key {name}"></span>{name}' for name in ("dynamic", "silent", "energetic"))
    heads = ("MACs, %", "open, %", "dynamic", "silent", "energetic")
    numbers = "".join(f'<th scope="col" class="number">{head}</th>' for head in heads)
    table = (
        f'<table class="sites"><caption>Filters by state:{keys}. Open: mean share of the filters that an image uses.'
        f'</caption><thead><tr><th scope="col">site</th><th scope="col">convolution</th>{numbers}'
        f'<th scope="col">filters</th></tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table>'
    )
    return _scrolling(table, "Gated convolutions")


def _parts(states: FilterStates) -> list[slice]:
    ends = np.cumsum([layer.n_filters for layer in states.layers]).tolist()
    return [slice(end - layer.n_filters, end) for end, layer in zip(ends, states.layers, strict=True)]


def _bar(counts: Mapping[str, int]) -> str:
    """The numbers beside it as lengths, so of no use to a screen reader."""
    spans = "".join(f'<span class="{name}" style="flex:{n} 0 0"></span>' for name, n in counts.items() if n)
    return f'<div class="bar" aria-hidden="true">{spans}</div>'


def _refused(plan: Plan) -> str:
    if not plan.refused:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(r.name)}</th>'
        f'<td class="number">{100 * r.n_macs / max(plan.n_macs, 1):.1f}</td><td>{html.escape(r.reason)}</td></tr>'
        for r in plan.refused
    )
    table = (
        '<table class="sites"><thead><tr><th scope="col">convolution</th><th scope="col" class="number">MACs, %</th>'
        f'<th scope="col">reason</th></tr></thead><tbody>\n{rows}\n</tbody></table>'
    )
    n = len(plan.refused)
    summary = f"<summary>{n} convolution{'s' * (n != 1)} left alone</summary>"
    return f"<details>{summary}{_scrolling(table, 'Convolutions left alone')}</details>"


def _scrolling(content: str, label: str) -> str:
    """What may be wider than a phone scrolls by itself, also with the keyboard."""
    return f'<div class="scroll" role="region" aria-label="{html.escape(label)}" tabindex="0">{content}</div>'


@dataclass(frozen=True)
class _Thumbnails:
    """Pictures of the images at both ends of the histogram."""

    pictures: NDArray[np.uint8]
    paths: PathSet
    macs: MacCount
    class_names: Sequence[str]

    def row(self, which: str) -> str:
        order = np.argsort(self.macs.executed.numpy(), kind="stable")
        chosen = order[:_N_SHOWN] if which == "cheapest" else order[::-1][:_N_SHOWN]
        items = "\n".join(self._item(int(i)) for i in chosen)
        return f'<h3>The {which} images</h3><ul class="images">\n{items}\n</ul>'

    def _item(self, i: int) -> str:
        share = 100 * int(self.macs.executed[i]) / self.macs.dense
        picture = self.pictures[i]
        small = ' class="small"' if max(picture.shape[:2]) < _SMALL else ""
        words = self._words(i)
        alt = html.escape(f"Image {self.paths.ids[i]}: {words}")
        return f'<li><img{small} src="{_picture(picture)}" alt="{alt}">{share:.1f} %<br>{html.escape(words)}</li>'

    def _words(self, i: int) -> str:
        label = self._name(int(self.paths.labels[i])) if self.paths.labels is not None else ""
        pred = int(self.paths.preds[i])
        if pred < 0 or (self.paths.labels is not None and pred == self.paths.labels[i]):
            return label
        return f"{label}, taken for {self._name(pred)}" if label else f"taken for {self._name(pred)}"

    def _name(self, c: int) -> str:
        return self.class_names[c] if c < len(self.class_names) else str(c)


def _picture(pixels: NDArray[np.uint8]) -> str:
    image = import_optional("matplotlib.image", "a report")
    colour = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]
    file = io.BytesIO()
    image.imsave(file, np.ascontiguousarray(colour), format="png")
    return _data_url(file)


def _stretched(images: Tensor) -> NDArray[np.uint8]:
    """Pixels of normalised images: per channel, the range over all images becomes 0 to 255."""
    shown = images.detach().float().cpu()
    shown = shown if shown.shape[1] in (1, 3) else shown[:, :1]
    low, high = shown.amin(dim=(0, 2, 3), keepdim=True), shown.amax(dim=(0, 2, 3), keepdim=True)
    scaled = 255 * (shown - low) / (high - low).clamp_min(1e-12)
    return scaled.round().byte().movedim(1, -1).numpy()


def _millions(n: float) -> str:
    return f"{n / 1e9:.2f} G" if n >= 1e9 else f"{n / 1e6:.2f} M"


def _write(target: Path, text: str) -> Path:
    target = target.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"report: there is no directory {target.parent}")
    descriptor, part = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part", text=True)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(part).chmod(0o644)
        Path(part).replace(target)
    finally:
        Path(part).unlink(missing_ok=True)
    return target
