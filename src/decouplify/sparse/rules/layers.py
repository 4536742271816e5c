"""Rules for convolutions and linear layers, which take in what follows them directly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from decouplify import aten
from decouplify.sparse.activations import act_of
from decouplify.sparse.drafts import Act, Map, Sliding, Step, new_map, with_zero
from decouplify.sparse.native import StepKind
from decouplify.sparse.ops import SparseConv2d
from decouplify.sparse.translation import ALWAYS_OPEN, Translation, only_user

__all__ = ["convolution", "linear"]


def convolution(t: Translation, node: Node) -> Map | None:
    """A convolution with what follows it directly: sum and activation."""
    conv = t.modules[str(node.target)]
    act, x = act_of(conv.activation), t.map_of(node.args[0])
    if act is None or x is None or not x.is_planar:
        return None
    sliding = _with_pad(t, _sliding_of(conv), node.args[0])
    y = new_map(tuple(node.meta["val"].shape), act)
    gate = t.gate_of(node.args[1])
    weights = {"weight": conv.weight.contiguous(), "bias": conv.bias.contiguous()}
    if gate >= 0:
        y.bounds = with_zero(y.bounds)
    if conv.groups > 1 and conv.weight.shape[1] == 1 and len(conv.weight) == conv.groups:
        expansion = _expansion_before(t, node, x, gate, act)
        if expansion is not None:
            _fuse_expansion(t, expansion, node, y, sliding, weights)
            return y
        t.emit(StepKind.WINDOW, node, input=x, output=y, gate=gate, sliding=sliding, act=act, weights=weights)
        return y
    step = t.emit(
        StepKind.CONVOLUTION, node, input=x, output=y, gate=gate, groups=conv.groups, sliding=sliding, act=act,
        weights=weights, reads_part=node.args[2] is not None,
    )  # fmt: skip
    if t.fuse and conv.activation is None:
        _fuse_sum(t, step)
    return y


def _expansion_before(t: Translation, node: Node, x: Map, gate: int, act: Act) -> Step | None:
    """The 1x1 convolution that writes what a depthwise one alone reads, if one step can do both."""
    last = t.draft.items[-1] if t.draft.items else None
    if not t.fuse or not isinstance(last, Step) or last.kind is not StepKind.CONVOLUTION or last.output is not x:
        return None
    is_plain = last.sliding == Sliding() and last.groups == 1 and last.other is None
    reader = only_user(last.node)
    alone = node in (reader, only_user(reader) if reader in t.pads else None)
    return last if is_plain and alone and last.gate == gate and last.act == act else None


def _fuse_expansion(
    t: Translation, expansion: Step, node: Node, y: Map, sliding: Sliding, weights: dict[str, Tensor]
) -> None:
    """Put one step in place of a 1x1 convolution and the depthwise one after it."""
    t.draft.items.remove(expansion)
    del t.maps[expansion.node]
    both = {**weights, "weight2": expansion.weights["weight"], "bias2": expansion.weights["bias"]}
    t.emit(
        StepKind.EXPAND, node, input=expansion.input, output=y, gate=expansion.gate, sliding=sliding,
        act=expansion.act, weights=both,
    )  # fmt: skip


def _fuse_sum(t: Translation, step: Step) -> None:
    """Let a convolution add the other operand of the sum that follows, and apply the activation after that."""
    add = only_user(step.node)
    if add is None or aten.name_of(add) != "add" or not aten.is_plain_add(add):
        return
    others = [n for n in add.all_input_nodes if n is not step.node]
    other = t.maps.get(others[0]) if len(others) == 1 else None
    assert step.output is not None
    if other is None or not other.is_planar or other.shape != step.output.shape:
        return
    step.other = other
    t.absorb(step, add)
    t.fuse_activation(step, add)


def linear(t: Translation, node: Node) -> Map | None:
    """A linear layer on one vector, or on every pixel of a map whose channels are last."""
    layer = t.modules[str(node.target)]
    act, x = act_of(layer.activation), t.map_of(node.args[0])
    if act is not None and x is not None and x.channels_last:
        return _pointwise(t, node, x, act)
    if act is None or x is None or x.size is not None or len(x.shape) != 2 or node.args[1] is not None:
        return None
    y = new_map((1, len(layer.weight)), act)
    weights = {"weight": layer.weight.t().contiguous(), "bias": layer.bias.contiguous()}
    t.emit(StepKind.LINEAR, node, input=x, output=y, act=act, weights=weights)
    return y


def _pointwise(t: Translation, node: Node, x: Map, act: Act) -> Map:
    """A linear layer as the 1x1 convolution that it is."""
    layer = t.modules[str(node.target)]
    gate = t.gate_of(node.args[1])
    bounds = act.bounds if gate == ALWAYS_OPEN else with_zero(act.bounds)
    y = Map((*x.shape[:3], len(layer.weight)), len(layer.weight), x.size, bounds, channels_last=True)
    weights = {"weight": layer.weight.contiguous(), "bias": layer.bias.contiguous()}
    reads_part = node.args[2] is not None
    t.emit(StepKind.CONVOLUTION, node, input=x, output=y, gate=gate, act=act, weights=weights, reads_part=reads_part)
    return y


def _sliding_of(conv: SparseConv2d) -> Sliding:
    kernel, stride, dilation = aten.pair(conv.weight.shape[2:]), aten.pair(conv.stride), aten.pair(conv.dilation)
    if conv.padding == "valid":
        padding = (0, 0)
    elif conv.padding == "same":
        padding = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
    else:
        padding = aten.pair(conv.padding)
    return Sliding(kernel, stride, padding, dilation)


def _with_pad(t: Translation, sliding: Sliding, source: Any) -> Sliding:
    """The window of a convolution whose input was to be padded first."""
    rows, columns = t.pads.get(source, (0, 0))
    return replace(sliding, padding=(sliding.padding[0] + rows, sliding.padding[1] + columns))
