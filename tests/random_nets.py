"""A hypothesis strategy that draws small convolutional networks out of every pattern that real ones are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu_inplace": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "sigmoid": nn.Sigmoid,
    "prelu": nn.PReLU,
    "none": nn.Identity,
}


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm(kind: str, n: int) -> nn.Module:
    return {
        "bn": nn.BatchNorm2d,
        "ln": LayerNorm2d,
        # Of one channel a plane may be one pixel, and torch refuses to normalise a single value.
        "gn": lambda c: nn.GroupNorm(1, c) if c > 1 else nn.Identity(),
        "none": lambda c: nn.Identity(),
    }[kind](n)


class Plain(nn.Module):
    """conv, norm, activation as modules."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        padding = spec.dilation * (spec.kernel // 2)
        self.conv = nn.Conv2d(c, k, spec.kernel, spec.stride, padding, spec.dilation, bias=spec.bias)
        self.norm, self.act = norm(spec.norm, k), ACTIVATIONS[spec.act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Functional(Plain):
    """The activation is a function, the output its container's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class BuriedFunctional(nn.Module):
    """A functional activation in the middle of a block, which no module returns."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, k, 3, 1, 1), nn.Conv2d(k, k, 1)
        self.norm = norm(spec.norm, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm(self.conv1(x)), inplace=spec_inplace(self.conv1)))


def spec_inplace(conv: nn.Conv2d) -> bool:
    return conv.in_channels % 2 == 0


class Residual(nn.Module):
    """A basic block with one activation for both places, and a shortcut by identity, convolution or zero padding."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c, k, 3, spec.stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(k), nn.BatchNorm2d(k)
        self.conv2 = nn.Conv2d(k, k, 3, 1, 1, bias=False)
        self.act = nn.ReLU(inplace=spec.bias)
        self.stride, self.extra = spec.stride, k - c
        fits = spec.stride == 1 and k == c
        use_padding = not fits and spec.bias and k > c
        self.downsample = (
            None if fits or use_padding else nn.Sequential(nn.Conv2d(c, k, 1, spec.stride), nn.BatchNorm2d(k))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.extra or self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        y += x
        return self.act(y)


class InvertedResidual(nn.Module):
    """expand, depthwise, squeeze-excite, project."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        e = c + 3
        self.expand = Plain(c, e, Spec(kernel=1, act="relu6"))
        self.depthwise = nn.Conv2d(e, e, spec.kernel, spec.stride, spec.kernel // 2, groups=e, bias=False)
        self.bn, self.act = nn.BatchNorm2d(e), ACTIVATIONS[spec.act]()
        self.reduce, self.restore = nn.Conv2d(e, 2, 1), nn.Conv2d(2, e, 1)
        self.project, self.bn2 = nn.Conv2d(e, k, 1, bias=False), nn.BatchNorm2d(k)
        self.adds = c == k and spec.stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.depthwise(self.expand(x))))
        y = y * torch.sigmoid(self.restore(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        y = self.bn2(self.project(y))
        return x + y if self.adds else y


class GroupedShuffle(nn.Module):
    """A grouped convolution between channel shuffles."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        self.first, self.second = Plain(c, 4, spec), nn.Conv2d(4, 8, 3, 1, 1, groups=2, bias=spec.bias)
        self.norm, self.act = norm("bn", 8), ACTIVATIONS[spec.act]()
        self.last = nn.Conv2d(8, k, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.second(self.first(x))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last(x)


class Inception(nn.Module):
    """Branches joined by concatenation, one of them pooled."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        self.a, self.b = Plain(c, k, spec), Functional(c, 3, Spec(kernel=1))
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.join = nn.Conv2d(k + 3 + 3, k, 1)
        self.stride = spec.stride

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)[:, :, :: self.stride, :: self.stride]
        b = b[:, :, : a.shape[2], : a.shape[3]]
        return self.join(torch.cat([a, b, self.pool(b)], 1))


class Dense(nn.Module):
    """Pre-activation layers whose outputs are concatenated."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(c), nn.BatchNorm2d(c + 3)])
        self.convs = nn.ModuleList([nn.Conv2d(c, 3, 3, 1, 1), nn.Conv2d(c + 3, 3, 1)])
        self.last = nn.Conv2d(c + 6, k, 1, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        for bn, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(bn(x)))], 1)
        return self.last(x)


class Branches(nn.Module):
    """RepVGG: two convolutions and a norm of one value, summed."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        self.big, self.small = nn.Conv2d(c, k, 3, 1, 1, bias=False), nn.Conv2d(c, k, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(k), nn.BatchNorm2d(k)
        self.identity = nn.BatchNorm2d(c) if c == k else None
        self.act = ACTIVATIONS[spec.act]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.big(x)) + self.bn2(self.small(x))
        return self.act(y if self.identity is None else y + self.identity(x))


class Split(nn.Module):
    """Res2Net: parts of the channels go different ways."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        self.first, self.conv = Plain(c, 6, spec), Plain(3, 3, Spec(act=spec.act))
        self.last = nn.Conv2d(6, k, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.last(torch.cat([self.conv(a + b), b], 1))


class ChannelsLast(nn.Module):
    """ConvNeXt: depthwise convolution, layer norm and linear layers on (N, H, W, C)."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 3, 1, 1, groups=c)
        self.norm, self.fc1, self.act = nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.GELU()
        self.fc2, self.gamma = nn.Linear(2 * c, c), nn.Parameter(torch.rand(c))
        self.last = nn.Conv2d(c, k, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = (self.gamma * self.fc2(self.act(self.fc1(y)))).permute(0, 3, 1, 2)
        return self.last(x + y)


class Twice(nn.Module):
    """One convolution called twice, which must be left alone."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(c, c, 3, 1, 1), nn.Conv2d(c, k, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.conv(torch.relu(self.conv(x)))))


class Standardised(nn.Conv2d):
    """The weight is a function of the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, self.bias)


class StandardisedBlock(nn.Module):
    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        self.conv, self.act = Standardised(c, k, 3), ACTIVATIONS[spec.act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) * 1.7


class MixedBranches(nn.Module):
    """A depthwise and a full convolution of one gated value, summed: only one of them can use the producer's gate."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        self.first = Plain(c, k, spec)
        self.depthwise, self.full = nn.Conv2d(k, k, 3, 1, 1, groups=k), nn.Conv2d(k, k, 1)
        self.act = ACTIVATIONS[spec.act]()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.act(self.depthwise(x) + self.full(x))


class NormOfGated(nn.Module):
    """Norms, a pool and all kinds of readers behind a gate: closed channels hold constants there."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__()
        self.first = nn.Conv2d(c, 4, 3, spec.stride, 1, bias=spec.bias)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.acts = nn.ModuleList(ACTIVATIONS[spec.act]() for _ in range(3))
        self.grouped, self.depthwise = nn.Conv2d(4, 6, 2, groups=2), nn.Conv2d(4, 4, 2, groups=4, bias=spec.bias)
        self.pool, self.one = nn.AvgPool2d(2, 1, 0 if spec.bias else 1), nn.Conv2d(4, 2, 1)
        self.linear = nn.Linear(4, 3)
        self.last = nn.Conv2d(6 + 4 + 2 + 3, k, spec.kernel, padding=spec.kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.first(x), (1, 1, 1, 1), mode="replicate")
        a, b, c = (act(norm(x)) for norm, act in zip(self.norms, self.acts, strict=True))
        maps = [self.grouped(a), self.depthwise(b * 0.5 + 1), self.one(self.pool(c)[:, :, :-1, :-1])]
        maps[2] = maps[2][:, :, : maps[0].shape[2], : maps[0].shape[3]]
        d = self.linear(c.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)[:, :, 1:, 1:]
        smallest = min(m.shape[2] for m in (*maps, d))
        return self.last(torch.cat([m[:, :, :smallest, :smallest] for m in (*maps, d)], 1))


class ZerosOnOneSide(Plain):
    """As TensorFlow pads: by an operator of its own, and more below and to the right."""

    def __init__(self, c: int, k: int, spec: Spec) -> None:
        super().__init__(c, k, spec)
        n_zeros = 2 * self.conv.padding[0]
        self.zeros, self.conv.padding = (n_zeros // 3, n_zeros - n_zeros // 3), (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.zeros * 2))


BLOCKS: tuple[type[nn.Module], ...] = (
    Plain,
    Functional,
    BuriedFunctional,
    Residual,
    InvertedResidual,
    GroupedShuffle,
    Inception,
    Dense,
    Branches,
    Split,
    ChannelsLast,
    Twice,
    StandardisedBlock,
    MixedBranches,
    NormOfGated,
    ZerosOnOneSide,
)
HEADS = ("linear", "conv", "two", "flatten")


@dataclass(frozen=True)
class Spec:
    """Details that blocks use as far as they have them."""

    kernel: int = 3
    stride: int = 1
    dilation: int = 1
    bias: bool = False
    norm: str = "bn"
    act: str = "relu"


@dataclass(frozen=True)
class NetSpec:
    """A network as data, so that hypothesis can print and shrink it."""

    stem: int
    blocks: tuple[tuple[int, int, Spec], ...]
    head: str
    size: int
    seed: int


class RandomNet(nn.Module):
    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.stem = Plain(3, spec.stem, Spec())
        blocks, channels = [], spec.stem
        for kind, width, details in spec.blocks:
            blocks.append(BLOCKS[kind](channels, width, details))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head, self.kind = nn.Linear(channels, 5), spec.head
        self.conv_head = nn.Conv2d(channels, 5, 1) if spec.head == "conv" else None
        self.second = nn.Linear(channels, 2) if spec.head == "two" else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.blocks(self.stem(x))
        if self.conv_head is not None:
            return self.conv_head(x).mean((2, 3))
        if self.kind == "flatten":
            return self.head(F.adaptive_max_pool2d(x, 2).flatten(2).sum(2))
        pooled = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
        return (self.head(pooled), self.second(pooled)) if self.second is not None else self.head(pooled)


def build(spec: NetSpec) -> RandomNet:
    """The network in eval mode, with weights and statistics that no channel has by accident."""
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        net = RandomNet(spec)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.5)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
    return net.eval()


_details = st.builds(
    Spec,
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 1, 2]),
    dilation=st.sampled_from([1, 1, 2]),
    bias=st.booleans(),
    norm=st.sampled_from(["bn", "bn", "none", "ln", "gn"]),
    act=st.sampled_from(sorted(ACTIVATIONS)),
)

net_specs = st.builds(
    NetSpec,
    stem=st.integers(1, 6),
    blocks=st.lists(
        st.tuples(st.integers(0, len(BLOCKS) - 1), st.integers(1, 7), _details), min_size=1, max_size=4
    ).map(tuple),
    head=st.sampled_from(HEADS),
    size=st.integers(7, 13),
    seed=st.integers(0, 2**16),
)
