"""The operators of the sparse form in plain torch: what is computed, and the reference for any faster version.

All work on one image. A value keeps its full number of channels; channels that are closed hold exact zeros. Which
channels to read and write comes in as boolean vectors, so a convolution touches only rows and columns of its weight
that this image needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decouplify.controller import ArchitectureController, binarise

__all__ = [
    "Controller",
    "Exists",
    "FoldedBias",
    "Mask",
    "SparseConv2d",
    "SparseLinear",
    "count",
    "count_executed_macs",
]

_counter: ContextVar[list[int] | None] = ContextVar("executed_macs", default=None)


@contextmanager
def count_executed_macs() -> Iterator[list[int]]:
    """A list that receives the multiply-accumulates of every operator that runs in the context."""
    counts: list[int] = []
    token = _counter.set(counts)
    try:
        yield counts
    finally:
        _counter.reset(token)


def count(n_macs: int) -> None:
    """Report executed multiply-accumulates to ``count_executed_macs``, if anyone listens."""
    counts = _counter.get()
    if counts is not None:
        counts.append(n_macs)


class Controller(nn.Module):
    """The gates of one image, shape (K,), exactly 0 or 1 (NaN where the input is)."""

    def __init__(self, controller: ArchitectureController) -> None:
        super().__init__()
        self.controller = controller

    def forward(self, x: Tensor) -> Tensor:
        count(self.controller.fc1.weight.numel() + self.controller.fc2.weight.numel())
        return binarise(self.controller(x))[0]


class Exists(nn.Module):
    """Which channels of a value exist: those of which at least one gate of the gate set is open.

    Args:
        columns: For each channel the positions of its gate set in the concatenated gates, (C, M). Two more positions
            follow the gates: one that is always closed, for padding, and one that is always open.
    """

    columns: Tensor

    def __init__(self, columns: Tensor) -> None:
        super().__init__()
        self.register_buffer("columns", columns)

    def forward(self, *gates: Tensor) -> Tensor:
        """Boolean, shape (C,). An undefined (NaN) gate counts as open."""
        dtype = gates[0].dtype if gates else torch.float32
        padded = torch.cat([*gates, torch.tensor([0.0, 1.0], dtype=dtype)])
        return (padded[self.columns] != 0).any(1)


class FoldedBias(nn.Module):
    """The bias of a reader for one image: what absent channels of constant value add to its open filters.

    Args:
        bias: Shape (K,).
        products: What channel c adds to filter k while it is absent, shape (K, C / groups).
        is_constant: Which channels hold a constant other than zero while they are absent, shape (C,).
    """

    bias: Tensor
    products: Tensor
    is_constant: Tensor

    def __init__(self, bias: Tensor, products: Tensor, is_constant: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias)
        self.register_buffer("products", products)
        self.register_buffer("is_constant", is_constant)

    def forward(self, exists: Tensor, gate: Tensor | None = None) -> Tensor:
        """Shape (K,)."""
        filters = torch.arange(len(self.bias)) if gate is None else gate.nonzero().flatten()
        n_groups = len(self.is_constant) // self.products.shape[1]
        absent = (self.is_constant & ~exists).view(n_groups, -1)
        absent = absent[filters * n_groups // len(self.bias)]  # those of each filter's group
        count(int(absent.sum()))
        return self.bias.index_add(0, filters, (self.products[filters] * absent).sum(1))


class Mask(nn.Module):
    """``Y * z`` where zeros do not follow from the operator before."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        z = z.to(y.dtype)
        return y * (z[None, :, None, None] if self.axis == 1 else z)


class _Reader(nn.Module):
    """What convolutions and linear layers share: a weight, and the choice of its rows and columns."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, activation: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.activation = activation

    def _activate(self, y: Tensor) -> Tensor:
        return y if self.activation is None else self.activation(y)


class SparseConv2d(_Reader):
    """A convolution with folded norm and fused activation: open filters from existing channels.

    Args:
        weight: Shape (K, C / groups, kH, kW).
        bias: Shape (K,).
        stride: Two numbers.
        padding: Two numbers, zeros; or "same" or "valid".
        dilation: Two numbers.
        groups: Groups.
        activation: Element-wise function, applied to open filters only, or None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: list[int],
        padding: list[int] | str,
        dilation: list[int],
        groups: int,
        activation: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__(weight, bias, activation)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def extra_repr(self) -> str:
        k, c, *kernel = self.weight.shape
        return f"{c * self.groups}->{k}, kernel={tuple(kernel)}, stride={tuple(self.stride)}, groups={self.groups}"

    def forward(
        self, x: Tensor, gate: Tensor | None = None, exists: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Shape (1, K, H', W').

        Args:
            x: Shape (1, C, H, W).
            gate: Gates of the filters, shape (K,); None computes all.
            exists: Which input channels to read, shape (C,); None reads all.
            bias: Bias for this image, shape (K,); None takes the layer's own.
        """
        bias = self.bias if bias is None else bias
        filters = torch.arange(len(self.weight)) if gate is None else gate.nonzero().flatten()
        channels = torch.arange(x.shape[1]) if exists is None else exists.nonzero().flatten()
        if self.groups == 1:
            y = self._convolve(x, filters, channels, bias)
        elif self.weight.shape[1] == 1 and len(self.weight) == self.groups:
            y = self._depthwise(x, filters, exists, bias)
        else:
            y = self._grouped(x, filters, channels, bias)
        y = self._activate(y)
        if gate is None:
            return y
        full = y.new_zeros(len(y), len(self.weight), *y.shape[2:])
        full[:, filters] = y * gate[filters].to(y.dtype)[:, None, None]  # 1, or NaN where the gate is undefined
        return full

    def _geometry(self) -> tuple[list[int], list[int] | str, list[int]]:
        return self.stride, self.padding, self.dilation

    def _convolve(self, x: Tensor, filters: Tensor, channels: Tensor, bias: Tensor) -> Tensor:
        weight = self.weight[filters][:, channels]
        return self._run(x[:, channels], weight, bias[filters], 1, x)

    def _depthwise(self, x: Tensor, filters: Tensor, exists: Tensor | None, bias: Tensor) -> Tensor:
        """Filter k reads channel k alone; where that channel is missing only the bias is left."""
        alive = torch.ones(len(filters), dtype=torch.bool) if exists is None else exists[filters]
        read = filters[alive]
        part = self._run(x[:, read], self.weight[read], bias[read], max(len(read), 1), x)
        if bool(alive.all()):
            return part
        y = bias[filters].to(x.dtype)[None, :, None, None].expand(len(x), -1, *part.shape[2:]).clone()
        y[:, alive] = part
        return y

    def _grouped(self, x: Tensor, filters: Tensor, channels: Tensor, bias: Tensor) -> Tensor:
        """Group by group: each has its own filters and its own channels."""
        n_filters, n_channels = len(self.weight) // self.groups, self.weight.shape[1]
        parts = []
        for group in range(self.groups):
            rows = filters[(filters >= group * n_filters) & (filters < (group + 1) * n_filters)]
            columns = channels[(channels >= group * n_channels) & (channels < (group + 1) * n_channels)]
            weight = self.weight[rows][:, columns - group * n_channels]
            parts.append(self._run(x[:, columns], weight, bias[rows], 1, x))
        return torch.cat(parts, 1)

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor, groups: int, like: Tensor) -> Tensor:
        """The convolution itself. torch refuses empty ones, whose result is the bias, or nothing at all."""
        stride, padding, dilation = self._geometry()
        if x.shape[1] == 0 or len(weight) == 0:
            probe = like[:, :1].new_zeros(1, 1, *like.shape[2:])
            kernel = like.new_zeros(1, 1, *self.weight.shape[2:])
            size = F.conv2d(probe, kernel, None, stride, padding, dilation).shape[2:]
            return bias.to(like.dtype)[None, :, None, None].expand(len(like), -1, *size).clone()
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        count(weight.numel() * len(y) * y.shape[2] * y.shape[3])
        return y


class SparseLinear(_Reader):
    """A linear layer with fused activation: open outputs from existing features."""

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}->{self.weight.shape[0]}"

    def forward(
        self, x: Tensor, gate: Tensor | None = None, exists: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Shape (1, ..., K).

        Args:
            x: Shape (1, ..., C).
            gate: Gates of the outputs, shape (K,); None computes all.
            exists: Which features to read, shape (C,); None reads all.
            bias: Bias for this image, shape (K,); None takes the layer's own.
        """
        weight, bias = self.weight, self.bias if bias is None else bias
        if exists is not None:
            x, weight = x[..., exists], weight[:, exists]
        if gate is not None:
            weight, bias = weight[gate != 0], bias[gate != 0]
        count(weight.numel() * (x[..., 0].numel() if x.shape[-1] else 0))
        y = self._activate(F.linear(x, weight, bias))
        if gate is None:
            return y
        full = y.new_zeros(*y.shape[:-1], len(self.weight))
        full[..., gate != 0] = y * gate[gate != 0].to(y.dtype)
        return full
