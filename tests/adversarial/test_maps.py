"""The map of clean and attacked paths, and its distances."""

from __future__ import annotations

import json

import numpy as np
import pytest

from decouplify.adversarial import adversarial_map
from decouplify.paths import PathSet

rng = np.random.default_rng(0)
CENTRES = rng.random((3, 64)) < 0.5


def around(centre: np.ndarray, n: int, **columns) -> PathSet:
    columns = {name: np.full(n, value) for name, value in columns.items()}
    return PathSet.from_gates({"conv": centre ^ (rng.random((n, 64)) < 0.05)}, **columns)


def clean_paths() -> PathSet:
    gates = np.concatenate([around(CENTRES[c], 40).unpack() for c in range(2)])
    return PathSet.from_gates({"conv": gates}, labels=np.repeat([0, 1], 40), preds=np.repeat([0, 1], 40))


@pytest.mark.parametrize(("at", "where"), [(0, "source"), (1, "target"), (2, "neither")])
def test_shares_say_where_attacked_paths_lie(at, where) -> None:
    attacked = around(CENTRES[at], 30, labels=0, preds=1)
    found = adversarial_map(clean_paths(), attacked, 0, 1, method="pca")
    assert found.shares[where] > 0.8
    assert sum(found.shares.values()) == pytest.approx(1)
    np.testing.assert_array_equal(found.to_target, (attacked.unpack() ^ CENTRES[1]).sum(1))
    assert found.map.labels.tolist() == [0] * 40 + [1] * 40 + [2] * 30
    assert found.map.knn_accuracy > (0.9 if at == 2 else 0.5)


def test_only_attacks_from_source_to_target_are_shown() -> None:
    attacked = PathSet.from_gates({"conv": np.zeros((4, 64), bool)}, labels=[0, 0, 1, 0], preds=[1, 2, 1, 1])
    assert len(adversarial_map(clean_paths(), attacked, 0, 1, method="pca").to_source) == 2


def test_it_prints_saves_and_draws(tmp_path) -> None:
    found = adversarial_map(clean_paths(), around(CENTRES[2], 10, labels=0, preds=1), 0, 1, perplexity=5)
    assert found.map.method == "tsne"
    assert "10 attacked images, distance to source" in repr(found)
    saved = json.loads(found.save(tmp_path / "map.json").read_text())
    assert saved["shares"] == found.shares
    legend = found.plot(class_names=["dog", "truck"]).get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["dog", "truck", "dog attacked\nto be truck"]


def test_an_empty_group_is_named() -> None:
    with pytest.raises(ValueError, match="there are no images attacked from 0 to 1"):
        adversarial_map(clean_paths(), around(CENTRES[2], 10, labels=1, preds=0), 0, 1)
