from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decouplify.paths import DYNAMIC, ENERGETIC, SILENT, PathSet


def with_counts(counts_by_layer, n_images, **columns):
    """A path set in which the filters are open for exactly these numbers of images."""
    gates = {name: np.arange(n_images)[:, None] < np.array(c) for name, c in counts_by_layer.items()}
    return PathSet.from_gates(gates, **columns)


@given(st.integers(1, 60), st.floats(0, 0.49), st.data())
def test_states_follow_the_rule(n_images, tol, data):
    counts = data.draw(st.lists(st.integers(0, n_images), min_size=1, max_size=12))
    states = with_counts({"a": counts}, n_images).filter_states(tol)
    for count, state in zip(counts, states.state, strict=True):
        # In exact arithmetic the rule is count <= tol N; floating products are allowed their last digits.
        silent, energetic = count <= tol * n_images + 1e-9, n_images - count <= tol * n_images + 1e-9
        assert state == (SILENT if silent else ENERGETIC if energetic else DYNAMIC)


def test_tolerance_is_the_same_at_both_ends():
    # 0.29 * 100 is 28.999999999999996 in floating point.
    states = with_counts({"a": [0, 29, 30, 70, 71, 100]}, 100).filter_states(tol=0.29)
    assert states.state.tolist() == [SILENT, SILENT, DYNAMIC, DYNAMIC, ENERGETIC, ENERGETIC]
    exact = with_counts({"a": [0, 1, 99, 100]}, 100).filter_states()
    assert exact.state.tolist() == [SILENT, DYNAMIC, DYNAMIC, ENERGETIC]


def test_states_add_up_per_layer():
    states = with_counts({"a": [0, 0, 3, 10], "b": [10, 4, 5]}, 10).filter_states()
    assert [(s.name, s.depth, s.n_silent, s.n_dynamic, s.n_energetic, s.n_filters) for s in states.layers] == [
        ("a", 0, 2, 1, 1, 4),
        ("b", 1, 0, 2, 1, 3),
    ]
    assert states.totals == {"silent": 2, "dynamic": 3, "energetic": 2}
    np.testing.assert_allclose(states.rate, [0, 0, 0.3, 1, 1, 0.4, 0.5])


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    # R: prop.test(count, n, correct = FALSE)$conf.int
    [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (10, 10, 0.72247, 1.0), (1, 50, 0.0035392, 0.1049544)],
)
def test_wilson_interval(count, n, low, high):
    states = with_counts({"a": [count]}, n).filter_states()
    np.testing.assert_allclose([states.low[0], states.high[0]], [low, high], atol=1e-5)


@given(st.integers(1, 1000), st.data())
def test_wilson_interval_solves_its_equation(n, data):
    """Its ends are the rates p whose distance from the observed one is z standard errors *of p*."""
    count = data.draw(st.integers(0, n))
    states = with_counts({"a": [count]}, n).filter_states()
    for p in (states.low[0], states.high[0]):
        if 0 < p < 1:
            assert abs(count / n - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-4)
    assert states.low[0] <= count / n <= states.high[0]


def test_depth_correlation_is_spearmans():
    counts = {"a": [0, 0, 0, 0], "b": [5, 0, 0, 0], "c": [5, 5, 5, 5], "d": [5, 5, 0, 0]}
    states = with_counts(counts, 10).filter_states()
    # Ranks 1 2 4 3 against 1 2 3 4: rho = 1 - 6 * 2 / (4 * 15).
    assert states.depth_correlation == pytest.approx(0.8)
    assert math.isnan(with_counts({"a": [1], "b": [1]}, 2).filter_states().depth_correlation)
    # The tied layers share rank 1.5: centred, (-1.5, 0, 0, 1.5) against (-1.5, -0.5, 0.5, 1.5).
    ties = with_counts({"a": [0, 0], "b": [5, 0], "c": [5, 0], "d": [5, 5]}, 10).filter_states()
    assert ties.depth_correlation == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_summary_ends_with_the_shares_and_the_number_of_images():
    gates = {"conv1": [0, 3, 10, 10], "conv2": [0, 5, 5, 5]}
    states = with_counts(gates, 10, manifest={"model": "net"}).filter_states()
    assert states.summary().splitlines() == [
        "Filter states of net: silent = open for none of the images, dynamic = some, energetic = all",
        "(a filter seen open 0 times in 10 may still be open for up to 28 % of all images: 95 % interval)",
        "depth  layer       filters  dynamic  silent  energetic  mean rate",
        "0      conv1             4        1       1          2      0.575",
        "1      conv2             4        3       1          0      0.375",
        "       all layers        8        4       2          2      0.475",
        "dynamic 50.0 % / silent 25.0 % / energetic 25.0 % on 10 images",
    ]
    assert repr(states).endswith("dynamic 50.0 % / silent 25.0 % / energetic 25.0 % on 10 images)")
    assert "(up to 10.00% of the images may contradict" in with_counts(gates, 10).filter_states(0.1).summary()


def test_to_dict_is_json():
    paths = with_counts({"a": [0, 2, 3]}, 3)
    for result in (paths.filter_states(), paths.activation_histogram()):
        described = result.to_dict()
        assert json.loads(json.dumps(described, allow_nan=False)) == described


def test_states_refuse(make_paths):
    paths = make_paths(4, {"a": 3})
    for tol in (-0.1, 0.5, float("nan")):
        with pytest.raises(ValueError, match=r"wanted a share of the images in \[0, 0\.5\)"):
            paths.filter_states(tol)
    with pytest.raises(ValueError, match="need at least 1 image"):
        paths.subset([]).filter_states()
    with pytest.raises(ValueError, match="needs at least 1 image"):
        paths.subset([]).activation_histogram()


@given(st.integers(1, 300), st.data())
def test_histogram_counts_every_filter_once_and_the_ends_exactly(n_images, data):
    counts = np.array(data.draw(st.lists(st.integers(0, n_images), min_size=1, max_size=30)))
    hist = with_counts({"a": counts}, n_images).activation_histogram()
    assert hist.n_silent == (counts == 0).sum()
    assert hist.n_energetic == (counts == n_images).sum()
    assert hist.n_filters == len(counts)
    assert len(hist.counts) == min(20, n_images - 1)
    for a, b, n in zip(hist.edges, hist.edges[1:], hist.counts, strict=False):
        inside = (counts > a) & (counts < b)
        on_edge = (counts == a) | (counts == b)
        assert inside.sum() <= n <= (inside | on_edge).sum()


def test_histogram_of_the_last_layer_by_default():
    paths = with_counts({"a": [0, 1], "b": [2, 2, 1]}, 2)
    assert (paths.activation_histogram().name, paths.activation_histogram().n_energetic) == ("b", 2)
    assert paths.activation_histogram("a").n_silent == 1
    assert paths.activation_histogram(None).n_filters == 5
    assert paths.activation_histogram(None).name == "all layers"


def test_histogram_summary_lists_the_counts_of_each_bin():
    hist = with_counts({"a": [0, 1, 2, 2, 3, 4, 4]}, 4).activation_histogram()
    assert hist.summary().splitlines() == [
        "a: 7 filters, 1 never open, 2 always open, 4 between, on 4 images",
        "open for images  filters",
        "0                      1",
        "1 to 1                 1",
        "2 to 2                 2",
        "3 to 3                 1",
        "4                      2",
    ]


def test_states_of_many_layers_are_drawn(make_paths):
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as plt

    few = with_counts({"a": [0, 0, 3, 10], "b": [10, 4, 5]}, 10).filter_states()
    ax = few.plot()
    heights = {bar.get_label(): [patch.get_height() for patch in bar] for bar in ax.containers}
    np.testing.assert_allclose(heights["silent"], [50, 0])
    np.testing.assert_allclose(heights["dynamic"], [25, 200 / 3])
    np.testing.assert_allclose(heights["energetic"], [25, 100 / 3])
    tops = [max(bar[layer].get_y() + bar[layer].get_height() for bar in ax.containers) for layer in range(2)]
    np.testing.assert_allclose(tops, 100)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a", "b"]
    ax = few.plot(counts=True)
    assert [patch.get_height() for patch in ax.containers[0]] == [1, 1]
    many = make_paths(5, {f"layer{i}": 3 for i in range(60)}).filter_states()
    assert len(many.plot().get_xticklabels()) <= 30
    given = few.plot().figure.subplots(1, 1)
    assert few.plot(given) is given
    assert plt.get_fignums() == []


def test_histogram_is_drawn_with_its_end_bars():
    pytest.importorskip("matplotlib")
    hist = with_counts({"a": [0, 0, 0, 30, 50, 60, 100]}, 100).activation_histogram()
    ax = hist.plot()
    assert [[patch.get_height() for patch in bar] for bar in ax.containers[::2]] == [[3], [1]]
    assert ax.get_xticklabels()[0].get_text() == "0"
    assert ax.get_xticklabels()[-1].get_text() == "100"
    ax.figure.canvas.draw()
    with_counts({"a": [0, 1]}, 1).activation_histogram().plot().figure.canvas.draw()
