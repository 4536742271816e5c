"""Toy networks with one pathology each, and the plan that the matching rule must make of them.

Every network maps (N, 3, 16, 16) images to (N, 5) logits unless its pathology is the output. ``width`` is the number of
channels inside; two are enough for oracles that try all paths. The decorator ``toy`` states the plan in literals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decouplify
from decouplify.modes import eval_mode

SIZE = (3, 16, 16)
N_CLASSES = 5

FIRST = "first convolution (skip_first)"
POOLED = "reads a globally pooled map (squeeze-excite or head)"


@dataclass(frozen=True)
class Toy:
    """A toy network and its plan.

    Attributes:
        build: Makes the network, optionally of another width.
        gates: By gate name, in execution order: its sites, and the modules that multiply ("relu after bn1": the module
            ``relu`` where it receives the output of ``bn1``).
        refused: Reason by convolution.
        options: Arguments for ``wrap`` that belong to the pathology.
        exact: Whether every channel that closed gates make zero is known to be zero, not just some of them.
    """

    build: Callable[..., nn.Module]
    gates: dict[str, tuple[list[str], list[str]]]
    refused: dict[str, str]
    options: dict[str, Any]
    exact: bool

    def wrapped(self, width: int = 8, **options: Any) -> nn.Module:
        """The network with random statistics, wrapped."""
        model = randomise_statistics(self.build(width))
        return decouplify.wrap(model, SIZE, **{**self.options, **options})


TOYS: dict[str, Toy] = {}


def toy(
    gates: dict[str, tuple[list[str], list[str]]],
    refused: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
    stem: str = "stem.0",
    exact: bool = True,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a network; the refusal of its first convolution, ``stem``, need not be repeated."""

    def register(build: type[nn.Module]) -> type[nn.Module]:
        TOYS[build.__name__] = Toy(build, gates, {stem: FIRST, **(refused or {})}, options or {}, exact)
        return build

    return register


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


# Order of convolution, norm and activation ----------------------------------------------------------------------------


@toy({"a.0": (["a.0"], ["a.2"]), "b.0": (["b.0"], ["b.2"])})
class Plain(Classifier):
    """Convolution, norm, activation in a row: nothing that could go wrong."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.b = conv_bn_relu(width, width), conv_bn_relu(width, width, stride=2)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@toy({"conv1": (["conv1"], ["act"]), "conv2": (["conv2"], ["conv2"])})
class NoNorm(Classifier):
    """As VGG without batch norm; the second convolution has neither norm nor activation."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv1, self.act = nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.1)
        self.conv2, self.pool = nn.Conv2d(width, width, 3), nn.MaxPool2d(2)

    def body(self, x: Tensor) -> Tensor:
        return self.pool(self.conv2(self.act(self.conv1(x))))


@toy({"conv1": (["conv1"], ["act2"]), "conv2": (["conv2"], ["conv2"])})
class PreActivation(Classifier):
    """Norm and activation come before the convolution, and a norm stands behind the sum."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.bn1, self.act1, self.conv1 = nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        self.bn2, self.act2, self.conv2 = nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(width)

    def body(self, x: Tensor) -> Tensor:
        y = self.conv1(self.act1(self.bn1(x)))
        y = self.conv2(self.act2(self.bn2(y)))
        return self.bn3(x + y)


@toy({"conv": (["conv"], ["act"]), "after.0": (["after.0"], ["after.2"])})
class ActivationBeforeNorm(Classifier):
    """The norm belongs to the next layer and moves zeros away."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv, self.act, self.bn = nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.BatchNorm2d(width)
        self.after = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.after(self.bn(self.act(self.conv(x))))


@toy({"conv1": (["conv1"], ["act1"]), "conv2": (["conv2"], ["act2"]), "after.0": (["after.0"], ["after.2"])})
class SigmoidActivation(Classifier):
    """sigmoid(0) is not 0: zeros come from the gate, not from the convolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv1, self.act1 = nn.Conv2d(width, width, 3, padding=1), nn.Sigmoid()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.Sigmoid()
        self.after = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.after(self.act2(self.bn2(self.conv2(self.act1(self.conv1(x))))))


@toy(
    {"conv1": (["conv1"], ["act1"]), "conv2": (["conv2"], ["act2"]), "conv3": (["conv3"], ["conv3"])},
)
class OtherNorms(Classifier):
    """A norm over groups of channels needs closed filters too; a norm per image, an activation with weights do not."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv1, self.norm1, self.act1 = nn.Conv2d(width, width, 3), nn.GroupNorm(2, width), nn.ReLU()
        self.conv2, self.norm2, self.act2 = nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width), nn.PReLU(width)
        self.conv3 = nn.Conv2d(width, width, 3)

    def body(self, x: Tensor) -> Tensor:
        return self.conv3(self.act2(self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))))


@toy({"conv": (["conv"], ["act"]), "after.0": (["after.0"], ["after.2"])})
class LayerNormPermuted(Classifier):
    """ConvNeXt: the norm runs over channels, in another memory order."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv, self.norm, self.act = nn.Conv2d(width, width, 3, padding=1), nn.LayerNorm(width), nn.GELU()
        self.after = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return self.after(self.act(y).permute(0, 3, 1, 2))


# Where a hook can reach the value -------------------------------------------------------------------------------------


@toy({"conv1": (["conv1"], ["relu after bn1"]), "conv2": (["conv2"], ["bn2"])})
class SharedRelu(Classifier):
    """One ReLU for all places, as in torchvision's ResNet; the last one follows the sum."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def body(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


@toy({"conv1": (["conv1"], ["relu after bn1"]), "conv2": (["conv2"], ["bn2"])})
class SharedReluByKeyword(SharedRelu):
    """A shared activation that receives its input by name, where no gate is."""

    def body(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(input=self.bn2(self.conv2(y)) + x)


class BasicConv(nn.Module):
    """Convolution, norm and a ReLU that is no module: only this container returns the activated map."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(n_in, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


@toy({"a.conv": (["a.conv"], ["a"]), "b.conv": (["b.conv"], ["b"])})
class FunctionalRelu(Classifier):
    """As torchvision's GoogLeNet."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.b = BasicConv(width, width), BasicConv(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@toy({"conv": (["conv"], ["bn"]), "after.0": (["after.0"], ["after.2"])})
class UnreachableRelu(Classifier):
    """A ReLU that only the model itself runs: no module returns its result, so the gate sits before it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.after = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.after(F.relu(self.bn(self.conv(x))))


@toy({"conv": (["conv"], ["bn"]), "left.0": (["left.0"], ["left.2"]), "right.0": (["right.0"], ["right.2"])})
class IdentityOnOneWay(Classifier):
    """The gated value goes two ways, on one of them through modules that return it untouched."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.identity = nn.Identity()
        self.left, self.right = conv_bn_relu(width, width), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return self.left(self.identity(y)) + self.right(y)


@toy({"conv": (["conv"], ["bn"]), "left.0": (["left.0"], ["left.2"]), "right.0": (["right.0"], ["right.2"])})
class DropoutOnOneWay(IdentityOnOneWay):
    """In eval mode dropout returns its input, which the other way reads as well."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.identity = nn.Dropout(0.5)


class ConvWithStatistics(nn.Module):
    """Returns the convolved map in a tuple, which a hook cannot multiply."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, 3, 3) / (3 * width**0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv2d(x, self.weight, padding=1)
        return y, y.mean()


@toy(
    {"after.0": (["after.0"], ["after.2"])},
    {
        "inner": "no module returns its output, so no hook can gate it",
        "<conv2d_default_2>": "no module of its own to hook",
        "named": "its module does not receive the convolved map as its first argument",
    },
)
class OutOfReach(Classifier):
    """Convolutions that hooks cannot serve: returned in a tuple, run by the model itself, called by keyword."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.inner, self.after = ConvWithStatistics(width), conv_bn_relu(width, width)
        self.weight = nn.Parameter(torch.randn(width, width, 1, 1) / width**0.5)
        self.named = nn.Conv2d(width, width, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.after(self.named(input=F.conv2d(self.inner(x)[0], self.weight)))


class TwoConvs(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, width, 1, 1) / width**0.5)
        self.second = nn.Parameter(torch.randn(width, width, 1, 1) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(F.conv2d(x, self.first)), self.second)


@toy({"after.0": (["after.0"], ["after.2"])}, {"both": "its module runs several convolutions itself"})
class SeveralInOneModule(Classifier):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.both, self.after = TwoConvs(width), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.after(self.both(x))


@toy({"once.0": (["once.0"], ["once.2"])}, {"twice": "called 2 times per image"})
class ConvTwice(Classifier):
    """A convolution shared by two places would need two gates at one place."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.twice, self.once = nn.Conv2d(width, width, 3, padding=1), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.once(F.relu(self.twice(F.relu(self.twice(x)))))


@toy({"after.0": (["after.0"], ["after.2"])}, {"conv": "its output is changed through another name"})
class WriteThroughView(Classifier):
    """Half of a convolution's output is changed in place through a slice of it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv, self.after = nn.Conv2d(width, width, 3, padding=1), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, : y.shape[1] // 2].add_(1)
        return self.after(y)


@toy({"1.0": (["1.0"], ["1.2"]), "2": (["2"], ["2"])}, stem="0.0")
class BareSequential(nn.Sequential):
    """A container that runs all of its children, also one that is added later."""

    def __init__(self, width: int = 8) -> None:
        pooling = nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(width, N_CLASSES)
        super().__init__(
            conv_bn_relu(3, width), conv_bn_relu(width, width), nn.Conv2d(width, width, 3, padding=1), *pooling
        )


@toy({"a.0": (["a.0"], ["a.2"]), "b.0": (["b.0"], ["b.2"])})
class ImageInPlace(Plain):
    """Normalises its images in place."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.sub_(0.5))


# What the convolution is ----------------------------------------------------------------------------------------------


@toy({"a.0": (["a.0"], ["a.2"]), "b.0": (["b.0"], ["b.2"]), "c.0": (["c.0"], ["c.2"])})
class Grouped(Classifier):
    """Two groups, and as many groups as channels with two filters each."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.b = conv_bn_relu(width, width, groups=2), conv_bn_relu(width, 2 * width, groups=width)
        self.c = conv_bn_relu(2 * width, width, groups=2)

    def body(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


@toy(
    {
        "expand.0": (["expand.0", "depthwise"], ["expand.2", "act"]),
        "project.0": (["project.0"], ["project.1"]),
        "last": (["last"], ["last"]),
    }
)
class DepthwiseChain(Classifier):
    """Inverted residual: the depthwise convolution shares the gate of its producer; behind a sum there is none."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU6())
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, groups=2 * width, bias=False)
        self.bn, self.act = nn.BatchNorm2d(2 * width), nn.ReLU6()
        self.project = nn.Sequential(nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.last, self.mix = nn.Conv2d(width, width, 3, groups=width), nn.BatchNorm2d(width)

    def body(self, x: Tensor) -> Tensor:
        y = self.project(self.act(self.bn(self.depthwise(self.pad(self.expand(x))))))
        return F.relu(self.mix(F.relu(self.last(x[:, :, 1:, 1:] + y)) + 1))


@toy(
    {"same": (["same"], ["same"]), "mirror": (["mirror"], ["mirror"]), "ones": (["ones"], ["ones"])},
)
class Padding(Classifier):
    """Padding by name, by mirroring, and with a number that is not zero."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.same = nn.Conv2d(width, width, 2, padding="same", dilation=2)
        self.mirror = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")
        self.pad, self.ones = nn.ConstantPad2d(1, 1.0), nn.Conv2d(width, width, 3, padding="valid")

    def body(self, x: Tensor) -> Tensor:
        return self.ones(self.pad(self.mirror(self.same(x))))


@toy(
    {"conv": (["conv"], ["conv"]), "expand": (["expand"], ["act"]), "project": (["project"], ["project"])},
    options={"linear_as_conv": True},
)
class LinearOnMaps(Classifier):
    """The multiply-accumulates sit in linear layers on (N, H, W, C) maps; a learned scale follows the last one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.expand, self.act, self.project = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def body(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 1)
        y = self.project(self.act(self.expand(y)))
        return x + (y * self.gamma).permute(0, 3, 1, 2)


class DynamicConv(nn.Module):
    """A convolution whose weight another layer computes from the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.make, self.width = nn.Linear(width, width * width), width

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        weight = self.make(x.mean((2, 3))).view(n * self.width, c, 1, 1)
        return F.conv2d(x.reshape(1, n * c, h, w), weight, groups=n).view(n, self.width, h, w)


@toy(
    {"a.0": (["a.0"], ["a.2"]), "after.0": (["after.0"], ["after.2"])},
    {"dynamic": "its weight is computed from the image"},
    exact=False,
)
class DynamicWeight(Classifier):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.dynamic, self.after = conv_bn_relu(width, width), DynamicConv(width), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.after(self.dynamic(self.a(x)))


class Blur(nn.Module):
    """Fixed low-pass filter: a convolution that nobody trains."""

    kernel: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.full((width, 1, 3, 3), 1 / 9))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, stride=2, padding=1, groups=x.shape[1])


@toy({"a.0": (["a.0"], ["a.2"]), "b.0": (["b.0"], ["b.2"])}, {"blur": "its weight is not a parameter"}, exact=False)
class FixedWeight(Classifier):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.blur, self.b = conv_bn_relu(width, width), Blur(width), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.blur(self.a(x)))


@toy(
    {"a.0": (["a.0"], ["a.2"]), "b.0": (["b.0"], ["b.2"])},
    {
        "up": "not a 2-D convolution (conv_transpose2d)",
        "rows": "not a 2-D convolution (conv1d)",
        "cls": "classifier: nothing with parameters follows",
    },
    exact=False,
)
class OtherConvs(Classifier):
    """Convolutions of another kind, and one that is the classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.up = conv_bn_relu(width, width), nn.ConvTranspose2d(width, width, 2, 2, groups=2)
        self.rows, self.b = nn.Conv1d(width, width, 3, padding=1), conv_bn_relu(width, width)
        self.cls = nn.Conv2d(width, N_CLASSES, 1)
        del self.fc

    def forward(self, x: Tensor) -> Any:
        y = self.up(self.a(self.stem(x)))
        y = self.b(self.rows(y.flatten(2)).view_as(y))
        return self.cls(y).mean((2, 3))


@toy(
    {"after.0": (["after.0"], ["after.2"])},
    {"windowed": "its batch is not the images (windows or frames are folded into it)"},
)
class FoldedBatch(Classifier):
    """A convolution on windows: its batch is four times the images."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.windowed, self.after = nn.Conv2d(width, width, 3, padding=1), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.view(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(4 * n, c, h // 2, w // 2)
        y = self.windowed(y).view(n, 2, 2, c, h // 2, w // 2).permute(0, 3, 1, 4, 2, 5)
        return self.after(y.reshape(n, c, h, w))


@toy(
    {"a.0": (["a.0"], ["a.2"]), "b.0": (["b.0"], ["b.2"])},
    {"squeeze": POOLED, "excite": POOLED, "embed": "what it reads does not depend on the image"},
)
class SqueezeExcite(Classifier):
    """Convolutions on a pooled map, and on a table of positions that is the same for all images."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.b = conv_bn_relu(width, width), conv_bn_relu(width, width)
        self.squeeze, self.excite = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1)
        self.embed = nn.Conv2d(2, width, 1)

    def body(self, x: Tensor) -> Tensor:
        y = self.a(x)
        scale = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        positions = torch.arange(x.shape[2] * 2, dtype=x.dtype, device=x.device).view(1, 2, -1, 1).sin()
        return self.b(y * scale * self.embed(positions).exp())


@toy(
    {"a.0": (["a.0"], ["a.2"]), "b.0": (["b.0"], ["b.2"]), "c.0": (["c.0"], ["c.2"])},
)
class LateStage(Classifier):
    """Strides shrink the map to one position before the last convolution: a 1x1 map that nothing has pooled."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.b = conv_bn_relu(width, width, stride=4), conv_bn_relu(width, width, stride=2)
        self.c = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


# How values meet ------------------------------------------------------------------------------------------------------


@toy(
    {
        "reduce.0": (["reduce.0"], ["reduce.2"]),
        "spatial.0": (["spatial.0"], ["spatial.2"]),
        "expand.0": (["expand.0"], ["expand.1"]),
        "shortcut.0": (["shortcut.0"], ["shortcut.1"]),
        "after.0": (["after.0"], ["after.2"]),
    }
)
class NormBeforeAdd(Classifier):
    """Bottleneck with projection: two convolutions end in a norm right before the sum."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.reduce, self.spatial = conv_bn_relu(width, width, 1), conv_bn_relu(width, width, stride=2)
        self.expand = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Sequential(nn.Conv2d(width, width, 1, 2, bias=False), nn.BatchNorm2d(width))
        self.act, self.after = nn.ReLU(), conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        y = self.expand(self.spatial(self.reduce(x)))
        y += self.shortcut(x)
        return self.after(self.act(y))


@toy({"dense.0": (["dense.0", "pointwise.0"], ["act"]), "after.0": (["after.0"], ["after.2"])})
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


@toy({"a.0": (["a.0"], ["a.2"]), "branch.0": (["branch.0"], ["branch.2"]), "after.0": (["after.0"], ["after.2"])})
class ChannelShuffle(Classifier):
    """ShuffleNet unit: half of the channels pass by, then the halves are interleaved."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a, self.branch = conv_bn_relu(width, width), conv_bn_relu(width // 2, width // 2)
        self.after = conv_bn_relu(width, width)

    def body(self, x: Tensor) -> Tensor:
        kept, changed = self.a(x).chunk(2, 1)
        y = torch.cat([kept, self.branch(changed)], 1)
        n, c, h, w = y.shape
        return self.after(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


@toy({name: ([name], [name]) for name in ("a", "one", "pooled", "padded", "grouped")})
class NormOfGated(Classifier):
    """As DenseNet: norms stand between a gate and what reads it, so that closed channels hold constants."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a = nn.Conv2d(width, width, 3, 1, 1)
        self.norm1, self.norm2, self.relu = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.ReLU()
        self.one, self.padded = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.grouped = nn.Conv2d(width, width, 2, groups=2)
        self.pool, self.pooled = nn.AvgPool2d(3, 1, 1), nn.Conv2d(width, width, 1, bias=False)

    def body(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y, z = self.relu(self.norm1(x)), self.norm2(x)
        same_size = self.one(y) + self.pooled(self.pool(y)) + self.padded(y)
        return same_size[:, :, 1:, 1:] + self.grouped(z)


@toy({"a.0": (["a.0"], ["a.2"]), "b.0": (["b.0"], ["b.2"]), "c.0": (["c.0"], ["c.2"])})
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


@toy(
    {
        "a.0": (["a.0"], ["a.2"]),
        "b.0": (["b.0"], ["b.1"]),
        "c.0": (["c.0"], ["c.2"]),
        "last": (["last"], ["last"]),
    }
)
class ZeroPaddedShortcut(Classifier):
    """CIFAR ResNet, option A: the shortcut drops positions and adds channels of zeros, in two memory orders."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.a = conv_bn_relu(width, 2 * width, stride=2)
        self.b = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * width))
        self.c, self.last = conv_bn_relu(2 * width, width), nn.Conv2d(2 * width, width, 1)

    def body(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, x.shape[1]))
        y = self.c(F.relu(self.b(self.a(x)) + shortcut))
        y = F.pad(y.permute(0, 2, 3, 1), (0, y.shape[1])).permute(0, 3, 1, 2)
        return F.relu(self.last(y))


@toy({"a.0": (["a.0"], ["a.2"]), "b.0": (["b.0"], ["b.2"])})
class TwoOutputs(Plain):
    def forward(self, x: Tensor) -> Any:
        a = self.a(self.stem(x))
        return self.fc(self.b(a).mean((2, 3))), a


@toy({"a.0": (["a.0"], ["a.2"]), "b.0": (["b.0"], ["b.2"])})
class DictOutput(Plain):
    def forward(self, x: Tensor) -> Any:
        a = self.a(self.stem(x))
        return {"logits": self.fc(self.b(a).mean((2, 3))), "features": [a, None]}


# Random states --------------------------------------------------------------------------------------------------------


def randomise_statistics(model: nn.Module) -> nn.Module:
    """Running statistics and scales as in a trained network, none of them 0 or 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    return model


def randomise_gates(model: nn.Module) -> nn.Module:
    """Controllers that open about half of their filters, others for each image."""
    pooled: dict[nn.Module, Tensor] = {}

    def pool(controller: nn.Module, args: tuple[Tensor]) -> None:
        pooled[controller] = args[0].mean((2, 3) if controller.input_axis == 1 else (1, 2)).double()

    controllers = model.decoupling.controllers.values()
    handles = [controller.register_forward_pre_hook(pool) for controller in controllers]
    with eval_mode(model):
        run(model, random_images(16, model.decoupling.plan.input_size, seed=16).to(next(model.parameters())))
    for handle in handles:
        handle.remove()
    model.decoupling.drop_forward()
    for controller in controllers:
        # Centred on the mean image and in pairs of opposite sign: hidden units that are closed for all images would
        # give all of them the same path.
        s, fc1, fc2 = pooled[controller], controller.fc1, controller.fc2
        nn.init.normal_(fc1.weight)
        half = len(fc1.weight) // 2
        fc1.weight.data[half : 2 * half] = -fc1.weight.data[:half]
        fc1.bias.data = -fc1.weight.detach() @ s.mean(0).to(fc1.weight)
        hidden = F.linear(s.to(fc1.weight), fc1.weight, fc1.bias).detach().relu()
        nn.init.normal_(fc2.weight)
        fc2.weight.data /= hidden.std()
        fc2.bias.data = 0.3 * torch.randn_like(fc2.bias) - fc2.weight.detach() @ hidden.mean(0)
    return model


def random_gates(model: nn.Module, n_images: int | None = None, p: float = 0.5) -> dict[str, Tensor]:
    """Random binary values for ``decoupling.forced``: shape (K,), or (N, K) for ``n_images``."""
    lead = () if n_images is None else (n_images,)
    return {gate.name: (torch.rand(*lead, gate.n_filters) < p).float() for gate in model.decoupling.plan.gates}


def random_images(n: int = 2, size: tuple[int, ...] = SIZE, seed: int = 0) -> Tensor:
    """Noise around a colour that differs between images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *size, generator=generator) + torch.randn(n, size[0], 1, 1, generator=generator)


def leaves(output: Any) -> list[Tensor]:
    """All tensors of a model's output."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def run(model: nn.Module, images: Tensor) -> list[Tensor]:
    """All tensors that a model returns, without gradient; the images stay as they are."""
    with torch.no_grad():
        return leaves(model(images.clone()))
