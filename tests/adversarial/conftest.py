"""A small wrapped network that has learned something, and the images it learned it from."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import decouplify
from decouplify.adversarial import PixelModel
from decouplify.train import DecouplingRecipe, Recipe, decouple, train_dense

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


class Net(nn.Module):
    """Three gated convolutions, four classes."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = self.layer(3, width, 1)
        self.body = nn.Sequential(
            self.layer(width, width, 2), self.layer(width, 2 * width, 2), self.layer(2 * width, 2 * width, 1)
        )
        self.fc = nn.Linear(2 * width, 4)

    @staticmethod
    def layer(n_in: int, n_out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Trained:
    """``pixel`` reads ``images`` in [0, 1]; ``original`` is the network before wrapping."""

    pixel: PixelModel
    original: nn.Module
    images: Tensor
    labels: Tensor


@pytest.fixture(scope="session")
def trained() -> Trained:
    """Faint waves of four orientations under noise: learnable, and easy to fool with 8/255."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images, labels = waves(480)
        normalised = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        model = Net()
        train_dense(model, normalised[:280], labels[:280], Recipe(6, batch_size=32))
        original = Net()
        original.load_state_dict(model.state_dict())
        # Bias 0: gates depend on the image from the start; the network learns to live with it in a few epochs.
        decouplify.wrap(model, (3, 16, 16), input_norm=True, bias=0.0, verify=False)
        recipe = DecouplingRecipe(6, batch_size=32, lr=0.05, target=None, mutual_information=0.1)
        decouple(model, normalised[:280], labels[:280], recipe)
    return Trained(PixelModel(model, MEAN, STD).eval(), original.eval(), images[280:], labels[280:])


def waves(n: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % 4
    angle = labels * torch.pi / 4 + 0.15 * torch.randn(n)
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    position = angle.cos()[:, None, None] * rows + angle.sin()[:, None, None] * columns
    wave = 0.07 * torch.sin(1.3 * position + 6 * torch.rand(n, 1, 1))
    noise = 0.08 * torch.randn(n, 3, 16, 16)
    return (0.45 + wave[:, None] + noise).clamp(0, 1), labels
