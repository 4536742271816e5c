"""The residual networks for CIFAR-10 of He et al. (2016, section 4.2), which neither torchvision nor timm has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A: subsample, pad channels with zeros)."""

    def __init__(self, n_inputs: int, n_filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_inputs, n_filters, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_filters)
        self.conv2 = nn.Conv2d(n_filters, n_filters, 3, 1, 1, bias=False)
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
    """ResNet-(6 n + 2) on 32x32 images: n blocks each at 16, 32 and 64 filters.

    Args:
        n_blocks: n; 3 gives ResNet-20, 9 gives ResNet-56.
        n_classes: Classes.
        width: Filters of the first stage; the others have two and four times as many.
    """

    def __init__(self, n_blocks: int, n_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, n_blocks, 1)
        self.layer2 = self._stage(width, 2 * width, n_blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, n_blocks, 2)
        self.linear = nn.Linear(4 * width, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    @staticmethod
    def _stage(n_inputs: int, n_filters: int, n_blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(n_inputs, n_filters, stride)
        return nn.Sequential(first, *(BasicBlock(n_filters, n_filters, 1) for _ in range(n_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet20(n_classes: int = 10) -> CifarResNet:
    """ResNet-20, 0.27 M parameters, 41 M multiply-accumulates."""
    return CifarResNet(3, n_classes)


def resnet56(n_classes: int = 10) -> CifarResNet:
    """ResNet-56, 0.85 M parameters, 126 M multiply-accumulates."""
    return CifarResNet(9, n_classes)
