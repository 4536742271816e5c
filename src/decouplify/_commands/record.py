"""``decouplify record``: the paths of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import decouplify
from decouplify._commands.app import app
from decouplify._commands.opening import device_of, open_checkpoint
from decouplify._commands.options import CheckpointFile, Data, Device, Json, Part, Split
from decouplify._commands.showing import emit, numbers_of, show, show_facts
from decouplify.paths import FilterStates, macs_of_paths
from decouplify.reporting import headline_facts


@app.command()
def record(
    checkpoint: CheckpointFile,
    data: Data,
    out: Annotated[Path, typer.Option(help="Directory for the path set.", show_default=False)],
    split: Part = Split.test,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Record the calculation path of every image and print what the paths say."""
    opened = open_checkpoint(checkpoint, data, device_of(device))
    paths = decouplify.record(opened.model, opened.images.loader(split.value), out=out)
    macs = macs_of_paths(opened.model, paths)
    if as_json:
        origin = {"checkpoint": str(checkpoint), "data": data, "split": split.value, "out": str(out)}
        emit(origin | numbers_of(paths, macs))
        return
    _show_states(paths.filter_states())
    show_facts(f"{opened.extra['model']} on {data}, {split.value} images", headline_facts(paths, macs))
    show(f"path set: {out}")


def _show_states(states: FilterStates) -> None:
    table = Table("layer", title="Filter states", title_justify="left")
    for name in ("filters", "dynamic", "silent", "energetic"):
        table.add_column(name, justify="right")
    for layer in states.layers:
        counts = (layer.n_filters, layer.n_dynamic, layer.n_silent, layer.n_energetic)
        table.add_row(layer.name, *map(str, counts))
    show(table)
