"""Make a recorded network narrower: which channels belong together, and what is left when some of them go.

A channel cannot leave a network alone. A sum ties channel c of one operand to channel c of the other, a depthwise
convolution ties its input to its output, a concatenation passes channels on under new numbers. All channels tied to
each other form a *class*; a class is removed as a whole, from every weight that writes or reads it. An operator that is
not known here keeps the channels of its operands and of its result as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from decouplify import aten
from decouplify.sites import n_macs
from decouplify.trace import Trace

__all__ = ["ChannelClasses", "Channels", "Layer", "narrow"]

_FIXED = 0  # the class of all channels that must stay


@dataclass(frozen=True)
class Channels:
    """The channels of a value: along which axis they lie, and an identifier for each position."""

    axis: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer whose channels are understood.

    Attributes:
        node: Its node.
        inputs: Channels of what it reads, None if these stay as they are.
        outputs: Its filters.
        is_depthwise: Whether filter k reads channel k alone.
    """

    node: Node
    inputs: Channels | None
    outputs: Channels
    is_depthwise: bool


@dataclass(frozen=True)
class _Slice:
    """A tensor that loses entries along a dimension together with its channels."""

    tensor: Node
    dim: int
    ids: tuple[int, ...]


class ChannelClasses:
    """The channel classes of a recorded run.

    Attributes:
        trace: The run.
        layers: All layers whose filters could leave, in execution order.
        channels: Channels of each value for which they are known.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.layers: list[Layer] = []
        self.channels: dict[Node, Channels] = {}
        self.slices: list[_Slice] = []
        self.resized: list[tuple[Node, Channels]] = []
        self._parents = [_FIXED]
        for node in trace.graph.nodes:
            if node.op == "output" or (node.op == "call_function" and node not in trace.static):
                self._visit(node)

    def find(self, channel: int) -> int:
        """The class of a channel, named by one of its members."""
        while self._parents[channel] != channel:
            self._parents[channel] = self._parents[self._parents[channel]]
            channel = self._parents[channel]
        return channel

    def is_fixed(self, channel: int) -> bool:
        """Whether the channel must stay."""
        return self.find(channel) == _FIXED

    def kept(self, channels: Channels, removed: Collection[int]) -> list[int]:
        """Positions that stay when classes are removed."""
        return self._positions(channels.ids, removed)

    def n_macs(self, removed: Collection[int]) -> int:
        """Multiply-accumulates of the network without the removed classes."""
        layers = {layer.node: layer for layer in self.layers}
        counted = (n for n in self.trace.graph.nodes if aten.name_of(n) in aten.COUNTED and n not in self.trace.static)
        return sum(n_macs(node) if node not in layers else self._layer_macs(layers[node], removed) for node in counted)

    def _layer_macs(self, layer: Layer, removed: Collection[int]) -> int:
        n_kept, n_all = len(self.kept(layer.outputs, removed)), len(layer.outputs.ids)
        if layer.inputs is not None and not layer.is_depthwise:
            n_kept *= len(self.kept(layer.inputs, removed))
            n_all *= len(layer.inputs.ids)
        return n_macs(layer.node) // n_all * n_kept

    def _positions(self, ids: Sequence[int], removed: Collection[int]) -> list[int]:
        return [i for i, channel in enumerate(ids) if self.find(channel) not in removed]

    # Building -----------------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        known = node not in self.trace.hazards and isinstance(node.meta.get("val"), Tensor)
        rule = _RULES.get(aten.name_of(node)) if known else None
        result = None if rule is None else rule(self, node)
        if result is not None:
            self.channels[node] = result
            return
        for source in node.all_input_nodes:
            self.pin(source)

    def new(self, n: int, axis: int) -> Channels:
        """Channels that are tied to no others yet."""
        start = len(self._parents)
        self._parents.extend(range(start, start + n))
        return Channels(axis, tuple(range(start, start + n)))

    def tie(self, a: Sequence[int], b: Sequence[int]) -> None:
        """Let channels at equal positions leave together or not at all."""
        for i, j in zip(a, b, strict=True):
            i, j = sorted((self.find(i), self.find(j)))
            self._parents[j] = i  # the smaller, so that fixed wins

    def pin(self, node: Node) -> None:
        """Keep the channels of a value."""
        if node in self.channels:
            self.tie(self.channels[node].ids, [_FIXED] * len(self.channels[node].ids))

    def slice(self, node: Node, name: str, dim: int, channels: Channels | None) -> None:
        """Let an argument, if it is a tensor, lose entries together with these channels."""
        tensor = aten.argument(node, name)
        if isinstance(tensor, Node) and channels is not None:
            self.slices.append(_Slice(tensor, dim, channels.ids))


# Rules: the channels of a result, None to keep everything as it is ----------------------------------------------------


def _same(classes: ChannelClasses, node: Node) -> Channels | None:
    """Operators that treat each channel by itself and take a single tensor."""
    return classes.channels.get(node.all_input_nodes[0]) if len(node.all_input_nodes) == 1 else None


def _spatial(classes: ChannelClasses, node: Node) -> Channels | None:
    found = _same(classes, node)
    is_map = found is not None and found.axis == 1 and aten.value_of(node).dim() == 4
    return found if is_map and (aten.name_of(node) not in aten.PADS or aten.is_spatial_zero_pad(node)) else None


def _owns_tensors(node: Node, *names: str) -> bool:
    """Whether the named arguments are absent, or tensors that serve nobody else."""
    tensors = [t for name in names if (t := aten.argument(node, name)) is not None]
    return all(isinstance(t, Node) and t.op == "get_attr" and len(t.users) == 1 for t in tensors)


def _conv(classes: ChannelClasses, node: Node) -> Channels | None:
    if aten.is_transposed(node) or not _owns_tensors(node, "weight", "bias"):
        return None
    n_filters, n_channels = aten.value_of(node.args[1]).shape[:2]  # type: ignore[arg-type]  # a node
    groups = aten.conv_arguments(node)[3]
    inputs = classes.channels.get(node.args[0])  # type: ignore[arg-type]  # a node
    is_depthwise = groups > 1 and groups == n_filters and n_channels == 1
    if (groups > 1 and not is_depthwise) or (inputs is not None and inputs.axis != 1):
        return None
    if is_depthwise and inputs is None:
        return None
    outputs = classes.new(int(n_filters), 1)
    if is_depthwise and inputs is not None:
        classes.tie(inputs.ids, outputs.ids)
        classes.resized.append((node, outputs))
    else:
        classes.slice(node, "weight", 1, inputs)
    classes.slice(node, "weight", 0, outputs)
    classes.slice(node, "bias", 0, outputs)
    classes.layers.append(Layer(node, inputs, outputs, is_depthwise))
    return outputs


def _linear(classes: ChannelClasses, node: Node) -> Channels | None:
    last = aten.value_of(node).dim() - 1
    inputs = classes.channels.get(node.args[0])  # type: ignore[arg-type]  # a node
    if not _owns_tensors(node, "weight", "bias") or (inputs is not None and inputs.axis != last):
        return None
    outputs = classes.new(int(aten.value_of(node).shape[-1]), last)
    classes.slice(node, "weight", 1, inputs)
    classes.slice(node, "weight", 0, outputs)
    classes.slice(node, "bias", 0, outputs)
    classes.layers.append(Layer(node, inputs, outputs, is_depthwise=False))
    return outputs


def _batch_norm(classes: ChannelClasses, node: Node) -> Channels | None:
    names = ("weight", "bias", "running_mean", "running_var")
    found = classes.channels.get(node.all_input_nodes[0])
    if found is None or found.axis != 1 or not _owns_tensors(node, *names):
        return None
    for name in names:
        classes.slice(node, name, 0, found)
    return found


def _arithmetic(classes: ChannelClasses, node: Node) -> Channels | None:
    operands = [arg for arg in node.args[:2] if isinstance(arg, Node)]
    found = [classes.channels.get(operand) for operand in operands]
    if len(operands) == 1:
        return found[0]
    a, b = found
    if a is None or b is None or aten.value_of(operands[0]).dim() != aten.value_of(operands[1]).dim():
        return None
    if a.axis != b.axis or len(a.ids) != len(b.ids):
        return None
    classes.tie(a.ids, b.ids)
    return a


def _cat(classes: ChannelClasses, node: Node) -> Channels | None:
    axis = int(aten.argument(node, "dim", 0)) % aten.value_of(node).dim()
    parts: list[int] = []
    for source in node.all_input_nodes:
        found = classes.channels.get(source)
        if found is not None and found.axis != axis:
            return None
        parts += [_FIXED] * aten.value_of(source).shape[axis] if found is None else found.ids
    is_plain = len(node.all_input_nodes) == len(node.args[0])  # type: ignore[arg-type]  # a list; repeats would not show
    return Channels(axis, tuple(parts)) if is_plain else None


def _reduction(classes: ChannelClasses, node: Node) -> Channels | None:
    found, dims = _same(classes, node), aten.argument(node, "dim")
    if found is None or dims is None:
        return None
    n_dims = aten.value_of(node.all_input_nodes[0]).dim()
    reduced = {d % n_dims for d in ([dims] if isinstance(dims, int) else dims)}
    if found.axis in reduced:
        return None
    n_before = 0 if aten.argument(node, "keepdim", False) else sum(d < found.axis for d in reduced)
    return Channels(found.axis - n_before, found.ids)


def _flatten(classes: ChannelClasses, node: Node) -> Channels | None:
    """(N, C, H, W) or (N, C) to (N, C H W)."""
    found, before, after = _same(classes, node), aten.value_of(node.all_input_nodes[0]), aten.value_of(node)
    if found is None or found.axis != 1 or after.dim() != 2 or after.shape[0] != before.shape[0]:
        return None
    n_positions = before[0, 0].numel()
    flat = Channels(1, tuple(channel for channel in found.ids for _ in range(n_positions)))
    classes.resized.append((node, flat))
    return flat


def _permute(classes: ChannelClasses, node: Node) -> Channels | None:
    found, dims = _same(classes, node), aten.argument(node, "dims")
    return None if found is None else Channels([d % len(dims) for d in dims].index(found.axis), found.ids)


_Rule = Callable[[ChannelClasses, Node], Channels | None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys([*aten.ACTIVATIONS, *aten.IDENTITIES], _same),
    **dict.fromkeys([*aten.SPATIAL, *aten.PADS], _spatial),
    **dict.fromkeys(aten.CONV2D, _conv),
    **dict.fromkeys(aten.LINEAR, _linear),
    **dict.fromkeys(aten.AFFINE, _arithmetic),
    **dict.fromkeys(aten.REDUCTIONS, _reduction),
    **dict.fromkeys(("flatten", "view", "reshape"), _flatten),
    "batch_norm": _batch_norm,
    "cat": _cat,
    "permute": _permute,
}


# Removing -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def narrow(classes: ChannelClasses, removed: Collection[int]) -> Trace:
    """The recorded run without some channel classes, which is then that of a narrower network.

    Args:
        classes: The classes of a run, which is changed in place and must not be used with them again.
        removed: Classes to remove; of each layer at least one filter must stay.

    Returns:
        The run, with smaller tensors and the shapes that follow from them.

    Raises:
        ValueError: If a layer would lose all of its filters, or a class must stay.
    """
    trace = classes.trace
    if any(classes.is_fixed(channel) for channel in removed):
        raise ValueError("narrow: channels are to be removed that must stay")
    for layer in classes.layers:
        if not classes.kept(layer.outputs, removed):
            raise ValueError(f"narrow: '{trace.owner_of(layer.node)}' would lose all of its filters")
    for cut in classes.slices:
        positions = classes._positions(cut.ids, removed)
        tensor = trace.tensors[str(cut.tensor.target)]
        index = torch.tensor(positions, device=tensor.device)
        trace.tensors[str(cut.tensor.target)] = tensor.detach().index_select(cut.dim, index)
    for node, channels in classes.resized:
        _resize(node, len(classes.kept(channels, removed)))
    _infer_shapes(trace)
    return trace


def _resize(node: Node, size: int) -> None:
    """Correct the one number among the arguments that counts channels."""
    name = aten.name_of(node)
    if name in aten.CONV2D:
        _set_argument(node, "groups", size)
    elif name in ("view", "reshape"):
        shape = aten.argument(node, "size", aten.argument(node, "shape"))
        _set_argument(node, "size" if name == "view" else "shape", [shape[0], size])


def _set_argument(node: Node, name: str, value: Any) -> None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]  # an operator
    at = names.index(name)
    if at < len(node.args):
        node.update_arg(at, value)
    else:
        node.update_kwarg(name, value)


def _infer_shapes(trace: Trace) -> None:
    """Run the graph on fake tensors, which have shapes and no values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    values: dict[Node, Any] = {}
    with torch.inference_mode(), mode:
        for node, value in _values(trace, mode, values):
            values[node] = value
            node.meta["val"] = value


def _values(trace: Trace, mode: FakeTensorMode, values: dict[Node, Any]) -> Iterator[tuple[Node, Any]]:
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            old = aten.value_of(node)
            yield node, torch.empty(old.shape, dtype=old.dtype, device=old.device)
        elif node.op == "get_attr":
            yield node, mode.from_tensor(trace.tensors[str(node.target)])
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            yield node, node.target(*args, **kwargs)
