"""The page of results on CIFAR-10: finished rows, what each loss does, what is not finished, and what the paper has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from statistics import fmean
from typing import Any

from label_free import RESULTS as LABEL_FREE
from label_free import read, section
from recipes_page import RESULTS as RECIPES
from recipes_page import recipes_section

__all__ = ["page"]

Result = dict[str, Any]


def page(found: list[Result], missing: list[str]) -> str:
    """All of it as Markdown.

    Args:
        found: Finished rows.
        missing: Names of the others.
    """
    parts = [result for result in found if is_part_of_ablation(result)]
    whole = sorted((r for r in found if not is_part_of_ablation(r)), key=_place)
    lines = [*HEAD, *map(_line, whole), "", *_means(whole), *NOTES]
    todo = "Not run yet: " + ", ".join(f"`{name}`" for name in missing) + "."
    small = [*recipes_section(read(RECIPES)), "", *section(read(LABEL_FREE))]
    return "\n".join([*lines, *_notes(found), "", todo, "", *_ablation(parts), "", *small])


def is_part_of_ablation(result: Result) -> bool:
    """Whether a row belongs to the table of what each loss does."""
    return result.get("images") is not None or "kl" in result["changes"]


def _place(result: Result) -> tuple[int, int, int]:
    """Networks as they come in the paper's tables, and the forms of a seed side by side."""
    return NETWORKS.index(result["network"]), result["seed"], FORMS.index(result["form"])


def _means(found: list[Result]) -> Iterator[str]:
    """A sentence for each network of which dense, static and decoupled forms were trained more than once."""
    for network in dict.fromkeys(result["network"] for result in found):
        by_form = {form: [r["top1"] for r in found if (r["network"], r["form"]) == (network, form)] for form in FORMS}
        repeated = {form: accuracies for form, accuracies in by_form.items() if len(accuracies) > 1}
        if repeated.keys() >= set(FORMS[:3]):
            means = ", ".join(f"{form} {100 * fmean(accuracies):.2f}" for form, accuracies in repeated.items())
            yield f"Means over seeds, {network}: {means}."


def _notes(found: list[Result]) -> list[str]:
    """What rows have to say, once for all rows that say the same."""
    rows: dict[str, list[str]] = {}
    for result in found:
        if "note" in result:
            rows.setdefault(result["note"], []).append(f"`{result['row']}`")
    return [f"* {', '.join(names)}: {note}" for note, names in rows.items()]


NETWORKS = ("resnet56", "resnet20", "vgg19", "googlenet")
FORMS = ("dense", "static", "decoupled", "inner")
HEAD = (
    "# Results on CIFAR-10",
    "",
    "<!-- Written by: python benchmarks/accuracy.py --report -->",
    "",
    "Top-1 on 5,000 test images stored as JPEGs of quality 75, which costs 3 to 4 points against the usual PNGs. All",
    "rows of a network start from the same dense weights, where no note names others, and train equally long; *static*",
    "is the twin without gates that has as many MACs for good, taught by the same teacher. *Other path*: every image",
    "on the path of another one. kNN sees paths alone, 10 nearest of the other test images. Standard error of a top-1:",
    "0.4 points.",
    "",
    "| row | epochs | top-1 | MACs, M | reduction | silent / dynamic / energetic | distinct paths | kNN | other path "
    "| training, s |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
NOTES = (
    "",
    "The paper (ResNet-56, 200 epochs, PNGs): 93.17 dense, 93.08 at 63 M of 125 M MACs.",
    "",
    "Every row with its whole recipe and command: `docs/results/accuracy.jsonl`.",
    "",
)


def _line(result: dict[str, Any]) -> str:
    macs = result["dense_macs"] / result["mac_reduction"] / 1e6
    cells = [result["row"], result["epochs"], f"{100 * result['top1']:.2f}", f"{macs:.1f}"]
    if result["distinct_paths"] is None:
        cells += ["", "", "", "", ""]
    else:
        shares = " / ".join(f"{100 * result[state]:.0f} %" for state in ("silent", "dynamic", "energetic"))
        paths = f"{result['distinct_paths']:,} of {result['n_images']:,}"
        other = f"{100 * result['top1_on_another_images_path']:.2f}"
        cells += [f"{result['mac_reduction']:.2f}x", shares, paths, f"{result['path_knn']:.2f}", other]
    return "| " + " | ".join(map(str, [*cells, round(result["train_seconds"])])) + " |"


TERMS = ("none", "sparse", "sparse + KL", "sparse + MI", "sparse + KL + MI")
ABLATION_HEAD = (
    "## What each loss does",
    "",
    "Runs that repeat Table 7 of the paper. ResNet-20: small ones, from published weights, 5,000 training images,",
    "8 epochs on one CPU core, lambda_m 0.3, lambda_k 1. ResNet-56: 20 epochs on all images, lambda_m 0.1, lambda_k 1.",
    "Otherwise as above. Compare only rows of one network.",
    "",
    "| network | input norm | losses | seeds | top-1 | reduction | silent / dynamic / energetic | kNN | other path |",
    "|---|---|---|---|---|---|---|---|---|",
)
ABLATION_NOTES = (
    "",
    "As in the paper, the sparse term alone brings the MACs down, the KL term leaves fewer filters dynamic, and the MI",
    "term makes paths tell the class: kNN rises, and another image's path costs more. In so few steps the input norm",
    "decides more than any loss how many filters are dynamic. Two runs of a row differ by up to 1.3 points of top-1,",
    "2.5 points on another image's path and 4 points of dynamic filters.",
    "",
    "On ResNet-56 these large weights cost 3.4 points of top-1 against the sparse term alone, and make paths say more",
    "about the class; the usual recipe takes lambda_m 0.01 and lambda_k 0.01.",
    "",
    "The paper (ResNet-56, silent / dynamic / energetic): controllers only 13 / 0 / 86 %, with the sparse term",
    "60 / 0 / 40 %, sparse + KL 15 / 0 / 85 %, sparse + MI 33 / 29 / 38 %, all 35 / 30 / 34 %.",
)


def _ablation(found: list[Result]) -> Iterator[str]:
    """A table like Table 7 of the paper, means over seeds."""
    yield from ABLATION_HEAD
    for network, input_norm, terms in product(("resnet20", "resnet56"), (False, True), TERMS):
        rows = [row for row in found if (row["network"], _has_norm(row), _terms(row)) == (network, input_norm, terms)]
        if rows:
            yield _ablation_line(network, "yes" if input_norm else "no", terms, rows)
    yield from ABLATION_NOTES


def _has_norm(row: Result) -> bool:
    return bool(row["wrapping"].get("input_norm", True))


def _terms(row: Result) -> str:
    """What is left of the loss beside the task's."""
    recipe = row["recipe"]
    weights = {"sparse": recipe["target"] is not None, "KL": recipe["kl"] > 0, "MI": recipe["mutual_information"] > 0}
    return " + ".join(term for term, is_used in weights.items() if is_used) or "none"


def _ablation_line(network: str, input_norm: str, terms: str, rows: list[Result]) -> str:
    def mean(key: str) -> float:
        return fmean(row[key] for row in rows)

    states = " / ".join(f"{100 * mean(state):.0f} %" for state in ("silent", "dynamic", "energetic"))
    top1, other = (f"{100 * mean(key):.1f}" for key in ("top1", "top1_on_another_images_path"))
    cells = (
        network,
        input_norm,
        terms,
        len(rows),
        top1,
        f"{mean('mac_reduction'):.2f}x",
        states,
        f"{mean('path_knn'):.2f}",
        other,
    )
    return "| " + " | ".join(map(str, cells)) + " |"
