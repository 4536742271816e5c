"""Rewrite the recorded run of a wrapped model into the graph of its sparse form.

Convolution, norm and activation up to the gate become one operator with the norm folded into the weights; each gets the
gates of its filters and the existence of its channels; everything else stays as it was recorded.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from decouplify import aten
from decouplify.chains import chain_of
from decouplify.costs import CostModel, index_matrix
from decouplify.decoupling import Decoupling, module_key
from decouplify.flow import gate_columns
from decouplify.plan import End
from decouplify.sites import Matching
from decouplify.sparse.constants import bias_products, constants_of
from decouplify.sparse.ops import Controller, Exists, FoldedBias, Mask, SparseConv2d, SparseLinear
from decouplify.trace import Trace

__all__ = ["Lowered", "lower"]


@dataclass(frozen=True)
class Lowered:
    """A sparse form for one image size.

    Attributes:
        module: Runs one image, batch of one.
        gates: Node of each gate's values, by gate name.
        ends: Node of each gated value.
        n_recorded_macs: Multiply-accumulates of what runs as recorded (1-D, 3-D and transposed convolutions).
    """

    module: GraphModule
    gates: dict[str, str]
    ends: dict[End, str]
    n_recorded_macs: int


@dataclass(frozen=True)
class _Fused:
    """A run of recorded nodes that becomes one operator."""

    conv: Node
    norm: Node | None
    activation: Node | None

    @property
    def last(self) -> Node:
        return self.activation or self.norm or self.conv


@torch.no_grad()
def lower(trace: Trace, matching: Matching, decoupling: Decoupling) -> Lowered:
    """The sparse form of a recorded run.

    Args:
        trace: The run of the unwrapped model in eval mode. Its tensors are kept, so they must not change afterwards;
            where a norm can be folded into a weight, that is done in place, and the norm becomes one that only adds.
        matching: Its sites; gate names must be those of ``decoupling``.
        decoupling: The controllers, which are copied.
    """
    return _Lowering(trace, matching, decoupling).run()


class _Lowering:
    def __init__(self, trace: Trace, matching: Matching, decoupling: Decoupling) -> None:
        self.trace, self.matching, self.decoupling = trace, matching, decoupling
        self.costs = CostModel.of(trace, matching)
        self.columns = gate_columns(matching)
        self.gate_of_column = [name for name, columns in self.columns.items() for _ in columns]
        self.reader_of = {reader.node: i for i, reader in enumerate(self.costs.readers)}
        self.graph = Graph()
        self.root = nn.Module()
        self.new: dict[Node, Any] = {}
        self.gates: dict[str, Node] = {}
        self.static = _evaluate_static(trace)
        self.n_names = Counter(tensor.data_ptr() for tensor in trace.tensors.values())
        self.constants = constants_of(trace, matching, self.costs.readers, self.static)
        self.end_of = {node: end for end, node in matching.ends.items()}
        self.gate_of_end = {end: gate.name for gate in matching.plan.gates for end in gate.ends}
        self.site_of = {node: name for name, node in matching.convs.items()}
        self.n_recorded_macs = 0
        self.gate_of_site = {site.name: site.gate for site in matching.plan.sites}

    def run(self) -> Lowered:
        for node in self.trace.graph.nodes:
            if node in self.new or node in self.static:
                continue
            if node.op == "placeholder":
                self.new[node] = self.graph.placeholder(node.name)
                self.new[node].meta["val"] = node.meta["val"]
            elif node.op == "output":
                self.graph.output(self._map(node.args[0]))
            else:
                self._lower(node)
        self.graph.lint()
        module = GraphModule(self.root, self.graph, "SparseForm").eval()
        ends = {end: self.new[node].name for end, node in self.matching.ends.items()}
        gates = {name: node.name for name, node in self.gates.items()}
        return Lowered(module, gates, ends, self.n_recorded_macs)

    def _lower(self, node: Node) -> None:
        reader = self.reader_of.get(node.name)
        fused = self._fuse(node) if reader is not None and self._is_understood(node) else None
        if fused is not None and reader is not None:
            result = self._emit_reader(fused, reader)
        else:
            result = self.graph.node_copy(node, self._lookup)
            self.n_recorded_macs += 0 if reader is None else self.costs.readers[reader].n_macs
        last = node if fused is None else fused.last
        end = self.end_of.get(last)
        if end is not None and (fused is None or self._gate_of(fused) != self.gate_of_end[end]):
            result.meta["val"] = last.meta["val"]
            result = self._call("mask", Mask(end.axis), result, self.gates[self.gate_of_end[end]])
        # Translation to other executors needs shapes; the recorded values are fake tensors, which hold nothing else.
        result.meta["val"] = last.meta["val"]
        for member in (node,) if fused is None else (fused.conv, fused.norm, fused.activation):
            if member is not None:
                self.new[member] = result

    def _is_understood(self, node: Node) -> bool:
        name = aten.name_of(node)
        if node.args[1] not in self.static:
            return False  # the image decides about the weight
        return name in aten.LINEAR or (name in aten.CONV2D and not aten.is_transposed(node))

    def _gate_of(self, fused: _Fused) -> str | None:
        """The gate that leaves exact zeros in the result of a fused operator."""
        site = self.site_of.get(fused.conv)
        if site is None:
            return None
        skips = next(s.skips for s in self.matching.plan.sites if s.name == site)
        return self.gate_of_site[site] if skips else None

    def _fuse(self, conv: Node) -> _Fused:
        """As much of conv, norm, activation as follows directly, and not beyond the gate."""
        found: dict[str, Node] = {}
        for link in chain_of(self.trace, conv):
            if link.node is not conv:
                follows = link.node.all_input_nodes[0] is (found.get("norm") or conv)
                if not follows or not self._can_fuse(link.kind, link.node):
                    break
                found[link.kind] = link.node
            if link.node in self.end_of:
                break
        return _Fused(conv, found.get("norm"), found.get("activation"))

    @staticmethod
    def _can_fuse(kind: str, node: Node) -> bool:
        """A batch norm with running statistics, or an activation without parameters of its own."""
        if kind == "activation":
            return len(node.all_input_nodes) == 1
        return aten.name_of(node) == "batch_norm" and aten.has_fixed_statistics(node)

    def _emit_reader(self, fused: _Fused, reader: int) -> Node:
        conv = fused.conv
        weight, bias = self._folded(fused)
        activation = None if fused.activation is None else _as_function(fused.activation)
        if aten.name_of(conv) in aten.LINEAR:
            operator: nn.Module = SparseLinear(weight, bias, activation)
        else:
            stride, padding, dilation, groups = aten.conv_arguments(conv)
            operator = SparseConv2d(weight, bias, stride, padding, dilation, groups, activation)
        self._emit_controller(conv)
        name = self._gate_of(fused)
        gate = None if name is None else self.gates[name]
        exists = self._emit_exists(reader)
        folded = self._emit_bias(reader, operator, exists, gate)
        arguments = (self.new[conv.args[0]], gate, exists, *folded)  # type: ignore[index]  # a node
        return self._call(self.trace.owner_of(conv) or conv.name, operator, *arguments)

    def _emit_controller(self, conv: Node) -> None:
        """Decide the gate right before its first convolution runs."""
        gate = self.gate_of_site.get(self.site_of.get(conv, ""))
        if gate is None or gate in self.gates:
            return
        controller = self.decoupling.controllers[module_key(gate)]
        copied = Controller(_frozen_copy(controller))
        self.gates[gate] = self._call("gate", copied, self.new[self.matching.inputs[gate]])

    def _emit_bias(self, reader: int, operator: Any, exists: Node | None, gate: Node | None) -> list[Node]:
        """The bias of this image, where absent channels may hold constants; nothing if they are zeros."""
        constants = self.constants.get(self.costs.readers[reader].node)
        if constants is None:
            return []
        is_constant = torch.tensor([s is not None for s in self.costs.readers[reader].constant])
        products = bias_products(operator.weight, constants * is_constant, self.costs.readers[reader].groups)
        folded = FoldedBias(operator.bias, products, is_constant)
        return [self._call("bias", folded, exists, gate)]

    def _emit_exists(self, reader: int) -> Node | None:
        sets = self.costs.readers[reader].read
        if all(s is None for s in sets):
            return None
        used = {column for s in sets if s is not None for column in s}
        deciding = {self.gate_of_column[column] for column in used}
        names = [name for name in self.columns if name in deciding]
        columns = index_matrix(sets, [column for name in names for column in self.columns[name]])
        return self._call("exists", Exists(columns), *(self.gates[name] for name in names))

    def _folded(self, fused: _Fused) -> tuple[Tensor, Tensor]:
        """Weight and bias with the batch norm folded in; float64 in between keeps the last bit."""
        weight = self.static[fused.conv.args[1]]  # type: ignore[index]  # a node
        bias_node = aten.argument(fused.conv, "bias")
        bias = weight.new_zeros(len(weight)) if bias_node is None else self.static[bias_node]
        if fused.norm is None:
            return weight.detach(), bias.detach()
        scale, shift = self._scale_and_shift(fused.norm)
        folded = (weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
        folded_bias = (bias.double() * scale + shift).to(weight.dtype)
        if not torch.equal(folded, weight):  # a norm that was folded before leaves the weight as it is
            self._keep_folded(fused, folded, folded_bias)
        # The weight need not be there twice.
        return (weight.detach() if torch.equal(folded, weight) else folded), folded_bias

    def _keep_folded(self, fused: _Fused, weight: Tensor, bias: Tensor) -> None:
        """Put the folded weight in place of the recorded one, and a norm that only adds the folded bias after it."""
        conv, norm = fused.conv, fused.norm
        assert norm is not None
        own_weight, mean, var = (
            self._own_tensor(node)
            for node in (conv.args[1], aten.argument(norm, "running_mean"), aten.argument(norm, "running_var"))
        )
        if own_weight is None or mean is None or var is None or own_weight.dtype != torch.float32:
            return
        neutral = [(aten.argument(norm, "weight"), 1.0), (aten.argument(norm, "bias"), 0.0)]
        neutral.append((aten.argument(conv, "bias"), 0.0))
        found = [(self._own_tensor(node), value) for node, value in neutral if node is not None]
        if any(tensor is None for tensor, _ in found):
            return
        for tensor, value in found:
            assert tensor is not None
            tensor.fill_(value)
        own_weight.copy_(weight)
        mean.copy_(-bias)
        var.fill_(1.0 - float(aten.argument(norm, "eps")))

    def _own_tensor(self, node: Any) -> Tensor | None:
        """The recorded tensor behind a node, if nothing else in the graph reads it under this or another name."""
        if not isinstance(node, Node) or node.op != "get_attr" or len(node.users) != 1:
            return None
        tensor = self.trace.tensors[str(node.target)]
        return tensor if self.n_names[tensor.data_ptr()] == 1 else None

    def _scale_and_shift(self, norm: Node) -> tuple[Tensor, Tensor]:
        mean, var, gamma, beta = (
            None if (n := aten.argument(norm, name)) is None else self.static[n].double()
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        assert mean is not None and var is not None
        scale = torch.rsqrt(var + float(aten.argument(norm, "eps")))
        scale = scale if gamma is None else scale * gamma
        return scale, -mean * scale if beta is None else beta - mean * scale

    def _map(self, value: Any) -> Any:
        return torch.fx.map_arg(value, self._lookup)

    def _lookup(self, node: Node) -> Any:
        if node not in self.new:
            self.new[node] = self._constant(node)
        return self.new[node]

    def _constant(self, node: Node) -> Any:
        """A tensor that does not depend on the image, computed once."""
        value = self.static[node]
        if not isinstance(value, Tensor):
            return value
        name = self._free_name(node.name)
        self.root.register_buffer(name, value.detach().clone())
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            return self.graph.create_node("get_attr", name)

    def _call(self, name: str, module: nn.Module, *args: Any) -> Node:
        key = self._free_name(module_key(name))
        self.root.add_module(key, module)
        return self.graph.call_module(key, args)

    def _free_name(self, name: str) -> str:
        candidate, i = name, 0
        while hasattr(self.root, candidate):
            i += 1
            candidate = f"{name}_{i}"
        return candidate


def _evaluate_static(trace: Trace) -> dict[Node, Any]:
    """The value of every node that does not depend on the image."""
    values: dict[Node, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for node in trace.graph.nodes:
            if node not in trace.static:
                continue
            if node.op == "get_attr":
                values[node] = trace.tensors[str(node.target)]
            else:
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return values


def _as_function(node: Node) -> Callable[[Tensor], Tensor]:
    """An activation node as a function of its input."""
    return _Activation(node.target, tuple(node.args[1:]), dict(node.kwargs))


@dataclass(frozen=True)
class _Activation:
    """``lambda y: target(y, *args, **kwargs)``, which can be copied and printed."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, y: Tensor) -> Tensor:
        result: Tensor = self.target(y, *self.args, **self.kwargs)
        return result


def _frozen_copy(controller: nn.Module) -> Any:
    copied = copy.deepcopy(controller).cpu().eval()
    return copied.requires_grad_(False)
