"""Scores are the counts they claim to be, know planted filters, and are not fooled by filters that ignore the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import decouplify
from decouplify.concepts import (
    Concept,
    ConceptImage,
    ConceptImages,
    collect_thresholds,
    interpretability,
    planted_concepts,
)
from planted import PlantedColors


def raw(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).movedim(-1, 0).float() / 255


def test_a_planted_filter_ranks_first(planted: nn.Module, scenes: ConceptImages) -> None:
    scores = interpretability(planted, scenes, "features", min_images=10)
    first = scores.ranking(3)
    assert {(f.filter, f.concept.name) for f in first} == {(0, "red-c"), (1, "green-c"), (2, "blue-c")}
    for found in first:
        assert found.value > 0.9
        assert found.null < 0.2
        assert found.p_value == 1 / 21
    assert scores.ranking(1, measure="conditional", category="color")[0].filter in (0, 1, 2)
    assert "red-c" in scores.summary()


def test_random_filters_stay_inside_their_null(scenes: ConceptImages) -> None:
    scores = interpretability(PlantedColors(60).eval(), scenes, "features", min_images=10)
    layer = scores.layer("features")
    for measure in ("iou", "conditional", "paper"):
        p_values = layer.p_values(measure)[3:]
        assert (p_values <= 1 / 21).sum() <= 9, measure  # 60 / 21 = 2.9 expected
        assert 0.35 < p_values.mean() < 0.7, measure
        excess = (layer.best(measure) - layer.null[measure].mean(0))[3:]
        assert abs(excess.mean()) < 0.05 * layer.null[measure][:, 3:].mean() + 0.01, measure


class Recorded(nn.Module):
    """Gives the pixels as features."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)


def random_images(seed: int, n: int = 12) -> ConceptImages:
    """Random pixels on random grids, two layers of labels, whole-image labels, categories missing here and there."""
    rng = np.random.default_rng(seed)
    concepts = tuple(Concept(number, f"c{number}", "ab"[number % 2]) for number in (1, 2, 3, 300, 301))
    images = []
    for i in range(n):
        pixels = (rng.random((8, 8, 4)) ** rng.integers(1, 9) * 255).astype(np.uint8)
        masks = rng.choice([0, 0, 0, 1, 2, 300], (rng.integers(0, 3), *rng.integers(3, 7, 2)))
        whole = tuple(int(number) for number in (3, 301) if rng.random() < 0.3)
        annotated = None if rng.random() < 0.5 else frozenset(["ab"[rng.integers(2)]])
        images.append(ConceptImage(pixels, masks, whole, annotated, f"image {i}"))
    return ConceptImages(concepts, images, raw)


def slow_scores(data: ConceptImages, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """The formulas, one filter, concept and image at a time."""
    shape = (len(thresholds), len(data.concepts))
    hits, both, either = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    present = np.zeros(shape[1])
    for image in data.images:
        features = raw(image.pixels)
        for t, concept in enumerate(data.concepts):
            label = image.mask(concept.number)
            labelled = {c.category for c in data.concepts if c.number in image.numbers} | (
                {"a", "b"} if image.categories is None else image.categories
            )
            present[t] += label.any()
            for k, threshold in enumerate(thresholds):
                up = F.interpolate(features[None, k : k + 1], size=image.grid, mode="bilinear", align_corners=False)
                active = up[0, 0].numpy() > threshold
                n_both, n_either = (active & label).sum(), (active | label).sum()
                hits[k, t] += label.any() and n_both / n_either > 0.01
                both[k, t] += n_both
                either[k, t] += n_either if concept.category in labelled else label.sum()
    return {
        "paper": hits / len(data),
        "conditional": hits / np.maximum(present, 1),
        "iou": both / np.maximum(either, 1),
    }


@pytest.mark.parametrize("seed", range(4))
def test_measures_equal_the_slow_formulas(seed: int) -> None:
    data = random_images(seed)
    scores = interpretability(Recorded(), data, "maps", quantile=0.2, min_images=1, n_permutations=3, batch_size=5)
    layer = scores.layers[0]
    for measure, expected in slow_scores(data, layer.thresholds).items():
        np.testing.assert_allclose(np.nan_to_num(layer.measures[measure]), expected, atol=1e-12, err_msg=measure)


@given(seed=st.integers(0, 2**31), quantile=st.floats(0.01, 0.9))
@settings(max_examples=30)
def test_the_papers_score_never_exceeds_the_frequency(seed: int, quantile: float) -> None:
    data = random_images(seed)
    scores = interpretability(Recorded(), data, "maps", quantile=quantile, min_images=1, n_permutations=2)
    layer = scores.layers[0]
    assert (layer.measures["paper"] <= scores.n_present / scores.n_images).all()
    assert (layer.hits <= scores.n_present).all()
    for values in layer.measures.values():
        assert np.nanmin(values, initial=0) >= 0
        assert np.nanmax(values, initial=0) <= 1
    conditional = np.nan_to_num(layer.measures["conditional"], nan=1.0)
    assert (layer.measures["paper"] <= conditional + 1e-12).all()
    assert all((null >= 0).all() and (null <= 1).all() for null in layer.null.values() if not np.isnan(null).any())


def test_closed_filters_are_never_active_and_modes_return(scenes: ConceptImages) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    decouplify.wrap(model, (3, 32, 32)).train()
    with torch.no_grad():
        model.decoupling.controllers["2"].fc2.bias[:3] = -1
    scores = interpretability(model, scenes, min_images=5, max_images=30)
    layer = scores.layer("2")
    assert (layer.n_fired[:3] == 0).all()
    assert (layer.n_fired[3:] > 0).all()
    assert layer.mean("paper") == pytest.approx(5 / 8 * layer.mean("paper", include_silent=False))
    assert all(module.training for module in model.modules())
    assert model.decoupling._observer is None
    assert scores.n_images == 30


def test_a_layer_that_is_closed_altogether(scenes: ConceptImages) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    decouplify.wrap(model, (3, 32, 32))
    with torch.no_grad():
        model.decoupling.controllers["1"].fc2.bias.fill_(-1)
    state = torch.get_rng_state()
    layer = interpretability(model, scenes, min_images=5, max_images=20).layer("1")
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are the caller's
    assert (layer.mean(), layer.mean("paper")) == (0, 0)
    assert np.isnan(layer.mean("paper", include_silent=False))
    assert (layer.p_values() == 1).all()


def test_the_null_pairs_each_image_with_others(planted: nn.Module) -> None:
    same = planted_concepts(1, 32).images[0]
    data = ConceptImages(planted_concepts(1, 32).concepts, [same] * 6, planted_concepts(1, 32).transform)
    layer = interpretability(planted, data, "features", min_images=1, n_permutations=50).layers[0]
    # All images are equal, so a random pairing is as good as the true one; and there are 5 shifts, not 50.
    assert layer.null["iou"].shape[0] == 5
    assert (layer.null["iou"] == layer.best("iou")).all()
    assert (layer.p_values() == 1).all()


def test_concepts_in_too_few_images_have_no_score(planted: nn.Module, scenes: ConceptImages) -> None:
    scores = interpretability(planted, scenes, "features", min_images=1000, max_images=20)
    layer = scores.layers[0]
    assert np.isnan(layer.measures["iou"]).all()
    assert (layer.measures["paper"] <= scores.n_present / 20).all()
    assert scores.ranking() == []
    assert np.isnan(layer.p_values()).all()
    assert scores.to_dict()["layers"][0]["iou"]["mean"] is None
    assert "0 concepts in at least 1000 of 20 images" in scores.summary()


def test_results_can_be_saved_and_drawn(planted: nn.Module, scenes: ConceptImages, tmp_path: Any) -> None:
    from matplotlib import pyplot

    scores = interpretability(planted, scenes, "features", min_images=5, max_images=30)
    document = scores.to_dict()
    assert document["layers"][0]["iou"]["best"][0] > 0.9
    assert scores.save(tmp_path / "scores.json").stat().st_size > 100
    for measure in ("iou", "conditional", "paper"):
        assert scores.plot(measure=measure, before=scores).get_ylabel()
    assert scores.save(tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []
    with pytest.raises(ValueError, match="measure is 'f1', wanted one of 'iou', 'conditional', 'paper'"):
        scores.plot(measure="f1")  # type: ignore[arg-type]


def test_refusals(planted: nn.Module, scenes: ConceptImages) -> None:
    with pytest.raises(ValueError, match="n_permutations=0"):
        interpretability(planted, scenes, "features", n_permutations=0)
    with pytest.raises(ValueError, match="at least 2 images"):
        interpretability(planted, scenes, "features", max_images=1)
    odd = ConceptImage(scenes[0].pixels, np.full((1, 4, 4), 412), name="odd")
    with pytest.raises(ValueError, match="has the label 412, which is no concept"):
        interpretability(planted, ConceptImages(scenes.concepts, [scenes[0], odd], scenes.transform), "features")
    scores = interpretability(planted, scenes, "features", max_images=5, min_images=1)
    with pytest.raises(ValueError, match="no category 'verb'"):
        scores.ranking(category="verb")
    with pytest.raises(KeyError, match="no layer 'stem' was scored"):
        scores.layer("stem")
    other = collect_thresholds(nn.Sequential(nn.Conv2d(3, 2, 1)), scenes, "0", max_images=2)
    with pytest.raises(ValueError, match="other weights"):
        interpretability(planted, scenes, "features", thresholds=other)
