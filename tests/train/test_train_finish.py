"""After training: norms know binary gates, and thresholds meet the target."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import decouplify
from decouplify.cifar import CifarGoogLeNet, CifarResNet, CifarVgg
from decouplify.train import calibrate, executed_share, reestimate_norms


@pytest.fixture
def images() -> list[Tensor]:
    return list(torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(24))


def with_spread_gates(model: nn.Module) -> nn.Module:
    """Controllers as after training: logits that differ between images and filters."""
    generator = torch.Generator().manual_seed(1)
    decouplify.wrap(model.eval(), (3, 32, 32), input_norm=True, verify=False)
    for controller in model.decoupling.controllers.values():
        controller.fc2.weight.data.normal_(0, 0.5, generator=generator)
        controller.fc2.bias.data.normal_(0.5, 0.5, generator=generator)
    return model


NETWORKS = {
    "resnet": lambda: CifarResNet(1, width=8),
    "vgg": lambda: CifarVgg(width=0.15),
    "googlenet": lambda: CifarGoogLeNet(width=0.05),
}


@pytest.mark.parametrize("target", [1 / 1.5, 1 / 2, 1 / 2.5])
@pytest.mark.parametrize("network", NETWORKS)
def test_thresholds_land_within_two_per_cent_of_the_target(network: str, target: float, images: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = with_spread_gates(NETWORKS[network]())
    shift = calibrate(model, images, target, largest=8.0)
    assert executed_share(model, images) == pytest.approx(target, rel=0.02)
    assert shift != 0.0


def test_a_target_that_is_met_or_cannot_be_met_changes_nothing(images: list[Tensor]) -> None:
    model = with_spread_gates(NETWORKS["resnet"]())
    biases = [c.fc2.bias.clone() for c in model.decoupling.controllers.values()]
    assert calibrate(model, images, executed_share(model, images)) == 0.0
    assert calibrate(model, images, 0.01, largest=8.0) == 0.0  # the stem alone costs more
    assert calibrate(model, images, 0.3) == 0.0  # too far to be had for nothing
    assert all(torch.equal(b, c.fc2.bias) for b, c in zip(biases, model.decoupling.controllers.values(), strict=True))
    with pytest.raises(ValueError, match="a share of the dense MACs"):
        calibrate(model, images, 2.0)


def test_statistics_are_those_of_what_evaluation_computes(images: list[Tensor]) -> None:
    model = with_spread_gates(NETWORKS["resnet"]())
    model.bn1.momentum = 0.3
    reestimate_norms(model, [(x, None) for x in images])
    seen = torch.cat([model.conv1(x) for x in images])
    torch.testing.assert_close(model.bn1.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert model.bn1.momentum == 0.3
    assert not any(module.training for module in model.modules())
    pooled = torch.cat([torch.relu(model.bn1(model.conv1(x))).mean((2, 3)) for x in images])
    controller = model.decoupling.controllers["layer1__0__conv1"]
    # Of the batch-normalised stem the controllers saw batches, so only roughly.
    torch.testing.assert_close(controller.norm.running_mean, pooled.mean(0), rtol=0.05, atol=0.05)
