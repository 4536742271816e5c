"""Random paths cost what was asked for, and steered controllers decide them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import decouplify
from decouplify.bench.masks import calibrate_norms, max_paths, random_images, random_path, steer
from toynets import SIZE, TOYS, run

GATED = ["Plain", "PreActivation", "SharedRelu", "DepthwiseChain", "ParallelBranches", "SqueezeExcite", "LinearOnMaps"]


def wrapped(name: str = "Plain", width: int = 16) -> nn.Module:
    return TOYS[name].wrapped(width, verify=False).eval()


def path_for(model: nn.Module, n_images: int, **cost: float) -> Tensor:
    return random_path(model.decoupling.plan, model.decoupling.costs, n_images, **cost)


@pytest.mark.parametrize("mac_reduction", [1.2, 1.5, 2.0])
@pytest.mark.parametrize("name", ["Plain", "DenseConcat", "DepthwiseChain"])
def test_a_random_path_has_the_mac_reduction_asked_for(name: str, mac_reduction: float) -> None:
    costs = wrapped(name, 64).decoupling.costs
    path = path_for(wrapped(name, 64), 8, mac_reduction=mac_reduction)
    assert costs.n_dense / costs.executed(path).mean().item() == pytest.approx(mac_reduction, rel=0.01)
    assert len(path.unique(dim=0)) == 8


def test_a_random_path_keeps_the_share_asked_for_and_repeats() -> None:
    model = wrapped(width=128)
    path = path_for(model, 8, keep=0.3)
    assert path.mean().item() == pytest.approx(0.3, abs=0.05)
    assert torch.equal(path, path_for(model, 8, keep=0.3))
    assert path_for(model, 8, keep=1.0).min() == 1


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ({}, "one of them is wanted"),
        ({"keep": 0.5, "mac_reduction": 2.0}, "one of them is wanted"),
        ({"keep": 0.0}, r"in \(0, 1\]"),
        ({"mac_reduction": 1000.0}, "no gates give a MAC reduction of 1000"),
        ({"mac_reduction": 0.5}, "no gates give"),
    ],
)
def test_costs_that_no_path_has_are_refused(cost: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        path_for(wrapped(), 2, **cost)


@pytest.mark.parametrize("name", GATED)
def test_steered_controllers_decide_the_given_paths_with_room_to_spare(name: str) -> None:
    model = wrapped(name)
    images = random_images(max_paths(model.decoupling.plan), SIZE)
    path = path_for(model, len(images), keep=0.5)
    steer(model, images, path)
    run(model, images)
    assert torch.equal(model.decoupling.path().double(), path)
    margins = torch.cat(list(model.decoupling.margins().values()), 1)
    assert margins.abs().min() > 0.9
    assert decouplify.verify(model, decouplify.sparsify(model), images).n_near == 0


def test_more_images_than_a_controller_can_tell_apart_are_refused() -> None:
    model = wrapped()
    n = max_paths(model.decoupling.plan) + 1
    with pytest.raises(ValueError, match=f"at most {n - 1}"):
        steer(model, random_images(n, SIZE), path_for(model, n, keep=0.5))


def test_equal_images_are_refused_and_leave_no_hook() -> None:
    model = wrapped()
    with pytest.raises(ValueError, match="almost the same features"):
        steer(model, random_images(1, SIZE).expand(3, -1, -1, -1), path_for(model, 3, keep=0.5))
    assert not any(controller._forward_pre_hooks for controller in model.decoupling.controllers.values())


def test_calibrated_norms_have_the_statistics_of_the_images_and_nothing_else_changes() -> None:
    model = TOYS["Plain"].build(16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    images = random_images(8, SIZE)
    calibrate_norms(model, images)
    features = model.stem[0](images)
    assert torch.allclose(model.stem[1].running_mean, features.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(model.stem[1].running_var, features.var((0, 2, 3)), rtol=1e-4)
    assert model.training
    assert model.stem[1].momentum == 0.1
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
