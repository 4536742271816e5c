"""The monitor keeps its false-positive rate and finds paths of another kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import decouplify
from decouplify.adversarial import PathMonitor
from decouplify.paths import PathSet


def paths_of(n: int, seed: int, flips: float = 0.1) -> PathSet:
    """Three classes, each around a path of its own; labels are unknown, predictions right."""
    centres = np.random.default_rng(99).random((3, 40)) < 0.5
    rng = np.random.default_rng(seed)
    preds = np.arange(n) % 3
    return PathSet.from_gates({"conv": centres[preds] ^ (rng.random((n, 40)) < flips)}, preds=preds)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_the_false_positive_rate_holds_on_new_images(rate) -> None:
    shares = [
        PathMonitor(paths_of(600, seed), false_positive_rate=rate).score(paths_of(1000, seed + 50)).flagged.mean()
        for seed in range(8)
    ]
    assert np.mean(shares) <= rate + 0.01
    assert np.mean(shares) > 0.2 * rate  # ties of small integers make it flag less, but not nothing


def test_paths_of_another_class_or_of_none_are_flagged() -> None:
    monitor, ordinary = PathMonitor(paths_of(600, 0)), paths_of(300, 1)
    wrong_class = monitor.judge(ordinary.unpack(), (ordinary.preds + 1) % 3)
    random = monitor.judge(np.random.default_rng(5).random((300, 40)) < 0.5, ordinary.preds)
    assert wrong_class.flagged.mean() > 0.95
    assert random.flagged.mean() > 0.95
    assert wrong_class.scores.mean() > 2 * monitor.score(ordinary).scores.mean()


def test_a_class_without_known_paths_is_flagged() -> None:
    verdicts = PathMonitor(paths_of(600, 0)).judge(paths_of(2, 1).unpack(), np.array([8, 1]))
    assert verdicts.flagged.tolist() == [True, False]
    assert verdicts.scores[0] == np.inf


def test_scores_are_multiples_of_the_typical_distance() -> None:
    paths = PathSet.from_gates({"conv": np.eye(40, dtype=bool)}, preds=np.zeros(40, int))  # all two bits apart
    verdicts = PathMonitor(paths).judge(np.zeros((1, 40), bool), np.zeros(1, int))
    assert verdicts.scores.tolist() == [0.5]
    assert verdicts.p_values.tolist() == [1.0]


def test_images_and_their_last_forward_give_the_same_verdicts(trained) -> None:
    x = trained.images
    paths = decouplify.record(trained.pixel.module, [trained.pixel.normalise(x[:120])])
    monitor = PathMonitor(paths, trained.pixel)
    verdicts = monitor.score(x[120:150])
    forwards = []
    handle = trained.pixel.register_forward_hook(lambda *_: forwards.append(1))
    with torch.no_grad():
        logits = trained.pixel(x[120:150])
    last = monitor.last(logits)
    handle.remove()
    assert len(forwards) == 1
    np.testing.assert_array_equal(last.scores, verdicts.scores)
    np.testing.assert_array_equal(last.preds, verdicts.preds)
    again = monitor.score(decouplify.record(trained.pixel.module, [trained.pixel.normalise(x[120:150])]))
    np.testing.assert_array_equal(again.p_values, verdicts.p_values)


def test_wrong_input_is_refused(trained) -> None:
    with pytest.raises(ValueError, match="false_positive_rate is 5, wanted between 0 and 1"):
        PathMonitor(paths_of(100, 0), false_positive_rate=5)
    with pytest.raises(ValueError, match="30 paths given, at least 200 wanted"):
        PathMonitor(paths_of(30, 0), false_positive_rate=0.01)
    with pytest.raises(ValueError, match=r"score\(images\) needs the model"):
        PathMonitor(paths_of(100, 0)).score(trained.images)
    with pytest.raises(ValueError, match=r"paths of shape \(2, 5\) given, \(N, 40\) wanted"):
        PathMonitor(paths_of(100, 0)).judge(np.zeros((2, 5), bool), np.zeros(2, int))
    with pytest.raises(ValueError, match="has no preds"):
        PathMonitor(PathSet.from_gates({"conv": np.eye(40, dtype=bool)}))
