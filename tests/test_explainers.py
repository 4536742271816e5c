"""Captum and pytorch-grad-cam run unchanged on a wrapped model: they explain the network that it is.

With all gates open a wrapped model is the network it was, so its explanations must be, too. Where gates are closed,
they are constants of the image, and the explanation is that of the network in which they are held.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import captum.attr as captum_attr
import pytest
import pytorch_grad_cam as grad_cam
import timm
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

import decouplify

SIZE = (3, 32, 32)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4).eval()


@pytest.fixture(scope="module")
def opened(original: nn.Module) -> nn.Module:
    return decouplify.wrap(copy.deepcopy(original), SIZE)


@pytest.fixture
def decoupled(original: nn.Module) -> nn.Module:
    """Gates that differ from image to image."""
    torch.manual_seed(0)
    model = decouplify.wrap(copy.deepcopy(original), SIZE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for controller in model.decoupling.controllers.values():
            controller.fc2.weight.normal_(0, 1, generator=generator)
            controller.fc2.bias.normal_(0.5, 0.5, generator=generator)
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(2))


def layer_of(model: nn.Module) -> nn.Module:
    return model.get_submodule("layer2.0")  # the last one with more than a few places


Explain = Callable[[nn.Module, Tensor], Tensor]
CAPTUM: dict[str, Explain] = {
    "Saliency": lambda m, x: captum_attr.Saliency(m).attribute(x, target=1),
    "InputXGradient": lambda m, x: captum_attr.InputXGradient(m).attribute(x, target=1),
    "IntegratedGradients": lambda m, x: captum_attr.IntegratedGradients(m).attribute(x, target=1, n_steps=8),
    "GradientShap": lambda m, x: captum_attr.GradientShap(m).attribute(x, baselines=0 * x[:1], target=1),
    "GuidedBackprop": lambda m, x: captum_attr.GuidedBackprop(m).attribute(x, target=1),
    "DeepLift": lambda m, x: captum_attr.DeepLift(m).attribute(x, target=1),
    "Occlusion": lambda m, x: captum_attr.Occlusion(m).attribute(x, (3, 16, 16), (3, 16, 16), target=1),
    "LayerGradCam": lambda m, x: captum_attr.LayerGradCam(m, layer_of(m)).attribute(x, target=1),
    "LayerActivation": lambda m, x: captum_attr.LayerActivation(m, layer_of(m)).attribute(x),
    "LayerConductance": lambda m, x: captum_attr.LayerConductance(m, layer_of(m)).attribute(x, target=1, n_steps=8),
}
CAMS = ("GradCAM", "GradCAMPlusPlus", "XGradCAM", "HiResCAM", "LayerCAM", "EigenCAM", "ScoreCAM", "AblationCAM")


def cam(name: str, model: nn.Module, images: Tensor) -> Tensor:
    with getattr(grad_cam, name)(model, [layer_of(model)]) as explainer:
        explainer.batch_size = 16
        return torch.from_numpy(explainer(images, [ClassifierOutputTarget(1)] * len(images)))


CAM: dict[str, Explain] = {name: lambda m, x, name=name: cam(name, m, x) for name in CAMS}  # type: ignore[misc]
EXPLAINERS = CAPTUM | CAM

# What the packages say about themselves, and what torch says about their hooks.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting forward, backward hooks and attributes on non-linear:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU activations:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require gradients:UserWarning"),
]


def explain(name: str, model: nn.Module, images: Tensor) -> Tensor:
    torch.manual_seed(0)
    return EXPLAINERS[name](model, images.clone()).detach()


@pytest.mark.parametrize("name", EXPLAINERS)
def test_open_gates_change_no_explanation(name: str, original: nn.Module, opened: nn.Module, images: Tensor) -> None:
    expected, found = explain(name, original, images), explain(name, opened, images)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", EXPLAINERS)
def test_closed_gates_are_explained_and_nothing_is_left_behind(name: str, decoupled: nn.Module, images: Tensor) -> None:
    before = state_of(decoupled, images)
    found = explain(name, decoupled, images)
    assert len(found) == len(images)
    assert found.isfinite().all()
    assert found.abs().max() > 0
    after = state_of(decoupled, images)
    assert after["hooks"] == before["hooks"]
    assert after["modes"] == before["modes"]
    assert torch.equal(after["path"], before["path"])
    assert torch.equal(after["logits"], before["logits"])


def state_of(model: nn.Module, images: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        logits = model(images)
    modules = list(model.modules())
    return {
        "logits": logits,
        "path": model.decoupling.path(),
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in modules],
        "modes": [m.training for m in modules],
    }


def test_paths_differ_in_what_follows(decoupled: nn.Module, images: Tensor) -> None:
    path = state_of(decoupled, images)["path"]
    assert 0.1 < path.mean() < 0.9
    assert not torch.equal(path[0], path[1])


def test_gates_are_constants_of_an_explanation(decoupled: nn.Module, images: Tensor) -> None:
    """The gradient that explainers see is that of the network with this image's gates held."""
    decoupled(images)
    gates = {name: z.detach() for name, z in decoupled.decoupling.gates().items()}
    free = captum_attr.Saliency(decoupled).attribute(images.clone(), target=1, abs=False)
    with decoupled.decoupling.forced(gates):
        held = captum_attr.Saliency(decoupled).attribute(images.clone(), target=1, abs=False)
    torch.testing.assert_close(free, held)


def test_with_gates_held_integrated_gradients_are_complete(decoupled: nn.Module, images: Tensor) -> None:
    """Attributions sum to the change of the logit; along the way gates would switch, so they are held."""
    image = images[:1].double()
    model = decoupled.double()
    with torch.no_grad():
        model(image)
        gates = {name: z[0] for name, z in model.decoupling.gates().items()}
        with model.decoupling.forced(gates):
            wanted = model(image)[0, 1] - model(0 * image)[0, 1]
    with model.decoupling.forced(gates):
        found = captum_attr.IntegratedGradients(model).attribute(image, target=1, n_steps=300)
    assert float(found.sum()) == pytest.approx(float(wanted), rel=0.02)
