"""The protocol of the paper's Table 6: few training images per class, held-out images, several runs.

An image and its adversarial twin always go together, to training or to testing; all features of a table see the same
draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from decouplify._optional import import_optional
from decouplify.adversarial.detectors import Detector

__all__ = ["Protocol", "Score", "Seen", "TooFewImagesError", "score_detectors"]

_FPR = 0.05


class TooFewImagesError(ValueError):
    """Too few images are classified correctly and attacked with success: give more images, or a stronger attack."""


class Seen(NamedTuple):
    """What a detector sees of N images: features (N, D) and predicted classes (N,)."""

    features: NDArray[np.float32]
    preds: NDArray[np.int64]

    def rows(self, index: NDArray[np.intp]) -> Seen:
        """The chosen images."""
        return Seen(self.features[index], self.preds[index])


@dataclass(frozen=True)
class Protocol:
    """How detectors are compared.

    Attributes:
        detectors: Makes a fresh detector from a seed, by name.
        n_per_class: Training images per class, each with its twin.
        repeats: Independent runs.
        seed: Of draws and detectors.
        n_threads: Detectors trained at a time; the numbers do not depend on it. scikit-learn's let others run.

    Raises:
        ValueError: If a number is not positive, or there is nothing to compare.
    """

    detectors: Mapping[str, Callable[[int], Detector]]
    n_per_class: tuple[int, ...] = (1, 5, 10)
    repeats: int = 5
    seed: int = 0
    n_threads: int = 1

    def __post_init__(self) -> None:
        numbers = (*self.n_per_class, self.repeats, self.n_threads)
        if not self.detectors or not self.n_per_class or min(numbers) < 1:
            raise ValueError(
                f"detection protocol: {len(self.detectors)} detectors, n_per_class {self.n_per_class}, {self.repeats} "
                f"repeats and {self.n_threads} threads given; at least one detector, and positive numbers, wanted"
            )


@dataclass(frozen=True)
class Score:
    """How well one detector did with one number of training images, over the runs.

    Attributes:
        detector: Its name.
        n_per_class: Training images per class that were asked for.
        n_train: Images it was trained on, each with its twin; fewer than asked for where a class had not enough.
        n_test: Held-out images it was tested on, each with its twin, mean over runs.
        auc_mean: Area under the ROC curve of its scores, mean over runs, in [0, 1].
        auc_std: Standard deviation over runs; 0 for one run.
        auc_hard_mean: The same area for yes/no answers (balanced accuracy), as the published code of critical data
            routing paths computes it.
        auc_hard_std: Its deviation.
        tpr_mean: Share of adversarial images found when at most 5 % of the clean ones are flagged.
        tpr_std: Its deviation.
    """

    detector: str
    n_per_class: int
    n_train: int
    n_test: float
    auc_mean: float
    auc_std: float
    auc_hard_mean: float
    auc_hard_std: float
    tpr_mean: float
    tpr_std: float


def score_detectors(
    protocol: Protocol,
    labels: NDArray[np.int64],
    clean: Seen,
    trained_on: Seen,
    trainable: NDArray[np.bool_],
    tests: Mapping[str, tuple[Seen, NDArray[np.bool_]]],
) -> dict[str, tuple[Score, ...]]:
    """Train every detector on clean and attacked images, and test it on held-out ones.

    Args:
        protocol: Detectors, sizes and runs.
        labels: Class of each image, which the draws are balanced over, shape (N,).
        clean: What is seen of the N clean images.
        trained_on: What is seen of their attacked twins in training, row by row.
        trainable: Which of them may be drawn for training, shape (N,).
        tests: Attacked twins to test on by name, and which of them count, shape (N,). None that was drawn for training
            is tested, neither as clean nor as attacked.

    Returns:
        For each test, one score per detector and number of training images. A test that some draw leaves without
        images is missing.

    Raises:
        TooFewImagesError: If no class has 2 images to draw from.
    """

    def run_of(trial: _Trial) -> dict[str, _Measurement]:
        detector = protocol.detectors[trial.detector](protocol.seed + trial.run)
        _fit(detector, clean.rows(trial.drawn), trained_on.rows(trial.drawn))
        return dict(_test(detector, clean, tests, trial.drawn))

    trials = [
        _Trial(name, n, run, drawn)
        for n, run, drawn in _draws(protocol, labels, trainable)
        for name in protocol.detectors
    ]
    with ThreadPoolExecutor(protocol.n_threads) as pool:
        found = list(pool.map(run_of, trials))
    measured: dict[tuple[str, str, int], list[_Measurement]] = {}
    for trial, by_test in zip(trials, found, strict=True):
        for test, measurement in by_test.items():
            measured.setdefault((test, trial.detector, trial.n_per_class), []).append(measurement)
    return {test: scores for test in tests if (scores := _summaries(protocol, test, measured))}


class _Trial(NamedTuple):
    """One detector to be trained on one draw."""

    detector: str
    n_per_class: int
    run: int
    drawn: NDArray[np.intp]


def _test(
    detector: Detector,
    clean: Seen,
    tests: Mapping[str, tuple[Seen, NDArray[np.bool_]]],
    drawn: NDArray[np.intp],
) -> Iterator[tuple[str, _Measurement]]:
    """What a trained detector reaches in each test, on the images that were not drawn."""
    held_out = np.ones(len(clean.preds), bool)
    held_out[drawn] = False
    clean_scores = detector.score(*clean)
    for test, (attacked, counted) in tests.items():
        rows = np.flatnonzero(held_out & counted)
        if len(rows):
            yield test, _measure(clean_scores[rows], detector.score(*attacked.rows(rows)), len(drawn))


def _draws(
    protocol: Protocol, labels: NDArray[np.int64], trainable: NDArray[np.bool_]
) -> Iterator[tuple[int, int, NDArray[np.intp]]]:
    """Images per class, number of the run, and the training images drawn for it."""
    for n in protocol.n_per_class:
        for run in range(protocol.repeats):
            yield n, run, draw(labels, trainable, n, (protocol.seed, n, run))


def draw(
    labels: NDArray[np.int64], trainable: NDArray[np.bool_], n: int, seed: int | Sequence[int]
) -> NDArray[np.intp]:
    """Rows of n training images of every class, sorted; at most half of what a class has, so that some are held out.

    Raises:
        TooFewImagesError: If no class has 2 images to draw from.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for c in np.unique(labels):
        candidates = rng.permutation(np.flatnonzero((labels == c) & trainable))
        rows.append(candidates[: min(n, len(candidates) // 2)])
    drawn = np.sort(np.concatenate(rows))
    if not len(drawn):
        raise TooFewImagesError(
            f"detection: {int(trainable.sum())} images are classified correctly and were attacked with success, at "
            "least 2 of one class wanted; give more images or a stronger attack"
        )
    return drawn


class _Measurement(NamedTuple):
    auc: float
    auc_hard: float
    tpr: float
    n_train: int
    n_test: int


def _fit(detector: Detector, clean: Seen, attacked: Seen) -> None:
    features = np.concatenate([clean.features, attacked.features])
    adversarial = np.arange(len(features)) >= len(clean.features)
    detector.fit(features, np.concatenate([clean.preds, attacked.preds]), adversarial)


def _measure(clean: NDArray[np.float64], attacked: NDArray[np.float64], n_train: int) -> _Measurement:
    metrics = import_optional("sklearn.metrics", "detection scores")
    truth = np.repeat([0, 1], [len(clean), len(attacked)])
    scores = np.concatenate([clean, attacked])
    false_positive, true_positive, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    return _Measurement(
        auc=float(metrics.roc_auc_score(truth, scores)),
        auc_hard=float(metrics.roc_auc_score(truth, scores > 0)),
        tpr=float(true_positive[false_positive <= _FPR].max()),
        n_train=n_train,
        n_test=len(attacked),
    )


def _summaries(
    protocol: Protocol, test: str, measured: Mapping[tuple[str, str, int], Sequence[_Measurement]]
) -> tuple[Score, ...]:
    wanted = [(name, n) for name in protocol.detectors for n in protocol.n_per_class]
    runs = [measured.get((test, name, n), ()) for name, n in wanted]
    if min(map(len, runs)) < protocol.repeats:
        return ()
    return tuple(_summary(name, n, found) for (name, n), found in zip(wanted, runs, strict=True))


def _summary(name: str, n: int, runs: Sequence[_Measurement]) -> Score:
    auc, auc_hard, tpr, n_train, n_test = (np.array(values, float) for values in zip(*runs, strict=True))
    ddof = 1 if len(runs) > 1 else 0
    spread = [(float(v.mean()), float(v.std(ddof=ddof))) for v in (auc, auc_hard, tpr)]
    return Score(name, n, int(n_train[0]), float(n_test.mean()), *spread[0], *spread[1], *spread[2])
