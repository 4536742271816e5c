"""Paths of networks without gates, against responses read by plain hooks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import decouplify
from decouplify.paths import pseudo_paths, pseudo_thresholds

SIZE = (3, 8, 8)


def network() -> nn.Sequential:
    conv = {"padding": 1, "bias": False}
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, **conv),
        nn.ReLU(),
        nn.Conv2d(4, 10, 3, **conv),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.Conv2d(10, 6, 3, **conv),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()


@pytest.fixture
def model() -> nn.Sequential:
    return network()


@pytest.fixture
def batches():
    images = torch.randn(30, *SIZE, generator=torch.Generator().manual_seed(3))
    return [(images[:17], torch.arange(17) % 4), (images[17:], torch.arange(13) % 4)]


@torch.no_grad()
def responses(model, batches):
    """What leaves the two gated convolutions, after their ReLU: (N, 10, H, W) and (N, 6, H, W)."""
    images = torch.cat([batch[0] for batch in batches])
    return model[:5](images), model[:7](images)


def test_a_filter_is_open_where_its_mean_response_is_above_that_of_all_images(model, batches):
    paths = pseudo_paths(model, batches, input_size=SIZE)
    pooled = torch.cat([y.mean((2, 3)) for y in responses(model, batches)], 1)
    assert [(layer.name, layer.n_filters) for layer in paths.layers] == [("2", 10), ("5", 6)]
    near = (pooled - pooled.mean(0)).abs() < 1e-3  # the threshold is a mean of float16 numbers
    agrees = paths.unpack() == (pooled > pooled.mean(0)).numpy()
    assert (agrees | near.numpy()).all()
    assert 0.2 < paths.rates().mean() < 0.8
    assert paths.labels.tolist() == [*np.arange(17) % 4, *np.arange(13) % 4]
    assert paths.manifest["pseudo"] == {"rule": "mean", "threshold_images": 30}


def test_a_quantile_closes_each_filter_for_that_share_of_the_images(model, batches):
    paths = pseudo_paths(model, batches, rule="quantile", quantile=0.8, input_size=SIZE)
    pooled = torch.cat([y.mean((2, 3)) for y in responses(model, batches)], 1)
    varies = (pooled.std(0) > 1e-3).numpy()
    np.testing.assert_allclose(paths.counts()[varies], 6, atol=1)  # a fifth of 30


def test_active_filters_respond_somewhere(model, batches):
    paths = pseudo_paths(model, iter(batches), rule="active", input_size=SIZE)  # no threshold, so one reading is enough
    wanted = torch.cat([(y > 0).flatten(2).any(2) for y in responses(model, batches)], 1)
    np.testing.assert_array_equal(paths.unpack(), wanted.numpy())


def test_thresholds_of_some_images_are_used_on_others(model, batches):
    thresholds = pseudo_thresholds(model, batches[:1], input_size=SIZE)
    assert thresholds.n_images == 17
    paths = pseudo_paths(model, iter(batches[1:]), thresholds=thresholds, input_size=SIZE, margins=True)
    pooled = torch.cat([y.mean((2, 3)) for y in responses(model, batches[1:])], 1)
    limits = np.concatenate(list(thresholds.values.values()))
    np.testing.assert_array_equal(paths.unpack(), pooled.numpy() > limits)
    np.testing.assert_allclose(paths.margins, pooled.numpy() - limits, atol=1e-3)
    same = pseudo_paths(model, batches[:1], input_size=SIZE)
    again = pseudo_paths(model, batches[:1], thresholds=thresholds, input_size=SIZE)
    np.testing.assert_array_equal(same.bits, again.bits)  # two extractions of one image must not differ
    with pytest.raises(ValueError, match=r"thresholds of 2 layers and 16 filters given, this Sequential has 1 and 6"):
        pseudo_paths(model, batches, thresholds=thresholds, input_size=SIZE, exclude="2")


def test_sites_and_names_are_those_of_the_wrapped_network(model, batches):
    wrapped = decouplify.wrap(copy.deepcopy(model), SIZE, only="5")
    real = decouplify.record(wrapped, batches)
    assert pseudo_paths(model, batches, like=wrapped).layers == real.layers


def test_the_network_and_the_random_state_stay_as_they_were(model, batches):
    model.train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    pseudo_paths(model, batches, input_size=SIZE)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_set_on_disk_equals_one_in_memory(model, batches, tmp_path):
    in_memory = pseudo_paths(model, batches, input_size=SIZE)
    on_disk = pseudo_paths(model, batches, input_size=SIZE, out=tmp_path / "set")
    np.testing.assert_array_equal(in_memory.bits, on_disk.bits)
    assert on_disk.manifest["pseudo"]["rule"] == "mean"


@pytest.fixture
def obvious():
    """A network in which two of eight filters decide: brightness of the first and of the second channel."""
    model = nn.Sequential(
        nn.Conv2d(2, 2, 1, bias=False),
        nn.Conv2d(2, 8, 1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2, bias=False),
    ).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[:, :, None, None])
        model[1].weight.fill_(0.5)
        model[1].weight[:2] = torch.eye(2)[:, :, None, None]
        model[5].weight.zero_()
        model[5].weight[0, 0] = model[5].weight[1, 1] = 20.0
    return model


def test_a_critical_path_keeps_the_prediction_and_what_it_needs(obvious):
    images = torch.zeros(6, 2, 4, 4)
    images[:3, 0] = 1.0
    images[3:, 1] = 1.0
    paths = pseudo_paths(obvious, [images], rule="cdrp", input_size=(2, 4, 4))
    needed = paths.unpack()[:, :2]
    np.testing.assert_array_equal(needed, [[True, False]] * 3 + [[False, True]] * 3)
    assert not paths.unpack()[:, 2:].any()


def test_a_critical_path_does_not_depend_on_the_images_beside_it(model, batches):
    with torch.no_grad():
        model[-1].weight *= 50  # or every prediction is uniform and no filter matters
    together = pseudo_paths(model, batches, rule="cdrp", input_size=SIZE, margins=True, steps=8)
    single = [
        (image[None], label[None]) for images, labels in batches for image, label in zip(images, labels, strict=True)
    ]
    alone = pseudo_paths(model, single, rule="cdrp", input_size=SIZE, margins=True, steps=8)
    np.testing.assert_allclose(together.margins, alone.margins, atol=2e-3)
    assert together.margins.min() >= 0
    assert together.margins.std() > 0.01


def test_pseudo_paths_refuse(model, batches):
    wrapped = decouplify.wrap(network(), SIZE)
    with pytest.raises(ValueError, match=r"Sequential is wrapped and has real paths: decouplify\.record reads them"):
        pseudo_paths(wrapped, batches)
    with pytest.raises(TypeError, match=r"list_iterator, which can be read once, .* thresholds=pseudo_thresholds"):
        pseudo_paths(model, iter(batches), input_size=SIZE)
    with pytest.raises(ValueError, match=r"rule is 'median', wanted one of 'mean', 'quantile', 'active', 'cdrp'"):
        pseudo_paths(model, batches, rule="median")
    with pytest.raises(ValueError, match=r"quantile is 1, wanted a share of the images in \(0, 1\)"):
        pseudo_paths(model, batches, rule="quantile", quantile=1)
    with pytest.raises(ValueError, match=r'"cdrp" fits every image by itself and has no thresholds'):
        pseudo_thresholds(model, batches, rule="cdrp")
    headless = nn.Sequential(*list(model)[:7])
    with pytest.raises(ValueError, match=r"needs a model whose output is \(N, classes\) logits"):
        pseudo_paths(headless, batches, rule="cdrp", input_size=SIZE)
