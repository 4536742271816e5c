"""Writes the page: findings, charts and pictures into one file."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from torch import nn

from decouplify._version import __version__
from decouplify.paths import FilterStates
from decouplify.plan import Plan
from decouplify.reporting.charts import Chart, charts_of, plotly_source
from decouplify.reporting.findings import Fact, Findings, TellingFilter, headline_facts, study
from decouplify.reporting.pictures import Sheet

__all__ = ["report", "write_page"]

_N_SHOWN = 6  # cheapest and dearest images
_N_RATES = 10  # classes shown beside a filter


def report(
    model: nn.Module,
    loader: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    title: str = "Calculation paths",
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_images: int | None = 10_000,
    timings: Mapping[str, float] | None = None,
    timing_note: str = "",
    facts: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Path:
    """Write one HTML page about a wrapped network on given images.

    The page shows the costs, the paths as a map, where classes part, which filters tell the class, filter states, and
    the cheapest and dearest images. It is one file, some 5 MB of which are the plotting library, and opens without a
    network. What needs labels is left out, with the reason, where there are none.

    Args:
        model: A wrapped model.
        loader: As for ``decouplify.record``; it is read once.
        path: The HTML file, which appears whole or not at all.
        title: Its heading.
        class_names: Names of the classes, by index; the indices themselves if not given.
        mean: Per channel, what was subtracted from pixels in [0, 1], to show pictures in their own colours. Without
            it and ``std`` the range of the first batch is shown as black to white.
        std: Per channel, what they were divided by.
        max_images: Stop after this many images; ``None``: read all. A picture takes 12 kB of memory.
        timings: Milliseconds per image by name, for the first table.
        timing_note: On what, how and how often it was timed.
        facts: More lines for the first table, name to text.
        seed: Seed of the map and the tree.
        progress: Show progress bars; if not given, only on a terminal and with rich installed.

    Returns:
        The absolute path of the file.

    Raises:
        ImportError: If plotly, pillow or scikit-learn is not installed.
        ValueError: If the model is not wrapped, or there are no images.
        FileNotFoundError: If the directory of ``path`` does not exist.
    """
    _check_target(Path(path))
    plotly_source()  # a missing package is better found now than after minutes
    found = study(
        model,
        loader,
        class_names=class_names,
        mean=mean,
        std=std,
        max_images=max_images,
        seed=seed,
        progress=progress,
    )
    return write_page(found, path, title=title, timings=timings, timing_note=timing_note, facts=facts)


def write_page(
    found: Findings,
    path: str | os.PathLike[str],
    *,
    title: str = "Calculation paths",
    timings: Mapping[str, float] | None = None,
    timing_note: str = "",
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write the page of findings that are there already; see ``report`` for the arguments."""
    target = _check_target(Path(path))
    sheet = _sheet(found)
    charts = charts_of(found, {} if sheet is None else sheet.place)
    first_table = headline_facts(found.paths, found.macs)
    first_table += [Fact(name, value) for name, value in (facts or {}).items()]
    if timings:
        times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in timings.items())
        first_table.append(Fact("Time per image", times, timing_note))
    page = _read("template.html").substitute(
        title=html.escape(title),
        subtitle=html.escape(_subtitle(found.plan)),
        n_images=f"{len(found.paths):,}",
        facts="\n".join(_fact_row(fact) for fact in first_table),
        map=_chart(charts["map"]),
        tree=_chart(charts["tree"]) if "tree" in charts else _missing(found.left_out["tree"]),
        information=_chart(charts["information"]) if "information" in charts else _missing(found.left_out["filters"]),
        telling=_telling_filters(found, sheet),
        states=_chart(charts["states"]),
        histogram=_chart(charts["histogram"]),
        macs=_chart(charts["macs"]),
        images=_images(found, sheet, "cheapest") + _images(found, sheet, "dearest"),
        sites=_site_table(found.plan, found.states),
        refused=_refused(found.plan),
        tiles=_tile_style(sheet),
        columns="1" if sheet is None else str(sheet.n_columns),
        lines="1" if sheet is None else str(sheet.n_lines),
        charts=_script_data(charts),
        plotly=plotly_source(),
        script=resources.files("decouplify.reporting").joinpath("page.js").read_text(encoding="utf-8"),
        version=__version__,
    )
    return _write(target, page)


# Parts of the page ----------------------------------------------------------------------------------------------------


def _read(name: str) -> Template:
    return Template(resources.files("decouplify.reporting").joinpath(name).read_text(encoding="utf-8"))


def _chart(chart: Chart) -> str:
    words = html.escape(chart.caption).replace("\n", "<br>")
    style = f"height:{chart.height:.1f}rem" + (f";min-width:{chart.width:.1f}rem" if chart.width else "")
    alt = html.escape(chart.alt)
    area = f'<div id="chart-{chart.name}" class="chart" style="{style}" role="img" aria-label="{alt}"></div>'
    area = _scrolling(area, chart.name) if chart.width else area
    return f"<figure>{area}<figcaption>{words}</figcaption></figure>"


def _missing(reason: str) -> str:
    return f'<p class="quiet">Left out: {html.escape(reason)}.</p>'


def _script_data(charts: Mapping[str, Chart]) -> str:
    """The figures as one JSON object that cannot end its script element."""
    figures = ",".join(f'"chart-{name}":{chart.figure}' for name, chart in charts.items())
    return ("{" + figures + "}").replace("<", "\\u003c")


def _sheet(found: Findings) -> Sheet | None:
    if found.pictures is None:
        return None
    rows = [*_by_cost(found, "cheapest"), *_by_cost(found, "dearest")]
    rows += [row for telling in found.telling for row in telling.top_rows]
    return Sheet.of(found.pictures, [*rows, *found.map.rows.tolist()])


def _tile_style(sheet: Sheet | None) -> str:
    if sheet is None:
        return ""
    rendering = "image-rendering:pixelated;" if sheet.small else ""
    size = f"background-size:{100 * sheet.n_columns}% {100 * sheet.n_lines}%"
    return f".tile{{background-image:url({sheet.url});{size};{rendering}aspect-ratio:{sheet.aspect:.4f}}}"


def _by_cost(found: Findings, which: str) -> list[int]:
    order = np.argsort(found.macs.executed.numpy(), kind="stable")
    chosen: list[int] = (order if which == "cheapest" else order[::-1])[:_N_SHOWN].tolist()
    return chosen


def _images(found: Findings, sheet: Sheet | None, which: str) -> str:
    rows = _by_cost(found, which)
    shares = [f"{100 * int(found.macs.executed[row]) / found.macs.dense:.1f} %" for row in rows]
    items = "\n".join(_item(found, sheet, row, share) for row, share in zip(rows, shares, strict=True))
    return f'<h3>The {which} images</h3><ul class="images">\n{items}\n</ul>'


def _item(found: Findings, sheet: Sheet | None, row: int, number: str) -> str:
    words = found.words(row)
    return f"<li>{_tile(found, sheet, row)}{number}<br>{html.escape(words)}</li>"


def _tile(found: Findings, sheet: Sheet | None, row: int) -> str:
    if sheet is None:
        return ""
    alt = html.escape(f"Image {found.paths.ids[row]}: {found.words(row)}")
    return f'<div class="tile" role="img" aria-label="{alt}" style="background-position:{sheet.position(row)}"></div>'


def _telling_filters(found: Findings, sheet: Sheet | None) -> str:
    return "\n".join(_telling_card(found, telling, sheet) for telling in found.telling)


def _telling_card(found: Findings, telling: TellingFilter, sheet: Sheet | None) -> str:
    information = found.information
    assert information is not None
    column = telling.column
    bits = f"{information.information[column]:.3f} bits"
    interval = f"95 % interval {information.low[column]:.3f} to {information.high[column]:.3f}"
    is_open = f"{100 * found.states.rate[column]:.0f} %"
    pictures = "".join(
        f"<li>{_tile(found, sheet, row)}{html.escape(found.words(row))}</li>" for row in telling.top_rows
    )
    return (
        f'<article class="card"><h3>{html.escape(telling.layer)}, filter {telling.number}</h3>'
        f'<p class="quiet">{bits} about the class ({interval}); open for {is_open} of all images</p>'
        f'{_rates(found, column)}<ul class="images">{pictures}</ul></article>'
    )


def _rates(found: Findings, column: int) -> str:
    """How often the filter is open in each class, as bars; of many classes those at both ends."""
    information = found.information
    assert information is not None
    rates = information.rates[:, column]
    shown = np.arange(len(rates))
    if len(rates) > _N_RATES:
        order = np.argsort(-rates, kind="stable")
        shown = np.concatenate([order[: _N_RATES // 2], order[-_N_RATES // 2 :]])
    rows = [
        f'<li><span class="name">{html.escape(found.name(int(information.values[c])))}</span><span class="track">'
        f'<span class="fill" style="width:{100 * rates[c]:.1f}%"></span></span><span class="number">'
        f"{100 * rates[c]:.0f} %</span></li>"
        for c in shown
    ]
    return f'<ul class="rates" aria-label="Share of the images of a class that open it">{"".join(rows)}</ul>'


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


def _check_target(path: Path) -> Path:
    target = path.resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"report: there is no directory {target.parent}")
    return target


def _write(target: Path, text: str) -> Path:
    descriptor, part = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part", text=True)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(part).chmod(0o644)
        Path(part).replace(target)
    finally:
        Path(part).unlink(missing_ok=True)
    return target
