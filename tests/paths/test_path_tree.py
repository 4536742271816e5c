"""The Hopkins statistic on bits, and the tree it grows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from decouplify.paths import PathSet, decision_tree, hopkins

pytest.importorskip("sklearn")


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_independent_bits_have_no_groups(rate):
    rng = np.random.default_rng(0)
    values = [hopkins(rng.random((400, 128)) < rate, n_null=10, seed=seed).value for seed in range(10)]
    assert 0.48 < np.mean(values) < 0.52
    tests = [hopkins(rng.random((200, 64)) < rate, n_null=40, seed=seed) for seed in range(40)]
    assert np.mean([test.p_value < 0.05 for test in tests]) <= 0.1
    assert np.mean([test.null for test in tests]) == pytest.approx(0.5, abs=0.02)


def test_the_customary_form_is_misled_by_rates():
    rng = np.random.default_rng(0)
    rare, even = rng.random((400, 128)) < 0.05, rng.random((400, 128)) < 0.5
    assert hopkins(rare, method="classic").value > 0.65
    assert hopkins(even, method="classic").value < 0.47
    assert hopkins(even, method="classic", exponent=128).value < 0.01


@pytest.mark.parametrize(("flip", "at_least", "p_below"), [(0.1, 0.6, 1e-6), (0.3, 0.51, 0.05)])
def test_planted_groups_are_found(flip, at_least, p_below):
    rng = np.random.default_rng(0)
    centers = rng.random((8, 128)) < 0.5
    test = hopkins(centers[np.arange(400) % 8] ^ (rng.random((400, 128)) < flip))
    assert test.value > at_least
    assert test.p_value < p_below
    assert test.effect == test.value - test.null


def test_poor_data_give_a_note_or_a_number_and_never_an_error():
    assert hopkins(np.ones((50, 8), bool)).note == "all paths are equal"
    assert hopkins(np.eye(2, dtype=bool)).note == "fewer than 3 images"
    duplicates = np.repeat(np.eye(4, dtype=bool), 25, axis=0)
    assert 0.5 <= hopkins(duplicates).value <= 1
    for x in (np.eye(3, dtype=bool), np.arange(30)[:, None] == 3, np.arange(20)[:, None] % 2 == 0):
        for method in ("permutation", "classic"):
            assert 0 <= hopkins(x, method=method).value <= 1
    with pytest.raises(ValueError, match='wanted "permutation" or "classic"'):
        hopkins(duplicates, method="uniform")


def hierarchy(n_per_class=40, flip=0.1, seed=0):
    """Four classes. Two pairs part at layer 3, the classes of a pair at layer 6; before that, noise and constants."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([4, 7, 8, 9], n_per_class)
    pair, single = (labels >= 8).astype(int), np.searchsorted([4, 7, 8, 9], labels)
    gates = {}
    for depth in range(8):
        group = np.zeros_like(labels) if depth < 3 else pair if depth < 6 else single
        centers = rng.random((group.max() + 1, 32)) < 0.5
        gates[f"conv{depth}"] = centers[group] ^ (rng.random((len(labels), 32)) < flip)
    gates["conv1"] = np.ones_like(gates["conv1"])  # a layer that never changes
    return PathSet.from_gates(gates, labels=labels, manifest={"model": "net"})


def test_a_planted_hierarchy_is_recovered():
    tree = decision_tree(hierarchy(), class_names={4: "car", 7: "bus", 8: "cat", 9: 'a "dog"'})
    root = tree.root
    assert (root.layer, root.depth, root.classes, root.n_images) == ("conv3", 3, (4, 7, 8, 9), 160)
    assert [child.classes for child in root.children] == [(4, 7), (8, 9)]
    assert [child.layer for child in root.children] == ["conv6", "conv6"]
    assert [end.classes for child in root.children for end in child.children] == [(4,), (7,), (8,), (9,)]
    assert root.purity > 0.95
    assert root.hopkins.p_value < 1e-3
    assert len(tree.splits) == 3
    assert tree.summary().splitlines()[1].startswith('car, bus, cat, a "dog" - conv3: H 0.')
    assert "4 classes in 4 branches (160 images); the first to divide them is conv3, layer 3" in tree.headline()
    assert json.loads(json.dumps(tree.to_dict(), allow_nan=False))["root"]["children"][0]["classes"] == [4, 7]


def test_the_tree_is_drawn_and_written_as_dot():
    tree = decision_tree(hierarchy(), class_names={4: "car", 7: "bus", 8: "cat", 9: 'a "dog"'})
    dot = tree.to_dot()
    assert dot.startswith("digraph paths {")
    assert dot.count("->") == 6
    assert 'label="a \\"dog\\""' in dot
    ax = tree.plot()
    words = [text.get_text() for text in ax.texts]
    assert {"car", "bus", "cat"} <= set(words)
    ax.figure.canvas.draw()


def test_noise_and_what_divides_images_but_not_classes_give_no_tree():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 4
    noise = PathSet.from_gates({"a": rng.random((200, 32)) < 0.5}, labels=labels)
    assert decision_tree(noise).headline() == "no layer divides the 4 classes (200 images)"
    bright = rng.random(200) < 0.5
    nuisance = PathSet.from_gates({"a": bright[:, None] ^ (rng.random((200, 32)) < 0.1)}, labels=labels)
    tree = decision_tree(nuisance)
    assert not tree.splits
    assert tree.plot().texts


def test_duplicates_and_constant_layers_do_no_harm():
    labels = np.repeat([0, 1], 30)
    gates = {"same": np.ones((60, 4)), "split": np.stack([labels, 1 - labels], axis=1)}
    tree = decision_tree(PathSet.from_gates(gates, labels=labels))
    assert tree.root.layer == "split"
    assert tree.root.purity == 1
    constant = PathSet.from_gates({"same": np.ones((60, 4))}, labels=labels)
    assert decision_tree(constant).splits == ()


def test_the_customary_rule_is_there_on_request():
    tree = decision_tree(hierarchy(flip=0.02), method="classic", threshold=0.6)
    assert tree.root.layer == "conv3"
    assert np.isnan(tree.root.hopkins.p_value)
    assert ", p " not in tree.summary()


def test_some_classes_layers_and_images():
    paths = hierarchy()
    tree = decision_tree(paths, classes=[4, 8], layers=["conv4", "conv7"], max_per_class=25)
    assert (tree.n_images, tree.layers, tree.depths) == (50, ("conv4", "conv7"), (4, 7))
    assert (tree.root.layer, tree.root.classes) == ("conv4", (4, 8))
    with pytest.raises(ValueError, match="has no images of class 5"):
        decision_tree(paths, classes=[4, 5])
    with pytest.raises(ValueError, match="at least 2 classes, 1 given"):
        decision_tree(paths, classes=[4])
    with pytest.raises(ValueError, match=r"min_purity=0\.3"):
        decision_tree(paths, min_purity=0.3)
