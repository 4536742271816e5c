"""Thresholds are the quantile they claim to be, whatever the values and however they are divided."""

from __future__ import annotations

import itertools

import hypothesis.extra.numpy as st_numpy
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from decouplify.concepts import ConceptImages, ValueHistogram, collect_thresholds
from decouplify.errors import NonFiniteError

DISTRIBUTIONS = {
    "relu": lambda x: x.relu(),
    "heavy tail": lambda x: (2 * x).exp(),
    "signed": lambda x: x,
    "below zero": lambda x: -(2 * x).exp(),
    "silu": nn.functional.silu,
    "tiny": lambda x: 1e-5 * x.abs(),
    "large": lambda x: 1e5 * x.abs().clamp(max=9),
}


def histogram_of(values: Tensor) -> ValueHistogram:
    histogram = ValueHistogram(values.shape[1])
    histogram.update(values)
    return histogram


@pytest.mark.parametrize("share", [0.005, 0.05, 0.3])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_within_one_per_cent_of_the_exact_quantile(name: str, share: float) -> None:
    values = DISTRIBUTIONS[name](torch.randn(40, 3, 50, 50))
    found = histogram_of(values).upper_quantile(share).double()
    exact = values.transpose(0, 1).flatten(1).double().quantile(1 - share, dim=1)
    assert ((found - exact).abs() <= 0.01 * exact.abs()).all(), (found, exact)
    above = (values.transpose(0, 1).flatten(1) > found[:, None]).double().mean(1)
    assert (above >= share * 0.999).all()


@given(
    values=st_numpy.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e5, 1e5, width=32)),
    share=st.floats(0.01, 0.99),
)
def test_just_below_the_exact_order_statistic(values: np.ndarray, share: float) -> None:
    n = len(values)
    found = float(histogram_of(torch.from_numpy(values)[None, None, None, :]).upper_quantile(share)[0])
    exact = float(np.sort(values)[::-1][int(share * n)])
    if abs(exact) < 2.0**-20:
        assert found == 0
    else:
        assert found < exact
        assert exact - found <= abs(exact) / 128 * 1.0001


def test_parts_add_up_to_the_whole_in_any_order() -> None:
    parts = [torch.randn(4, 5, 6, 6), torch.randn(2, 5, 3, 9).relu(), torch.zeros(1, 5, 2, 2)]
    whole = ValueHistogram(5)
    for part in parts:
        whole.update(part)
    for order in itertools.permutations(parts):
        merged = ValueHistogram(5)
        for part in order:
            merged.merge(histogram_of(part))
        assert torch.equal(merged.positive, whole.positive)
        assert torch.equal(merged.zero, whole.zero)
        assert whole.negative is not None
        assert torch.equal(merged.negative, whole.negative)
    assert whole.n_values == 4 * 36 + 2 * 27 + 4
    with pytest.raises(ValueError, match="of 5 and of 4 filters cannot be merged"):
        whole.merge(ValueHistogram(4))


def test_rare_filters_are_active_wherever_positive_and_saturated_ones_at_their_highest() -> None:
    rare = torch.zeros(1, 1, 100, 100)
    rare[0, 0, 0, :10] = 5
    saturated = torch.ones(1, 1, 100, 100) * 6
    saturated[0, 0, 50:] = 3
    thresholds = histogram_of(torch.cat([rare, saturated], 1)).upper_quantile(0.005)
    assert thresholds[0] == 0
    assert 5.9 < float(thresholds[1]) < 6


def test_values_beyond_the_bins_are_refused() -> None:
    with pytest.raises(ValueError, match=r"activations reach 1e\+07"):
        histogram_of(torch.full((1, 1, 2, 2), 1e7))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).relu()


def test_two_layers_never_share_thresholds(scenes: ConceptImages) -> None:
    model = TwoLayers()
    both = collect_thresholds(model, scenes, ["a", "b"], quantile=0.01)
    for name in ("a", "b"):
        alone = collect_thresholds(model, scenes, name, quantile=0.01, batch_size=7)
        np.testing.assert_allclose(both.values[name], alone.values[name], rtol=0.009)  # batches round differently
    assert (both.values["a"] != both.values["b"]).all()
    assert list(both.to_dict()["values"]) == ["a", "b"]
    assert "8 filters of 2 layers, exceeded at 1.00% of the places of 80 images" in both.summary()


def test_thresholds_of_other_weights_are_refused(scenes: ConceptImages) -> None:
    model = TwoLayers()
    thresholds = collect_thresholds(model, scenes, "a", max_images=3)
    thresholds.of(["a"], model, torch.device("cpu"))
    with pytest.raises(ValueError, match="no thresholds for b; there are some for a"):
        thresholds.of(["b"], model, torch.device("cpu"))
    with torch.no_grad():
        model.b.bias[0] += 0.1
    with pytest.raises(ValueError, match="belong to other weights"):
        thresholds.of(["a"], model, torch.device("cpu"))


def test_refusals(scenes: ConceptImages) -> None:
    model = TwoLayers()
    with pytest.raises(ValueError, match="quantile is 0, wanted a share"):
        collect_thresholds(model, scenes, "a", quantile=0)
    with pytest.raises(ValueError, match="TwoLayers is not wrapped, so name the layers"):
        collect_thresholds(model, scenes)
    with pytest.raises(ValueError, match="TwoLayers has no layer 'c'; there are , a, b"):
        collect_thresholds(model, scenes, "c")
    with pytest.raises(ValueError, match="max_images is 0"):
        collect_thresholds(model, scenes, "a", max_images=0)
    with torch.no_grad():
        model.a.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="layer 'a' returns NaN or infinity"):
        collect_thresholds(model, scenes, "a")
    assert not model.a._forward_hooks
