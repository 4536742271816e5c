"""The coverage page: what the sweep found, in the words of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["failures", "page", "summary"]

Row = dict[str, Any]


def failures(row: Row) -> list[str]:
    """What does not hold for a network."""
    if "error" in row:
        return [row["error"]]
    laws = ("same_plan", "eval_bitwise", "keys_kept", "train_equal", "unwrap_identical")
    found = [law for law in laws if row.get(law) is False]
    error = row.get("sparse_error", 0.0)
    # float64 excuses rounding; it runs the reference, not the engine, so it does not excuse what is plainly wrong.
    # Where the masked form itself is far from its own float64, more is rounding: in proportion to that, with some room.
    condition = row.get("masked_error", 0.0)
    allowed, allowed_float64 = max(1e-2, 10 * condition), max(1e-10, 100 * condition * 2**-29)
    if error > allowed or row.get("sparse_error_float64", error * 1e-5) > allowed_float64:
        found.append(f"sparse form off by {row['sparse_error']:.1e}")
    return found


def summary(row: Row) -> str:
    wrong = failures(row)
    if wrong:
        return "FAILED " + "; ".join(wrong)
    if not row["sites"]:
        return str(row["checked"])
    return f"{row['sites']} sites, {100 * row['gated_share']:.1f} % of MACs, {row['checked']}"


def page(rows: Sequence[Row], known: Iterable[str]) -> str:
    """The coverage page.

    Args:
        rows: One per network.
        known: All networks there are.
    """
    parts = [_head(rows, known), _refusals(rows), _failures(rows), _networks(rows), _nothing(rows)]
    return "\n".join(line for part in parts for line in part) + "\n"


def _head(rows: Sequence[Row], known: Iterable[str]) -> list[str]:
    wrapped, checked = _wrapped(rows), [r for r in rows if _is_checked(r)]
    n_light = sum(r["checked"] != "numbers" for r in checked)
    missing = set(known) - {r["name"] for r in rows}
    n_rest = len(wrapped) - len(checked)
    lines = [
        "# Coverage",
        "",
        "Which networks of torchvision and timm can be wrapped, and what was checked on each. Made by",
        "`python benchmarks/zoo.py --results docs/results/zoo.jsonl --report docs/coverage.md` from random weights;",
        "; ".join(_versions(rows)) + ".",
        "",
        "Every network was planned on its own image size. Where a plan has sites, the numbers were compared: eval",
        "output bitwise equal with gates open, training step equal, random gates leave zeros where they are predicted,",
        "masked and sparse form agree (1e-5, or 1e-10 in float64; in proportion to its own rounding where a network is",
        "chaotic, as listed below), unwrapping gives the original back. For speed that",
        "was done on 96 x 96 images where the network runs the same convolutions there, with two images of noise;",
        "networks that are built for one image size were built for a small one, where that has the same sites. Of",
        "heavy networks everything but the training step was compared, on one image, with controllers of a quarter of",
        "the hidden units (and, in the latest rows, heads for two classes).",
        "",
        f"- networks planned: {len(rows)}, not yet: {len(missing)}; with something to gate: {len(wrapped)}",
        f"- checked with numbers: {len(checked)}, {n_light} of them without the training step; plan only or pending: "
        f"{n_rest} (the table says why)",
        f"- failures: {sum(bool(failures(r)) for r in rows)}",
    ]
    return [*lines, *_means(wrapped, checked)]


def _means(wrapped: Sequence[Row], checked: Sequence[Row]) -> list[str]:
    lines = []
    pure = [r["gated_share"] for r in wrapped if r["conv_share"] > 0.9]
    if pure:
        mean = 100 * sum(pure) / len(pure)
        lines.append(
            f"- mean gated share over the {len(pure)} networks of convolutions (over 90 % of MACs): {mean:.1f} %; "
            f"at least 95 % gated: {sum(share >= 0.95 for share in pure)}"
        )
    if checked:
        errors = sorted(r["sparse_error"] for r in checked)
        lines.append(
            f"- relative error of the sparse form: median {errors[len(errors) // 2]:.1e}, largest {errors[-1]:.1e}"
        )
        exact = [r["sparse_error_float64"] for r in checked if "sparse_error_float64" in r]
        if exact:
            lines.append(f"- above 1e-5, repeated in float64: {len(exact)}, there at most {max(exact):.1e}")
        chaotic = [r for r in checked if r.get("masked_error", 0.0) > 1e-3]
        if chaotic:
            lines.append(
                "- chaotic with random weights, their masked form in float32 being more than 1e-3 from float64: "
                + ", ".join(f"{r['name']} ({r['masked_error']:.0e})" for r in chaotic)
            )
        untrained = sum(r.get("train_equal", True) is None for r in checked)
        lines.append(f"- training step not comparable, for the image is too small for batch norm: {untrained}")
    return lines


def _versions(rows: Sequence[Row]) -> list[str]:
    """Each combination of package versions and how many networks ran under it."""
    found = Counter(tuple(f"{k} {v}" for k, v in r["versions"].items()) for r in rows)
    return [f"{', '.join(versions)}: {n} networks" for versions, n in found.most_common()]


def _refusals(rows: Sequence[Row]) -> list[str]:
    reasons: Counter[str] = Counter()
    for row in rows:
        for reason, n in row.get("refused", {}).items():
            reasons["called several times per image" if reason.startswith("called ") else reason] += n
    lines = ["", "## Convolutions left alone, over all networks", "", "| reason | convolutions |", "| --- | --- |"]
    return lines + [f"| {reason} | {n} |" for reason, n in reasons.most_common()]


def _failures(rows: Sequence[Row]) -> list[str]:
    failed = sorted((r["name"], "; ".join(failures(r))[:200].replace("\n", " ")) for r in rows if failures(r))
    if not failed:
        return []
    return ["", "## Failures", "", "| network | what |", "| --- | --- |"] + [f"| {n} | {what} |" for n, what in failed]


def _networks(rows: Sequence[Row]) -> list[str]:
    lines = [
        "",
        "## Networks",
        "",
        "Size: of the images on which numbers were compared; in brackets: the network was built for that size. A star:",
        "linear layers on maps are gated as well (`linear_as_conv=True`). A dagger: no training step was compared.",
        "",
        "| network | GMACs | sites | gates | gated % | size | sparse error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    return lines + [_network(r) for r in sorted(_wrapped(rows), key=lambda r: r["name"])]


def _network(r: Row) -> str:
    size = f"({r['size'][-1]})" if r.get("built_for") else f"{r['size'][-1]}"
    numbers = f"{size} | {r['sparse_error']:.0e}" if _is_checked(r) else f"- | {r['checked']}"
    star = "*" if r["linear_as_conv"] else ""
    star += "†" if _is_checked(r) and r["checked"] != "numbers" else ""
    share = f"{100 * r['gated_share']:.1f}"
    return f"| {r['name']}{star} | {r['gmacs']:.2f} | {r['sites']} | {r['gates']} | {share} | {numbers} |"


def _nothing(rows: Sequence[Row]) -> list[str]:
    """Networks without a site, put together by the reason."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if "error" not in row and not row["sites"]:
            by_reason.setdefault(_reason(row), []).append(row["name"])
    lines = ["", "## Nothing to gate", "", "| what there is | networks |", "| --- | --- |"]
    ordered = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    return lines + [f"| {reason} | {len(names)}: {', '.join(sorted(names))} |" for reason, names in ordered]


def _reason(row: Row) -> str:
    if row.get("refused"):
        return "; ".join(sorted({"called several times" if r.startswith("called ") else r for r in row["refused"]}))
    return "no convolution"


def _is_checked(row: Row) -> bool:
    return str(row.get("checked")).startswith("numbers") and "sparse_error" in row


def _wrapped(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r.get("sites")]
