from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decouplify.paths import PathSet, class_information, class_prototypes


def miller_madow_entropy(values):
    """Entropy in bits from a list of symbols, one formula, no arrays."""
    n, counts = len(values), Counter(values)
    plug_in = -sum(c / n * math.log2(c / n) for c in counts.values())
    return plug_in + (len(counts) - 1) / (2 * n) / math.log(2)


@given(st.integers(0, 10_000), st.integers(4, 60), st.integers(2, 5))
def test_information_equals_brute_force(seed, n, n_classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    labels[:2] = [0, 1]
    x = rng.random((n, 6)) < [0.0, 1.0, 0.05, 0.3, 0.5, 0.9]
    result = class_information(PathSet.from_gates({"a": x[:, :1], "b": x[:, 1:]}, labels=labels))
    for z, bits in zip(x.T, result.information, strict=True):
        pairs = list(zip(labels.tolist(), z.tolist(), strict=True))
        entropies = [miller_madow_entropy(values) for values in (labels.tolist(), z.tolist(), pairs)]
        assert bits == pytest.approx(entropies[0] + entropies[1] - entropies[2], abs=1e-12)


def test_gates_that_are_the_class_tell_all_of_it():
    labels = np.arange(4000) % 4
    gates = np.stack([labels < 2, labels % 2 == 0, labels == 3, labels < 9, labels > 9], axis=1)
    result = class_information(PathSet.from_gates({"a": gates}, labels=labels))
    assert result.class_entropy == pytest.approx(2)
    np.testing.assert_allclose(result.information, [1, 1, 0.8113, 0, 0], atol=2e-3)
    assert result.information[3:].tolist() == [0, 0]


def test_the_correction_removes_the_bias_of_independent_gates():
    rng = np.random.default_rng(0)
    paths = PathSet.from_gates({"a": rng.random((500, 2000)) < 0.5}, labels=rng.integers(0, 10, 500))
    mean = class_information(paths).information.mean()
    # Uncorrected, (C - 1) / 2N nats = 0.013 bits would be found where there are none.
    assert abs(mean) < 0.001


def test_prototypes_rates_and_selectivity():
    gates = {"a": [[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]]}
    paths = PathSet.from_gates(gates, labels=[5, 5, 8, 8])
    result = class_information(paths)
    assert result.values.tolist() == [5, 8]
    assert result.rates.tolist() == [[1, 0.5, 0], [0.5, 0.5, 0]]
    assert result.prototypes.tolist() == [[True, False, False], [False, False, False]]
    np.testing.assert_allclose(result.selectivity, [1 / 3, 0, np.nan])


def test_prototypes_are_a_path_set_to_measure_distances_to():
    rng = np.random.default_rng(0)
    labels = np.repeat([2, 4, 7], 30)
    centers = rng.random((3, 41)) < 0.5
    x = np.repeat(centers, 30, axis=0) ^ (rng.random((90, 41)) < 0.1)
    paths = PathSet.from_gates({"a": x[:, :9], "b": x[:, 9:]}, labels=labels)
    prototypes = class_prototypes(paths)
    np.testing.assert_array_equal(prototypes.unpack(), centers)
    assert prototypes.ids.tolist() == [2, 4, 7]
    distances = paths.hamming(prototypes)
    assert distances.shape == (90, 3)
    np.testing.assert_array_equal(prototypes.ids[distances.argmin(axis=1)], labels)
    by_name = class_prototypes(paths, by=np.repeat(["x", "y", "z"], 30))
    assert by_name.ids.tolist() == ["x", "y", "z"]
    assert by_name.labels is None


def test_summary_names_the_best_filter():
    labels = np.arange(400) % 2
    noise = np.arange(400) % 3 == 0
    gates = {"conv1": np.stack([noise, noise], axis=1), "conv2": np.stack([noise, noise, labels == 1], axis=1)}
    result = class_information(PathSet.from_gates(gates, labels=labels))
    assert result.best(1) == [("conv2", 2, pytest.approx(1, abs=0.01))]
    assert result.best(99)[0][:2] == ("conv2", 2)
    assert len(result.best(99)) == 5
    lines = result.summary().splitlines()
    assert lines[1].split() == ["depth", "layer", "filters", "mean", "bits", "max", "bits"]
    assert lines[3].split()[:3] == ["1", "conv2", "3"]
    assert lines[-1].startswith("400 images of 2 classes (1.00 bits)")
    assert lines[-1].endswith("(conv2, filter 2); 1 of 5 tell more than chance")
    assert json.dumps(result.to_dict(), allow_nan=False)


def test_information_is_drawn_layer_by_layer(make_paths):
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as plt

    result = class_information(make_paths(60, {"a": 7, "b": 9}, n_classes=3))
    ax = result.plot()
    best = ax.lines[-1].get_ydata()
    np.testing.assert_allclose(best, [result.information[:7].max(), result.information[7:].max()])
    ax.figure.canvas.draw()
    assert plt.get_fignums() == []


def test_information_needs_classes(make_paths):
    with pytest.raises(ValueError, match="has no labels"):
        class_information(make_paths(5, {"a": 2}))
    with pytest.raises(ValueError, match=r"needs at least 2 classes, .* has 1"):
        class_information(make_paths(5, {"a": 2}, n_classes=1))


@given(st.integers(0, 10_000), st.integers(20, 80), st.integers(2, 5))
def test_the_p_value_is_that_of_the_g_test(seed, n, n_classes):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    labels, z = rng.integers(0, n_classes, n), rng.random(n) < 0.4
    labels[:2], z[:2] = [0, 1], [True, False]
    result = class_information(PathSet.from_gates({"a": z[:, None]}, labels=labels))
    table = np.stack([[(z[labels == c] == value).sum() for c in np.unique(labels)] for value in (True, False)])
    wanted = stats.chi2_contingency(table, correction=False, lambda_="log-likelihood")
    assert result.p_value[0] == pytest.approx(wanted.pvalue, abs=1e-9)


def test_the_interval_holds_the_true_information_in_95_of_100_samples():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (1000, 400))
    z = np.where(labels == 1, rng.random(labels.shape) < 0.8, rng.random(labels.shape) < 0.3)
    results = [class_information(PathSet.from_gates({"a": z[:, [i]]}, labels=labels[:, i])) for i in range(400)]

    def entropy(*p):
        return -sum(q * math.log2(q) for q in p)

    true = entropy(0.55, 0.45) - (entropy(0.8, 0.2) + entropy(0.3, 0.7)) / 2
    inside = np.mean([result.low[0] <= true <= result.high[0] for result in results])
    assert 0.92 < inside < 0.98


def test_only_filters_that_tell_the_class_are_said_to_tell_it():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 800)
    noise, planted = rng.random((800, 200)) < 0.5, (labels % 2 == 0)[:, None] ^ (rng.random((800, 20)) < 0.3)
    constant = np.zeros((800, 3), bool)
    result = class_information(PathSet.from_gates({"n": noise, "p": planted, "c": constant}, labels=labels))
    telling = result.telling()
    assert telling[200:220].all()
    assert telling[:200].sum() <= 5
    assert result.p_value[220:].tolist() == [1, 1, 1]
    assert not telling[220:].any()
    with pytest.raises(ValueError, match=r"share of false discoveries is 0, wanted a number in \(0, 1\)"):
        result.telling(0)
