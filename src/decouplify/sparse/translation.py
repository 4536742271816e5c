"""The walk along the graph of a sparse form: what rules do not take, torch runs, and values cross over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from decouplify import aten
from decouplify.sparse.activations import act_of_node
from decouplify.sparse.drafts import Draft, Map, ReadGate, SetGate, Step, TorchCall, new_map
from decouplify.sparse.native import StepKind
from decouplify.sparse.ops import Exists, FoldedBias

__all__ = ["ALWAYS_OPEN", "Rule", "Translation", "only_user"]

#: In place of the index of a gate.
ALWAYS_OPEN = -1

#: What the engine finds out by itself: which channels exist, and what absent ones add to a bias.
_ONLY_FOR_TORCH = (Exists, FoldedBias)


class Translation:
    """One graph on its way to the engine.

    Args:
        module: See ``translate``.
        rules: By class of a module or name of an operator, what emits its steps.
        fuse: See ``translate``.
    """

    def __init__(self, module: GraphModule, rules: Mapping[Any, Rule], fuse: bool) -> None:
        self.module, self.rules, self.fuse = module, rules, fuse
        self.draft = Draft()
        self.maps: dict[Node, Map] = {}
        self.gates: dict[Node, int] = {}
        self.in_torch: set[Node] = set()
        self.done: set[Node] = set()  # nodes that became part of an earlier step
        self.pads: dict[Node, tuple[int, int]] = {}  # rows and columns of zeros that the next convolution adds
        self.concatenated: dict[Map, list[Map]] = {}  # the parts of each concatenation
        self.modules = dict(module.named_modules())

    def run(self) -> Draft:
        """Translate all nodes; once."""
        for node in self.module.graph.nodes:
            if node in self.done or self.operator(node) in _ONLY_FOR_TORCH:
                continue
            if node.op in ("placeholder", "get_attr"):
                self.in_torch.add(node)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self._to_torch(source)
            else:
                self._translate(node)
        return self.draft

    def operator(self, node: Node) -> Any:
        """What a node runs: a class for modules, a name for functions."""
        if node.op == "call_module":
            return type(self.modules[str(node.target)])
        return aten.name_of(node)

    def _translate(self, node: Node) -> None:
        rule = self.rules.get(self.operator(node))
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
        elif self.gates.get(node, ALWAYS_OPEN) != ALWAYS_OPEN:
            self.draft.items.append(ReadGate(self.gates[node], node))
        else:
            assert node in self.gates or self.operator(node) in _ONLY_FOR_TORCH
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
            loaded = new_map(shape)
            slot = self.draft.n_slots
            self.draft.loads[slot] = node
            self.draft.items.append(Step(StepKind.LOAD, node.name, node, output=loaded, slot=slot))
            self.maps[node] = loaded
        return self.maps[node]

    def gate_of(self, node: Any) -> int:
        """The index of a gate, given to the engine if torch decides it; -1 where everything is open."""
        if node is None:
            return ALWAYS_OPEN
        if node not in self.gates:
            self.add_gate(node, int(self.controller_of(node).fc2.out_features))
            self.draft.items.append(SetGate(self.gates[node], node))
        return self.gates[node]

    def add_gate(self, node: Node, n_filters: int) -> None:
        """Give a gate of a controller its index."""
        self.gates[node] = len(self.draft.gates)
        self.draft.gates.append((node, n_filters))

    def controller_of(self, node: Node) -> Any:
        """The controller that a node runs."""
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

    def fuse_activation(self, step: Step, last: Node) -> None:
        """Let a step apply the activation that follows the last of its nodes, if one does."""
        following = only_user(last)
        act = None if following is None else act_of_node(following)
        if self.fuse and act is not None and following is not None:
            step.act = act
            self.absorb(step, following)

    def absorb(self, step: Step, node: Node) -> None:
        """Make a node part of an earlier step, which now completes that node's value."""
        assert step.output is not None
        step.node, step.output.bounds = node, step.act.bounds
        self.maps[node] = step.output
        self.done.add(node)


Rule = Callable[[Translation, Node], Map | None]
"""Emits steps for a node and returns the map that stands for its value; None leaves the node to torch."""


def only_user(node: Node) -> Node | None:
    """The one node that reads a node's value; None if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _shape_of_map(value: Any) -> tuple[int, ...] | None:
    """The shape of a value that the engine could hold, None for any other."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() not in (2, 4):
        return None
    return tuple(value.shape) if value.shape[0] == 1 and value.numel() > 0 else None
