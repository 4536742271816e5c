"""Which channels of which values are known, given the gates: zero, or a constant that no image changes.

Every channel carries the set of gates that must *all* be closed for it to be known. A gated value has one gate per
channel, and is zero where that is closed; a sum needs the gates of both operands closed; a concatenation, split or
shuffle moves sets about; a norm turns zero into a constant, which is still the same for every image and position. The
sets are found by running each recorded operator on *labels*, integers that stand for sets, instead of features:
whatever an operator that only moves elements does, it does to the labels as well.

What the constants are is not asked here, since training changes them: equal constants only have equal *value numbers*.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from decouplify import aten
from decouplify.sites import Matching
from decouplify.trace import Trace

__all__ = ["Flow", "GateSet", "gate_columns"]

#: The gates (columns of a path) that must all be closed for a channel to be known: empty for a channel that always is,
#: None for one that never is.
GateSet = frozenset[int] | None

_ZERO, _DENSE = 0, 1

#: Static tensors with more elements than this get no value numbers; those that scale or shift channels are smaller.
_MOST_ELEMENTS = 1 << 14


@dataclass(frozen=True)
class _Known:
    """What a label stands for: the value ``value`` once all of ``gates`` are closed. Value 0 is zero."""

    gates: GateSet
    value: int


def gate_columns(matching: Matching) -> dict[str, range]:
    """The columns of each gate's filters in a path (all gates concatenated)."""
    columns: dict[str, range] = {}
    start = 0
    for gate in matching.plan.gates:
        columns[gate.name] = range(start, start + gate.n_filters)
        start += gate.n_filters
    return columns


class Flow:
    """Gate sets of all values of a recorded run.

    Labels are small integer tensors that broadcast to the shape of the value they describe: a dimension along which
    nothing varies has size one. Label 0 is "always zero", 1 is "dense", others index ``_known``.
    """

    def __init__(self, trace: Trace, matching: Matching) -> None:
        self._trace = trace
        self._known = [_Known(frozenset(), 0), _Known(None, 0)]
        self._ids = {known: i for i, known in enumerate(self._known)}
        self._numbers: dict[Hashable, int] = {}
        self._labels: dict[Node, Any] = {}
        self._ends = self._gate_labels(matching)
        self._rules = _rules()
        for node in trace.graph.nodes:
            self._labels[node] = self._label(node)
        self._channels: dict[tuple[Node, int], list[_Known]] = {}

    def zeros(self, node: Node, axis: int) -> list[GateSet]:
        """For each channel of a value the gates that must all be closed for it to be zero.

        Args:
            node: A node with one tensor value.
            axis: Its channel axis.
        """
        return [known.gates if known.value == 0 else None for known in self._of_channels(node, axis)]

    def constants(self, node: Node, axis: int) -> list[GateSet]:
        """As ``zeros``, for the channels that then hold another constant, the same at all positions."""
        return [known.gates if known.value != 0 else None for known in self._of_channels(node, axis)]

    def labels(self, node: Node) -> Tensor:
        """Labels of an input value, dense for an unknown value."""
        found = self._labels.get(node)
        return found if isinstance(found, Tensor) else self.dense()

    def operand(self, value: Any) -> Tensor:
        """Labels of an operand of arithmetic: a node, a tensor that does not depend on the image, or a number."""
        if not isinstance(value, Node):
            known = _Known(frozenset(), self._number(("number", value)) if value != 0 else 0)
            return torch.tensor(self._intern(known), dtype=torch.int32)
        labels = self.labels(value)
        if not self.is_static(value) or not self.is_dense(value):
            return labels
        shape = aten.value_of(value).shape
        if shape.numel() > _MOST_ELEMENTS:
            return labels
        elements = [_Known(frozenset(), self._number((value, i))) for i in range(shape.numel())]
        return torch.tensor([self._intern(known) for known in elements], dtype=torch.int32).view(shape)

    def is_static(self, node: Node) -> bool:
        """Whether a value does not depend on the image."""
        return node in self._trace.static

    def is_dense(self, node: Node) -> bool:
        """Whether nothing is known of any element of a value."""
        return bool((self.labels(node) == _DENSE).all())

    def dense(self) -> Tensor:
        """The label of a value of which nothing is known."""
        return torch.tensor(_DENSE, dtype=torch.int32)

    def together(self, node: Node, a: Tensor, b: Tensor) -> Tensor:
        """Labels of ``node``, a function of two operands, zero where both are: known where both are known."""
        return self._combine(a, b, lambda i, j: self._both(node, i, j))

    def product(self, node: Node, a: Tensor, b: Tensor) -> Tensor:
        """Labels of a product: zero where either operand is, known where both are; the fewest gates win."""
        return self._combine(
            a, b, lambda i, j: self._fewest(self._zero_of(i), self._zero_of(j), self._both(node, i, j))
        )

    def quotient(self, node: Node, a: Tensor, b: Tensor) -> Tensor:
        """Labels of a quotient: zero where the dividend is, known where both operands are."""
        return self._combine(a, b, lambda i, j: self._fewest(self._zero_of(i), self._both(node, i, j)))

    def function(self, node: Node, labels: Tensor, axis: int | None, keeps_zero: bool) -> Tensor:
        """Labels of an element-wise function of one value.

        Args:
            node: What computes it.
            labels: Labels of the value.
            axis: Channel axis if the function differs between channels, else None.
            keeps_zero: Whether the function of zero is zero.
        """
        if bool((labels == _DENSE).all()):
            return self.dense()
        channel = torch.zeros((), dtype=torch.int32)
        if axis is not None:
            shape = aten.value_of(node).shape
            channel = torch.arange(shape[axis]).view([-1 if d == axis else 1 for d in range(len(shape))])
        return self._combine(labels, channel, lambda i, c: self._image(node, i, c, keeps_zero))

    def only_zeros(self, labels: Tensor) -> Tensor:
        """The labels with constants forgotten."""
        forget = torch.tensor([i if known.value == 0 else _DENSE for i, known in enumerate(self._known)])
        return forget[labels.long()].int()

    def reduce(self, labels: Tensor, dims: list[int]) -> Tensor:
        """Labels of a reduction: zero where everything reduced is, known where it does not vary.

        Reduced dimensions keep size one.
        """
        for dim in dims:
            if labels.dim() and labels.shape[dim] > 1:
                labels = self._reduce_one(labels, dim)
        return labels

    def _of_channels(self, node: Node, axis: int) -> list[_Known]:
        key = (node, axis)
        if key not in self._channels:
            shape = aten.value_of(node).shape
            labels = self.reduce(self._labels[node], [d for d in range(len(shape)) if d != axis % len(shape)])
            self._channels[key] = [self._known[i] for i in labels.flatten().expand(shape[axis]).tolist()]
        return self._channels[key]

    def _label(self, node: Node) -> Any:
        value = node.meta.get("val")
        if node.op == "output" or not isinstance(value, (Tensor, list, tuple)):
            return None
        if node in self._trace.hazards:
            return self.dense()
        rule = self._rules.get(aten.name_of(node))
        labels = self.dense() if rule is None else rule(self, node)
        end = self._ends.get(node)
        return labels if end is None else self.product(node, end, labels) if isinstance(labels, Tensor) else end

    def _gate_labels(self, matching: Matching) -> dict[Node, Tensor]:
        columns = gate_columns(matching)
        found: dict[Node, Tensor] = {}
        for gate in matching.plan.gates:
            closed = [self._intern(_Known(frozenset({c}), 0)) for c in columns[gate.name]]
            for end in gate.ends:
                node = matching.ends[end]
                n_dims = aten.value_of(node).dim()
                shape = [-1 if d == end.axis % n_dims else 1 for d in range(n_dims)]
                found[node] = torch.tensor(closed, dtype=torch.int32).view(shape)
        return found

    def _intern(self, known: _Known) -> int:
        if known not in self._ids:
            self._ids[known] = len(self._known)
            self._known.append(known)
        return self._ids[known]

    def _number(self, key: Hashable) -> int:
        """A value number, the same for the same key."""
        return self._numbers.setdefault(key, len(self._numbers) + 1)

    def _zero_of(self, label: int) -> int:
        """The label if it stands for zero, else dense."""
        return label if self._known[label].value == 0 else _DENSE

    def _fewest(self, *labels: int) -> int:
        """Of several things known about one value the one that needs the fewest gates closed."""

        def n_gates(label: int) -> float:
            gates = self._known[label].gates
            return float("inf") if gates is None else len(gates)

        return min(labels, key=n_gates)

    def _both(self, node: Node, i: int, j: int) -> int:
        """What is known of a function of two values that is zero where both are zero."""
        a, b = self._known[i], self._known[j]
        if a.gates is None or b.gates is None:
            return _DENSE
        value = self._number((node, i, j)) if a.value or b.value else 0
        return self._intern(_Known(a.gates | b.gates, value))

    def _image(self, node: Node, label: int, channel: int, keeps_zero: bool) -> int:
        """What is known of a function of one value."""
        known = self._known[label]
        if known.gates is None or (keeps_zero and known.value == 0):
            return label
        return self._intern(_Known(known.gates, self._number((node, label, channel))))

    def _same(self, i: int, j: int) -> int:
        """What is known of two positions at once: both are zero, or both are the same."""
        a, b = self._known[i], self._known[j]
        if i == j:
            return i
        if a.gates is None or b.gates is None or a.value != b.value:
            return _DENSE
        return self._intern(_Known(a.gates | b.gates, a.value))

    def _combine(self, a: Tensor, b: Tensor, pair: Callable[[int, int], int]) -> Tensor:
        """Apply a function of two numbers element-wise, once per pair that occurs."""
        a, b = torch.broadcast_tensors(a.long(), b.long())
        pairs, inverse = torch.unique((a << 32) | b, return_inverse=True)
        results = [pair(p >> 32, p & 0xFFFFFFFF) for p in pairs.tolist()]
        return torch.tensor(results, dtype=torch.int32)[inverse]

    def _reduce_one(self, labels: Tensor, dim: int) -> Tensor:
        first = labels.narrow(dim, 0, 1)
        if bool((labels == first).all()):
            return first
        while labels.shape[dim] > 1:  # halves together: log2(size) passes instead of one per position
            half = labels.shape[dim] // 2
            rest = labels.narrow(dim, 2 * half, labels.shape[dim] - 2 * half)
            labels = self._combine(labels.narrow(dim, 0, half), labels.narrow(dim, half, half), self._same)
            labels = torch.cat([labels, rest], dim)
        return labels


_Rule = Callable[[Flow, Node], Any]


def _rules() -> dict[str, _Rule]:
    """How labels pass each operator; an operator without a rule makes its result dense."""
    rules: dict[str, _Rule] = {}
    rules.update(dict.fromkeys(aten.IDENTITIES, _keep))
    rules.update(dict.fromkeys(aten.ACTIVATIONS, _through_activation))
    rules.update(dict.fromkeys(aten.SPATIAL, _through_pooling))
    rules.update(dict.fromkeys(aten.MOVES, _move))
    rules.update(dict.fromkeys(aten.PADS, _pad))
    rules.update(dict.fromkeys(aten.REDUCTIONS, _through_reduction))
    rules.update(dict.fromkeys(aten.ZEROS, lambda flow, node: torch.tensor(_ZERO, dtype=torch.int32)))
    rules.update(dict.fromkeys(("add", "sub", "maximum", "minimum"), _through_arithmetic(Flow.together)))
    rules["mul"], rules["div"] = _through_arithmetic(Flow.product), _through_arithmetic(Flow.quotient)
    rules["batch_norm"], rules["getitem"] = _through_norm, _item
    return rules


def _keep(flow: Flow, node: Node) -> Tensor:
    return flow.labels(node.all_input_nodes[0])


def _through_activation(flow: Flow, node: Node) -> Tensor:
    others = node.all_input_nodes[1:]
    if not all(flow.is_static(other) for other in others):
        return flow.dense()
    return flow.function(node, _keep(flow, node), 1 if others else None, aten.is_zero_preserving(node))


def _through_norm(flow: Flow, node: Node) -> Tensor:
    if not aten.has_fixed_statistics(node):
        return flow.dense()
    return flow.function(node, _keep(flow, node), 1, keeps_zero=False)


def _through_arithmetic(combine: Callable[[Flow, Node, Tensor, Tensor], Tensor]) -> _Rule:
    def rule(flow: Flow, node: Node) -> Tensor:
        a, b = node.args[:2]
        if any(isinstance(arg, Node) and not flow.is_static(arg) and flow.is_dense(arg) for arg in (a, b)):
            a, b = (flow.labels(arg) if isinstance(arg, Node) else flow.dense() for arg in (a, b))
            return combine(flow, node, a, b)  # whatever the other operand is, only its zeros count
        return combine(flow, node, flow.operand(a), flow.operand(b))

    return rule


def _through_pooling(flow: Flow, node: Node) -> Any:
    labels = _keep(flow, node)
    n_dims = aten.value_of(node.all_input_nodes[0]).dim()
    pooled = flow.reduce(labels, [n_dims - 2, n_dims - 1]) if labels.dim() == n_dims else labels
    if aten.averages_padding(node):
        pooled = flow.only_zeros(pooled)
    return pooled if isinstance(aten.value_of(node), Tensor) else [pooled, flow.dense()]  # a maximum with its indices


def _through_reduction(flow: Flow, node: Node) -> Tensor:
    source = node.all_input_nodes[0]
    labels, n_dims = flow.labels(source), aten.value_of(source).dim()
    dims = aten.argument(node, "dim")
    dims = list(range(n_dims)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    if aten.name_of(node) == "sum":
        labels = flow.only_zeros(labels)  # of how many, the labels do not tell
    if labels.dim() < n_dims:
        return labels
    labels = flow.reduce(labels, [d % n_dims for d in dims])
    if aten.argument(node, "keepdim", False):
        return labels
    return labels.squeeze(tuple(d % n_dims for d in dims))


def _move(flow: Flow, node: Node) -> Any:
    """Run the operator itself on labels spread out to the full shape."""
    is_view = "view" in aten.name_of(node)

    def spread(arg: Any) -> Any:
        if isinstance(arg, Node):
            value = aten.value_of(arg)
            if not isinstance(value, Tensor):
                return arg
            labels = flow.labels(arg).expand(value.shape)
            return labels.contiguous() if is_view else labels  # a view refuses strides that the features did not have
        if isinstance(arg, (list, tuple)):
            return type(arg)(spread(a) for a in arg)
        return arg

    if aten.name_of(node) == "index_select":  # its index is data, not features
        return flow.dense()
    moved = node.target(*spread(node.args), **{k: spread(v) for k, v in node.kwargs.items()})  # type: ignore[operator]
    return _compact(moved) if isinstance(moved, Tensor) else [_compact(m) for m in moved]


def _compact(labels: Tensor) -> Tensor:
    """Shrink dimensions along which nothing varies to size one."""
    for dim in range(labels.dim()):
        first = labels.narrow(dim, 0, 1) if labels.shape[dim] else labels
        if labels.shape[dim] > 1 and (labels.stride(dim) == 0 or bool((labels == first).all())):
            labels = first
    return labels.clone()


def _pad(flow: Flow, node: Node) -> Tensor:
    source = node.all_input_nodes[0]
    pad = list(aten.argument(node, "pad"))
    is_zero = aten.argument(node, "mode", "constant") == "constant" and not aten.argument(node, "value", 0)
    labels = flow.labels(source)
    padded = [i for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1]]  # counted from the last dimension
    if all(labels.dim() <= i or labels.shape[-1 - i] == 1 for i in padded) and len(pad) <= 4:
        if aten.argument(node, "mode", "constant") != "constant":
            return labels
        return flow.only_zeros(labels) if is_zero else flow.dense()
    if not is_zero:
        return flow.dense()
    labels = labels.expand(aten.value_of(source).shape)
    return _compact(torch.nn.functional.pad(labels, pad, value=_ZERO))


def _item(flow: Flow, node: Node) -> Any:
    source, index = node.args
    labels = flow._labels.get(source)  # type: ignore[arg-type]  # getitem reads a node
    return labels[index] if isinstance(labels, list) and isinstance(index, int) else flow.dense()
