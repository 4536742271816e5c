"""Which channels of which values are known to be zero, given the gates.

Every channel carries the set of gates that must *all* be closed for it to be zero. A gated value has one gate per
channel; a sum needs the gates of both operands closed; a concatenation, split or shuffle moves sets about; a norm with
a bias forgets them. The sets are found by running each recorded operator on *labels*, integers that stand for sets,
instead of features: whatever an operator that only moves elements does, it does to the labels as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from decouplify import aten
from decouplify.sites import Matching
from decouplify.trace import Trace

__all__ = ["Flow", "GateSet", "gate_columns"]

#: The gates (columns of a path) that must all be closed for a channel to be zero: empty for a channel that is always
#: zero, None for one that is never known to be.
GateSet = frozenset[int] | None

_ZERO, _DENSE = 0, 1


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
    nothing varies has size one. Label 0 is the empty set, 1 is "dense", others index ``_sets``.
    """

    def __init__(self, trace: Trace, matching: Matching) -> None:
        self._trace = trace
        self._sets: list[GateSet] = [frozenset(), None]
        self._ids: dict[GateSet, int] = {s: i for i, s in enumerate(self._sets)}
        self._unions: dict[tuple[int, int], int] = {}
        self._labels: dict[Node, Any] = {}
        self._ends = self._gate_labels(matching)
        self._rules = _rules()
        for node in trace.graph.nodes:
            self._labels[node] = self._label(node)
        self._last_sets: dict[tuple[Node, int], list[GateSet]] = {}

    def channels(self, node: Node, axis: int) -> list[GateSet]:
        """The gate set of each channel of a value.

        Args:
            node: A node with one tensor value.
            axis: Its channel axis.
        """
        key = (node, axis)
        if key not in self._last_sets:
            shape = aten.value_of(node).shape
            labels = self.reduce(self._labels[node], [d for d in range(len(shape)) if d != axis % len(shape)])
            self._last_sets[key] = [self._sets[i] for i in labels.flatten().expand(shape[axis]).tolist()]
        return self._last_sets[key]

    def labels(self, node: Node) -> Tensor:
        """Labels of an input value, dense for a number or an unknown value."""
        found = self._labels.get(node)
        return found if isinstance(found, Tensor) else torch.tensor(_DENSE, dtype=torch.int32)

    def union(self, a: Tensor, b: Tensor) -> Tensor:
        """Labels of a sum: zero where both operands are."""
        return self._combine(a, b, self._unite)

    def sparser(self, a: Tensor, b: Tensor) -> Tensor:
        """Labels of a product: zero where either operand is; one reason is kept, the one with fewer gates."""
        return self._combine(a, b, lambda i, j: i if self._size(i) <= self._size(j) else j)

    def reduce(self, labels: Tensor, dims: list[int]) -> Tensor:
        """Labels of a reduction: zero where everything reduced is zero. Reduced dimensions keep size one."""
        for dim in dims:
            if labels.dim() and labels.shape[dim] > 1:
                labels = self._reduce_one(labels, dim)
        return labels

    def _label(self, node: Node) -> Any:
        value = node.meta.get("val")
        if node.op == "output" or not isinstance(value, (Tensor, list, tuple)):
            return None
        if node in self._trace.hazards:
            return self._dense()
        rule = self._rules.get(aten.name_of(node))
        labels = self._dense() if rule is None else rule(self, node)
        end = self._ends.get(node)
        return labels if end is None else self.sparser(end, labels) if isinstance(labels, Tensor) else end

    def _dense(self) -> Tensor:
        return torch.tensor(_DENSE, dtype=torch.int32)

    def _gate_labels(self, matching: Matching) -> dict[Node, Tensor]:
        columns = gate_columns(matching)
        found: dict[Node, Tensor] = {}
        for gate in matching.plan.gates:
            ids = torch.tensor([self._intern(frozenset({c})) for c in columns[gate.name]], dtype=torch.int32)
            for end in gate.ends:
                node = matching.ends[end]
                n_dims = aten.value_of(node).dim()
                found[node] = ids.view([-1 if d == end.axis % n_dims else 1 for d in range(n_dims)])
        return found

    def _intern(self, gates: GateSet) -> int:
        if gates not in self._ids:
            self._ids[gates] = len(self._sets)
            self._sets.append(gates)
        return self._ids[gates]

    def _size(self, label: int) -> float:
        gates = self._sets[label]
        return float("inf") if gates is None else len(gates)

    def _unite(self, i: int, j: int) -> int:
        a, b = self._sets[i], self._sets[j]
        return _DENSE if a is None or b is None else self._intern(a | b)

    def _combine(self, a: Tensor, b: Tensor, pair: Callable[[int, int], int]) -> Tensor:
        """Apply a function of two labels element-wise, once per pair of labels that occurs."""
        a, b = torch.broadcast_tensors(a.long(), b.long())
        pairs, inverse = torch.unique((a << 32) | b, return_inverse=True)
        results = [pair(p >> 32, p & 0xFFFFFFFF) for p in pairs.tolist()]
        return torch.tensor(results, dtype=torch.int32)[inverse]

    def _reduce_one(self, labels: Tensor, dim: int) -> Tensor:
        first = labels.narrow(dim, 0, 1)
        if bool((labels == first).all()):
            return first
        while labels.shape[dim] > 1:  # unite halves: log2(size) passes instead of one per position
            half = labels.shape[dim] // 2
            rest = labels.narrow(dim, 2 * half, labels.shape[dim] - 2 * half)
            labels = self.union(labels.narrow(dim, 0, half), labels.narrow(dim, half, half))
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
    rules.update({"add": _add, "sub": _add, "maximum": _add, "minimum": _add, "mul": _multiply, "div": _divide})
    rules["getitem"] = lambda flow, node: _item(flow, node)
    return rules


def _keep(flow: Flow, node: Node) -> Tensor:
    return flow.labels(node.all_input_nodes[0])


def _through_activation(flow: Flow, node: Node) -> Tensor:
    return _keep(flow, node) if aten.is_zero_preserving(node) else torch.tensor(_DENSE, dtype=torch.int32)


def _through_pooling(flow: Flow, node: Node) -> Any:
    labels = _keep(flow, node)
    n_dims = aten.value_of(node.all_input_nodes[0]).dim()
    pooled = flow.reduce(labels, [n_dims - 2, n_dims - 1]) if labels.dim() == n_dims else labels
    return pooled if isinstance(aten.value_of(node), Tensor) else [pooled, flow._dense()]  # a maximum with its indices


def _through_reduction(flow: Flow, node: Node) -> Tensor:
    source = node.all_input_nodes[0]
    labels, n_dims = flow.labels(source), aten.value_of(source).dim()
    dims = aten.argument(node, "dim")
    dims = list(range(n_dims)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
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
        return torch.tensor(_DENSE, dtype=torch.int32)
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
        return labels if is_zero or aten.argument(node, "mode") != "constant" else flow._dense()
    if not is_zero:
        return flow._dense()
    labels = labels.expand(aten.value_of(source).shape)
    return _compact(torch.nn.functional.pad(labels, pad, value=_ZERO))


def _add(flow: Flow, node: Node) -> Tensor:
    a, b = node.args[:2]
    if not isinstance(a, Node) or not isinstance(b, Node):
        number = b if isinstance(a, Node) else a
        kept = a if isinstance(a, Node) else b
        return flow.labels(kept) if number == 0 and isinstance(kept, Node) else flow._dense()
    return flow.union(flow.labels(a), flow.labels(b))


def _multiply(flow: Flow, node: Node) -> Tensor:
    a, b = (flow.labels(arg) if isinstance(arg, Node) else flow._dense() for arg in node.args[:2])
    return flow.sparser(a, b)


def _divide(flow: Flow, node: Node) -> Tensor:
    return flow.labels(node.args[0]) if isinstance(node.args[0], Node) else flow._dense()


def _item(flow: Flow, node: Node) -> Any:
    source, index = node.args
    labels = flow._labels.get(source)  # type: ignore[arg-type]  # getitem reads a node
    return labels[index] if isinstance(labels, list) and isinstance(index, int) else flow._dense()
