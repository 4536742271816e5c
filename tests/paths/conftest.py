"""A stand-in for a wrapped model, and path sets with known content."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import decouplify
from decouplify.data import load_images
from decouplify.paths import PathSet
from decouplify.train import DecouplingRecipe, Recipe, decouple, train_dense

# Names, and sizes that are no multiples of 8 except one.
LAYERS = (("conv1", 5), ("block.conv", 16), ("block.conv2", 9))


@dataclass(frozen=True)
class Gate:
    name: str
    n_filters: int


@dataclass(frozen=True)
class Plan:
    gates: tuple[Gate, ...] = tuple(Gate(*layer) for layer in LAYERS)
    model: str = "toy"

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "gates": [vars(gate) for gate in self.gates]}


class Decoupling(nn.Module):
    """Gates that are linear in the mean of each channel; open where the logit is positive."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.plan = Plan()
        self.controllers = nn.ModuleList(nn.Linear(n_channels, gate.n_filters) for gate in self.plan.gates)
        self._logits: list[Tensor] = []

    def decide(self, pooled: Tensor) -> None:
        self._logits = [controller(pooled) for controller in self.controllers]

    def gates(self) -> dict[str, Tensor]:
        if self.training:
            return self._named([logits.sigmoid() for logits in self._logits])
        return self._named([(logits > 0).float() for logits in self._logits])

    def margins(self) -> dict[str, Tensor]:
        return self._named(self._logits)

    def _named(self, values: list[Tensor]) -> dict[str, Tensor]:
        return {gate.name: value for gate, value in zip(self.plan.gates, values, strict=True)}


class Toy(nn.Module):
    """A classifier of (N, 3, 4, 4) images with a dropout that must be off, and gates computed on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(3, 4)
        self.decoupling = Decoupling(3)

    def forward(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert len(images) > 0
        pooled = self.dropout(self.norm(images)).mean(dim=(2, 3))
        self.decoupling.decide(pooled)
        return self.head(pooled)


@pytest.fixture
def toy() -> Toy:
    return Toy().train()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(23, 3, 4, 4, generator=torch.Generator().manual_seed(1))


MakePaths = Callable[..., PathSet]


@pytest.fixture
def make_paths() -> MakePaths:
    """Random paths: ``make_paths(n, {"layer": n_filters}, p=0.5, n_classes=None, seed=0)``."""

    def make(
        n: int, sizes: Mapping[str, int], p: float = 0.5, n_classes: int | None = None, seed: int = 0, **columns: Any
    ) -> PathSet:
        rng = np.random.default_rng(seed)
        gates = {name: rng.random((n, k)) < p for name, k in sizes.items()}
        if n_classes is not None:
            columns["labels"] = np.arange(n) % n_classes
        return PathSet.from_gates(gates, **columns)

    return make


@dataclass(frozen=True)
class Trained:
    """A network before and after decoupling, and the digits it was not trained on."""

    original: nn.Module
    wrapped: nn.Module
    images: Tensor
    labels: Tensor
    pictures: Any

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.images.split(100), self.labels.split(100), strict=True))


@pytest.fixture(scope="session")
def trained() -> Trained:
    """Digits at 8 x 8, four convolutions, a few seconds of training; two thirds of the filters become dynamic."""
    pytest.importorskip("sklearn")
    digits = load_images("digits", size=8)
    torch.manual_seed(0)
    model = nn.Sequential(
        *block(1, 8), *block(8, 16), *block(16, 24), nn.MaxPool2d(2), *block(24, 32), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    train_dense(model, *digits.tensors("train"), Recipe(5, batch_size=64))
    original = copy.deepcopy(model)
    wrapped = decouplify.wrap(model, digits.image_size, input_norm=True)
    recipe = DecouplingRecipe(10, 0.05, 64, mutual_information=0.1, target="1.5x", distillation=0.0)
    decouple(wrapped, *digits.tensors("train"), recipe)
    images, labels = digits.tensors("test")
    return Trained(original.eval(), wrapped.eval(), images, labels, digits.test_images)


def block(n_inputs: int, n_filters: int) -> list[nn.Module]:
    return [nn.Conv2d(n_inputs, n_filters, 3, padding=1, bias=False), nn.BatchNorm2d(n_filters), nn.ReLU()]
