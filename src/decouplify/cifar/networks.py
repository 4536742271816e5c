"""Networks for 32x32 images that neither torchvision nor timm has: the ones that CIFAR-10 tables are about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BasicBlock", "CifarGoogLeNet", "CifarResNet", "CifarVgg", "googlenet", "resnet20", "resnet56", "vgg19"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A: subsample, pad channels with zeros).

    Args:
        n_inputs: Channels of the block's input.
        n_filters: Channels of its output.
        stride: Of the first convolution.
        n_inner: Channels between the convolutions, by default ``n_filters``.
    """

    def __init__(self, n_inputs: int, n_filters: int, stride: int, n_inner: int | None = None) -> None:
        super().__init__()
        n_inner = n_filters if n_inner is None else n_inner
        self.conv1 = nn.Conv2d(n_inputs, n_inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_inner)
        self.conv2 = nn.Conv2d(n_inner, n_filters, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_filters)
        self.relu = nn.ReLU(inplace=True)
        self.stride, self.n_padded = stride, n_filters - n_inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.n_padded:
            before = self.n_padded // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.n_padded - before))
        return self.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet-(6 n + 2) of He et al. (2016, section 4.2): n blocks each at 16, 32 and 64 filters.

    Args:
        n_blocks: n; 3 gives ResNet-20, 9 gives ResNet-56.
        n_classes: Classes.
        width: Filters of the first stage; the others have two and four times as many.
        inner: Channels between the two convolutions of a block, as a share of the block's.
    """

    def __init__(self, n_blocks: int, n_classes: int = 10, width: int = 16, inner: float = 1.0) -> None:
        super().__init__()
        self.inner = inner
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, n_blocks, 1)
        self.layer2 = self._stage(width, 2 * width, n_blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, n_blocks, 2)
        self.linear = nn.Linear(4 * width, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def _stage(self, n_inputs: int, n_filters: int, n_blocks: int, stride: int) -> nn.Sequential:
        n_inner = round(self.inner * n_filters)
        first = BasicBlock(n_inputs, n_filters, stride, n_inner)
        return nn.Sequential(first, *(BasicBlock(n_filters, n_filters, 1, n_inner) for _ in range(n_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class CifarVgg(nn.Module):
    """VGG-19 with batch norm and one linear layer, the variant of network slimming (Liu et al. 2017).

    Args:
        n_classes: Classes.
        width: Filters relative to 64, 128, 256, 512 and 512.
    """

    _STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))

    def __init__(self, n_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        n_inputs = 3
        for n_filters, n_convs in self._STAGES:
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(n_convs):
                layers += conv_norm_relu(n_inputs, round(width * n_filters), 3)
                n_inputs = round(width * n_filters)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(n_inputs, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Inception(nn.Module):
    """Four branches: 1x1; 1x1, 3x3; 1x1, 3x3, 3x3; max pool, 1x1. Their outputs are concatenated.

    Args:
        n_inputs: Channels of the input.
        n_filters: Filters of the 1x1; of the second branch's 1x1 and 3x3; of the third's; of the last 1x1.
    """

    def __init__(self, n_inputs: int, n_filters: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        n1, n3_reduced, n3, n5_reduced, n5, n_pooled = n_filters
        self.one = nn.Sequential(*conv_norm_relu(n_inputs, n1, 1))
        self.three = nn.Sequential(*conv_norm_relu(n_inputs, n3_reduced, 1), *conv_norm_relu(n3_reduced, n3, 3))
        self.five = nn.Sequential(
            *conv_norm_relu(n_inputs, n5_reduced, 1), *conv_norm_relu(n5_reduced, n5, 3), *conv_norm_relu(n5, n5, 3)
        )
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), *conv_norm_relu(n_inputs, n_pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


class CifarGoogLeNet(nn.Module):
    """GoogLeNet with batch norm on 32x32 images, its 5x5 convolutions as pairs of 3x3.

    Args:
        n_classes: Classes.
        width: Filters relative to the original's.
    """

    _STAGES = (
        ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
        (
            (192, 96, 208, 16, 48, 64),
            (160, 112, 224, 24, 64, 64),
            (128, 128, 256, 24, 64, 64),
            (112, 144, 288, 32, 64, 64),
            (256, 160, 320, 32, 128, 128),
        ),
        ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
    )

    def __init__(self, n_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        n_channels = round(192 * width)
        layers: list[nn.Module] = conv_norm_relu(3, n_channels, 3)
        for i, stage in enumerate(self._STAGES):
            layers += [nn.MaxPool2d(3, 2, 1)] if i else []
            for block in stage:
                a, b, c, d, e, f = (max(1, round(n * width)) for n in block)
                layers.append(Inception(n_channels, (a, b, c, d, e, f)))
                n_channels = a + c + e + f
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(n_channels, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def conv_norm_relu(n_inputs: int, n_filters: int, size: int) -> list[nn.Module]:
    """A convolution that keeps height and width, its norm and its activation."""
    conv = nn.Conv2d(n_inputs, n_filters, size, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return [conv, nn.BatchNorm2d(n_filters), nn.ReLU(inplace=True)]


def vgg19(n_classes: int = 10, width: float = 1.0) -> CifarVgg:
    """VGG-19 for CIFAR, 20 M parameters, 398 M multiply-accumulates."""
    return CifarVgg(n_classes, width)


def googlenet(n_classes: int = 10, width: float = 1.0) -> CifarGoogLeNet:
    """GoogLeNet for CIFAR, 6.2 M parameters, 1.52 G multiply-accumulates."""
    return CifarGoogLeNet(n_classes, width)


def resnet20(n_classes: int = 10, inner: float = 1.0) -> CifarResNet:
    """ResNet-20, 0.27 M parameters, 41 M multiply-accumulates."""
    return CifarResNet(3, n_classes, inner=inner)


def resnet56(n_classes: int = 10, inner: float = 1.0) -> CifarResNet:
    """ResNet-56, 0.85 M parameters, 126 M multiply-accumulates."""
    return CifarResNet(9, n_classes, inner=inner)
