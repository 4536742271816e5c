"""The protocol: who is trained on, who is tested, and what the numbers mean."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decouplify.adversarial import DETECTORS, Protocol, Seen, TooFewImagesError, score_detectors
from decouplify.adversarial.detectors import detector_named
from decouplify.adversarial.protocol import draw


@dataclass
class Spy:
    """A detector whose only feature is the image's number; it keeps who it was trained on and asked about."""

    log: list[tuple[set[int], set[int]]]
    trained: set[int] = field(default_factory=set)

    def fit(self, features, preds, adversarial) -> None:
        self.trained = set(features[:, 0].astype(int))
        assert (features[adversarial][:, 0] == features[~adversarial][:, 0] + 1000).all()  # twins, row by row

    def score(self, features, preds):
        self.log.append((self.trained, set(features[:, 0].astype(int))))
        return features[:, 0].astype(float)


def seen(features: np.ndarray) -> Seen:
    return Seen(features.astype(np.float32), np.zeros(len(features), np.int64))


def all_of(n: int) -> np.ndarray:
    return np.ones(n, bool)


def test_no_image_is_in_training_and_test() -> None:
    log: list[tuple[set[int], set[int]]] = []
    labels = np.arange(60) % 3
    clean, attacked = np.arange(60)[:, None], np.arange(1000, 1060)[:, None]
    counted = np.arange(60) != 7
    protocol = Protocol({"spy": lambda seed: Spy(log)}, (1, 5), 3)
    tests = {"same": (seen(attacked), counted)}
    scores = score_detectors(protocol, labels, seen(clean), seen(attacked), counted, tests)["same"]
    tested_on_attacked = [(trained, asked) for trained, asked in log if min(asked) >= 1000]
    assert len(tested_on_attacked) == 2 * 3
    for trained, asked in tested_on_attacked:
        drawn = {number for number in trained if number < 1000}
        assert trained == drawn | {number + 1000 for number in drawn}
        assert asked == {1000 + i for i in range(60) if i not in drawn and i != 7}
    assert [(s.n_per_class, s.n_train, s.n_test) for s in scores] == [(1, 3, 56), (5, 15, 44)]


@given(n=st.integers(1, 12), seed=st.integers(0, 5))
def test_draws_are_balanced_and_leave_images_of_every_class(n: int, seed: int) -> None:
    labels = np.repeat([0, 1, 2, 3], [40, 30, 4, 1])
    trainable = np.arange(75) % 5 > 0
    rows = draw(labels, trainable, n, seed)
    assert len(set(rows)) == len(rows)
    assert trainable[rows].all()
    assert np.bincount(labels[rows]).tolist() == [n, n, min(n, 3 // 2)]


def test_the_same_draws_for_all_features() -> None:
    labels = np.arange(40) % 4
    logs = []
    for offset in (0, 100):
        log: list[tuple[set[int], set[int]]] = []
        clean, attacked = np.arange(40)[:, None] + offset, np.arange(1000, 1040)[:, None] + offset
        protocol = Protocol({"spy": lambda seed, log=log: Spy(log)}, (3,), 4, seed=2)
        score_detectors(protocol, labels, seen(clean), seen(attacked), all_of(40), {"t": (seen(attacked), all_of(40))})
        logs.append([{number - offset for number in trained} for trained, _ in log])
    assert logs[0] == logs[1]
    assert len({frozenset(trained) for trained in logs[0]}) == 4  # and another draw in every run


def scores_of(clean: np.ndarray, attacked: np.ndarray, **options):
    n = len(clean)
    protocol = Protocol(DETECTORS, (5,), 3, **options)
    labels = np.arange(n) % 4
    found = score_detectors(
        protocol, labels, seen(clean), seen(attacked), all_of(n), {"t": (seen(attacked), all_of(n))}
    )
    return {score.detector: score for score in found["t"]}


def test_detectors_find_what_is_there_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    clean = rng.random((300, 20)) < 0.5
    moved = clean.copy()
    moved[:, :6] = True
    nothing = rng.random((300, 20)) < 0.5
    for name, score in scores_of(clean, moved).items():
        assert score.auc_mean > 0.95, name
        assert score.tpr_mean > 0.8, name
    for name, score in scores_of(clean, nothing).items():
        assert abs(score.auc_mean - 0.5) < 0.05, name


def test_placebo_is_a_half_for_every_detector() -> None:
    clean = np.random.default_rng(0).random((100, 20)) < 0.5
    for name, score in scores_of(clean, clean.copy()).items():
        assert score.auc_mean == 0.5, name
        assert score.auc_hard_mean == 0.5, name


def test_features_that_never_change_tell_nothing() -> None:
    for name, score in scores_of(np.ones((60, 3)), np.ones((60, 3))).items():
        assert score.auc_mean == 0.5, name


def test_the_numbers_do_not_depend_on_the_threads() -> None:
    rng = np.random.default_rng(3)
    clean, attacked = rng.random((60, 12)) < 0.4, rng.random((60, 12)) < 0.6
    assert scores_of(clean, attacked) == scores_of(clean, attacked, n_threads=3)


def test_the_numbers_are_what_they_are_called() -> None:
    """Against pairs counted one by one."""
    rng = np.random.default_rng(1)
    clean, attacked = rng.normal(0, 1, (50, 1)), rng.normal(0.8, 1, (50, 1))

    @dataclass
    class Raw:
        def fit(self, features, preds, adversarial) -> None: ...

        def score(self, features, preds):
            return features[:, 0].astype(float) - 0.4

    protocol = Protocol({"raw": lambda seed: Raw()}, (1,), 1)
    labels = np.zeros(50, int)
    (score,) = score_detectors(
        protocol, labels, seen(clean), seen(attacked), all_of(50), {"t": (seen(attacked), all_of(50))}
    )["t"]
    drawn = draw(labels, all_of(50), 1, (0, 1, 0))
    a, b = (np.delete(x.astype(np.float32)[:, 0].astype(float) - 0.4, drawn) for x in (clean, attacked))
    assert score.auc_mean == pytest.approx((b[:, None] > a).mean())
    assert score.auc_hard_mean == pytest.approx(((b > 0).mean() + (a <= 0).mean()) / 2)
    allowed = [(b >= t).mean() for t in np.concatenate([a, b]) if (a >= t).mean() <= 0.05]
    assert score.tpr_mean == pytest.approx(max(allowed))
    assert score.auc_std == 0


def test_what_cannot_be_tested_is_missing() -> None:
    clean = np.arange(20)[:, None]
    protocol = Protocol({"p": DETECTORS["prototype"]}, (1,), 2)
    tests = {"some": (seen(clean), all_of(20)), "none": (seen(clean), np.zeros(20, bool))}
    found = score_detectors(protocol, np.arange(20) % 2, seen(clean), seen(clean), all_of(20), tests)
    assert list(found) == ["some"]
    nobody = np.zeros(20, bool)
    with pytest.raises(TooFewImagesError, match=r"0 images are classified correctly .* at least 2 of one class wanted"):
        score_detectors(protocol, np.arange(20) % 2, seen(clean), seen(clean), nobody, tests)


def test_prototypes_know_classes_by_what_the_images_are_taken_for() -> None:
    """Class 0 at 0, class 1 at 1; attacks move everything by 0.3 and are taken for the other class."""
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    clean = labels[:, None] + 0.1 * rng.normal(size=(80, 5))
    attacked = (1 - labels)[:, None] + 0.3 + 0.1 * rng.normal(size=(80, 5))
    detector = detector_named("prototype")
    features = np.concatenate([clean, attacked]).astype(np.float32)
    preds, adversarial = np.concatenate([labels, 1 - labels]), np.repeat([False, True], 80)
    detector.fit(features, preds, adversarial)
    assert ((detector.score(features, preds) > 0) == adversarial).mean() > 0.95
    assert np.isfinite(detector.score(features[:3], np.array([7, 7, 7]))).all()  # a class never seen


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one detector, and positive numbers, wanted"):
        Protocol(DETECTORS, (0, 5))
    with pytest.raises(ValueError, match="5 repeats and 0 threads given"):
        Protocol(DETECTORS, n_threads=0)
    with pytest.raises(ValueError, match="no detector is called 'svm'; there are random_forest"):
        detector_named("svm")
