"""A student learns what its teacher's modules return, and nothing stays behind on either."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import decouplify
from decouplify.cifar import CifarResNet
from decouplify.train import DecouplingRecipe, Recipe, decouple, feature_distance, train_dense

STAGES = "layer[123]"


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(**options: Any) -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet(1, n_classes=4, width=4, **options)


def wrapped() -> nn.Module:
    return decouplify.wrap(network(), (3, 8, 8), input_norm=True)


def recipe(**changes: Any) -> DecouplingRecipe:
    return DecouplingRecipe(**{"epochs": 4, "batch_size": 16, "lr": 0.05, "norm_batches": 3, **changes})


def features_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}
    modules = [(name, model.get_submodule(name)) for name in ("layer1", "layer2", "layer3")]
    hooks = [m.register_forward_hook(lambda _m, _a, out, n=n: kept.__setitem__(n, out)) for n, m in modules]
    with torch.no_grad():
        model.eval()(images)
    for hook in hooks:
        hook.remove()
    return kept


def test_the_distance_is_relative_to_each_modules_features_and_teaches_the_student_alone() -> None:
    taught = {"small": torch.full((2, 3), 0.1), "large": torch.full((2, 5), 10.0, requires_grad=True)}
    features = {name: (0.5 * t).detach().requires_grad_() for name, t in taught.items()}
    distance = feature_distance(features, taught)
    assert distance.item() == pytest.approx(0.25)
    distance.backward()
    assert taught["large"].grad is None
    # d/df of ||f - t||^2 / ||t||^2 is 2 (f - t) / ||t||^2, halved by the mean over two modules.
    torch.testing.assert_close(features["large"].grad, torch.full((2, 5), -5.0 / 1000))
    assert feature_distance(taught, taught).item() == 0.0
    assert float(feature_distance({"a": torch.zeros(3)}, {"a": torch.zeros(3)})) == 0.0
    half = {"a": torch.ones(2, dtype=torch.bfloat16)}
    assert feature_distance(half, half).dtype == torch.float32


def test_features_end_nearer_to_the_teachers_than_with_answers_alone(images: Tensor) -> None:
    expected = features_of(network(), images)
    distances = []
    for features in ((), STAGES):
        model = wrapped()
        decouple(model, images, None, recipe(features=features, feature_weight=3.0))
        distances.append(float(feature_distance(features_of(model, images), expected)))
    assert distances[1] < 0.8 * distances[0]


def test_the_loss_grows_by_the_weighted_distance(images: Tensor) -> None:
    labels, teacher = torch.zeros(48, dtype=torch.long), network().eval()

    def loss(**changes: Any) -> float:
        torch.manual_seed(1)
        student = CifarResNet(1, n_classes=4, width=4)
        how = Recipe(1, lr=0.0, batch_size=48, warmup_epochs=0.0, **changes)
        history = train_dense(student, images, labels, how, teacher=teacher)
        return history.epochs[0]["loss"]

    plain, one, three = loss(), loss(features=STAGES), loss(features=(STAGES,), feature_weight=3.0)
    assert one > plain
    assert three - plain == pytest.approx(3 * (one - plain), rel=1e-4)


def test_no_hook_stays_on_either_network(images: Tensor) -> None:
    model, teacher = wrapped(), network().eval()
    before = [copy.copy(m._forward_hooks) for m in (*model.modules(), *teacher.modules())]
    decouple(model, images, None, recipe(epochs=1, features=STAGES), teacher=teacher)
    assert [m._forward_hooks for m in (*model.modules(), *teacher.modules())] == before
    with pytest.raises(ValueError, match="equal shapes wanted"):
        decouple(model, images, None, recipe(epochs=1, features="layer1.0.conv1"), teacher=network(inner=0.5))
    assert [m._forward_hooks for m in model.modules()] == before[: len(list(model.modules()))]


@pytest.mark.parametrize(
    ("features", "teacher", "message"),
    [
        ("layer9", "original", r"features='layer9' matches no module of CifarResNet; .* begin with conv1, bn1"),
        ((STAGES, "decoupling*"), "original", r"features='decoupling\*' matches no module"),
        (STAGES, nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), "the teacher, Sequential, has no module 'layer1'"),
        (STAGES, None, "are a teacher's, and teacher is None"),
    ],
)
def test_features_that_are_not_there_are_refused(images: Tensor, features: Any, teacher: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decouple(wrapped(), images, torch.zeros(48).long(), recipe(features=features), teacher=teacher)


class Beside(nn.Module):
    """Beside its answer a pair, and an auxiliary head in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.aux, self.fc = Pair(), nn.Linear(192, 4), nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.pair(x.flatten(1))
        return self.fc(x) + (self.aux(x) if self.training else 0)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("pair", "'pair' returns a tuple; a module that returns one tensor wanted"),
        ("aux", "'aux' does not run in eval mode; name modules that do in both networks"),
    ],
)
def test_modules_without_a_feature_are_refused(images: Tensor, features: str, message: str) -> None:
    how = Recipe(1, batch_size=16, features=features)
    with pytest.raises(ValueError, match=message):
        train_dense(Beside(), images, torch.zeros(48).long(), how, teacher=Beside())
