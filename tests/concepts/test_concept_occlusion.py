"""Hiding a concept switches the gates that need it, and direct, cascaded and accidental switches are told apart."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from torch import nn

import decouplify
from decouplify.concepts import (
    ConceptImages,
    collect_thresholds,
    filter_cards,
    interpretability,
    occlude_concept,
    representation_ability,
)
from decouplify.concepts._occlude import FILLS, control_mask, hide
from decouplify.concepts._pictures import overlay
from decouplify.paths import pseudo_paths, pseudo_thresholds


def test_direct_and_cascaded_switches_are_told_apart(chain: nn.Module, squares: ConceptImages) -> None:
    result = occlude_concept(chain, squares, "red square")
    conv2, conv3 = result.layers
    assert (conv2.name, conv3.name, len(result.images)) == ("conv2", "conv3", 6)
    # Filters 0 and 1 of conv2 see red themselves; filter 0 of conv3 is on only while filter 1 of conv2 is.
    assert conv2.off.tolist() == [[True, True, False]] * 6
    assert conv2.direct_off.tolist() == [[True, True, False]] * 6
    assert not conv2.cascaded_off.any()
    assert conv3.off.tolist() == [[True, False]] * 6
    assert not conv3.direct_off.any()
    assert conv3.cascaded_off.tolist() == [[True, False]] * 6
    assert (conv2.always_off, conv3.always_off) == ([0, 1], [0])
    assert not conv2.on.any()
    assert np.allclose(result.area, 16 / 256)
    # What is hidden instead overlaps the square as little as possible, so nothing switches.
    assert not conv2.control_off.any()
    assert np.array_equal(conv2.specific_off, conv2.off)
    # Filter 0 of conv2 shows where red is: the mask itself.
    assert (conv2.iou[:, 0] == 1).all()
    assert (conv2.margin_before[:, 0] > 0).all()
    assert (conv2.margin_after[:, 0] < 0).all()
    first = result.filters()[0]
    assert (first.layer, first.filter, first.off, first.control, first.direct, first.iou) == ("conv2", 0, 1, 0, 1, 1)


def test_a_concept_nobody_looks_at_switches_nothing(chain: nn.Module, squares: ConceptImages) -> None:
    result = occlude_concept(chain, squares, "blue square")
    assert not any(layer.off.any() for layer in result.layers)
    assert "no filter switches off" in result.summary()
    assert result.filters() == []
    assert [len(example.filters) for example in result.examples] == [0] * 4


def test_a_network_without_gates_is_read_by_its_responses(chain: nn.Module, squares: ConceptImages) -> None:
    """Against pseudo-paths of whole images and of images hidden by hand."""
    dark = [replace(i, pixels=0 * i.pixels, masks=0 * i.masks, name="dark") for i in squares.images]
    squares = ConceptImages(squares.concepts, [*squares.images, *dark], squares.transform)
    plain = decouplify.unwrap(copy.deepcopy(chain))
    keys = list(plain.state_dict())
    result = occlude_concept(plain, squares, "red square", ["conv2", "conv3"])
    assert list(plain.state_dict()) == keys
    number = result.concept.number
    shown = {image.name: image for image in squares.images}
    whole = [shown[name] for name in result.images]
    hidden = [hide(image.pixels, image.mask(number), "black", np.random.default_rng(0)) for image in whole]
    read = [torch.stack([squares.transform(p) for p in pixels]) for pixels in ([i.pixels for i in whole], hidden)]
    everything = [torch.stack([squares.transform(image.pixels) for image in squares.images])]
    thresholds = pseudo_thresholds(plain, everything, like=chain)
    before, after = (pseudo_paths(plain, [x], thresholds=thresholds, like=chain, margins=True) for x in read)
    for layer in result.layers:
        np.testing.assert_array_equal(layer.before, before.unpack(layer.name))
        np.testing.assert_array_equal(layer.after, after.unpack(layer.name))
        columns = before.filter_slices[layer.name]
        np.testing.assert_allclose(layer.margin_before, before.margins[:, columns], atol=1e-3)
        np.testing.assert_allclose(layer.margin_after, after.margins[:, columns], atol=1e-3)
        assert not layer.cascaded_off.any()
    assert result.layers[0].off[:, 0].all()  # filter 0 of conv2 responds to red alone
    assert not result.layers[0].control_off[:, 0].any()
    assert representation_ability(plain, squares, ["conv2"]).covers[0].multiple_mean > 0.9


def test_the_model_is_left_as_it_was(chain: nn.Module, squares: ConceptImages) -> None:
    chain.train()
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in chain.modules()]
    occlude_concept(chain, squares, 7, "conv3", max_images=2)
    representation_ability(chain, squares, max_images=2)
    assert all(module.training for module in chain.modules())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in chain.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in chain.state_dict().items())
    assert (chain.decoupling._forced, chain.decoupling._observer) == ({}, None)


def test_fewer_images_and_given_images(chain: nn.Module, squares: ConceptImages) -> None:
    assert occlude_concept(chain, squares, 7, indices=[4, 2], n_examples=0).images == ("square 4", "square 2")
    result = occlude_concept(chain, squares, 7, max_images=3, n_examples=1)
    assert (len(result.images), len(result.examples)) == (3, 1)


@pytest.mark.parametrize("fill", FILLS)
def test_fillings_touch_the_concept_only(squares: ConceptImages, fill: str) -> None:
    image = squares[1]
    mask = image.mask(7)
    hidden = hide(image.pixels, mask, fill, np.random.default_rng(0))  # type: ignore[arg-type]
    inside = mask.repeat(2, 0).repeat(2, 1)
    assert np.array_equal(hidden[~inside], image.pixels[~inside])
    assert not np.array_equal(hidden[inside], image.pixels[inside])
    expected = {"black": 0, "mean": image.pixels.mean((0, 1)).astype(np.uint8)}
    if fill in expected:
        assert (hidden[inside] == expected[fill]).all()
    assert image.pixels[inside].max() == 255  # the original is whole


def test_controls_have_the_same_size_and_are_elsewhere(squares: ConceptImages) -> None:
    mask = squares[1].mask(7)
    control = control_mask(mask, np.random.default_rng(0))
    assert control.sum() == mask.sum()
    assert not (control & mask).any()


def test_filters_that_switch_together_cover_the_concept(chain: nn.Module, squares: ConceptImages) -> None:
    result = representation_ability(chain, squares, ["conv2", "conv3"], images_per_concept=4)
    by_place = {(cover.layer, cover.concept.number): cover for cover in result.covers}
    red = by_place["conv2", 7]
    assert (red.n_images, red.n_off, red.n_specific) == (4, 2, 2)
    # Filter 0 is the square, filter 1 is on everywhere: together they cover all, so the overlap is that of the image.
    assert (red.single_max, red.single_mean) == (1, 1)
    assert red.multiple_max == pytest.approx(16 / 256)
    blue = by_place["conv2", 9]
    assert (blue.n_off, blue.multiple_mean, blue.control_mean) == (0, 0, 0)
    assert blue.single_mean == pytest.approx(16 / 256)  # of the filter that is on everywhere
    for cover in result.covers:
        assert 0 <= cover.single_mean <= cover.single_max <= 1
        assert 0 <= cover.multiple_mean <= cover.multiple_max <= 1
    assert result.mean("multiple_mean", "conv2", "object") == pytest.approx(8 / 256)
    assert np.isnan(result.mean("multiple_mean", "conv2", "part"))


def test_cards_hold_the_strongest_images(chain: nn.Module, squares: ConceptImages) -> None:
    scores = interpretability(chain, squares, "conv2", min_images=1)
    thresholds = collect_thresholds(chain, squares, ["conv2"])
    cards = filter_cards(chain, squares, [("conv2", 0), *scores.ranking(1)], top=2, thresholds=thresholds, batch_size=4)
    for card in cards.cards:
        assert (card.layer, card.filter) == ("conv2", 0)
        assert [image.value for image in card.images] == [0.5, 0.5]
        assert [image.name for image in card.images] == ["square 0", "square 1"]  # all are equal: in their order
        for i, image in enumerate(card.images):
            assert np.array_equal(image.mask, squares[i].mask(7))
    assert (cards.cards[0].title, cards.cards[1].title) == ("", "red square")
    silent = filter_cards(chain, squares, [("conv2", 2)], thresholds=thresholds)
    assert silent.cards[0].images == ()
    assert "none" in silent.summary()


def test_cards_begin_with_the_strongest_image(chain: nn.Module, squares: ConceptImages) -> None:
    brightness = [0.7, 1.0, 0.8, 0.6, 0.9]
    dimmed = [
        replace(image, pixels=(image.pixels * share).astype(np.uint8))
        for image, share in zip(squares.images, brightness, strict=False)
    ]
    data = replace(squares, images=dimmed)
    thresholds = collect_thresholds(chain, data, "conv2", quantile=0.3)  # so that all squares are above it
    cards = filter_cards(chain, data, [("conv2", 0)], top=3, thresholds=thresholds, batch_size=2)
    assert [image.name for image in cards.cards[0].images] == ["square 1", "square 4", "square 2"]


def test_overlays_light_the_mask_and_darken_the_rest() -> None:
    pixels = np.full((100, 60, 1), 200, np.uint8)
    mask = np.zeros((10, 6), np.bool_)
    mask[2:6, 1:4] = True
    picture = overlay(pixels, mask)
    assert picture.shape == (400, 240, 3)
    assert (picture[0, 0] == 50).all()
    assert (picture[150, 100] == 200).all()
    assert tuple(picture[80, 40]) == (255, 214, 0)  # the corner of the mask


def test_results_can_be_saved_and_drawn(chain: nn.Module, squares: ConceptImages, tmp_path: Path) -> None:
    hidden = occlude_concept(chain, squares, 7)
    together = representation_ability(chain, squares)
    thresholds = collect_thresholds(chain, squares, ["conv2"])
    cards = filter_cards(chain, squares, [("conv2", 0), ("conv2", 2)], thresholds=thresholds)
    for result in (hidden, together, cards, thresholds):
        name = type(result).__name__
        assert result.save(tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert result.save(tmp_path / f"{name}.json").stat().st_size > 50
        assert result.summary()
        assert repr(result).startswith(f"{name}(")
    together.plot(reduce="max")
    hidden.plot_examples().savefig(tmp_path / "examples.png")
    cards.plot_card(0).savefig(tmp_path / "card.png")
    cards.plot_card(1)
    assert pyplot.get_fignums() == []


def test_refusals(chain: nn.Module, squares: ConceptImages, scenes: ConceptImages) -> None:
    with pytest.raises(ValueError, match="fill is 'white', wanted one of 'black', 'mean', 'blur', 'noise'"):
        occlude_concept(chain, squares, 7, fill="white")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no concept 'green square'"):
        occlude_concept(chain, squares, "green square")
    with pytest.raises(ValueError, match="'relu1' is not a gated convolution; those are conv2, conv3"):
        occlude_concept(chain, squares, 7, "relu1")
    with pytest.raises(ValueError, match="no convolution of Conv2d can be gated"):
        occlude_concept(nn.Conv2d(3, 3, 1), squares, 7)
    plain = decouplify.unwrap(copy.deepcopy(chain))
    with pytest.raises(ValueError, match=r"Chain has no gates, so thresholds .*; leave thresholds out"):
        occlude_concept(plain, squares, 7, thresholds=collect_thresholds(plain, squares, "relu2"))
    with pytest.raises(ValueError, match=r"none of 80 images shows 'day-s' on 0\.2 to 80 % of its area"):
        occlude_concept(chain, scenes, "day-s")
    with pytest.raises(ValueError, match="none of 80 images has a concept of scene"):
        representation_ability(chain, scenes, categories="scene")
    with pytest.raises(ValueError, match="there is no filter 3"):
        filter_cards(chain, squares, [("conv2", 3)])
    with pytest.raises(ValueError, match='reduce is \'sum\', wanted "mean" or "max"'):
        representation_ability(chain, squares).plot(reduce="sum")  # type: ignore[arg-type]


def test_networks_with_shared_gates_and_signed_features(scenes: ConceptImages) -> None:
    """A depthwise convolution shares its producer's gate, SiLU is negative, and a residual sum has two branches."""
    timm = pytest.importorskip("timm")
    model = decouplify.wrap(timm.create_model("test_efficientnet", num_classes=3), (3, 32, 32))
    with torch.no_grad():
        for controller in model.decoupling.controllers.values():
            controller.fc2.weight.normal_(0, 2)
            controller.fc2.bias.normal_(0, 0.1)
    layers = [site.name for site in model.decoupling.plan.sites]
    result = occlude_concept(model, scenes, "ball", layers, max_images=3, threshold_images=10)
    assert [layer.name for layer in result.layers] == layers
    shared = [site.name for site in model.decoupling.plan.sites if site.gate != site.name]
    assert shared
    by_name = {layer.name: layer for layer in result.layers}
    for site in model.decoupling.plan.sites:
        assert np.array_equal(by_name[site.name].off, by_name[site.gate].off)
    # Nothing is before the first gate, so all it does is direct.
    assert not result.layers[0].cascaded_off.any()
    assert np.array_equal(result.layers[0].off, result.layers[0].direct_off)
