"""Networks that take more than one image tensor: refused as a whole with the way out, gated by their backbone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection

import decouplify
from decouplify.errors import TraceError
from decouplify.losses import DecouplingLoss

SMALL = {"fasterrcnn_mobilenet_v3_large_320_fpn": (3, 96, 96), "ssdlite320_mobilenet_v3_large": (3, 320, 320)}


def detector(name: str) -> nn.Module:
    options: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 3}
    return torchvision.models.get_model(name, **options)


def pictures_with_boxes() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different sizes, as detectors take them, and one box in each."""
    images = [torch.rand(3, 90, 120), torch.rand(3, 100, 80)]
    target = {"boxes": torch.tensor([[10.0, 12.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
    return images, [target, target]


@pytest.mark.parametrize("name", SMALL)
def test_a_detector_as_a_whole_is_told_to_wrap_its_backbone(name: str) -> None:
    model = detector(name)
    modules = list(model.state_dict())
    with pytest.raises(TraceError, match=r"reads values of the features .* such as model\.backbone"):
        decouplify.wrap(model, (3, 320, 320))
    assert list(model.state_dict()) == modules
    assert model.training


@pytest.mark.parametrize("name", SMALL)
def test_a_detector_with_a_wrapped_backbone_trains_and_detects_as_before(name: str) -> None:
    model = detector(name).eval()
    images, targets = pictures_with_boxes()
    with torch.no_grad():
        before = model(images)
    decouplify.wrap(model.backbone, SMALL[name])
    with torch.no_grad():
        after = model(images)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(before, after, strict=True) for k in a)
    losses = model.train()(images, targets)
    criterion = DecouplingLoss(model.backbone, mutual_information=0.0, sparsity=1e-3)
    (sum(losses.values()) + criterion()).backward()
    gradients = [p.grad for p in model.backbone.decoupling.controllers.parameters()]
    assert gradients
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(g.any() for g in gradients)


def test_frozen_norms_of_detection_backbones_are_part_of_the_site() -> None:
    backbone = detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    model = decouplify.wrap(backbone.eval(), (3, 64, 64))
    assert any(type(m).__name__ == "FrozenBatchNorm2d" for m in model.modules())
    ends = {site.name: site.end.module for site in model.decoupling.plan.sites}
    assert ends["body.layer1.0.conv1"] == "body.layer1.0.relu"
    assert ends["body.layer1.0.conv2"] == "body.layer1.0.bn2"


def test_one_of_two_inputs_can_be_wrapped() -> None:
    class Stereo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
            self.head = nn.Conv2d(4, 1, 1)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            features = self.encoder(torch.cat([left, right]))
            return self.head(torch.cat(features.chunk(2), 1))

    model = Stereo().eval()
    with pytest.raises(
        TraceError, match=r"missing 1 required positional argument: 'right'.*wrap its convolutional back"
    ):
        decouplify.wrap(model, (3, 16, 16))
    left, right = torch.randn(2, 2, 3, 16, 16)
    before = model(left, right)
    decouplify.wrap(model.encoder, (3, 16, 16))
    assert torch.equal(model(left, right), before)
    assert model.encoder.decoupling.path().shape == (4, 4)
