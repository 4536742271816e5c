"""Feature maps of any wrapped network are those behind its gates, and a tap leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from decouplify.concepts.features import FeatureTap, to_input
from decouplify.concepts.synthetic import planted_concepts
from toynets import SIZE, TOYS


@pytest.mark.parametrize("name", TOYS)
def test_features_are_those_behind_the_gates(name: str) -> None:
    model = TOYS[name].wrapped().train()
    plan = model.decoupling.plan
    gates = {gate.name: (torch.arange(gate.n_filters) > 0).float() for gate in plan.gates}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with FeatureTap(model, [site.name for site in plan.sites]) as tap, model.decoupling.forced(gates):
        maps = tap(torch.randn(2, *SIZE))
    assert list(maps) == [site.name for site in plan.sites]
    for site in plan.sites:
        features, closed = maps[site.name], gates[site.gate] == 0
        assert features.dim() == 4
        assert features.shape[1] == site.out_channels
        assert (features[:, closed] == 0).all()
        assert (features[:, ~closed] != 0).any(), site.name
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(module.training for module in model.modules())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.pool, self.spare = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.ReLU()
        self.flat = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.pool(self.act(self.act(self.conv(x)))))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("act", "layer 'act' runs more than once per image"),
        ("flat", r"layer 'flat' returns shape \(2, 3\), wanted feature maps"),
        ("spare", "the forward pass did not run spare"),
        ("convv", "Twice has no layer 'convv'; did you mean conv"),
    ],
)
def test_layers_that_give_no_maps_are_refused(layer: str, message: str) -> None:
    model = Twice()
    with pytest.raises(ValueError, match=message), FeatureTap(model, [layer]) as tap:
        tap(torch.randn(2, *SIZE))
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training


def test_images_of_one_batch_must_fit_together() -> None:
    small, large = planted_concepts(1, 16), planted_concepts(1, 32)
    with pytest.raises(ValueError, match=r"have the sizes \[\(3, 16, 16\), \(3, 32, 32\)\]; scale them in the reader"):
        to_input([small[0], large[0]], small.transform, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"image 'scene_0000\.png' has NaN or infinity after the transform"):
        to_input([small[0]], lambda pixels: small.transform(pixels) / 0, torch.device("cpu"))
