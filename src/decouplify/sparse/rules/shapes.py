"""Rules for what moves values and does not change them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from decouplify import aten
from decouplify.sparse.activations import act_of
from decouplify.sparse.drafts import Map, Sliding, new_map, with_zero
from decouplify.sparse.native import StepKind
from decouplify.sparse.ops import SparseConv2d
from decouplify.sparse.translation import Translation, only_user

__all__ = ["concatenate", "identity", "pad", "part", "permute", "reshape"]


def permute(t: Translation, node: Node) -> Map | None:
    """Channels to the end and back, which moves nothing: only the name of the dimensions changes."""
    x = t.map_of(node.args[0])
    wanted = [0, 3, 1, 2] if x is not None and x.channels_last else [0, 2, 3, 1]
    if x is None or x.size is None or [d % 4 for d in aten.argument(node, "dims")] != wanted:
        return None
    y = Map(tuple(node.meta["val"].shape), x.channels, x.size, x.bounds, not x.channels_last, base=x)
    t.emit(StepKind.MASK, node, input=x, output=y)
    return y


def reshape(t: Translation, node: Node) -> Map | None:
    """Flattening to one vector, or nothing at all."""
    x = t.map_of(node.args[0])
    value = node.meta["val"]
    if x is None or not isinstance(value, Tensor):
        return None
    shape = tuple(value.shape)
    if shape == x.shape:
        return x
    if len(shape) != 2 or shape[0] != 1 or x.channels_last:
        return None
    y = Map(shape, shape[1], None, with_zero(x.bounds))
    t.emit(StepKind.FLATTEN, node, input=x, output=y)
    return y


def identity(t: Translation, node: Node) -> Map | None:
    """An operator that changes nothing in eval mode."""
    value = node.meta["val"]
    return t.map_of(node.args[0]) if isinstance(value, Tensor) and value.dtype == torch.float32 else None


def concatenate(t: Translation, node: Node) -> Map | None:
    """Channels side by side."""
    operands: Any = node.args[0]
    parts = [t.map_of(part) for part in operands]
    if any(p is None or not p.is_planar for p in parts) or int(aten.argument(node, "dim", 0)) not in (1, -3):
        return None
    maps = [p for p in parts if p is not None]
    y = new_map(tuple(node.meta["val"].shape))
    y.bounds = with_zero((min(m.bounds[0] for m in maps), max(m.bounds[1] for m in maps)))
    position = 0
    for part in _with_earlier_concatenation(t, maps):
        t.emit(StepKind.COPY, node, input=part, output=y, position=position, clears=position == 0)
        position += part.channels
    t.concatenated[y] = maps
    return y


def _with_earlier_concatenation(t: Translation, parts: list[Map]) -> list[Map]:
    """In place of the first parts the last concatenation of them: in a dense block, of all but the newest."""
    for whole, earlier in reversed(t.concatenated.items()):
        if 1 < len(earlier) < len(parts) and earlier == parts[: len(earlier)]:
            return [whole, *parts[len(earlier) :]]
    return parts


def pad(t: Translation, node: Node) -> Map | None:
    """Zeros around the pixels, or before and after the channels."""
    x = t.map_of(node.args[0])
    zeros = [*map(int, aten.argument(node, "pad")), 0, 0, 0, 0, 0, 0]
    if x is None or not x.is_planar or not _pads_zeros(node) or min(zeros) < 0 or any(zeros[6:]):
        return None
    reader = only_user(node)
    if t.fuse and not any(zeros[4:]) and _is_convolution_here(t, reader):
        # Zeros are what a convolution finds outside its input anyway; its output's size tells how far it goes.
        t.pads[node] = (zeros[2], zeros[0])
        return x
    return _copy(t, node, x, Sliding(padding=(zeros[2], zeros[0])), position=zeros[4])


def _is_convolution_here(t: Translation, node: Node | None) -> bool:
    """Whether ``convolution`` will have a step for a node that reads a map of planes."""
    if node is None or t.operator(node) is not SparseConv2d:
        return False
    return act_of(t.modules[str(node.target)].activation) is not None


def _pads_zeros(node: Node) -> bool:
    return aten.argument(node, "mode", "constant") == "constant" and not aten.argument(node, "value")


def part(t: Translation, node: Node) -> Map | None:
    """Every n-th row or column."""
    x = t.map_of(node.args[0])
    dim, start, step = (aten.argument(node, name) for name in ("dim", "start", "step"))
    if x is None or not x.is_planar or dim not in (2, 3) or (start or 0) < 0:
        return None
    axis = dim - 2
    stride, padding = [1, 1], [0, 0]
    stride[axis], padding[axis] = int(step), -int(start or 0)
    return _copy(t, node, x, Sliding(stride=(stride[0], stride[1]), padding=(padding[0], padding[1])))


def _copy(t: Translation, node: Node, x: Map, sliding: Sliding, position: int = 0) -> Map:
    y = new_map(tuple(node.meta["val"].shape))
    y.bounds = with_zero(x.bounds)
    t.emit(StepKind.COPY, node, input=x, output=y, sliding=sliding, position=position, clears=True)
    return y
