"""A monitor for a running network: is this path like any that was seen for the predicted class?

In the manner of runtime monitors of neuron activation patterns (Cheng et al. 2019, arXiv:1809.06573), with paths in
place of patterns and a false-positive rate that holds by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify.adversarial.pixels import device_of
from decouplify.data import stratified_split
from decouplify.decoupling import decoupling_of
from decouplify.modes import eval_mode
from decouplify.paths import PathSet
from decouplify.paths._distance import hamming_block

__all__ = ["PathMonitor", "Verdicts"]


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What a monitor says about N images.

    Attributes:
        preds: Predicted class, shape (N,).
        scores: Distance to the nearest known path of that class, as a multiple of what is typical for the class, shape
            (N,); infinite for classes without a known path.
        p_values: Share of calibration images that were at least as unusual, shape (N,), in (0, 1].
        flagged: Where the p-value is at most the false-positive rate, shape (N,).
    """

    preds: NDArray[np.int64]
    scores: NDArray[np.float64]
    p_values: NDArray[np.float64]
    flagged: NDArray[np.bool_]


class PathMonitor:
    """Flags images whose path is unlike any seen for the predicted class.

    One half of the given paths is remembered, the other half says how far from those ordinary images are. Of ordinary
    images at most ``false_positive_rate`` are flagged on average (split conformal prediction), whatever the network;
    how many others are found depends on how much their paths differ, which is a matter of measurement. An attack that
    knows the monitor can avoid it.

    A verdict needs the path and the predicted class, which every forward gives, and the distances to the remembered
    paths of one class.

    Args:
        paths: Paths of ordinary images, which the network was better not trained on, as ``decouplify.record`` returns.
        model: A wrapped model, or a ``PixelModel`` of one, for ``score(images)`` and ``last``.
        false_positive_rate: Share of ordinary images that may be flagged, in (0, 1).
        max_per_class: Remember so many paths per class at most.
        seed: Of the choice of what is remembered.

    Raises:
        ValueError: If the rate is not in (0, 1), there are too few paths for it, or they have no predictions.
    """

    def __init__(
        self,
        paths: PathSet,
        model: nn.Module | None = None,
        *,
        false_positive_rate: float = 0.05,
        max_per_class: int = 500,
        seed: int = 0,
    ) -> None:
        if not 0 < false_positive_rate < 1:
            raise ValueError(f"PathMonitor: false_positive_rate is {false_positive_rate}, wanted between 0 and 1")
        preds = paths.groups("preds")
        n_calibration = len(paths) // 2
        # With fewer, no p-value could be as small as the rate, and nothing would ever be flagged.
        if 1 / (n_calibration + 1) > false_positive_rate:
            raise ValueError(
                f"PathMonitor: {len(paths)} paths given, at least {2 * int(np.ceil(1 / false_positive_rate))} wanted "
                f"for a false-positive rate of {false_positive_rate:g}"
            )
        self.model, self.false_positive_rate, self.n_filters = model, false_positive_rate, paths.n_filters
        remembered, calibration = stratified_split(preds, n_calibration, seed)
        self._known = {
            int(c): paths.unpack(rows=remembered[preds[remembered] == c][:max_per_class]) for c in np.unique(preds)
        }
        self._typical = self._typical_distances()
        self._calibration = np.sort(self._scores(paths.unpack(rows=calibration), preds[calibration]))

    def score(self, images: Tensor | PathSet) -> Verdicts:
        """Verdicts on images, or on paths that were recorded before.

        Args:
            images: What the model reads, shape (N, C, H, W), as many as one forward can take; or a path set with the
                same filters.

        Raises:
            ValueError: If images are given and the monitor has no model, or the filters are others.
        """
        if isinstance(images, PathSet):
            return self.judge(images.unpack(), images.groups("preds"))
        model = self._model("score(images)")
        with eval_mode(model), torch.no_grad():
            return self.last(model(images.to(device_of(model))))

    def last(self, logits: Tensor) -> Verdicts:
        """Verdicts on the images of the model's last forward in this thread, which returned these logits.

        Nothing is computed again. The model must be in eval mode.

        Raises:
            RuntimeError: If there was no forward.
            ValueError: If the monitor has no model.
        """
        path = decoupling_of(self._model("last(logits)"), "PathMonitor").path()
        return self.judge(path.detach().cpu().numpy() > 0.5, logits.detach().argmax(1).cpu().numpy())

    def judge(self, paths: NDArray[np.bool_], preds: NDArray[np.int64]) -> Verdicts:
        """Verdicts on paths, shape (N, F), of images taken for the classes ``preds``, shape (N,).

        Raises:
            ValueError: If there are other filters than the monitor knows.
        """
        if paths.ndim != 2 or paths.shape[1] != self.n_filters:
            raise ValueError(f"PathMonitor: paths of shape {paths.shape} given, (N, {self.n_filters}) wanted")
        scores = self._scores(paths, preds)
        n_as_unusual = len(self._calibration) - np.searchsorted(self._calibration, scores, side="left")
        p_values = (1 + n_as_unusual) / (1 + len(self._calibration))
        return Verdicts(preds, scores, p_values, p_values <= self.false_positive_rate)

    def _model(self, what: str) -> nn.Module:
        if self.model is None:
            raise ValueError(f"PathMonitor.{what} needs the model; give it: PathMonitor(paths, model)")
        return self.model

    def _typical_distances(self) -> dict[int, float]:
        """Median distance of a class's remembered paths to their nearest neighbour among them."""
        medians = {}
        for c, known in self._known.items():
            if len(known) > 1:
                distances = hamming_block(known, known)
                np.fill_diagonal(distances, np.iinfo(np.int32).max)
                medians[c] = max(1.0, float(np.median(distances.min(1))))
        overall = float(np.median(list(medians.values()))) if medians else 1.0
        return {c: medians.get(c, overall) for c in self._known}

    def _scores(self, paths: NDArray[np.bool_], preds: NDArray[np.int64]) -> NDArray[np.float64]:
        scores = np.full(len(paths), np.inf)
        for c in np.unique(preds):
            rows = preds == c
            if int(c) in self._known:
                scores[rows] = hamming_block(paths[rows], self._known[int(c)]).min(1) / self._typical[int(c)]
        return scores
