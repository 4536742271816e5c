from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decouplify.paths import PathSet, path_map
from decouplify.paths._distance import (
    between_within,
    class_distance_sums,
    class_members,
    silhouette,
    stratified_rows,
)

pytest.importorskip("sklearn")


def planted(n_per_class=30, n_classes=4, n_filters=80, flip=0.1, seed=0, **columns):
    """Every class has a path of its own; each image flips a few of its bits. Two layers of equal size."""
    rng = np.random.default_rng(seed)
    centers = rng.random((n_classes, n_filters)) < 0.5
    labels = np.repeat(np.arange(n_classes), n_per_class)
    x = centers[labels] ^ (rng.random((len(labels), n_filters)) < flip)
    half = n_filters // 2
    return PathSet.from_gates({"a": x[:, :half], "b": x[:, half:]}, labels=labels, **columns)


def nearest_center_accuracy(xy, labels):
    centers = np.stack([xy[labels == value].mean(axis=0) for value in np.unique(labels)])
    return (np.linalg.norm(xy[:, None] - centers, axis=2).argmin(axis=1) == labels).mean()


@pytest.mark.parametrize("method", ["tsne", "opentsne", "pca"])
def test_planted_classes_show_in_the_picture_and_in_the_numbers(method):
    if method == "opentsne":
        pytest.importorskip("openTSNE")
    result = path_map(planted(), method)
    assert result.xy.shape == (120, 2)
    assert result.xy.dtype == np.float32
    assert result.method == method
    assert nearest_center_accuracy(result.xy, result.labels) > 0.95
    assert result.knn_accuracy == 1.0
    assert result.knn_k == 10
    assert result.silhouette > 0.5
    assert result.between_within > 2
    assert (result.n_varying, result.n_distinct) == (80, 120)
    assert len(result.explained_variance) == 80
    assert result.explained_variance.sum() == pytest.approx(1, abs=1e-4)
    assert result.note == ""
    assert np.isfinite(result.kl_divergence) == (method != "pca")


def test_paths_without_classes_give_numbers_that_say_so():
    rng = np.random.default_rng(0)
    noise = PathSet.from_gates({"a": rng.random((200, 64)) < 0.5}, labels=np.arange(200) % 4)
    result = path_map(noise, "pca")
    assert 0.1 < result.knn_accuracy < 0.4
    assert abs(result.silhouette) < 0.02
    assert result.between_within == pytest.approx(1, abs=0.02)


def test_the_same_seed_gives_the_same_map():
    paths = planted(n_per_class=12)
    first, again, other = path_map(paths), path_map(paths), path_map(paths, seed=1, max_images=30)
    np.testing.assert_array_equal(first.xy, again.xy)
    assert len(other.rows) == 30


def test_some_layers_only():
    paths = planted()
    result = path_map(paths, "pca", layers=["b"])
    assert result.layers == ("b",)
    assert result.n_varying == 40
    selected = path_map(paths.select_layers(["b"]), "pca")
    np.testing.assert_allclose(result.xy, selected.xy)


def test_a_capped_map_says_which_images_it_shows():
    paths = planted(n_per_class=50, ids=[f"img{i}" for i in range(200)])
    result = path_map(paths, "pca", max_images=40)
    assert np.bincount(result.labels).tolist() == [10, 10, 10, 10]
    np.testing.assert_array_equal(paths.ids[result.rows], result.ids)
    np.testing.assert_array_equal(paths.labels[result.rows], result.labels)


def test_few_components_are_enough_for_the_request():
    assert len(path_map(planted(n_per_class=5), "pca", n_components_pca=3).explained_variance) == 3


def test_perplexity_is_lowered_for_few_images():
    result = path_map(planted(n_per_class=4))
    assert result.perplexity == pytest.approx(5)
    assert result.note == "perplexity lowered from 30 to 5 for 16 images"
    assert f"note: {result.note}" in result.summary()


def test_equal_paths_give_a_degenerate_map():
    paths = PathSet.from_gates({"a": np.tile([1, 0, 1], (20, 1))}, labels=np.arange(20) % 2)
    result = path_map(paths)
    assert (result.xy == 0).all()
    assert result.note == "no filter differs between these images, so all points coincide"
    assert (result.n_varying, result.n_distinct) == (0, 1)
    assert np.isnan([result.knn_accuracy, result.silhouette, result.between_within]).all()
    result.plot().figure.canvas.draw()


@pytest.mark.parametrize(
    ("x", "n_distinct"),
    [
        ([[1, 0, 1]], 1),  # one image
        ([[1, 0, 1], [0, 1, 1]], 2),
        ([[1, 0, 1], [0, 1, 1], [1, 1, 1]], 3),
        ([[0], [1]] * 10, 2),  # one filter
        ([[0, 0], [1, 1]] * 10, 2),  # two filters that always agree: one dimension
        ([[0, 0, 0], [1, 1, 0]] * 30, 2),
        ([[0, 0, 1]] * 30 + [[1, 1, 0]], 2),  # one outlier
    ],
)
@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_poor_sets_give_a_map_all_the_same(x, n_distinct, method):
    result = path_map(PathSet.from_gates({"a": x}, labels=np.arange(len(x)) % 2), method)
    assert result.xy.shape == (len(x), 2)
    assert np.isfinite(result.xy).all()
    assert result.n_distinct == n_distinct
    result.plot().figure.canvas.draw()
    assert json.dumps(result.to_dict(), allow_nan=False)


def test_maps_without_classes_have_no_class_numbers():
    unlabelled = PathSet.from_gates({"a": planted().unpack()})
    one_class = PathSet.from_gates({"a": planted().unpack()}, labels=np.zeros(120, int))
    for paths in (unlabelled, one_class):
        result = path_map(paths, "pca")
        assert np.isnan([result.knn_accuracy, result.silhouette, result.between_within]).all()
        assert "accuracy" not in result.headline()
        result.plot().figure.canvas.draw()


def test_path_map_refuses():
    paths = planted(n_per_class=3)
    with pytest.raises(ValueError, match='method is \'umap\', wanted "tsne", "opentsne" or "pca"'):
        path_map(paths, "umap")
    for wrong in ({"perplexity": 0}, {"n_components_pca": 0}, {"max_images": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            path_map(paths, **wrong)
    with pytest.raises(ValueError, match="needs at least 1 image"):
        path_map(paths.subset([]))
    with pytest.raises(ValueError, match="has no layer 'c'"):
        path_map(paths, layers=["c"])


def test_missing_packages_are_named_with_their_extra(monkeypatch):
    result = path_map(planted(n_per_class=3), "pca")
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ImportError, match=r'path_map needs scikit-learn; .* pip install "decouplify\[analysis\]"'):
        path_map(planted(n_per_class=3), "pca")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'plotting needs matplotlib; .* pip install "decouplify\[analysis\]"'):
        result.plot()


def test_a_map_is_drawn_with_a_legend_of_classes():
    import matplotlib.pyplot as plt

    result = path_map(planted(manifest={"model": "net"}), "pca")
    ax = result.plot(class_names=["ant", "bee", "cat", "dog"])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ant", "bee", "cat", "dog"]
    assert ax.get_title(loc="left") == "Path map of net"
    assert any("10-nearest-neighbour accuracy 100.0 %" in text.get_text() for text in ax.texts)
    dots = max(ax.collections, key=lambda dots: len(dots.get_offsets()))
    assert len(dots.get_offsets()) == 120
    # Every dot has the colour of its class, whatever the order of drawing.
    colors = {tuple(row): set() for row in np.unique(dots.get_facecolors(), axis=0)}
    for position, color in zip(np.asarray(dots.get_offsets()), dots.get_facecolors(), strict=True):
        image = np.linalg.norm(result.xy - position, axis=1).argmin()
        colors[tuple(color)].add(int(result.labels[image]))
    assert sorted(map(tuple, colors.values())) == [(0,), (1,), (2,), (3,)]
    many = path_map(planted(n_per_class=2, n_classes=25), "pca").plot()
    assert many.get_legend() is None
    assert many.get_title(loc="right") == "25 classes"
    given = ax.figure.subplots()
    assert result.plot(given, class_names={i: str(i) for i in range(4)}) is given
    assert plt.get_fignums() == []


@given(st.integers(0, 10_000), st.integers(2, 30), st.integers(1, 12), st.integers(1, 5))
def test_class_distances_equal_those_over_all_pairs(seed, n, n_filters, n_classes):
    rng = np.random.default_rng(seed)
    x, labels = rng.random((n, n_filters)) < 0.4, rng.integers(0, n_classes, n)
    _, own_class, sizes = class_members(labels)
    pairs = (x[:, None] != x[None]).sum(axis=2)
    sums = class_distance_sums(x, own_class, sizes)
    for c in range(len(sizes)):
        np.testing.assert_array_equal(sums[:, c], pairs[:, own_class == c].sum(axis=1))
    same = np.equal.outer(labels, labels)
    within, between = pairs[same & ~np.eye(n, dtype=bool)], pairs[~same]
    ratio = between_within(sums, own_class, sizes)
    if len(within) and len(between) and within.sum():
        assert ratio == pytest.approx(between.mean() / within.mean())
    elif len(within) and len(between) and between.sum():
        assert ratio == np.inf
    else:
        assert np.isnan(ratio)
    if 2 <= len(sizes) < n:
        from sklearn.metrics import silhouette_score

        wanted = silhouette_score(pairs.astype(float), labels, metric="precomputed")
        assert silhouette(sums, own_class, sizes) == pytest.approx(wanted)
    elif len(sizes) < 2:
        assert np.isnan(silhouette(sums, own_class, sizes))


def test_a_stratified_subset_of_unequal_classes():
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    chosen = labels[stratified_rows(labels, 30, seed=0)]
    assert np.bincount(chosen).tolist() == [21, 6, 3]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 60), st.integers(0, 5))
def test_a_stratified_subset_keeps_the_shares_within_one_image(labels, n_wanted, seed):
    labels = np.array(labels)
    rows = stratified_rows(labels, n_wanted, seed)
    assert len(rows) == min(n_wanted, len(labels))
    assert (np.diff(rows) > 0).all()
    share = len(rows) / len(labels)
    for value in np.unique(labels):
        assert abs((labels[rows] == value).sum() - share * (labels == value).sum()) <= 1
