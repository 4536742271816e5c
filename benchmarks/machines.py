"""Results of several machines: each has a file of its own beside the first one's, named after it and a dash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from decouplify.bench.result import Machine


def name_of(machine: Machine) -> str:
    return f"{machine.cpu}, {machine.simd}, {machine.n_cores} cores"


def here() -> str:
    """This machine."""
    return name_of(Machine.here())


def other_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))


def tables(path: Path, head: str, cells: Callable[[dict[str, Any]], Iterable[str]]) -> list[str]:
    """One table per file of JSON lines, under the name of its machine; nothing where there is no file."""
    lines = []
    for file in (path, *other_files(path)):
        if not file.exists():
            continue
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        lines += [f"{rows[0]['machine']}:", "", head, "| --- " * (head.count("|") - 1) + "|"]
        lines += [f"| {' | '.join(cells(row))} |" for row in rows]
        lines.append("")
    return lines
