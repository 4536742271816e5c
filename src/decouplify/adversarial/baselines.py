"""What one could look at instead of paths, on the same images and with the same detectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy, nn

from decouplify.adversarial.experiment import Attacked, Experiment, Mask, seen_as
from decouplify.adversarial.observations import OF_ONE_FORWARD, Features, Observation, Original
from decouplify.adversarial.protocol import Seen
from decouplify.paths._distance import stratified_rows

__all__ = ["BASELINES", "compare_original", "compare_views"]

BASELINES = (*OF_ONE_FORWARD, "pseudo-paths", "critical paths")


class _Looks(NamedTuple):
    """Features of the clean images, of their attacked twins, and of the clean ones seen again; (N, D) each."""

    clean: Features
    attacked: Features
    again: Features


def compare_views(experiment: Experiment, main: Attacked, placebo: Observation, names: Sequence[str]) -> None:
    """Rows for what the forwards so far have shown."""
    for name in (name for name in names if name in OF_ONE_FORWARD):
        look = OF_ONE_FORWARD[name]
        looks = _Looks(look(experiment.clean), look(main.seen), look(placebo))
        _compare_baseline(experiment, name, main, looks, main.success)


def compare_original(
    experiment: Experiment, main: Attacked, original: nn.Module | None, names: Sequence[str], n_critical: int
) -> None:
    """Rows for what the network shows that there was before wrapping."""
    if not {"pseudo-paths", "critical paths"} & set(names):
        return
    source = Original(experiment.model, original, experiment.images.pixels, experiment.batch_size)
    if "pseudo-paths" in names:
        with experiment.stage("pseudo-paths"):
            looks = _look(experiment, source.pseudo, main, np.arange(len(experiment)))
        _compare_baseline(experiment, "pseudo-paths", main, looks, main.success)
    if "critical paths" in names:
        _compare_critical(experiment, main, source, n_critical)


def _compare_critical(experiment: Experiment, main: Attacked, source: Original, n_images: int) -> None:
    """Critical paths of some images, and paths of the same images."""
    successes = np.flatnonzero(main.success)
    part = successes[stratified_rows(experiment.labels[successes], n_images, experiment.protocol.seed)]
    counted = np.isin(np.arange(len(experiment)), part)
    with experiment.stage("critical paths"):
        looks = _look(experiment, source.critical, main, part)
    note = "" if len(part) == len(successes) else f"{len(part)} images"
    if note:
        for view in experiment.views:
            attacked = seen_as(view, main.seen)
            training = (seen_as(view, experiment.clean), attacked, counted)
            experiment.compare(view, main.name, training, {main.name: (attacked, counted)}, note)
    _compare_baseline(experiment, "critical paths", main, looks, counted, note)


def _look(experiment: Experiment, look: Callable[[Tensor], Features], main: Attacked, rows: NDArray[np.intp]) -> _Looks:
    """Look at some images, at their attacked twins, and at the former again in the opposite order.

    Other images get zeros; nobody counts them.
    """
    index = from_numpy(rows)
    clean = experiment.images.pixels[index]
    found = [look(clean), look(main.crafted.images[index]), look(clean.flip(0))[::-1]]
    whole = _Looks(*(np.zeros((len(experiment), features.shape[1]), np.float32) for features in found))
    for features, part in zip(whole, found, strict=True):
        features[rows] = part
    return whole


def _compare_baseline(
    experiment: Experiment, name: str, main: Attacked, looks: _Looks, counted: Mask, note: str = ""
) -> None:
    """The attack and a placebo, seen through a baseline's features."""
    clean = Seen(looks.clean, experiment.clean.preds)
    attacked, again = Seen(looks.attacked, main.seen.preds), Seen(looks.again, experiment.clean.preds)
    for what, seen in ((main.name, attacked), ("placebo", again)):
        experiment.compare(name, what, (clean, seen, counted), {what: (seen, counted)}, note)
