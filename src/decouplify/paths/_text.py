"""How results are printed and turned into plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """An aligned text table; the first ``left`` columns are flush left, the others flush right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(aligned).rstrip()

    return "\n".join(line(row) for row in [header, *rows])


def percent(part: float, whole: float) -> str:
    """``part`` of ``whole`` in per cent, one decimal."""
    return f"{100 * part / whole:.1f} %"


def file_size(n_bytes: int) -> str:
    """A number of bytes with a unit that leaves one to three digits before the point."""
    size, units = float(n_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def plain(value: Any) -> Any:
    """The value as JSON can hold it: lists for arrays and tuples, ``None`` for what is not finite."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
