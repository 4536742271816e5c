"""Toy networks with one pathology each, and what the matching rule must say about them.

Every network maps (N, 3, 16, 16) images to (N, 5) logits unless its pathology is the output. ``width`` is the number of
channels inside; two are enough for the oracles that try all paths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decouplify

SIZE = (3, 16, 16)
N_CLASSES = 5


def conv_bn_relu(n_in: int, n_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(n_out), nn.ReLU())


class Classifier(nn.Module):
    """A stem, whatever a subclass puts in ``body``, global pooling and a linear layer."""

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, width, stride=2)
        self.fc = nn.Linear(width if out is None else out, N_CLASSES)

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


class Plain(Classifier):
    """Conv, norm, activation in a row: nothing that could go wrong."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.b = conv_bn_relu(width, width), conv_bn_relu(width, width, stride=2)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class SharedRelu(Classifier):
    """One ReLU object for all places, as in torchvision's ResNet; the last one comes after the sum."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class BasicConv(nn.Module):
    """Conv, norm and a ReLU that is no module: only the container returns the activated map."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(n_in, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class FunctionalRelu(Classifier):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.b = BasicConv(width, width), BasicConv(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class NoNorm(Classifier):
    """As VGG without batch norm; the second convolution has neither norm nor activation."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv1, self.act = nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.1)
        self.conv2, self.pool = nn.Conv2d(width, width, 3), nn.MaxPool2d(2)

    def body(self, x: Tensor) -> Tensor:
        return self.pool(self.conv2(self.act(self.conv1(x))))


class NormBeforeAdd(Classifier):
    """Bottleneck with projection: two convolutions end in a norm right before the sum."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.reduce, self.spatial = conv_bn_relu(width, width, 1), conv_bn_relu(width, width, stride=2)
        self.expand = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Sequential(nn.Conv2d(width, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        self.act = nn.ReLU()
        self.after = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        y = self.act(self.expand(self.spatial(self.reduce(x))) + self.shortcut(x))
        return self.after(y)


class PreActivation(Classifier):
    """Norm and activation belong to the convolution that follows."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.bn1, self.act1, self.conv1 = nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        self.bn2, self.act2, self.conv2 = nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(width)

    def body(self, x: Tensor) -> Tensor:
        y = self.conv1(self.act1(self.bn1(x)))
        y = self.conv2(self.act2(self.bn2(y)))
        return self.bn3(x + y)


class DepthwiseChain(Classifier):
    """Inverted residual: the depthwise convolution has as many filters as its producer, one each."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU6())
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, groups=2 * width, bias=False)
        self.bn, self.act = nn.BatchNorm2d(2 * width), nn.ReLU6()
        self.project = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.last = nn.Conv2d(width, width, 3, groups=width)

    def body(self, x: Tensor) -> Tensor:
        y = self.project(self.act(self.bn(self.depthwise(self.pad(self.expand(x))))))
        return self.last(x[:, :, 1:, 1:] + y)


class Grouped(Classifier):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.b = conv_bn_relu(width, width), conv_bn_relu(width, 2 * width, groups=2)
        self.c = conv_bn_relu(2 * width, width, groups=2)

    def body(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class SqueezeExcite(Classifier):
    """1x1 convolutions on a pooled map decide about channels, and are no convolutions worth a gate."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.b = conv_bn_relu(width, width), conv_bn_relu(width, width)
        self.squeeze, self.excite = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)

    def body(self, x: Tensor) -> Tensor:
        y = self.a(x)
        scale = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return self.b(y * scale)


class ParallelBranches(Classifier):
    """RepVGG before its branches are merged: two convolutions and a norm read one value and are summed."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.dense = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.pointwise = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.identity, self.act = nn.BatchNorm2d(width), nn.ReLU()
        self.after = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.after(self.act(self.dense(x) + self.pointwise(x) + self.identity(x)))


class ChannelShuffle(Classifier):
    """ShuffleNet unit: half of the channels pass by, then the halves are interleaved."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.half = width // 2
        self.a = conv_bn_relu(width, width)
        self.branch = conv_bn_relu(self.half, self.half)
        self.after = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        kept, changed = self.a(x).chunk(2, 1)
        y = torch.cat([kept, self.branch(changed)], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.after(y)


class DenseConcat(Classifier):
    """Every layer reads all that came before."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.b = conv_bn_relu(width, width), conv_bn_relu(2 * width, width)
        self.c = conv_bn_relu(3 * width, width)

    def body(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(torch.cat([x, a], 1))
        return self.c(torch.cat([x, a, b], 1))


class ZeroPaddedShortcut(Classifier):
    """CIFAR ResNet, option A: the shortcut drops positions and adds channels of zeros."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width, 2 * width)
        self.a = conv_bn_relu(width, 2 * width, stride=2)
        self.b = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * width))
        self.c = conv_bn_relu(2 * width, 2 * width)

    def body(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, x.shape[1]))
        return self.c(F.relu(self.b(self.a(x)) + shortcut))


class LayerNormPermuted(Classifier):
    """ConvNeXt: the norm runs over channels, in another memory order."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv, self.norm, self.act = nn.Conv2d(width, width, 3, padding=1), nn.LayerNorm(width), nn.GELU()
        self.after = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return self.after(self.act(y).permute(0, 3, 1, 2))


class LinearOnMaps(Classifier):
    """The multiply-accumulates sit in linear layers on (N, H, W, C) maps."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.expand, self.act, self.project = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1)
        y = self.project(self.act(self.expand(y)))
        return x + (y * self.gamma).permute(0, 3, 1, 2)


class ConvTwice(Classifier):
    """A convolution shared by two places would need two gates at one place."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.twice, self.once = nn.Conv2d(width, width, 3, padding=1), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.once(F.relu(self.twice(F.relu(self.twice(x)))))


class DynamicConv(nn.Module):
    """A convolution whose weight another layer computes from the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.make, self.width = nn.Linear(width, width * width), width

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weight = self.make(x.mean((2, 3))).view(n * self.width, c, 1, 1)
        return F.conv2d(x.reshape(1, n * c, h, w), weight, groups=n).view(n, self.width, h, w)


class DynamicWeight(Classifier):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.dynamic, self.after = DynamicConv(width), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.after(self.dynamic(x))


class Blur(nn.Module):
    """Fixed low-pass filter: a convolution that nobody trains."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.full((width, 1, 3, 3), 1 / 9))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, stride=2, padding=1, groups=x.shape[1])


class FixedWeight(Classifier):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.blur, self.b = conv_bn_relu(width, width), Blur(width), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.blur(self.a(x)))


class Transposed(Classifier):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.up = conv_bn_relu(width, width), nn.ConvTranspose2d(width, width, 2, 2)
        self.b = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.up(self.a(x)))


class WriteThroughView(Classifier):
    """Half of a convolution's output is changed in place through a slice of it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv, self.after = nn.Conv2d(width, width, 3, padding=1), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, : y.shape[1] // 2].add_(1)
        return self.after(y)


class ConvWithStatistics(nn.Module):
    """Returns the convolved map in a tuple, which a hook cannot multiply."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, 3, 3) / (3 * width**0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv2d(x, self.weight, padding=1)
        return y, y.mean()


class NotReturned(Classifier):
    """Two convolutions out of reach: one returned in a tuple, one computed by the model itself."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.inner, self.after = ConvWithStatistics(width), conv_bn_relu(width, width)
        self.weight = nn.Parameter(torch.randn(width, width, 1, 1) / width**0.5)

    def body(self, x: Tensor) -> Tensor:
        return self.after(F.conv2d(self.inner(x)[0], self.weight))


class TwoOutputs(Plain):
    def forward(self, x: Tensor) -> Any:
        a = self.a(self.stem(x))
        return self.fc(self.b(a).mean((2, 3))), a


class DictOutput(Plain):
    def forward(self, x: Tensor) -> Any:
        a = self.a(self.stem(x))
        return {"logits": self.fc(self.b(a).mean((2, 3))), "features": [a, None]}


class LateStage(Classifier):
    """Strides shrink the map to one position before the last convolution: 1x1 maps that nothing pooled."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.b = conv_bn_relu(width, width, stride=4), conv_bn_relu(width, width, stride=2)
        self.c = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class IdentityOnOneWay(Classifier):
    """The gated value is read twice, once through an ``nn.Identity`` that also returns it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.identity = nn.Identity()
        self.left, self.right = conv_bn_relu(width, width), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.left(self.identity(y)) + self.right(y)


class SigmoidActivation(Classifier):
    """sigmoid(0) is not 0: zeros come from the gate, not from the convolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv1, self.act1 = nn.Conv2d(width, width, 3, padding=1), nn.Sigmoid()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.Sigmoid()
        self.after = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.after(self.act2(self.bn2(self.conv2(self.act1(self.conv1(x))))))


@dataclass(frozen=True)
class Toy:
    """A toy network and its plan in literals.

    Attributes:
        build: Makes the network, optionally of another width.
        gates: Sites of each gate, by gate name, in execution order.
        ends: Where each gate multiplies, "module" or "module after other module".
        refused: Reason by name of the convolution.
        options: Further arguments of ``wrap``.
        exact: Whether ``flow`` knows every channel that the gates make zero, not just some.
    """

    build: Callable[..., nn.Module]
    gates: dict[str, list[str]]
    ends: dict[str, list[str]]
    refused: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = True

    def wrapped(self, seed: int = 0, **options: Any) -> nn.Module:
        """The network with random statistics, wrapped."""
        torch.manual_seed(seed)
        return decouplify.wrap(randomise_statistics(self.build()), SIZE, **{**self.options, **options})


FIRST = {"stem.0": "first convolution (skip_first)"}

TOYS: dict[str, Toy] = {
    "plain": Toy(Plain, {"a.0": ["a.0"], "b.0": ["b.0"]}, {"a.0": ["a.2"], "b.0": ["b.2"]}),
}


def randomise_statistics(model: nn.Module) -> nn.Module:
    """Running statistics and scales of a network that has been trained, of which none is 0 or 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.5)
    return model


def randomise_gates(model: nn.Module, scale: float = 1.0) -> nn.Module:
    """Controllers that open about half of the filters, others for each image."""
    for controller in model.decoupling.controllers.values():
        hidden = controller.fc2.in_features
        nn.init.normal_(controller.fc1.weight, std=4 * scale / controller.fc1.in_features**0.5)
        nn.init.normal_(controller.fc2.weight, std=4 * scale / hidden**0.5)
        nn.init.normal_(controller.fc2.bias, std=0.5 * scale)
    return model


def random_gates(model: nn.Module, n_images: int | None = None, p: float = 0.5) -> dict[str, Tensor]:
    """Random binary values for ``decoupling.forced``: shape (K,), or (N, K) for ``n_images``."""
    lead = () if n_images is None else (n_images,)
    return {g.name: (torch.rand(*lead, g.n_filters) < p).float() for g in model.decoupling.plan.gates}


def images(n: int = 2, size: tuple[int, ...] = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(seed))
