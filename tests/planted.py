"""Networks whose filters and gates are known, and images they are made for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import decouplify
from decouplify.concepts import Concept, ConceptImage, ConceptImages

SIZE = 32


class PlantedColors(nn.Module):
    """Filters 0-2 are the masks of red, green and blue; the others are smooth noise that ignores the image."""

    def __init__(self, n_random: int = 20) -> None:
        super().__init__()
        self.n_random = n_random
        self.features = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pixels = x * 0.25 + 0.5
        others = pixels.sum(1, keepdim=True) - pixels
        planted = (nn.functional.avg_pool2d((pixels - others / 2 > 0.3).float(), 2) >= 0.5).float()
        noise = torch.cat([self.noise(image) for image in x])
        return self.features(torch.cat([planted, noise], 1))

    def noise(self, image: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(image.double().abs().sum() * 1e6) % 2**31)
        coarse = torch.randn(1, self.n_random, 5, 5, generator=generator)
        return nn.functional.interpolate(coarse, size=image.shape[1] // 2, mode="bilinear").relu()


class Chain(nn.Module):
    """Three 1x1 convolutions; ``wrap`` gates the second and the third."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(3, 3, 1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(3, 3, 1), nn.ReLU()
        self.conv3, self.relu3 = nn.Conv2d(3, 2, 1), nn.ReLU()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.relu3(self.conv3(self.relu2(self.conv2(x))))
        return self.fc(x.mean((2, 3)))


def wrapped_chain() -> nn.Module:
    """Two filters that need red: filter 0 of conv2 because it sees it, filter 0 of conv3 because the former is on.

    On images of ``red_squares``: conv1 gives the red channel where it is bright. Filter 0 of conv2 is open only if
    there is any, and shows where; filter 1 is a constant 1 with the same gate; filter 2 is always open. Filter 0 of
    conv3 is open only if filter 1 of conv2 is, filter 1 always.
    """
    model = Chain()
    with torch.no_grad():
        for conv in (model.conv1, model.conv2, model.conv3):
            conv.weight.zero_()
            conv.bias.zero_()
        model.conv1.weight[0, 0] = 1.0
        model.conv1.bias[0] = -0.5
        model.conv2.weight[0, 0] = 1.0
        model.conv2.bias[1] = 1.0
        model.conv3.weight[0, 0] = 1.0
        model.conv3.bias[1] = 1.0
    decouplify.wrap(model, (3, SIZE, SIZE), reduction=1)
    controllers = model.decoupling.controllers
    with torch.no_grad():
        for controller in controllers.values():
            controller.fc1.weight.copy_(torch.eye(3))
            controller.fc1.bias.zero_()
            controller.fc2.weight.zero_()
        controllers["conv2"].fc2.bias.copy_(torch.tensor([-0.001, -0.001, 1.0]))
        controllers["conv2"].fc2.weight[:2, 0] = 1.0
        controllers["conv3"].fc2.bias.copy_(torch.tensor([-0.5, 1.0]))
        controllers["conv3"].fc2.weight[0, 1] = 1.0
    return model.eval()


def red_squares(n: int = 6) -> ConceptImages:
    """Dark images with a red square; concept 7 is the square, concept 9 a blue one beside it."""
    images = []
    for i in range(n):
        pixels = torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8)
        masks = torch.zeros(1, SIZE // 2, SIZE // 2, dtype=torch.int32)
        top = 2 * i
        pixels[top : top + 8, 4:12, 0] = 255
        pixels[top : top + 8, 16:24, 2] = 255
        masks[0, top // 2 : top // 2 + 4, 2:6] = 7
        masks[0, top // 2 : top // 2 + 4, 8:12] = 9
        images.append(ConceptImage(pixels.numpy(), masks.numpy(), name=f"square {i}"))
    concepts = (Concept(7, "red square", "object"), Concept(9, "blue square", "object"))
    return ConceptImages(concepts, images, transform=lambda p: torch.from_numpy(p).movedim(-1, 0).float() / 255)
