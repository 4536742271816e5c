"""The table of a detection experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from decouplify._optional import new_axes, write_title
from decouplify.adversarial.observations import OF_PATHS
from decouplify.adversarial.protocol import Score
from decouplify.paths._results import Result
from decouplify.paths._text import plain, text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DetectionResult", "DetectionRow"]


@dataclass(frozen=True)
class DetectionRow:
    """One comparison: what detectors saw, what they were trained on, and what they were tested on.

    Attributes:
        features: What was seen of an image: ``"paths"``, ``"margins"``, ``"softmax"``, ...
        trained_on: What the clean images were told from in training.
        tested_on: What they are told from in testing.
        n_attacked: Clean images that were classified correctly and therefore attacked.
        n_success: On how many of them the attack (or what stands for it) had success; only these count.
        scores: One per detector and number of training images.
        note: Which part of the images, empty if all of them.
    """

    features: str
    trained_on: str
    tested_on: str
    n_attacked: int
    n_success: int
    scores: tuple[Score, ...]
    note: str = ""

    @property
    def name(self) -> str:
        """The row in words."""
        how = (
            self.tested_on if self.trained_on == self.tested_on else f"{self.tested_on} (trained on {self.trained_on})"
        )
        return f"{self.features}: {how}" + (f" [{self.note}]" if self.note else "")

    def score(self, detector: str, n_per_class: int) -> Score:
        """The score of one detector with one number of training images.

        Raises:
            KeyError: If there is none.
        """
        for score in self.scores:
            if (score.detector, score.n_per_class) == (detector, n_per_class):
                return score
        raise KeyError(f"{self.name} has no score for {detector!r} with {n_per_class} images per class")


@dataclass(frozen=True, repr=False)
class DetectionResult(Result):
    """All rows of a detection experiment, and what they were computed on.

    Attributes:
        attack: Name of the attack.
        n_images: Images given, without repetitions.
        n_correct: Images that the model classifies correctly; only these are attacked.
        rows: The rows; the first is paths against the attack.
        skipped: Rows that could not be computed, by name, with the reason.
        facts: Model, settings, seconds per stage.
    """

    attack: str
    n_images: int
    n_correct: int
    rows: tuple[DetectionRow, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def row(self, name: str) -> DetectionRow:
        """The row of that name, as the table shows it.

        Raises:
            KeyError: If there is none, with the names there are.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {'; '.join(row.name for row in self.rows)}")

    def kind(self, row: DetectionRow) -> str:
        """``"attack"``: paths or margins against it; ``"baseline"``: something else against it; else ``"control"``."""
        if not row.trained_on == row.tested_on == self.attack:
            return "control"
        return "attack" if row.features in OF_PATHS else "baseline"

    def beaten_by(self, detector: str, n_per_class: int, features: str | None = None) -> list[DetectionRow]:
        """Baselines with a higher AUC than paths for the same detector, number of training images, and images.

        Args:
            detector: Name of the detector.
            n_per_class: Number of training images.
            features: ``"paths"`` or ``"margins"``; those of the first row if not given.
        """
        features = self.rows[0].features if features is None else features
        better = []
        for row in self.rows:
            if self.kind(row) == "baseline":
                ours = self.row(replace(row, features=features).name)
                if row.score(detector, n_per_class).auc_mean > ours.score(detector, n_per_class).auc_mean:
                    better.append(row)
        return better

    def table(self, metric: str = "auc") -> str:
        """The rows in the shape of the paper's Table 6: per detector, one column per number of training images.

        Args:
            metric: ``"auc"``, ``"auc_hard"`` or ``"tpr"``, see ``Score``.
        """
        table = text_table(self._header(), self._cells(metric))
        return "\n".join([*self._headlines(metric), table, *self.remarks()])

    def remarks(self) -> list[str]:
        """What is not as it was asked for, a line each."""
        lines = [f"left out: {name}: {reason}" for name, reason in self.skipped.items()]
        for n, n_train in {score.n_per_class: score.n_train for score in self.rows[0].scores}.items():
            wanted = n * int(self.facts.get("n_classes", 0))
            if n_train < wanted:
                lines.append(f"{n} per class: {n_train} instead of {wanted} training images, classes had not enough")
        return lines

    def to_markdown(self, metric: str = "auc") -> str:
        """The means of the same table in Markdown."""
        header = self._header()
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *self._cells(metric, deviations=False)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def _headlines(self, metric: str) -> list[str]:
        names = {"auc": "AUC", "auc_hard": "AUC of yes/no answers", "tpr": "share found at 5 % false alarms"}
        return [
            f"{names[metric]} (mean and deviation), attack {self.attack}: {self.n_correct} of {self.n_images} images "
            f"are classified correctly and attacked, with success on {self.rows[0].n_success}",
            "Columns: detector and training images per class. Only successful attacks count; no image is in both "
            "training and test.",
        ]

    def _header(self) -> list[str]:
        columns = [f"{_SHORT.get(s.detector, s.detector)} {s.n_per_class}" for s in self.rows[0].scores]
        return ["features: tested on", "success", *columns]

    def _cells(self, metric: str, deviations: bool = True) -> list[list[str]]:
        endings = ("_mean", "_std") if deviations else ("_mean",)
        return [
            [row.name, f"{row.n_success}/{row.n_attacked}"]
            + [" ".join(f"{getattr(score, metric + ending):.3f}" for ending in endings) for score in row.scores]
            for row in self.rows
        ]

    def summary(self) -> str:
        """The table of AUCs."""
        return self.table()

    def plot(self, ax: Axes | None = None) -> Axes:
        """AUC of every row and detector for the largest number of training images, with deviations as bars.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        ax = new_axes(8, 1.5 + 0.3 * len(self.rows)) if ax is None else ax
        most = max(score.n_per_class for score in self.rows[0].scores)
        detectors = [score.detector for score in self.rows[0].scores if score.n_per_class == most]
        places = np.arange(len(self.rows))[::-1]
        for i, detector in enumerate(detectors):
            scores = [row.score(detector, most) for row in self.rows]
            offset = 0.15 * ((len(detectors) - 1) / 2 - i)
            ax.errorbar(
                [s.auc_mean for s in scores],
                places + offset,
                xerr=[s.auc_std for s in scores],
                fmt="o",
                ms=4,
                label=_SHORT.get(detector, detector),
            )
        ax.set_yticks(places[::-1], [row.name for row in reversed(self.rows)])
        ax.axvline(0.5, color="0.7", lw=1, zorder=0)
        ax.set_xlabel(f"AUC, {most} training images per class")
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        ax.spines[["top", "right"]].set_visible(False)
        write_title(ax, f"Detection of {self.attack}", f"{self.rows[0].n_success} successful attacks")
        return ax

    def __repr__(self) -> str:
        return f"DetectionResult({self.attack}: {len(self.rows)} rows, {self.rows[0].n_success} successful attacks)"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        rows = [{"kind": self.kind(row), "name": row.name, **asdict(row)} for row in self.rows]
        return plain(
            {
                "attack": self.attack,
                "n_images": self.n_images,
                "n_correct": self.n_correct,
                "n_success": self.rows[0].n_success,
                "skipped": dict(self.skipped),
                "facts": dict(self.facts),
                "rows": rows,
            }
        )

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> DetectionResult:
        """What ``to_dict`` described."""
        rows = tuple(_row(row) for row in described["rows"])
        rest = {name: described[name] for name in ("attack", "n_images", "n_correct", "skipped", "facts")}
        return cls(rows=rows, **rest)


_SHORT = {"random_forest": "forest", "adaboost": "AdaBoost", "gradient_boosting": "boosting", "prototype": "prototype"}


def _row(described: Mapping[str, Any]) -> DetectionRow:
    fields = {name: value for name, value in described.items() if name not in ("kind", "name", "scores")}
    scores: Sequence[Mapping[str, Any]] = described["scores"]
    return DetectionRow(**fields, scores=tuple(Score(**score) for score in scores))
