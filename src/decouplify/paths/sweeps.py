"""Several trainings of one network side by side: what each loss term does to accuracy, work and filter states.

Source: Li et al., Interpretable Neural Network Decoupling, ECCV 2020, Table 7 and Figure 12.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from decouplify._optional import new_axes, write_title
from decouplify.paths._results import Result
from decouplify.paths._text import percent, plain, text_table
from decouplify.paths.costs import macs_of_paths
from decouplify.paths.recording import record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Sweep", "SweepRun", "sweep"]

_COLORS = {"dynamic": "#e08214", "silent": "#8a93a0", "energetic": "#35587f"}


@dataclass(frozen=True)
class SweepRun:
    """One trained network.

    Attributes:
        settings: What was set, by name: loss weights, a name, anything.
        accuracy: Share of the images classified correctly, in [0, 1]; NaN without labels.
        macs: Multiply-accumulates executed, mean over images, controllers included.
        dense_macs: Those of the original network.
        dynamic: Share of the filters open for some images, in [0, 1].
        silent: Share open for none.
        energetic: Share open for all.
        class_accuracy: Class accuracy of the 10 nearest paths, in [0, 1]; NaN if it is not defined.
    """

    settings: Mapping[str, Any]
    accuracy: float
    macs: float
    dense_macs: int
    dynamic: float
    silent: float
    energetic: float
    class_accuracy: float


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Result):
    """Trained networks side by side, all on the same images.

    Attributes:
        runs: In the order given.
        n_images: Number of images; states of filters depend on it.
    """

    runs: tuple[SweepRun, ...]
    n_images: int

    def headline(self) -> str:
        """One line: how many runs, on how many images."""
        return f"{len(self.runs)} runs, filter states on {self.n_images} images"

    def summary(self) -> str:
        """A table with a row per run, the columns of the paper's Table 7 and the class accuracy of paths."""
        names = list(dict.fromkeys(name for run in self.runs for name in run.settings))
        header = [*names, "top-1", "MACs", "reduction", "dynamic", "silent", "energetic", "10 nearest paths"]
        rows = [
            [
                *(str(run.settings.get(name, "")) for name in names),
                _share(run.accuracy),
                f"{run.macs / 1e6:.1f} M",
                f"{run.dense_macs / run.macs:.2f}x",
                *(percent(share, 1) for share in (run.dynamic, run.silent, run.energetic)),
                _share(run.class_accuracy),
            ]
            for run in self.runs
        ]
        return f"{text_table(header, rows, left=len(names))}\n{self.headline()}"

    def __repr__(self) -> str:
        return f"Sweep({self.headline()})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        return {"n_images": self.n_images, "runs": [plain(vars(run)) for run in self.runs]}

    def plot(self, ax: Axes | None = None, *, over: str | None = None) -> Axes:
        """States of the filters: lines over one setting (Figure 12), or a stacked bar per run.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
            over: A setting with numbers. Runs count that agree with most others in all their other settings, so that a
                star of sweeps around one point can be given as it is.

        Raises:
            ValueError: If fewer than two runs have different numbers there.
        """
        ax = new_axes(6.5, 4.0) if ax is None else ax
        if over is None:
            self._draw_bars(ax)
        else:
            self._draw_lines(ax, over)
        ax.set_ylabel("filters, %")
        ax.set_ylim(0, 100)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        write_title(ax, f"Filter states{'' if over is None else ' over ' + over}", self.headline())
        return ax

    def _draw_bars(self, ax: Axes) -> None:
        floor = np.zeros(len(self.runs))
        for state, color in reversed(_COLORS.items()):
            shares = np.array([100 * getattr(run, state) for run in self.runs])
            ax.bar(range(len(self.runs)), shares, bottom=floor, color=color, label=state)
            floor += shares
        names = ["\n".join(f"{key} {value}" for key, value in run.settings.items()) for run in self.runs]
        ax.set_xticks(range(len(self.runs)), names, fontsize=8)

    def _draw_lines(self, ax: Axes, over: str) -> None:
        runs = sorted(self._along(over), key=lambda run: run.settings[over])
        values = [float(run.settings[over]) for run in runs]
        for state, color in _COLORS.items():
            ax.plot(values, [100 * getattr(run, state) for run in runs], "o-", color=color, label=state)
        positive = [value for value in values if value > 0]
        if positive and max(positive) > 10 * min(positive):
            ax.set_xscale("symlog", linthresh=min(positive))
        ax.set_xlabel(over)

    def _along(self, over: str) -> list[SweepRun]:
        """The runs of the longest sweep over one setting."""

        def others(run: SweepRun) -> tuple[tuple[str, str], ...]:
            return tuple(sorted((k, str(v)) for k, v in run.settings.items() if k not in (over, "name")))

        having = [run for run in self.runs if isinstance(run.settings.get(over), int | float)]
        common = Counter(others(run) for run in having).most_common(1)
        chosen = [run for run in having if common and others(run) == common[0][0]]
        if len({run.settings[over] for run in chosen}) < 2:
            raise ValueError(f"plot: over={over!r}, wanted a setting with at least two different numbers, others equal")
        return chosen


def sweep(
    runs: Iterable[tuple[Mapping[str, Any], nn.Module]], loader: Iterable[Any], *, max_images: int | None = None
) -> Sweep:
    """Record every network on the same images and put the numbers side by side.

    Args:
        runs: Settings and wrapped model of each run; a generator that loads one checkpoint after the other keeps a
            single network in memory.
        loader: As for ``decouplify.record``; it is read once per run.
        max_images: Stop after this many images.

    Raises:
        ValueError: If there are no runs.
    """
    measured = [_measure(settings, model, loader, max_images) for settings, model in runs]
    if not measured:
        raise ValueError("sweep: got no runs, wanted pairs of settings and a wrapped model")
    return Sweep(tuple(run for run, _ in measured), measured[0][1])


def _measure(
    settings: Mapping[str, Any], model: nn.Module, loader: Iterable[Any], max_images: int | None
) -> tuple[SweepRun, int]:
    paths = record(model, loader, max_images=max_images)
    macs = macs_of_paths(model, paths)
    totals = paths.filter_states().totals
    labelled = paths.labels is not None
    run = SweepRun(
        settings=dict(settings),
        accuracy=float((paths.preds == paths.labels).mean()) if labelled and (paths.preds >= 0).all() else float("nan"),
        macs=float(macs.executed.double().mean()),
        dense_macs=macs.dense,
        class_accuracy=paths.knn_accuracy(10) if labelled and len(paths) > 10 else float("nan"),
        **{state: totals[state] / paths.n_filters for state in _COLORS},
    )
    return run, len(paths)


def _share(value: float) -> str:
    return "-" if np.isnan(value) else percent(value, 1)
