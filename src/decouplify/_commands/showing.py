"""What commands print: tables for people, one JSON document for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from decouplify.macs import MacCount
from decouplify.paths import PathSet
from decouplify.paths._text import plain
from decouplify.reporting import Fact

__all__ = ["emit", "numbers_of", "show", "show_facts"]

_NEIGHBOURS = 10
_PIPED_WIDTH = 160  # columns where no terminal says how many it has


def numbers_of(paths: PathSet, macs: MacCount) -> dict[str, Any]:
    """What recorded paths say, as plain data."""
    states = paths.filter_states()
    assert paths.labels is not None
    k = min(_NEIGHBOURS, len(paths) - 1)
    executed = macs.executed.double()
    return {
        "n_images": len(paths),
        "accuracy": float((paths.preds == paths.labels).mean()),
        "macs": {
            "dense": macs.dense,
            "executed_mean": float(executed.mean()),
            "executed_min": int(macs.executed.min()),
            "executed_max": int(macs.executed.max()),
            "controllers": macs.controllers,
            "reduction": macs.reduction,
        },
        "filters": {"n_filters": states.n_filters, "keep_ratio": float(states.rate.mean()), **states.totals},
        "distinct_paths": paths.distinct(),
        "knn": {"k": k, "accuracy": paths.knn_accuracy(k) if k else None},
        "layers": [vars(layer) for layer in states.layers],
    }


def show_facts(title: str, facts: list[Fact]) -> None:
    table = Table("", "", "", title=title, title_justify="left", show_header=False)
    for fact in facts:
        table.add_row(*fact)
    show(table)


def show(what: Table | str) -> None:
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    console.print(what, soft_wrap=isinstance(what, str))


def emit(document: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(plain(dict(document)), indent=2))
