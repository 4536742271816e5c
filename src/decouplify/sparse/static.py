"""What never changes need not be decided: filters that no recorded path opens, gates that every path leaves open.

Removing them is an assumption about the images to come. For an image whose path is one of the recorded ones the result
is the same; an image that would open a removed filter is computed without it, and one that would close a filter of a
dropped controller is computed with it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from decouplify.controller import ArchitectureController
from decouplify.decoupling import Decoupling, module_key
from decouplify.flow import Flow, gate_columns
from decouplify.narrow import ChannelClasses, narrow
from decouplify.paths import PathSet
from decouplify.plan import Plan
from decouplify.sites import Matching, match
from decouplify.sparse.lower import Lowered, lower
from decouplify.sparse.ops import Exists, Mask
from decouplify.trace import Trace

__all__ = ["Assumptions", "Habits", "lower_statically"]

_LEAST = 2  # filters left in every layer; with one, a depthwise convolution could not be told from a full one


@dataclass(frozen=True)
class Habits:
    """What recorded paths have in common.

    Attributes:
        n_images: How many there are.
        silent: Filters that none opens, boolean, shape (K,), by gate.
        energetic: Filters that all open, boolean, shape (K,), by gate.
        typical: The gates of the image that opens the median number of filters, zeros and ones, shape (K,), by gate.
        left_open: Gates that are not decided although they close filters, because that takes longer than it saves.
    """

    n_images: int
    silent: Mapping[str, Tensor]
    energetic: Mapping[str, Tensor]
    typical: Mapping[str, Tensor]
    left_open: frozenset[str] = frozenset()

    @classmethod
    def of(cls, paths: PathSet, plan: Plan) -> Habits:
        """The habits of the paths of a model.

        Raises:
            ValueError: If there are no paths, or they are not of a model with this plan.
        """
        wanted = [(gate.name, gate.n_filters) for gate in plan.gates]
        given = [(layer.name, layer.n_filters) for layer in paths.layers]
        if given != wanted:
            differing = next((b for a, b in zip(given, wanted, strict=False) if a != b), (wanted or given)[-1])
            raise ValueError(
                f"sparsify: these paths have {len(given)} layers, the model has {len(wanted)} gates, and they differ "
                f"first at {differing[0]!r}; record the paths with this model: paths=decouplify.record(model, loader)"
            )
        if len(paths) == 0:
            raise ValueError("sparsify: the path set has no images; without any, every filter would count as silent")
        counts = torch.from_numpy(paths.counts())
        by_gate = dict(zip((name for name, _ in wanted), counts.split([k for _, k in wanted]), strict=True))
        silent = {name: n == 0 for name, n in by_gate.items()}
        energetic = {name: n == len(paths) for name, n in by_gate.items()}
        return cls(len(paths), silent, energetic, _typical(paths, wanted))


def _typical(paths: PathSet, gates: list[tuple[str, int]]) -> dict[str, Tensor]:
    n_open = np.concatenate([bits.sum(1) for _, bits in paths.chunks()])
    row = int(n_open.argsort(kind="stable")[len(n_open) // 2])
    z = torch.from_numpy(paths.unpack(rows=[row])[0]).float()
    return dict(zip((name for name, _ in gates), z.split([k for _, k in gates]), strict=True))


@dataclass(frozen=True)
class Assumptions:
    """What a sparse form leaves out, and how its values look from outside, where nothing is left out.

    Attributes:
        n_images: Images whose paths are assumed to be typical.
        n_filters: K of each gate.
        kept: Filters that are still there, int64, by gate.
        dropped: Gates whose controller is gone; their filters that are still there are always open.
        axes: Channel axis and gate of each gated value, by its node.
        left_open: Those of the dropped ones that would close filters of recorded paths.
    """

    n_images: int
    n_filters: Mapping[str, int]
    kept: Mapping[str, Tensor]
    dropped: frozenset[str]
    axes: Mapping[str, tuple[int, str]]
    left_open: frozenset[str] = frozenset()

    def __str__(self) -> str:
        n_removed = sum(self.n_filters[name] - len(kept) for name, kept in self.kept.items())
        return (
            f"assumes paths as of {self.n_images} images: {n_removed} of {sum(self.n_filters.values())} filters "
            f"removed, {len(self.dropped)} of {len(self.kept)} controllers dropped"
        )

    def opened(self) -> dict[str, Tensor]:
        """Values for the gates that are left open, zeros and ones, shape (K,) each: what the sparse form computes."""
        return {name: self._full(torch.ones(len(self.kept[name])), 0, name) for name in self.left_open}

    def narrow(self, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values for the gates that are still decided, out of values for all filters of all gates."""
        return {name: z[self.kept[name]] for name, z in gates.items() if name not in self.dropped}

    def widen(self, nodes: Mapping[str, str], observer: Callable[[str, Tensor], None]) -> Callable[[str, Tensor], None]:
        """An observer that shows another one gates and gated values with all of their filters.

        Args:
            nodes: Node of each gate's values.
            observer: Is told node and value. It is told at once of the gates that nobody decides.
        """
        gates = {node: name for name, node in nodes.items()}
        for name in self.dropped:
            observer(nodes[name], self._full(torch.ones(len(self.kept[name])), 0, name))

        def observe(node: str, value: Tensor) -> None:
            if node in gates:
                value = self._full(value, 0, gates[node])
            elif node in self.axes:
                value = self._full(value, *self.axes[node])
            observer(node, value)

        return observe

    def _full(self, value: Tensor, axis: int, gate: str) -> Tensor:
        shape = list(value.shape)
        shape[axis] = self.n_filters[gate]
        return value.new_zeros(shape).index_copy(axis, self.kept[gate], value)


def lower_statically(
    trace: Trace, matching: Matching, decoupling: Decoupling, habits: Habits
) -> tuple[Lowered, Assumptions]:
    """``lower`` without the filters and controllers that the habits make superfluous.

    Args:
        trace: The run, which is changed.
        matching: Its sites.
        decoupling: The controllers.
        habits: What to rely on.
    """
    plan, classes = matching.plan, ChannelClasses(trace)
    removed = _removable(classes, matching, habits)
    filters = {gate.name: _kept(classes, matching.convs[gate.name], removed, gate.n_filters) for gate in plan.gates}
    inputs = {gate.name: _kept(classes, matching.inputs[gate.name], removed, gate.n_inputs) for gate in plan.gates}
    narrower = narrow(classes, removed)
    lowered = lower(
        narrower, match(narrower, plan.options, plan.model), _narrow_controllers(decoupling, inputs, filters)
    )
    always = {name for name, kept in filters.items() if bool(habits.energetic[name][kept].all())}
    dropped = habits.left_open | always
    lowered = _drop_controllers(lowered, {name: len(kept) for name, kept in filters.items()}, dropped)
    axes = {lowered.ends[end]: (end.axis, gate.name) for gate in plan.gates for end in gate.ends}
    n_filters = {gate.name: gate.n_filters for gate in plan.gates}
    return lowered, Assumptions(habits.n_images, n_filters, filters, dropped, axes, habits.left_open - always)


def _removable(classes: ChannelClasses, matching: Matching, habits: Habits) -> set[int]:
    """Channel classes that are zero, while the silent filters are closed, wherever anything reads them."""
    columns = gate_columns(matching)
    silent = {columns[name][k] for name, mask in habits.silent.items() for k in mask.nonzero().flatten().tolist()}
    flow = Flow(classes.trace, matching)
    read: set[int] = set()
    for node in _readings(classes, matching):
        channels = classes.channels[node]
        gate_sets = flow.zeros(node, channels.axis)
        alive = (c for c, gates in zip(channels.ids, gate_sets, strict=True) if gates is None or not gates <= silent)
        read.update(classes.find(c) for c in alive)
    written = {classes.find(c) for layer in classes.layers for c in layer.outputs.ids}
    removed = {c for c in written - read if not classes.is_fixed(c)}
    for layer in classes.layers:  # no layer disappears
        present = [classes.find(c) for c in layer.outputs.ids]
        n_missing = _LEAST - sum(c not in removed for c in present)
        removed -= set([c for c in present if c in removed][: max(n_missing, 0)])
    return removed


def _readings(classes: ChannelClasses, matching: Matching) -> Iterator[Node]:
    """The values that a layer or a controller reads."""
    for layer in classes.layers:
        if layer.inputs is not None:
            yield layer.node.args[0]  # type: ignore[misc]  # a node
    yield from (node for node in matching.inputs.values() if node in classes.channels)


def _kept(classes: ChannelClasses, node: Node, removed: set[int], n: int) -> Tensor:
    channels = classes.channels.get(node)
    return torch.arange(n) if channels is None else torch.tensor(classes.kept(channels, removed))


def _narrow_controllers(
    decoupling: Decoupling, inputs: Mapping[str, Tensor], filters: Mapping[str, Tensor]
) -> Decoupling:
    narrower = copy.deepcopy(decoupling)
    for name, kept in filters.items():
        controller = narrower.controllers[module_key(name)]
        assert isinstance(controller, ArchitectureController)
        hidden = torch.arange(controller.fc1.out_features)
        controller.fc1 = _part_of(controller.fc1, hidden, inputs[name])
        controller.fc2 = _part_of(controller.fc2, kept, hidden)
        if controller.norm is not None:
            assert controller.norm.running_mean is not None and controller.norm.running_var is not None
            controller.norm.running_mean = controller.norm.running_mean[inputs[name]]
            controller.norm.running_var = controller.norm.running_var[inputs[name]]
    return narrower


def _part_of(layer: nn.Linear, outputs: Tensor, inputs: Tensor) -> nn.Linear:
    part = nn.Linear(len(inputs), len(outputs), device=layer.weight.device, dtype=layer.weight.dtype)
    part.load_state_dict({"weight": layer.weight[outputs][:, inputs], "bias": layer.bias[outputs]})
    return part


def _drop_controllers(lowered: Lowered, n_filters: Mapping[str, int], dropped: frozenset[str]) -> Lowered:
    """The graph without the controllers of gates that are always open."""
    graph, module = lowered.module.graph, lowered.module
    nodes = {node.name: node for node in graph.nodes}
    name_of = {nodes[node]: name for name, node in lowered.gates.items()}
    ends = dict(lowered.ends)
    for node in [nodes[lowered.gates[name]] for name in dropped]:
        for user in list(node.users):
            operator = module.get_submodule(str(user.target))
            if isinstance(operator, Mask):
                user.replace_all_uses_with(user.args[0])
                ends = {end: user.args[0].name if at == user.name else at for end, at in ends.items()}
                graph.erase_node(user)
            elif isinstance(operator, Exists):
                _always(module, user, node, name_of, n_filters)
            else:
                user.args = (user.args[0], None, *user.args[2:])
        graph.erase_node(node)
    module.delete_all_unused_submodules()
    graph.lint()
    module.recompile()
    # Named all the same, so that whoever asks for a gate's values learns that it is open.
    gates = {name: f"{node} (always open)" if name in dropped else node for name, node in lowered.gates.items()}
    return replace(lowered, gates=gates, ends=ends)


def _always(
    module: GraphModule, exists: Node, gate: Node, name_of: Mapping[Node, str], n_filters: Mapping[str, int]
) -> None:
    """Count channels of a gate as existing without asking it."""
    operator = module.get_submodule(str(exists.target))
    assert isinstance(operator, Exists)
    sizes: list[Any] = [n_filters[name_of[node]] for node in exists.args]  # type: ignore[index]  # nodes
    at = exists.args.index(gate)
    start, size, total = sum(sizes[:at]), sizes[at], sum(sizes)
    columns = operator.columns
    of_gate = (columns >= start) & (columns < start + size)
    columns = torch.where(of_gate, total + 1, columns)  # the position that is always open
    operator.columns = torch.where(columns >= start + size, columns - size, columns)
    exists.args = tuple(node for node in exists.args if node is not gate)
    if not exists.args:  # every channel exists
        for reader in list(exists.users):
            reader.args = (*reader.args[:2], None)
        exists.graph.erase_node(exists)
