"""Detectors: from what is seen of an image to how adversarial it looks.

The three of the paper are scikit-learn's; the fourth only measures distances to prototypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from decouplify._optional import import_optional

__all__ = ["DETECTORS", "Detector", "PrototypeDetector", "SklearnDetector", "detector_named"]

Features = NDArray[np.float32]


class Detector(Protocol):
    """Tells clean from adversarial images, given what is seen of them and the classes they are taken for."""

    def fit(self, features: Features, preds: NDArray[np.int64], adversarial: NDArray[np.bool_]) -> None:
        """Learn from features (N, D), predicted classes (N,) and the truth (N,)."""

    def score(self, features: Features, preds: NDArray[np.int64]) -> NDArray[np.float64]:
        """How adversarial each image looks, shape (N,): the higher the more; above 0 means "adversarial"."""


class SklearnDetector:
    """A classifier of scikit-learn; the score is its probability of "adversarial" minus 1/2.

    Args:
        classifier: Any classifier with ``fit`` and ``predict_proba``.
    """

    def __init__(self, classifier: Any) -> None:
        self.classifier = classifier
        self._varying: NDArray[np.intp] = np.zeros(0, np.intp)

    def fit(self, features: Features, preds: NDArray[np.int64], adversarial: NDArray[np.bool_]) -> None:
        """Learn from features (N, D); columns that never change are left out."""
        self._varying = np.flatnonzero((features != features[:1]).any(0))
        if not len(self._varying):
            return
        try:
            self.classifier.fit(features[:, self._varying], adversarial)
        except ValueError as error:
            # What AdaBoost says when clean and adversarial images look the same, as in a placebo.
            if "worse than random" not in str(error):
                raise
            self._varying = self._varying[:0]

    def score(self, features: Features, preds: NDArray[np.int64]) -> NDArray[np.float64]:
        """See ``Detector``; 0 for all where the training images could not be told apart."""
        if not len(self._varying):
            return np.zeros(len(features))
        probability: NDArray[np.float64] = self.classifier.predict_proba(features[:, self._varying])[:, 1]
        return probability - 0.5


class PrototypeDetector:
    """Distance to the prototype of the predicted class, minus distance to where attacks move that prototype.

    Prototypes are the means of clean training images by predicted class. Attacked images taken for a class lie around
    the same prototype plus a shift; the shift is one for all classes, since with one image per class nothing finer can
    be learned. Distances are sums of squares, each feature divided by its variance among clean images, which is drawn
    half way to the mean variance. All of it are means and products: it takes milliseconds.
    """

    def __init__(self) -> None:
        self._prototypes: dict[int, Features] = {}
        self._elsewhere: Features = np.zeros(1, np.float32)
        self._direction: Features = np.zeros(1, np.float32)
        self._threshold = 0.0

    def fit(self, features: Features, preds: NDArray[np.int64], adversarial: NDArray[np.bool_]) -> None:
        """See ``Detector``."""
        clean, classes = features[~adversarial], preds[~adversarial]
        self._prototypes = {int(c): clean[classes == c].mean(0) for c in np.unique(classes)}
        self._elsewhere = clean.mean(0)
        variance = clean.var(0)
        shift = self._residuals(features[adversarial], preds[adversarial]).mean(0)
        spread = variance + variance.mean()
        self._direction = np.divide(shift, spread, out=np.zeros_like(shift), where=spread > 0)
        # |r|^2 - |r - shift|^2 is zero half way: where r . shift is |shift|^2 / 2.
        self._threshold = float(shift @ self._direction) / 2

    def score(self, features: Features, preds: NDArray[np.int64]) -> NDArray[np.float64]:
        """See ``Detector``."""
        projected: NDArray[np.float64] = (self._residuals(features, preds) @ self._direction).astype(np.float64)
        return projected - self._threshold

    def _residuals(self, features: Features, preds: NDArray[np.int64]) -> Features:
        """Features minus the prototype of the predicted class; that of all images for classes no clean one had."""
        return features - np.stack([self._prototypes.get(int(c), self._elsewhere) for c in preds])


def _random_forest(seed: int) -> Detector:
    ensemble = import_optional("sklearn.ensemble", "a random forest")
    return SklearnDetector(ensemble.RandomForestClassifier(100, random_state=seed))


def _adaboost(seed: int) -> Detector:
    ensemble = import_optional("sklearn.ensemble", "AdaBoost")
    return SklearnDetector(ensemble.AdaBoostClassifier(n_estimators=50, random_state=seed))


def _gradient_boosting(seed: int) -> Detector:
    """Each split looks at the square root of the features: on thousands of bits minutes become seconds."""
    ensemble = import_optional("sklearn.ensemble", "gradient boosting")
    return SklearnDetector(ensemble.GradientBoostingClassifier(max_features="sqrt", random_state=seed))


DETECTORS: dict[str, Callable[[int], Detector]] = {
    "random_forest": _random_forest,
    "adaboost": _adaboost,
    "gradient_boosting": _gradient_boosting,
    "prototype": lambda seed: PrototypeDetector(),
}


def detector_named(name: str, seed: int = 0) -> Detector:
    """A fresh detector: ``random_forest``, ``adaboost``, ``gradient_boosting`` or ``prototype``.

    Raises:
        ValueError: If there is none of that name.
        ImportError: If it needs scikit-learn, which is not installed.
    """
    if name not in DETECTORS:
        raise ValueError(f"no detector is called {name!r}; there are {', '.join(DETECTORS)}")
    return DETECTORS[name](seed)
