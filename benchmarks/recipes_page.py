"""The part of the page of results that compares recipes by small runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "recipes_section"]

RESULTS = Path("docs/results/recipes.jsonl")


HEAD = (
    "## Small runs that compare recipes",
    "",
    "<!-- Written by: python benchmarks/accuracy.py --report, from rows of benchmarks/recipes.py -->",
    "",
    "ResNet-14 on 16x16 images, 20,000 to learn from and 20,000 others to judge by, on one CPU core; all rows go on",
    "from the same start. Standard error of a top-1: 0.3 points; paths are those of 5,000 test images. *inner*: gates",
    "on the first convolution of each block, where the static twin is narrow; *at 0.2*: the network learns at the rate",
    'of the twins instead of half of it; *from importance*: `start="importance"` with hard gates throughout; *from',
    'prediction*: `start="prediction"` likewise; *a quarter*: of the MACs, instead of half; *features*: the outputs of',
    "the three stages are taught as well; *gates alone*: no weight of the network learns, and labels are not used;",
    '*from both*: filters closed for every image, weights fitted to them once, then `start="prediction"`.',
    "",
    "| row | epochs | seed | top-1 | MACs, M | silent / dynamic / energetic | distinct paths | kNN | other path |",
    "|---|---|---|---|---|---|---|---|---|",
)


def recipes_section(found: list[dict[str, Any]]) -> list[str]:
    """The table of the page of results."""
    return [*HEAD, *(_line(row) for row in found), "", "Rows: `docs/results/recipes.jsonl`."]


def _line(row: dict[str, Any]) -> str:
    cells = [row["row"], str(row["epochs"]), str(row["seed"]), f"{100 * row['top1']:.2f}"]
    cells.append(f"{row['dense_macs'] / row['mac_reduction'] / 1e6:.2f}")
    if row["form"] == "decoupled":
        states = " / ".join(f"{100 * row[state]:.0f} %" for state in ("silent", "dynamic", "energetic"))
        cells += [states, f"{row['distinct_paths']:,}", f"{row['path_knn']:.2f}"]
        cells += [f"{100 * row['top1_on_another_images_path']:.1f}"]
    else:
        cells += [""] * 4
    return "| " + " | ".join(cells) + " |"
