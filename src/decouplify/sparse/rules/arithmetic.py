"""Rules for sums, factors, norms and activations that stand alone."""

from __future__ import annotations

import torch
from torch.fx import Node

from decouplify import aten
from decouplify.sparse.activations import act_of_node
from decouplify.sparse.drafts import Map, new_map
from decouplify.sparse.native import StepKind
from decouplify.sparse.translation import Translation

__all__ = ["activation", "add", "layer_norm", "multiply", "norm"]


def add(t: Translation, node: Node) -> Map | None:
    """A sum of two maps."""
    x, other = (t.map_of(arg) for arg in node.args[:2])
    if x is None or other is None or x.size is None or not aten.is_plain_add(node):
        return None
    if (x.shape, x.channels_last) != (other.shape, other.channels_last):
        return None
    y = Map(x.shape, x.channels, x.size, channels_last=x.channels_last)
    step = t.emit(StepKind.ADD, node, input=x, other=other, output=y)
    t.fuse_activation(step, node)
    return y


def multiply(t: Translation, node: Node) -> Map | None:
    """A constant factor per channel."""
    factors = [c for arg in node.args[:2] if (c := t.constant(arg)) is not None]
    maps = [m for arg in node.args[:2] if (m := t.map_of(arg)) is not None]
    if len(factors) != 1 or len(maps) != 1 or maps[0].size is None:
        return None
    x, factor = maps[0], factors[0]
    wanted = (x.channels,) if x.channels_last else (x.channels, 1, 1)
    if tuple(factor.shape[-len(wanted) :]) != wanted or factor.numel() != x.channels:
        return None
    y = Map(x.shape, x.channels, x.size, channels_last=x.channels_last)
    weights = {"weight": factor.flatten().contiguous(), "bias": torch.zeros(x.channels)}
    t.emit(StepKind.SCALE, node, input=x, output=y, weights=weights)
    return y


def activation(t: Translation, node: Node) -> Map | None:
    """An activation that stands alone: a scaling by one."""
    x, act = t.map_of(node.args[0]), act_of_node(node)
    if x is None or x.size is None or act is None or not aten.is_zero_preserving(node):
        return None
    y = Map(x.shape, x.channels, x.size, act.bounds, x.channels_last)
    ones, zeros = torch.ones(x.channels), torch.zeros(x.channels)
    t.emit(StepKind.SCALE, node, input=x, output=y, act=act, weights={"weight": ones, "bias": zeros})
    return y


def norm(t: Translation, node: Node) -> Map | None:
    """A batch norm that no convolution could take in."""
    mean, var = (t.constant(aten.argument(node, name)) for name in ("running_mean", "running_var"))
    x = t.map_of(node.args[0])
    if mean is None or var is None or x is None or not x.is_planar or aten.argument(node, "training"):
        return None
    gamma, beta = (t.constant(aten.argument(node, name)) for name in ("weight", "bias"))
    scale = torch.rsqrt(var.double() + float(aten.argument(node, "eps")))
    scale = scale if gamma is None else scale * gamma.double()
    shift = -mean.double() * scale + (0.0 if beta is None else beta.double())
    y = new_map(x.shape)
    weights = {"weight": scale.float(), "bias": shift.float()}
    step = t.emit(StepKind.SCALE, node, input=x, output=y, weights=weights)
    t.fuse_activation(step, node)
    return y


def layer_norm(t: Translation, node: Node) -> Map | None:
    """A norm over the channels of each pixel."""
    x = t.map_of(node.args[0])
    if x is None or not x.channels_last or list(aten.argument(node, "normalized_shape")) != [x.channels]:
        return None
    weight, bias = (t.constant(aten.argument(node, name)) for name in ("weight", "bias"))
    weights = {
        "weight": torch.ones(x.channels) if weight is None else weight.contiguous(),
        "bias": torch.zeros(x.channels) if bias is None else bias.contiguous(),
    }
    y = Map(x.shape, x.channels, x.size, channels_last=True)
    t.emit(StepKind.NORM, node, input=x, output=y, weights=weights, epsilon=float(aten.argument(node, "eps")))
    return y
