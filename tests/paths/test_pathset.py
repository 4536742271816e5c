from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from decouplify import paths as paths_package
from decouplify.paths import LayerSpec, PathSet, _layout
from decouplify.paths._text import file_size


@st.composite
def gate_arrays(draw, max_images=12):
    """Layer name to booleans (N, K), with odd numbers of filters and sometimes no image at all."""
    n = draw(st.integers(0, max_images))
    sizes = draw(st.lists(st.integers(1, 19), min_size=1, max_size=4))
    return {f"layer{i}": draw(hnp.arrays(bool, (n, k))) for i, k in enumerate(sizes)}


def together(gates):
    return np.concatenate(list(gates.values()), axis=1)


@given(gate_arrays())
def test_unpacking_gives_back_what_was_packed(gates):
    paths = PathSet.from_gates(gates)
    np.testing.assert_array_equal(paths.unpack(), together(gates))
    for name, z in gates.items():
        np.testing.assert_array_equal(paths.unpack(name), z)
    assert paths.bits.shape == (len(together(gates)), sum((z.shape[1] + 7) // 8 for z in gates.values()))


@given(gate_arrays())
def test_pad_bits_are_zero(gates):
    paths = PathSet.from_gates(gates)
    n_set_bits = np.unpackbits(paths.bits, axis=1).sum()
    assert n_set_bits == together(gates).sum()


def test_bits_are_packed_least_significant_first():
    paths = PathSet.from_gates({"a": [[1, 0, 0, 0, 0, 0, 0, 0, 1]], "b": [[0, 1]]})
    assert paths.bits.tolist() == [[1, 1, 2]]
    assert paths.layers == (LayerSpec("a", 9, 0, 0), LayerSpec("b", 2, 2, 1))


@pytest.mark.parametrize("rows", [3, -1, slice(2, 7), [4, 0, 4], np.array([1, 2]), np.arange(9) % 2 == 0, []])
def test_rows_are_chosen_as_numpy_would(make_paths, rows):
    paths = make_paths(9, {"a": 5, "b": 11}, n_classes=3)
    wanted = np.atleast_2d(paths.unpack()[np.asarray(rows, dtype=int) if isinstance(rows, list) else rows])
    np.testing.assert_array_equal(paths.unpack(rows=rows), wanted)
    np.testing.assert_array_equal(paths.unpack("b", rows), wanted[:, 5:])
    subset = paths.subset(rows)
    np.testing.assert_array_equal(subset.unpack(), wanted)
    np.testing.assert_array_equal(paths.labels[subset.ids], subset.labels)


def test_counts_equal_a_naive_loop(make_paths, monkeypatch):
    monkeypatch.setattr(_layout, "_ROWS_PER_CHUNK", 7)
    paths = make_paths(50, {"a": 3, "b": 13}, p=0.3, n_classes=4)
    naive = np.zeros(16, int)
    for image in paths.unpack():
        for i, is_open in enumerate(image):
            naive[i] += is_open
    np.testing.assert_array_equal(paths.counts(), naive)
    np.testing.assert_allclose(paths.rates(), naive / 50)


def test_rates_by_class_equal_a_naive_loop(make_paths, monkeypatch):
    monkeypatch.setattr(_layout, "_ROWS_PER_CHUNK", 7)
    paths = make_paths(50, {"a": 3, "b": 13}, p=0.3)
    labels = np.array([7, 2, 2, 9, 7] * 10)
    groups = paths.rates(by=labels)
    assert groups.values.tolist() == [2, 7, 9]
    assert groups.n_images.tolist() == [20, 20, 10]
    for value, counts, rates in zip(groups.values, groups.counts, groups.rates, strict=True):
        members = paths.unpack()[labels == value]
        np.testing.assert_array_equal(counts, members.sum(axis=0))
        np.testing.assert_allclose(rates, members.mean(axis=0))


def test_rates_by_name(make_paths):
    paths = make_paths(12, {"a": 4}, n_classes=3, preds=np.zeros(12, int))
    assert paths.rates(by="labels").values.tolist() == [0, 1, 2]
    assert paths.rates(by="preds").values.tolist() == [0]


@given(gate_arrays(), st.integers(0, 5))
def test_hamming_equals_a_naive_loop(gates, n_other):
    x = together(gates)
    paths = PathSet.from_gates(gates)
    naive = np.array([[(a != b).sum() for b in x] for a in x]).reshape(len(x), len(x))
    np.testing.assert_array_equal(paths.hamming(), naive)
    other = paths.subset(slice(n_other))
    np.testing.assert_array_equal(paths.hamming(other), naive[:, :n_other])


def test_hamming_is_the_same_in_chunks(make_paths, monkeypatch):
    paths = make_paths(40, {"a": 21})
    whole = paths.hamming()
    monkeypatch.setattr(_layout, "_ROWS_PER_CHUNK", 7)
    np.testing.assert_array_equal(paths.hamming(), whole)


@given(gate_arrays())
def test_distinct_equals_the_size_of_a_set(gates):
    # Few filters per layer, so equal rows do occur.
    x = together(gates)[:, :3]
    paths = PathSet.from_gates({"layer": x})
    assert paths.distinct() == len({tuple(row) for row in x.tolist()})


def test_distinct_tells_thousands_of_paths_apart():
    numbers = np.arange(4000) % 3000
    assert PathSet.from_gates({"a": numbers[:, None] >> np.arange(12) & 1}).distinct() == 3000


def test_distinct_counts_a_path_once_though_it_is_in_two_chunks(make_paths, monkeypatch):
    monkeypatch.setattr(_layout, "_ROWS_PER_CHUNK", 4)
    paths = make_paths(6, {"a": 30})
    assert paths.subset([0, 1, 2, 3, 4, 5] * 3).distinct() == 6


def test_bits_may_lie_in_memory_column_by_column(make_paths):
    paths = make_paths(9, {"a": 30})
    turned = PathSet(**{**vars(paths), "bits": np.asfortranarray(paths.bits)})
    assert turned.distinct() == 9
    np.testing.assert_array_equal(turned.unpack(), paths.unpack())


def naive_knn_accuracy(x, labels, k):
    """Leave-one-out accuracy with the tie rules of the docstring, in fractions of whole votes."""
    credit = 0.0
    for i, path in enumerate(x):
        distance = {j: int((path != x[j]).sum()) for j in range(len(x)) if j != i}
        kth = sorted(distance.values())[k - 1]
        nearer = [j for j, d in distance.items() if d < kth]
        tied = [j for j, d in distance.items() if d == kth]
        votes = Counter()
        for j in nearer:
            votes[labels[j]] += len(tied)
        for j in tied:
            votes[labels[j]] += k - len(nearer)
        winners = [label for label, n in votes.items() if n == max(votes.values())]
        credit += (labels[i] in winners) / len(winners)
    return credit / len(x)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 8))
def test_knn_accuracy_equals_a_naive_loop(seed, k, n_filters):
    rng = np.random.default_rng(seed)
    x, labels = rng.random((14, n_filters)) < 0.4, rng.integers(0, 3, 14)
    paths = PathSet.from_gates({"a": x}, labels=labels)
    assert paths.knn_accuracy(k) == pytest.approx(naive_knn_accuracy(x, labels, k))


def test_knn_accuracy_does_not_depend_on_the_order_of_images(make_paths):
    paths = make_paths(60, {"a": 4}, n_classes=3)
    shuffled = paths.subset(np.random.default_rng(1).permutation(60))
    assert shuffled.knn_accuracy(5) == pytest.approx(paths.knn_accuracy(5))


def test_knn_accuracy_of_paths_that_are_the_class_is_one():
    labels = np.arange(40) % 4
    paths = PathSet.from_gates({"a": np.equal.outer(labels, np.arange(4))}, labels=labels)
    assert paths.knn_accuracy(5) == 1.0


def test_knn_accuracy_takes_a_seeded_subset_with_every_class(make_paths):
    labels = np.repeat([0, 1, 2], [100, 60, 40])
    paths = make_paths(200, {"a": 12}, labels=labels)
    first = paths.knn_accuracy(3, max_images=50, seed=1)
    assert first == paths.knn_accuracy(3, max_images=50, seed=1)
    assert first != paths.knn_accuracy(3, max_images=50, seed=2)


def test_select_layers_keeps_order_depth_and_bits(make_paths):
    paths = make_paths(10, {"a": 5, "b": 16, "c": 9}, n_classes=2)
    selected = paths.select_layers([-1, "a"])
    assert [(s.name, s.depth, s.offset) for s in selected.layers] == [("a", 0, 0), ("c", 2, 1)]
    np.testing.assert_array_equal(selected.unpack(), np.concatenate([paths.unpack("a"), paths.unpack("c")], axis=1))


def test_parts_remember_the_whole_and_forget_its_near_gates(make_paths):
    paths = make_paths(10, {"a": 5, "b": 6}, manifest={"model": "m", "n_near_threshold": 3})
    part = paths.subset([1, 2]).select_layers(["a"])
    assert part.manifest["part_of"] == {"n_images": 10, "n_filters": 11}
    assert part.manifest["n_near_threshold"] is None
    assert paths.manifest["n_near_threshold"] == 3


def test_repr_and_summary_say_what_is_there(make_paths):
    gates = {"a": np.ones((4, 5), int), "b": np.zeros((4, 15), int)}
    manifest = {"model": "net", "n_near_threshold": 2, "near_threshold": 1e-4}
    paths = PathSet.from_gates(gates, labels=[0, 1, 0, 1], preds=[0, 1, 0, 0], manifest=manifest)
    assert repr(paths) == "PathSet(4 images, 2 layers, 20 filters, labelled)"
    assert paths.summary().splitlines() == [
        "Paths of net: 4 images, 2 layers, 20 filters (3 bytes per image, 12 bytes)",
        "open on average: 25.0 % of the filters",
        "labels: 2 classes; predicted correctly: 75.0 %",
        "gates within 0.0001 of switching: 2 of 80",
    ]


def test_to_dict_is_json(make_paths):
    described = make_paths(4, {"a": 5}).to_dict()
    assert json.loads(json.dumps(described, allow_nan=False)) == described


def test_a_set_without_images_counts_zero_and_refuses_rates(make_paths):
    empty = make_paths(5, {"a": 3}).subset([])
    assert len(empty) == 0
    assert empty.counts().tolist() == [0, 0, 0]
    assert empty.distinct() == 0
    assert empty.hamming().shape == (0, 0)
    assert "0 images" in empty.summary()
    with pytest.raises(ValueError, match="rates need at least 1 image"):
        empty.rates()


def columns(n=2, **changes):
    whole = {
        "bits": np.zeros((n, 1), np.uint8),
        "layers": (LayerSpec("a", 3, 0, 0),),
        "ids": np.arange(n),
        "labels": None,
        "preds": np.zeros(n, np.int64),
        "conf": np.zeros(n, np.float32),
    }
    return whole | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": [[0]]}, TypeError, "bits is a list, wanted a NumPy array of uint8"),
        ({"bits": np.zeros((2, 1))}, TypeError, "bits has type float64, wanted uint8"),
        ({"bits": np.zeros((2, 2), np.uint8)}, ValueError, r"bits has shape \(2, 2\), wanted \(any, 1\)"),
        ({"bits": np.zeros((2, 1, 1), np.uint8)}, ValueError, r"bits has shape \(2, 1, 1\), wanted \(any, 1\)"),
        ({"bits": np.full((2, 1), 8, np.uint8)}, ValueError, "bits beyond the last filter of a layer are set"),
        ({"ids": np.arange(3)}, ValueError, r"ids has shape \(3,\), wanted \(2,\)"),
        ({"ids": np.array([None, None])}, TypeError, "ids has type object, wanted int64 or str"),
        ({"labels": np.zeros(2, np.int32)}, TypeError, "labels has type int32, wanted int64"),
        ({"conf": np.zeros(2)}, TypeError, "conf has type float64, wanted float32"),
        ({"margins": np.zeros((2, 8), np.float16)}, ValueError, r"margins has shape \(2, 8\), wanted \(2, 3\)"),
        ({"layers": ()}, ValueError, "needs at least one layer"),
        ({"layers": (LayerSpec("a", 3, 1, 0),)}, ValueError, "starts at byte 1, wanted 0"),
        ({"layers": (LayerSpec("a", 3, 0, 0), LayerSpec("a", 3, 1, 1))}, ValueError, "got 'a' more than once"),
        ({"layers": (LayerSpec("a", 3, 0, 1), LayerSpec("b", 3, 1, 0))}, ValueError, "execution order, got depths"),
    ],
)
def test_columns_that_do_not_fit_are_refused(changes, error, message):
    PathSet(**columns())
    with pytest.raises(error, match=message):
        PathSet(**columns(**changes))


@pytest.mark.parametrize(
    ("gates", "options", "error", "message"),
    [
        ({"a": [[0.5]]}, {}, ValueError, "gates of layer 'a' must be 0 or 1"),
        ({"a": [[np.nan]]}, {}, ValueError, "gates of layer 'a' must be 0 or 1"),
        ({"a": [1, 0]}, {}, ValueError, r"gates of layer 'a' have shape \(2,\), wanted \(images, filters\)"),
        ({"a": np.zeros((2, 0))}, {}, ValueError, "layer 'a' has 0 filters"),
        ({"a": [[1]], "b": [[1], [0]]}, {}, ValueError, "equally many images, got {'a': 1, 'b': 2}"),
        ({}, {}, ValueError, "needs at least one layer"),
        ({"a": [[1]]}, {"labels": [0.5]}, TypeError, "labels have type float64, wanted integers"),
        ({"a": [[1]]}, {"ids": [0.5]}, TypeError, "image ids have type float64, wanted integers or strings"),
    ],
)
def test_from_gates_refuses(gates, options, error, message):
    with pytest.raises(error, match=message):
        PathSet.from_gates(gates, **options)


def test_unknown_layers_are_refused_with_a_hint(make_paths):
    paths = make_paths(2, {"layer1.conv1": 3, "layer2.conv1": 4})
    with pytest.raises(ValueError, match=r"no layer 'layer1\.conv'; did you mean layer1\.conv1"):
        paths.unpack("layer1.conv")
    with pytest.raises(ValueError, match=r"no layer 2; the 2 layers are: layer1\.conv1, layer2\.conv1"):
        paths.unpack(2)
    with pytest.raises(ValueError, match="got no layer, wanted some of the 2"):
        paths.select_layers([])


def test_rows_out_of_range_are_refused(make_paths):
    paths = make_paths(3, {"a": 2})
    with pytest.raises(ValueError, match="rows has indices from 0 to 3, the path set has 3 images"):
        paths.subset([0, 3])
    with pytest.raises(TypeError, match=r"rows has type bool and shape \(2,\)"):
        paths.subset(np.array([True, False]))
    with pytest.raises(TypeError, match="rows has type float64"):
        paths.subset([0.5])


def test_groups_are_refused_when_there_are_none(make_paths):
    paths = make_paths(4, {"a": 2})
    with pytest.raises(ValueError, match=r"has no labels; give the values themselves: by=array of shape \(4,\)"):
        paths.knn_accuracy(2)
    with pytest.raises(ValueError, match="has no preds"):
        paths.rates(by="preds")
    with pytest.raises(ValueError, match='by is \'label\', wanted "labels", "preds" or an array'):
        paths.rates(by="label")
    with pytest.raises(ValueError, match=r"by has shape \(3,\), wanted one value per image: \(4,\)"):
        paths.rates(by=[0, 1, 2])


def test_too_many_neighbours_are_refused(make_paths):
    paths = make_paths(4, {"a": 2}, n_classes=2)
    with pytest.raises(ValueError, match="k is 4, wanted 1 to 3 neighbours for 4 images"):
        paths.knn_accuracy(4)


def test_hamming_refuses_other_layers(make_paths):
    with pytest.raises(ValueError, match="got 'a' with 2 filters and 'a' with 3"):
        make_paths(2, {"a": 2}).hamming(make_paths(2, {"a": 3}))
    with pytest.raises(ValueError, match="got 1 and 2 of them"):
        make_paths(2, {"a": 2}).hamming(make_paths(2, {"a": 2, "b": 2}))


def test_importing_the_package_imports_no_optional_package():
    code = "import sys, decouplify.paths; print({'sklearn', 'matplotlib', 'rich', 'scipy', 'pandas'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_public_names():
    assert paths_package.__all__ == [
        "DYNAMIC",
        "ENERGETIC",
        "SILENT",
        "ActivationHistogram",
        "BeforeAfter",
        "ClassInformation",
        "Contrast",
        "Counterfactual",
        "DecisionTree",
        "FilterStates",
        "GateEffect",
        "GroupRates",
        "Hopkins",
        "LayerSpec",
        "LayerStates",
        "PathDiff",
        "PathMap",
        "PathSet",
        "PseudoThresholds",
        "Result",
        "RunningIdsWarning",
        "Sweep",
        "SweepRun",
        "TreeNode",
        "before_after",
        "class_information",
        "class_prototypes",
        "contrast",
        "counterfactual",
        "decision_tree",
        "force",
        "gate_effect",
        "hopkins",
        "macs_of_paths",
        "merge",
        "path_map",
        "pseudo_paths",
        "pseudo_thresholds",
        "record",
        "sweep",
        "transplant",
    ]
    assert all(hasattr(paths_package, name) for name in paths_package.__all__)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (4_250_000_000, "4.25 GB"), (2e15, "2e+03 TB")],
)
def test_file_sizes_are_readable(n_bytes, text):
    assert file_size(n_bytes) == text
