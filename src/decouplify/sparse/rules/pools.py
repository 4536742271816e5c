"""Rules for pooling."""

from __future__ import annotations

from torch.fx import Node

from decouplify import aten
from decouplify.sparse.drafts import Map, Sliding, with_zero
from decouplify.sparse.native import StepKind, WindowKind
from decouplify.sparse.translation import Translation

__all__ = ["average_pool", "global_mean", "max_pool"]

#: Taps of one window that the engine takes (kMaxTaps in gather.h).
_MAX_TAPS = 256


def max_pool(t: Translation, node: Node) -> Map | None:
    """A maximum over windows."""
    return _pool(t, node, WindowKind.MAX)


def average_pool(t: Translation, node: Node) -> Map | None:
    """A mean over windows."""
    if aten.argument(node, "divisor_override") is not None:
        return None
    return _pool(t, node, WindowKind.AVERAGE)


def _pool(t: Translation, node: Node, window: WindowKind) -> Map | None:
    x = t.map_of(node.args[0])
    if x is None or not x.is_planar:
        return None
    kernel = aten.pair(aten.argument(node, "kernel_size"))
    stride = aten.pair(aten.argument(node, "stride") or kernel)
    sliding = Sliding(
        kernel, stride, aten.pair(aten.argument(node, "padding", 0)), aten.pair(aten.argument(node, "dilation", 1))
    )
    if kernel[0] * kernel[1] > _MAX_TAPS:
        return None
    y = Map(tuple(node.meta["val"].shape), x.channels, tuple(node.meta["val"].shape[2:]), with_zero(x.bounds))
    counts = bool(aten.argument(node, "count_include_pad", True))
    t.emit(StepKind.WINDOW, node, input=x, output=y, window=window, sliding=sliding, counts_padding=counts)
    return y


def global_mean(t: Translation, node: Node) -> Map | None:
    """A mean over all positions; or over windows of one element, which changes nothing."""
    x = t.map_of(node.args[0])
    shape = tuple(node.meta["val"].shape)
    if x is None or not x.is_planar:
        return None
    if shape == x.shape:
        return x
    if not aten.is_global_pool(node) or aten.name_of(node) not in ("mean", "adaptive_avg_pool2d"):
        return None
    if shape[:2] != x.shape[:2]:
        return None  # a mean over other dimensions, as of a map with channels last that torch has computed
    y = Map(shape, x.channels, None, with_zero(x.bounds))
    t.emit(StepKind.MEAN, node, input=x, output=y)
    return y
