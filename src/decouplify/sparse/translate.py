"""From the graph of a sparse form to steps of the engine.

Each node is looked up in a table of rules. A rule emits steps and returns the map that stands for the node's value, or
returns None if it cannot: then torch runs the node between steps, and its operands and results cross over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from decouplify import aten
from decouplify.sparse.drafts import IDENTITY, Act, Draft, Map, ReadGate, SetGate, Sliding, Step, TorchCall
from decouplify.sparse.native import ActivationKind, StepKind, WindowKind
from decouplify.sparse.ops import Controller, Exists, FoldedBias, Mask, SparseConv2d, SparseLinear

__all__ = ["obstacle", "translate"]


def obstacle(module: GraphModule) -> str:
    """Why the engine cannot run a graph at all, "" if it can."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_floating_point() and t.dtype != torch.float32 for t in tensors):
        return "the weights are not float32"
    if sum(node.op == "placeholder" for node in module.graph.nodes) != 1:
        return "the model takes more than an image"
    changed = _changed_under_a_reader(module)
    return f"'{changed}' changes a value that is read again afterwards" if changed else ""


def translate(module: GraphModule, fuse: bool) -> Draft:
    """The program of a sparse form for one image.

    Args:
        module: A lowered graph whose nodes know their example values (``meta["val"]``).
        fuse: Whether sums and activations become part of the convolution before them. Without, every node's value is
            stored for the caller to see.
    """
    return _Translation(module, fuse).run()


def _changed_under_a_reader(module: GraphModule) -> str:
    """The first in-place node whose change another node would see, since maps are values here and not memory."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    root: dict[Node, Node] = {}
    for node in module.graph.nodes:
        source = node.all_input_nodes[0] if node.all_input_nodes else node
        is_alias = aten.name_of(node) in aten.MOVES | aten.IDENTITIES or _is_in_place(node)
        root[node] = root[source] if is_alias else node
    for node in order:
        if not _is_in_place(node):
            continue
        aliases = [n for n, r in root.items() if r is root[node] and order[n] < order[node]]
        if any(order[user] > order[node] for alias in aliases for user in alias.users):
            return node.name
    return ""


def _is_in_place(node: Node) -> bool:
    return node.op == "call_function" and bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


class _Translation:
    def __init__(self, module: GraphModule, fuse: bool) -> None:
        self.module, self.fuse = module, fuse
        self.draft = Draft()
        self.maps: dict[Node, Map] = {}
        self.gates: dict[Node, int] = {}
        self.in_torch: set[Node] = set()
        self.done: set[Node] = set()  # nodes that became part of an earlier step
        self.pads: dict[Node, tuple[int, int]] = {}  # rows and columns of zeros that the next convolution adds
        self.concatenated: dict[Map, list[Map]] = {}  # the parts of each concatenation
        self.modules = dict(module.named_modules())

    def run(self) -> Draft:
        for node in self.module.graph.nodes:
            if node in self.done or self._operator(node) in _ONLY_FOR_TORCH:
                continue
            if node.op in ("placeholder", "get_attr"):
                self.in_torch.add(node)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self._to_torch(source)
            else:
                self._translate(node)
        return self.draft

    def _operator(self, node: Node) -> Any:
        """What a node runs: a class for modules, a name for functions."""
        if node.op == "call_module":
            return type(self.modules[str(node.target)])
        return aten.name_of(node)

    def _translate(self, node: Node) -> None:
        rule = _RULES.get(self._operator(node))
        found = None if rule is None else rule(self, node)
        if found is None and node not in self.gates:
            self._call_torch(node)
        elif found is not None:
            self.maps[node] = found
            if not self.fuse:
                self._to_torch(node)

    def _call_torch(self, node: Node) -> None:
        for source in node.all_input_nodes:
            self._to_torch(source)
        self.draft.items.append(TorchCall(node))
        self.in_torch.add(node)

    def _to_torch(self, node: Node) -> None:
        """Make a node's value available to torch."""
        if node in self.in_torch or node in self.draft.always_open:
            return
        if node in self.maps:
            slot = self.draft.n_slots
            self.draft.stores[slot] = (node, self.maps[node])
            self.draft.items.append(Step(StepKind.STORE, node.name, node, input=self.maps[node], slot=slot))
        elif self.gates.get(node, _ALWAYS_OPEN) != _ALWAYS_OPEN:
            self.draft.items.append(ReadGate(self.gates[node], node))
        else:
            assert node in self.gates or self._operator(node) in _ONLY_FOR_TORCH
            self._call_torch(node)
        self.in_torch.add(node)

    # What rules use.

    def map_of(self, node: Any) -> Map | None:
        """The map of a node's value, loaded from torch if need be; None if it is not a map or vector."""
        if not isinstance(node, Node):
            return None
        if node not in self.maps:
            shape = _shape_of_map(node.meta.get("val"))
            if node.op == "get_attr" or node not in self.in_torch or shape is None:
                return None
            loaded = _new_map(shape)
            slot = self.draft.n_slots
            self.draft.loads[slot] = node
            self.draft.items.append(Step(StepKind.LOAD, node.name, node, output=loaded, slot=slot))
            self.maps[node] = loaded
        return self.maps[node]

    def gate_of(self, node: Any) -> int:
        """The index of a gate, given to the engine if torch decides it; -1 where everything is open."""
        if node is None:
            return _ALWAYS_OPEN
        if node not in self.gates:
            self._add_gate(node, int(self._controller(node).fc2.out_features))
            self.draft.items.append(SetGate(self.gates[node], node))
        return self.gates[node]

    def _add_gate(self, node: Node, n_filters: int) -> None:
        self.gates[node] = len(self.draft.gates)
        self.draft.gates.append((node, n_filters))

    def _controller(self, node: Node) -> Any:
        return self.modules[str(node.target)].controller

    def emit(self, kind: StepKind, node: Node, **fields: Any) -> Step:
        """Append a step of the engine."""
        step = Step(kind, self._name(node), node, **fields)
        self.draft.items.append(step)
        return step

    @staticmethod
    def _name(node: Node) -> str:
        return str(node.target) if node.op == "call_module" else node.name

    def constant(self, node: Any) -> Tensor | None:
        """The value of a node that does not depend on the image."""
        if not isinstance(node, Node) or node.op != "get_attr":
            return None
        found = getattr(self.module, str(node.target))
        return found if isinstance(found, Tensor) else None

    # Rules.

    def controller(self, node: Node) -> None:
        """pool, two linear layers, threshold."""
        controller = self._controller(node)
        if self.fuse and _is_always_open(controller):
            self.gates[node] = _ALWAYS_OPEN
            self.draft.always_open.append(node)
            return
        x = self.map_of(node.args[0])
        if x is None or not _has_channels_at(x, controller.input_axis):
            return
        self._add_gate(node, controller.fc2.out_features)
        self.emit(StepKind.CONTROL, node, input=x, gate=self.gates[node], weights=_controller_weights(controller))

    def mask(self, node: Node) -> Map | None:
        """A gate on a value: its closed channels exist no longer."""
        x = self.map_of(node.args[0])
        if x is None or not _has_channels_at(x, self.modules[str(node.target)].axis):
            return None
        gate = self.gate_of(node.args[1])
        if gate == _ALWAYS_OPEN:
            return x
        y = Map(x.shape, x.channels, x.size, _with_zero(x.bounds), x.channels_last, base=x)
        self.emit(StepKind.MASK, node, input=x, output=y, gate=gate)
        return y

    def convolution(self, node: Node) -> Map | None:
        """A convolution with what follows it directly: sum and activation."""
        conv = self.modules[str(node.target)]
        act, x = act_of(conv.activation), self.map_of(node.args[0])
        if act is None or x is None or not x.is_planar:
            return None
        sliding = self._with_pad(_sliding_of(conv), node.args[0])
        y = _new_map(tuple(node.meta["val"].shape), act)
        gate = self.gate_of(node.args[1])
        weights = {"weight": conv.weight.contiguous(), "bias": conv.bias.contiguous()}
        if gate >= 0:
            y.bounds = _with_zero(y.bounds)
        if conv.groups > 1 and conv.weight.shape[1] == 1 and len(conv.weight) == conv.groups:
            expansion = self._expansion_before(node, x, gate, act)
            if expansion is not None:
                self._fuse_expansion(expansion, node, y, sliding, weights)
                return y
            self.emit(StepKind.WINDOW, node, input=x, output=y, gate=gate, sliding=sliding, act=act, weights=weights)
            return y
        step = self.emit(
            StepKind.CONVOLUTION, node, input=x, output=y, gate=gate, groups=conv.groups, sliding=sliding, act=act,
            weights=weights, reads_part=node.args[2] is not None,
        )  # fmt: skip
        if self.fuse and conv.activation is None:
            self._fuse_sum(step)
        return y

    def _expansion_before(self, node: Node, x: Map, gate: int, act: Act) -> Step | None:
        """The 1x1 convolution that writes what a depthwise one alone reads, if one step can do both."""
        last = self.draft.items[-1] if self.draft.items else None
        if not self.fuse or not isinstance(last, Step) or last.kind is not StepKind.CONVOLUTION or last.output is not x:
            return None
        is_plain = last.sliding == Sliding() and last.groups == 1 and last.other is None
        reader = _only_user(last.node)
        alone = node in (reader, _only_user(reader) if reader in self.pads else None)
        return last if is_plain and alone and last.gate == gate and last.act == act else None

    def _fuse_expansion(
        self, expansion: Step, node: Node, y: Map, sliding: Sliding, weights: dict[str, Tensor]
    ) -> None:
        """Put one step in place of a 1x1 convolution and the depthwise one after it."""
        self.draft.items.remove(expansion)
        del self.maps[expansion.node]
        both = {**weights, "weight2": expansion.weights["weight"], "bias2": expansion.weights["bias"]}
        self.emit(
            StepKind.EXPAND, node, input=expansion.input, output=y, gate=expansion.gate, sliding=sliding,
            act=expansion.act, weights=both,
        )  # fmt: skip

    def _fuse_sum(self, step: Step) -> None:
        """Let a convolution add the other operand of the sum that follows, and apply the activation after that."""
        add = _only_user(step.node)
        if add is None or aten.name_of(add) != "add" or not _is_plain_add(add):
            return
        others = [n for n in add.all_input_nodes if n is not step.node]
        other = self.maps.get(others[0]) if len(others) == 1 else None
        assert step.output is not None
        if other is None or not other.is_planar or other.shape != step.output.shape:
            return
        step.other = other
        self._absorb(step, add)
        self._fuse_activation(step, add)

    def _fuse_activation(self, step: Step, last: Node) -> None:
        following = _only_user(last)
        act = None if following is None else _act_of_node(following)
        if self.fuse and act is not None and following is not None:
            step.act = act
            self._absorb(step, following)

    def _absorb(self, step: Step, node: Node) -> None:
        """Make a node part of an earlier step, which now completes that node's value."""
        assert step.output is not None
        step.node, step.output.bounds = node, step.act.bounds
        self.maps[node] = step.output
        self.done.add(node)

    def linear(self, node: Node) -> Map | None:
        """A linear layer on one vector, or on every pixel of a map whose channels are last."""
        layer = self.modules[str(node.target)]
        act, x = act_of(layer.activation), self.map_of(node.args[0])
        if act is not None and x is not None and x.channels_last:
            return self._pointwise(node, x, act)
        if act is None or x is None or x.size is not None or len(x.shape) != 2 or node.args[1] is not None:
            return None
        y = _new_map((1, len(layer.weight)), act)
        weights = {"weight": layer.weight.t().contiguous(), "bias": layer.bias.contiguous()}
        self.emit(StepKind.LINEAR, node, input=x, output=y, act=act, weights=weights)
        return y

    def _pointwise(self, node: Node, x: Map, act: Act) -> Map:
        """A linear layer as the 1x1 convolution that it is."""
        layer = self.modules[str(node.target)]
        gate = self.gate_of(node.args[1])
        bounds = act.bounds if gate == _ALWAYS_OPEN else _with_zero(act.bounds)
        y = Map((*x.shape[:3], len(layer.weight)), len(layer.weight), x.size, bounds, channels_last=True)
        weights = {"weight": layer.weight.contiguous(), "bias": layer.bias.contiguous()}
        reads_part = node.args[2] is not None
        self.emit(
            StepKind.CONVOLUTION, node, input=x, output=y, gate=gate, act=act, weights=weights, reads_part=reads_part
        )
        return y

    def permute(self, node: Node) -> Map | None:
        """Channels to the end and back, which moves nothing: only the name of the dimensions changes."""
        x = self.map_of(node.args[0])
        wanted = [0, 3, 1, 2] if x is not None and x.channels_last else [0, 2, 3, 1]
        if x is None or x.size is None or [d % 4 for d in aten.argument(node, "dims")] != wanted:
            return None
        y = Map(tuple(node.meta["val"].shape), x.channels, x.size, x.bounds, not x.channels_last, base=x)
        self.emit(StepKind.MASK, node, input=x, output=y)
        return y

    def layer_norm(self, node: Node) -> Map | None:
        """A norm over the channels of each pixel."""
        x = self.map_of(node.args[0])
        if x is None or not x.channels_last or list(aten.argument(node, "normalized_shape")) != [x.channels]:
            return None
        weight, bias = (self.constant(aten.argument(node, name)) for name in ("weight", "bias"))
        weights = {
            "weight": torch.ones(x.channels) if weight is None else weight.contiguous(),
            "bias": torch.zeros(x.channels) if bias is None else bias.contiguous(),
        }
        y = Map(x.shape, x.channels, x.size, channels_last=True)
        self.emit(StepKind.NORM, node, input=x, output=y, weights=weights, epsilon=float(aten.argument(node, "eps")))
        return y

    def multiply(self, node: Node) -> Map | None:
        """A constant factor per channel."""
        factors = [c for arg in node.args[:2] if (c := self.constant(arg)) is not None]
        maps = [m for arg in node.args[:2] if (m := self.map_of(arg)) is not None]
        if len(factors) != 1 or len(maps) != 1 or maps[0].size is None:
            return None
        x, factor = maps[0], factors[0]
        wanted = (x.channels,) if x.channels_last else (x.channels, 1, 1)
        if tuple(factor.shape[-len(wanted) :]) != wanted or factor.numel() != x.channels:
            return None
        y = Map(x.shape, x.channels, x.size, channels_last=x.channels_last)
        weights = {"weight": factor.flatten().contiguous(), "bias": torch.zeros(x.channels)}
        self.emit(StepKind.SCALE, node, input=x, output=y, weights=weights)
        return y

    def add(self, node: Node) -> Map | None:
        """A sum of two maps."""
        x, other = (self.map_of(arg) for arg in node.args[:2])
        if x is None or other is None or x.size is None or not _is_plain_add(node):
            return None
        if (x.shape, x.channels_last) != (other.shape, other.channels_last):
            return None
        y = Map(x.shape, x.channels, x.size, channels_last=x.channels_last)
        step = self.emit(StepKind.ADD, node, input=x, other=other, output=y)
        self._fuse_activation(step, node)
        return y

    def activation(self, node: Node) -> Map | None:
        """An activation that stands alone: a scaling by one."""
        x, act = self.map_of(node.args[0]), _act_of_node(node)
        if x is None or x.size is None or act is None or not aten.is_zero_preserving(node):
            return None
        y = Map(x.shape, x.channels, x.size, act.bounds, x.channels_last)
        ones, zeros = torch.ones(x.channels), torch.zeros(x.channels)
        self.emit(StepKind.SCALE, node, input=x, output=y, act=act, weights={"weight": ones, "bias": zeros})
        return y

    def norm(self, node: Node) -> Map | None:
        """A batch norm that no convolution could take in."""
        mean, var = (self.constant(aten.argument(node, name)) for name in ("running_mean", "running_var"))
        x = self.map_of(node.args[0])
        if mean is None or var is None or x is None or not x.is_planar or aten.argument(node, "training"):
            return None
        gamma, beta = (self.constant(aten.argument(node, name)) for name in ("weight", "bias"))
        scale = torch.rsqrt(var.double() + float(aten.argument(node, "eps")))
        scale = scale if gamma is None else scale * gamma.double()
        shift = -mean.double() * scale + (0.0 if beta is None else beta.double())
        y = _new_map(x.shape)
        weights = {"weight": scale.float(), "bias": shift.float()}
        step = self.emit(StepKind.SCALE, node, input=x, output=y, weights=weights)
        self._fuse_activation(step, node)
        return y

    def max_pool(self, node: Node) -> Map | None:
        """A maximum over windows."""
        return self._pool(node, WindowKind.MAX)

    def average_pool(self, node: Node) -> Map | None:
        """A mean over windows."""
        if aten.argument(node, "divisor_override") is not None:
            return None
        return self._pool(node, WindowKind.AVERAGE)

    def _pool(self, node: Node, window: WindowKind) -> Map | None:
        x = self.map_of(node.args[0])
        if x is None or not x.is_planar:
            return None
        kernel = _pair(aten.argument(node, "kernel_size"))
        stride = _pair(aten.argument(node, "stride") or kernel)
        sliding = Sliding(
            kernel, stride, _pair(aten.argument(node, "padding", 0)), _pair(aten.argument(node, "dilation", 1))
        )
        if kernel[0] * kernel[1] > MAX_TAPS:
            return None
        y = Map(tuple(node.meta["val"].shape), x.channels, tuple(node.meta["val"].shape[2:]), _with_zero(x.bounds))
        counts = bool(aten.argument(node, "count_include_pad", True))
        self.emit(StepKind.WINDOW, node, input=x, output=y, window=window, sliding=sliding, counts_padding=counts)
        return y

    def global_mean(self, node: Node) -> Map | None:
        """A mean over all positions; or over windows of one element, which changes nothing."""
        x = self.map_of(node.args[0])
        shape = tuple(node.meta["val"].shape)
        if x is None or not x.is_planar:
            return None
        if shape == x.shape:
            return x
        if not aten.is_global_pool(node) or aten.name_of(node) not in ("mean", "adaptive_avg_pool2d"):
            return None
        if shape[:2] != x.shape[:2]:
            return None  # a mean over other dimensions, as of a map with channels last that torch has computed
        y = Map(shape, x.channels, None, _with_zero(x.bounds))
        self.emit(StepKind.MEAN, node, input=x, output=y)
        return y

    def reshape(self, node: Node) -> Map | None:
        """Flattening to one vector, or nothing at all."""
        x = self.map_of(node.args[0])
        value = node.meta["val"]
        if x is None or not isinstance(value, Tensor):
            return None
        shape = tuple(value.shape)
        if shape == x.shape:
            return x
        if len(shape) != 2 or shape[0] != 1 or x.channels_last:
            return None
        y = Map(shape, shape[1], None, _with_zero(x.bounds))
        self.emit(StepKind.FLATTEN, node, input=x, output=y)
        return y

    def identity(self, node: Node) -> Map | None:
        """An operator that changes nothing in eval mode."""
        value = node.meta["val"]
        return self.map_of(node.args[0]) if isinstance(value, Tensor) and value.dtype == torch.float32 else None

    def concatenate(self, node: Node) -> Map | None:
        """Channels side by side."""
        operands: Any = node.args[0]
        parts = [self.map_of(part) for part in operands]
        if any(p is None or not p.is_planar for p in parts) or int(aten.argument(node, "dim", 0)) not in (1, -3):
            return None
        maps = [p for p in parts if p is not None]
        y = _new_map(tuple(node.meta["val"].shape))
        y.bounds = _with_zero((min(m.bounds[0] for m in maps), max(m.bounds[1] for m in maps)))
        position = 0
        for part in self._with_earlier_concatenation(maps):
            self.emit(StepKind.COPY, node, input=part, output=y, position=position, clears=position == 0)
            position += part.channels
        self.concatenated[y] = maps
        return y

    def _with_earlier_concatenation(self, parts: list[Map]) -> list[Map]:
        """In place of the first parts the last concatenation of them: in a dense block, of all but the newest."""
        for whole, earlier in reversed(self.concatenated.items()):
            if 1 < len(earlier) < len(parts) and earlier == parts[: len(earlier)]:
                return [whole, *parts[len(earlier) :]]
        return parts

    def pad(self, node: Node) -> Map | None:
        """Zeros around the pixels, or before and after the channels."""
        x = self.map_of(node.args[0])
        pad = [*map(int, aten.argument(node, "pad")), 0, 0, 0, 0, 0, 0]
        if x is None or not x.is_planar or not _pads_zeros(node) or min(pad) < 0 or any(pad[6:]):
            return None
        reader = _only_user(node)
        if self.fuse and not any(pad[4:]) and self._is_convolution_here(reader):
            # Zeros are what a convolution finds outside its input anyway; its output's size tells how far it goes.
            self.pads[node] = (pad[2], pad[0])
            return x
        return self._copy(node, x, Sliding(padding=(pad[2], pad[0])), position=pad[4])

    def _is_convolution_here(self, node: Node | None) -> bool:
        """Whether ``convolution`` will have a step for a node that reads a map of planes."""
        if node is None or self._operator(node) is not SparseConv2d:
            return False
        return act_of(self.modules[str(node.target)].activation) is not None

    def _with_pad(self, sliding: Sliding, source: Any) -> Sliding:
        """The window of a convolution whose input was to be padded first."""
        rows, columns = self.pads.get(source, (0, 0))
        return replace(sliding, padding=(sliding.padding[0] + rows, sliding.padding[1] + columns))

    def part(self, node: Node) -> Map | None:
        """Every n-th row or column."""
        x = self.map_of(node.args[0])
        dim, start, step = (aten.argument(node, name) for name in ("dim", "start", "step"))
        if x is None or not x.is_planar or dim not in (2, 3) or (start or 0) < 0:
            return None
        axis = dim - 2
        stride, padding = [1, 1], [0, 0]
        stride[axis], padding[axis] = int(step), -int(start or 0)
        return self._copy(node, x, Sliding(stride=(stride[0], stride[1]), padding=(padding[0], padding[1])))

    def _copy(self, node: Node, x: Map, sliding: Sliding, position: int = 0) -> Map:
        y = _new_map(tuple(node.meta["val"].shape))
        y.bounds = _with_zero(x.bounds)
        self.emit(StepKind.COPY, node, input=x, output=y, sliding=sliding, position=position, clears=True)
        return y


#: What the engine finds out by itself: which channels exist, and what absent ones add to a bias.
_ONLY_FOR_TORCH = (Exists, FoldedBias)

#: In place of the index of a gate.
_ALWAYS_OPEN = -1

#: Taps of one window that the engine takes (kMaxTaps in gather.h).
MAX_TAPS = 256

_Rule = Callable[[_Translation, Node], Map | None]

_RULES: dict[Any, _Rule] = {
    Controller: _Translation.controller,  # its result is a gate, no map
    Mask: _Translation.mask,
    SparseConv2d: _Translation.convolution,
    SparseLinear: _Translation.linear,
    "add": _Translation.add,
    "batch_norm": _Translation.norm,
    "max_pool2d": _Translation.max_pool,
    "avg_pool2d": _Translation.average_pool,
    "adaptive_avg_pool2d": _Translation.global_mean,
    "mean": _Translation.global_mean,
    "cat": _Translation.concatenate,
    "pad": _Translation.pad,
    "constant_pad_nd": _Translation.pad,
    "slice": _Translation.part,
    "permute": _Translation.permute,
    "layer_norm": _Translation.layer_norm,
    "mul": _Translation.multiply,
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "_unsafe_view"), _Translation.reshape),
    **dict.fromkeys(aten.IDENTITIES, _Translation.identity),
    **dict.fromkeys(aten.ACTIVATIONS, _Translation.activation),
}


def act_of(activation: Any) -> Act | None:
    """The engine's function for the activation of an operator; None if it has none."""
    if activation is None:
        return IDENTITY
    schema = getattr(activation.target, "_schema", None)
    if schema is None:
        return None
    names = [a.name for a in schema.arguments][1:]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    arguments = {**defaults, **dict(zip(names, activation.args, strict=False)), **activation.kwargs}
    return _act(schema.name.split("::")[1].rstrip("_"), arguments)


def _act_of_node(node: Node) -> Act | None:
    schema = getattr(node.target, "_schema", None)
    if aten.name_of(node) not in aten.ACTIVATIONS or schema is None or len(node.all_input_nodes) != 1:
        return None
    return _act(aten.name_of(node), {a.name: aten.argument(node, a.name) for a in schema.arguments[1:]})


def _act(name: str, arguments: dict[str, Any]) -> Act | None:
    if name in ("hardtanh", "clamp", "clamp_min", "clamp_max"):
        low = arguments.get("min_val", arguments.get("min"))
        high = arguments.get("max_val", arguments.get("max"))
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return None
        return Act(low=-math.inf if low is None else float(low), high=math.inf if high is None else float(high))
    if name == "leaky_relu":
        return Act(ActivationKind.LEAKY, low=float(arguments["negative_slope"]))
    if name == "gelu":
        name += "_" + str(arguments.get("approximate"))
    return _PLAIN.get(name)


_PLAIN = {
    "relu": Act(low=0.0),
    "relu6": Act(low=0.0, high=6.0),
    "silu": Act(ActivationKind.SILU),
    "hardswish": Act(ActivationKind.HARDSWISH),
    "gelu_none": Act(ActivationKind.GELU),
    "gelu_tanh": Act(ActivationKind.GELU_TANH),
    "sigmoid": Act(ActivationKind.SIGMOID),
}


def _pads_zeros(node: Node) -> bool:
    return aten.argument(node, "mode", "constant") == "constant" and not aten.argument(node, "value")


def _is_always_open(controller: Any) -> bool:
    """Whether a controller opens every filter whatever it sees, as a fresh one does."""
    return not bool(controller.fc2.weight.any()) and bool((controller.fc2.bias > 0).all())


def _controller_weights(controller: Any) -> dict[str, Tensor]:
    """Both linear layers, inputs first, with the norm of the pooled input folded in."""
    w1, b1 = controller.fc1.weight.detach().double(), controller.fc1.bias.detach().double()
    if controller.norm is not None:
        scale = torch.rsqrt(controller.norm.running_var.double() + controller.norm.eps)
        b1 = b1 - w1 @ (controller.norm.running_mean.double() * scale)
        w1 = w1 * scale
    return {
        "weight": w1.t().float().contiguous(),
        "bias": b1.float(),
        "weight2": controller.fc2.weight.detach().t().float().contiguous(),
        "bias2": controller.fc2.bias.detach().float().contiguous(),
    }


def _sliding_of(conv: SparseConv2d) -> Sliding:
    kernel, stride, dilation = _pair(conv.weight.shape[2:]), _pair(conv.stride), _pair(conv.dilation)
    if conv.padding == "valid":
        padding = (0, 0)
    elif conv.padding == "same":
        padding = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
    else:
        padding = _pair(conv.padding)
    return Sliding(kernel, stride, padding, dilation)


def _pair(value: Any) -> tuple[int, int]:
    items = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return (items[0], items[-1])


def _new_map(shape: tuple[int, ...], act: Act = IDENTITY) -> Map:
    """A map, or a vector if the shape is (1, F)."""
    return Map(shape, shape[1], (shape[2], shape[3]) if len(shape) == 4 else None, act.bounds)


def _shape_of_map(value: Any) -> tuple[int, ...] | None:
    """The shape of a value that the engine could hold, None for any other."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() not in (2, 4):
        return None
    return tuple(value.shape) if value.shape[0] == 1 and value.numel() > 0 else None


def _has_channels_at(x: Map, axis: int) -> bool:
    return x.channels_last == (axis == -1) if x.size is not None else axis == 1


def _with_zero(bounds: tuple[float, float]) -> tuple[float, float]:
    """Bounds that also hold for channels that do not exist, or for padding."""
    return min(bounds[0], 0.0), max(bounds[1], 0.0)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_plain_add(node: Node) -> bool:
    return len(node.args) == 2 and aten.argument(node, "alpha", 1) == 1
