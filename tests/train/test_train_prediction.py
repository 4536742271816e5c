"""Controllers that start as predictors open, for each image, the filters that are worth most for it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import decouplify
from decouplify.cifar import CifarResNet
from decouplify.decoupling import Decoupling
from decouplify.errors import NonFiniteError
from decouplify.train import (
    DecouplingRecipe,
    calibrate,
    close_least_important,
    decouple,
    executed_share,
    predict_worth,
)
from decouplify.train.importance import PER_NEPER, importance, log_worth
from toynets import TOYS, random_images

SIZE, N_KINDS = (4, 16, 16), 4
OF_RESNET = {"input_size": (3, 8, 8), "verify": False, "input_norm": True, "only": ["layer[23].0.conv1"]}


def net_of_kinds(input_norm: bool) -> nn.Module:
    """Filters 3c to 3c + 2 answer to channel c of the image alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 12, 1, groups=4, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(12, 5))
    net[0].weight.data.abs_().clamp_(min=0.2)
    return decouplify.wrap(net.eval(), SIZE, verify=False, skip_first=False, reduction=1, input_norm=input_norm)


def images_of_kinds(n: int = 200) -> tuple[Tensor, Tensor]:
    """Images with one channel each, and which."""
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randperm(n, generator=generator) % N_KINDS
    x = torch.rand(n, *SIZE, generator=generator) + 0.5
    return x * nn.functional.one_hot(kinds, N_KINDS)[:, :, None, None], kinds


def equal_worth(model: nn.Module) -> dict[str, Tensor]:
    return {gate.name: torch.ones(gate.n_filters) for gate in model.decoupling.plan.gates}


def path_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        model(images)
    return model.decoupling.path()


def unwrapped_copy(net: nn.Module) -> nn.Module:
    return decouplify.unwrap(deepcopy(net))


@pytest.mark.parametrize("input_norm", [True, False])
def test_each_kind_of_image_opens_its_own_filters(input_norm: bool) -> None:
    model, (images, _) = net_of_kinds(input_norm), images_of_kinds()
    unseen, kinds = images_of_kinds(400)
    answers = model(unseen)
    predict_worth(model, [[(images, None)]], equal_worth(model), 0.3)  # 0.285 with a quarter of the filters
    path = path_of(model, unseen)
    own = nn.functional.one_hot(kinds, N_KINDS).repeat_interleave(3, 1).bool()
    assert bool(path[own].all())
    assert float(path.sum(1).mean()) < 3.6
    torch.testing.assert_close(model(unseen), answers)


def test_the_inputs_norm_or_the_first_layer_normalises() -> None:
    images, margins = images_of_kinds()[0], []
    for input_norm in (True, False):
        model = net_of_kinds(input_norm)
        predict_worth(model, [[(images, None)]], equal_worth(model), 0.3)
        with torch.no_grad():
            model(images)
        margins.append(model.decoupling.margins()["0"])
    torch.testing.assert_close(*margins, rtol=1e-3, atol=1e-3)


def test_it_begins_with_what_the_convolution_makes_of_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels of any size tell energies, and the mean prediction is the mean energy, before the first step."""
    monkeypatch.setattr(sys.modules["decouplify.train.prediction"], "_STEPS", 0)
    torch.manual_seed(0)
    size = torch.tensor([1.0, 30.0, 0.2, 5.0])
    net = nn.Sequential(nn.Conv2d(4, 12, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(12, 5))
    net[0].weight.data = (torch.rand(12, 4) / size)[:, :, None, None]
    model = decouplify.wrap(net.eval(), SIZE, verify=False, skip_first=False, reduction=1, input_norm=True)
    images = torch.rand(200, 4, 1, 1) * size[:, None, None] * torch.ones(SIZE)
    with torch.no_grad():
        energies = net[1](net[0](images)).square().mean((2, 3))
    predict_worth(model, [[(images, None)]], equal_worth(model), 0.5)
    path_of(model, images)
    predicted = (model.decoupling.margins()["0"] / PER_NEPER).exp().detach()
    for k in range(12):
        assert float(torch.corrcoef(torch.stack([predicted[:, k], energies[:, k]]))[0, 1]) > 0.97
    assert float(predicted.mean(0).std() / predicted.mean()) < 0.01
    spread, expected = predicted.std(0) / predicted.mean(0), energies.std(0) / energies.mean(0)
    torch.testing.assert_close(spread, expected, rtol=0.2, atol=0.0)


class _OwnConvolution(nn.Module):
    """A module that convolves with a parameter of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.rand(12, 4, 1, 1) + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.kernel)


def test_a_convolution_whose_weight_has_another_name() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(_OwnConvolution(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    model = decouplify.wrap(net.eval(), SIZE, verify=False, skip_first=False)
    images = torch.rand(200, *SIZE) * torch.rand(200, 4, 1, 1)
    predict_worth(model, [[(images, None)]], equal_worth(model), 0.5)
    assert executed_share(model, [images]) == pytest.approx(0.5, abs=0.01)
    assert len(path_of(model, images).unique(dim=0)) > 1


def test_what_an_image_does_not_tell_stays_as_important_as_in_the_mean() -> None:
    """All images look alike to the controller, whose input is a mean; which filters they move is chance."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
    )
    net[0].bias.data[5] = -100.0  # a filter that no image moves says nothing either
    model = decouplify.wrap(net.eval(), SIZE, verify=False, skip_first=False, input_norm=True)
    images = torch.randn(64, *SIZE)
    images = images - images.mean((2, 3), keepdim=True)
    important = {"0": torch.rand(12) + 0.1}
    predict_worth(model, [[(images, None)]], important, 0.7)
    paths = path_of(model, images)
    assert len(paths.unique(dim=0)) == 1
    expected = decouplify.wrap(unwrapped_copy(net), SIZE, verify=False, skip_first=False)
    closed = close_least_important(expected, important, 0.7)["0"]
    assert torch.equal(paths[0] == 0, closed)


def test_filters_without_importance_close_first() -> None:
    model, (images, kinds) = net_of_kinds(True), images_of_kinds()
    important = {name: torch.arange(12) % 3 != 1 for name in equal_worth(model)}
    predict_worth(model, [[(images, None)]], {name: mask.float() for name, mask in important.items()}, 0.6)
    path = path_of(model, images)
    own = nn.functional.one_hot(kinds, N_KINDS).repeat_interleave(3, 1).bool() & (torch.arange(12) % 3 != 1)
    assert not path[:, torch.arange(12) % 3 == 1].any()
    assert bool(path[own].all())


@pytest.mark.parametrize("target", [0.205, 1.0])  # 0.2 with two of the twelve filters
def test_what_is_closed_for_all_images_no_image_opens(target: float) -> None:
    model, (images, kinds) = net_of_kinds(True), images_of_kinds()
    closed = torch.arange(12) % 3 == 1
    predict_worth(model, [[(images, None)]], equal_worth(model), target, {"0": closed})
    path = path_of(model, images)
    own = nn.functional.one_hot(kinds, N_KINDS).repeat_interleave(3, 1).bool()
    assert not path[:, closed].any()
    assert bool(path[own & ~closed].all())
    assert float(path.sum(1).mean()) < 2.6 if target < 1 else bool(path[:, ~closed].all())
    assert calibrate(model, [images], 1.0, 4.0) == 0  # no shift that is allowed opens them


def test_filters_are_judged_without_those_that_are_closed(resnet: nn.Module, images: Tensor) -> None:
    closed = {"layer2.0.conv1": torch.arange(8) < 6}
    predict_worth(resnet, [[(images, None)]], equal_worth(resnet), 0.6, closed)
    decoupling = resnet.decoupling
    seen: list[Tensor] = []
    later = decoupling.controllers["layer3__0__conv1"]
    with torch.no_grad(), decoupling.forced({"layer2.0.conv1": (~closed["layer2.0.conv1"]).float()}):
        hook = later.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((2, 3))))
        resnet(images)
    hook.remove()
    torch.testing.assert_close(later.norm.running_mean, seen[0].mean(0))
    assert executed_share(resnet, [images]) == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("target", [0.4, 0.6, 0.8])
def test_the_target_is_met_where_no_gate_stands_before_another(target: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)
    )
    model = decouplify.wrap(net.eval(), SIZE, verify=False, skip_first=False)
    images = torch.randn(200, *SIZE) + torch.randn(200, 4, 1, 1)
    important = importance(model, [(images, None)])
    predict_worth(model, [[(images, None)]], important, target)
    assert executed_share(model, [images]) == pytest.approx(target, abs=0.002)  # a filter is 0.015 of an image
    assert len(path_of(model, images).unique(dim=0)) > 20


@pytest.fixture
def resnet() -> nn.Module:
    torch.manual_seed(0)
    net = CifarResNet(1, n_classes=4, width=4).eval()
    nn.init.normal_(net.linear.weight, 0, 0.5)
    return decouplify.wrap(net, **OF_RESNET)


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 3, 8, 8, generator=generator) + torch.randn(64, 3, 1, 1, generator=generator)


def controllers_alone(model: nn.Module, before: dict[str, Tensor]) -> bool:
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    return bool(changed) and all(".controllers." in name for name in changed)


def test_a_run_starts_there(resnet: nn.Module, images: Tensor) -> None:
    before = {name: t.clone() for name, t in resnet.state_dict().items()}
    recipe = DecouplingRecipe(0, target="1.5x", start="prediction", batch_size=16)
    decouple(resnet, images, None, recipe, augment=lambda x: x.flip(3))
    assert controllers_alone(resnet, before)
    assert executed_share(resnet, [images]) == pytest.approx(1 / 1.5, rel=0.02)
    assert len(path_of(resnet, images).unique(dim=0)) > 5


@pytest.mark.parametrize("of_images", [1.0, 1.2, 1.5])
def test_a_run_closes_some_for_all_images_and_fits_the_weights(
    resnet: nn.Module, images: Tensor, of_images: float
) -> None:
    before = {name: t.clone() for name, t in resnet.state_dict().items()}
    recipe = DecouplingRecipe(
        0,
        target="1.5x",
        start="prediction",
        reconstruct=True,
        start_rounds=2,
        image_reduction=of_images,
        trained="gates",
        batch_size=16,
    )
    decouple(resnet, images, None, recipe)
    assert controllers_alone(resnet, before) == (of_images == 1.5)
    assert executed_share(resnet, [images]) == pytest.approx(1 / 1.5, rel=0.03)
    decoupling = resnet.decoupling
    may_open = [(c.fc2.weight != 0).any(1) for c in decoupling.controllers.values()]
    executed = float(decoupling.costs.executed(torch.cat(may_open).double()[None]))
    assert executed / decoupling.costs.n_dense == pytest.approx(of_images / 1.5, abs=0.04)
    assert (len(path_of(resnet, images).unique(dim=0)) > 5) == (of_images > 1)


def test_a_run_judges_what_is_left_without_what_it_has_closed(
    resnet: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    without: list[Tensor] = []

    def noted_importance(*given: object, closed: dict[str, Tensor]) -> dict[str, Tensor]:
        without.append(torch.cat(list(closed.values())))
        return importance(*given, closed=closed)  # type: ignore[arg-type]

    def noted_worth(decoupling: Decoupling, important: dict[str, Tensor], is_open: Tensor) -> Tensor:
        without.append(~is_open)
        return log_worth(decoupling, important, is_open)

    monkeypatch.setattr(sys.modules["decouplify.train.start"], "importance", noted_importance)
    monkeypatch.setattr(sys.modules["decouplify.train.prediction"], "log_worth", noted_worth)
    decouple(resnet, images, None, DecouplingRecipe(0, target="1.5x", start="prediction", reconstruct=True))
    closed = torch.cat([(c.fc2.weight == 0).all(1) for c in resnet.decoupling.controllers.values()])
    assert closed.any()
    assert len(without) == 2
    assert all(torch.equal(mask, closed) for mask in without)


def test_views_of_one_image_judge_or_teach_together(resnet: nn.Module, images: Tensor) -> None:
    """Twice the same view is no other evidence: as many steps help, and the fit is the same."""
    found = []
    for n_views in (1, 2):
        model = decouplify.wrap(unwrapped_copy(resnet), **OF_RESNET)
        views = [[(x, None) for x in images.split(24)] for _ in range(n_views)]
        predict_worth(model, views, equal_worth(model), 0.6)
        norm = model.decoupling.controllers["layer2__0__conv1"].norm
        found.append(norm.running_mean.clone())
        assert executed_share(model, [images]) < 0.75
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("from_loader", "augmented", "n_views"), [(False, True, 4), (False, False, 1), (True, False, 1)]
)
def test_only_views_with_images_in_one_order_are_learnt_from(
    resnet: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch, from_loader: bool, augmented: bool, n_views: int
) -> None:
    """Passes of a loader that shuffles have other images at one place."""
    views: list[Tensor] = []

    def counted(model: nn.Module, given: Iterable[Iterable[tuple[Tensor, None]]], *rest: object) -> None:
        views.extend(torch.cat([x for x, _ in view]) for view in given)
        predict_worth(model, [[(x, None)] for x in views], *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sys.modules["decouplify.train.start"], "predict_worth", counted)
    recipe = DecouplingRecipe(0, target="1.5x", start="prediction", batch_size=16)
    data = DataLoader(TensorDataset(images, torch.zeros(64).long()), batch_size=16, shuffle=True)
    decouple(resnet, data if from_loader else images, None, recipe, augment=torch.neg if augmented else None)
    assert executed_share(resnet, [images]) == pytest.approx(1 / 1.5, rel=0.1)
    assert len(views) == n_views
    assert all(torch.equal(view, -views[0]) for view in views[1:])


def test_a_gate_of_two_convolutions_is_judged_by_what_it_multiplies_last() -> None:
    model = TOYS["DepthwiseChain"].wrapped().eval()
    assert [len(gate.ends) for gate in model.decoupling.plan.gates] == [2, 1, 1]
    images = random_images(100)
    predict_worth(model, [[(images, None)]], equal_worth(model), 0.5)
    assert executed_share(model, [images]) == pytest.approx(0.5, abs=0.1)


def test_a_network_in_a_wrapper_is_fitted_as_by_itself(resnet: nn.Module, images: Tensor) -> None:
    class Wrapper(nn.Module):  # as DistributedDataParallel
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    same = decouplify.wrap(unwrapped_copy(resnet), **OF_RESNET)
    for model in (Wrapper(resnet), same):
        predict_worth(model, [[(images, None)]], equal_worth(resnet), 0.6)
    assert torch.equal(path_of(same, images), path_of(resnet, images))


def test_training_goes_on_from_there(resnet: nn.Module, images: Tensor) -> None:
    recipe = DecouplingRecipe(
        1, lr=1e-4, optimizer="adam", target="1.5x", start="prediction", batch_size=16, hard_share=1.0, ramp_share=0.0
    )
    history = decouple(resnet, images, None, recipe)
    assert history.epochs[0]["measured"] == pytest.approx(1 / 1.5, rel=0.1)


def test_bad_requests_are_refused_and_change_nothing(resnet: nn.Module, images: Tensor) -> None:
    before = {name: t.clone() for name, t in resnet.state_dict().items()}
    important = equal_worth(resnet)
    with pytest.raises(ValueError, match=r"target_macs=1\.5"):
        predict_worth(resnet, [[(images, None)]], important, 1.5)
    with pytest.raises(ValueError, match="fewer than 4 images"):
        predict_worth(resnet, [[(images[:3], None)]], important, 0.5)
    name, mask = "layer2.0.conv1", torch.zeros(8, dtype=torch.bool)
    for closed in ({name: mask[:7]}, {name: mask.float()}):
        with pytest.raises(ValueError, match=rf"closed\['{name}'\] is torch\..*booleans of shape \(8,\) wanted"):
            predict_worth(resnet, [[(images, None)]], important, 0.5, closed)
    with pytest.raises(ValueError, match=r"closed has 'other', which is no gate; the gates are layer2\.0\.conv1"):
        predict_worth(resnet, [[(images, None)]], important, 0.5, {"other": mask})
    with pytest.raises(ValueError, match="not wrapped"):
        predict_worth(CifarResNet(1), [[(images, None)]], important, 0.5)
    with pytest.raises(NonFiniteError, match=r"gate 'layer2\.0\.conv1'"):
        predict_worth(resnet, [[(images * torch.nan, None)]], important, 0.5)
    with pytest.raises(ValueError, match="start='prediction' needs a target in MACs"):
        decouple(resnet, images, None, DecouplingRecipe(0, target=0.5, start="prediction"))
    assert all(torch.equal(t, before[name]) for name, t in resnet.state_dict().items())
    assert not any(c._forward_pre_hooks for c in resnet.decoupling.controllers.values())
