"""Find the sites of a recorded run by one rule.

From a convolution's output follow single consumers through at most one norm (and permutes around it), at most one
activation and any constant scales; stop at anything else. The last value on that way which a hook can replace is where
the gate sits. What is left alone is excluded by structure, never by class name, and carries its reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import Node

from decouplify import aten
from decouplify.chains import Link, chain_of, ends_of, extend
from decouplify.errors import PlanError
from decouplify.plan import End, Gate, Options, Plan, Refusal, Site
from decouplify.roles import Roles, why_not
from decouplify.trace import Trace

__all__ = ["Matching", "match", "n_macs"]


@dataclass(frozen=True)
class Matching:
    """A plan together with the nodes of the run it was found in.

    Attributes:
        plan: The plan.
        convs: Node of each site's convolution, by site name.
        ends: Node of each gated value.
        inputs: Node whose pooled value each gate's controller reads, by gate name.
    """

    plan: Plan
    convs: dict[str, Node]
    ends: dict[End, Node]
    inputs: dict[str, Node]


@dataclass(frozen=True)
class _Candidate:
    conv: Node
    name: str
    x: Node
    chain: tuple[Link, ...]


def match(trace: Trace, options: Options, model_name: str = "model") -> Matching:
    """The sites of a recorded run, their gates, and the convolutions left alone.

    Args:
        trace: The recorded run.
        options: What to gate.
        model_name: How the plan calls the model.

    Returns:
        The plan and its nodes. The plan may have no gates; whether that is an error is for the caller to say.

    Raises:
        PlanError: If a name or glob in ``only`` or ``exclude`` matches no convolution.
    """
    convs = [node for node in trace.graph.nodes if _is_conv(node, options)]
    _check_globs(options, [_conv_name(trace, conv) for conv in convs])
    roles = Roles(trace)
    refused: dict[Node, str] = {}
    candidates: list[_Candidate] = []
    for conv in convs:
        reason = why_not(trace, roles, conv, convs, options)
        if reason is None:
            candidates.append(_follow(trace, conv))
        else:
            refused[conv] = reason
    if options.skip_last and candidates:
        refused[candidates.pop().conv] = "last convolution (skip_last)"
    return _Assembly(trace, options, model_name).build(convs, candidates, refused)


def n_macs(node: Node) -> int:
    """Multiply-accumulates of a convolution or linear node for the recorded image."""
    data, weight = node.args[:2]
    assert isinstance(data, Node) and isinstance(weight, Node)
    # Each element that is computed, or for a transposed convolution each that is read, meets one slice of the weight.
    elements = aten.value_of(data if aten.is_transposed(node) else node)
    return int(elements.numel() * aten.value_of(weight)[0].numel())


def _is_conv(node: Node, options: Options) -> bool:
    name = aten.name_of(node)
    if name in aten.CONV2D | aten.OTHER_CONVS:
        return True
    return options.linear_as_conv and name in aten.LINEAR and aten.value_of(node).dim() == 4


def _conv_name(trace: Trace, conv: Node) -> str:
    """The convolving module's name; a second convolution of the same module is told apart by its node."""
    return trace.owner_of(conv) or f"<{conv.name}>"


def _check_globs(options: Options, names: list[str]) -> None:
    for option in ("only", "exclude"):
        for pattern in getattr(options, option):
            if not fnmatch.filter(names, pattern):
                known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise PlanError(f"{option}={pattern!r} matches no convolution of the model; it has: {known or 'none'}")


def _follow(trace: Trace, conv: Node) -> _Candidate:
    x = trace.call_of(conv).inputs[0]
    assert x is not None
    return _Candidate(conv, trace.owner_of(conv), x, chain_of(trace, conv))


class _Assembly:
    """Joins candidates into gates."""

    def __init__(self, trace: Trace, options: Options, model_name: str) -> None:
        self.trace, self.options, self.model_name = trace, options, model_name
        self.sites: list[Site] = []
        self.gates: dict[str, Gate] = {}
        self.end_nodes: dict[End, Node] = {}
        self.inputs: dict[str, Node] = {}
        self._gate_of_value: dict[Node, str] = {}

    def build(self, convs: list[Node], candidates: list[_Candidate], refused: dict[Node, str]) -> Matching:
        parallel = _find_parallel_branches(self.trace, candidates)
        for candidate in candidates:
            self._add(candidate, parallel.get(candidate.name))
        plan = Plan(
            model=self.model_name,
            input_size=tuple(aten.value_of(self.trace.image).shape[1:]),
            n_macs=sum(n_macs(node) for node in self._counted()),
            gates=tuple(self.gates.values()),
            sites=tuple(self.sites),
            refused=tuple(Refusal(_conv_name(self.trace, c), refused[c], n_macs(c)) for c in convs if c in refused),
            n_classes=self._n_classes(),
            options=self.options,
        )
        return Matching(plan, {c.name: c.conv for c in candidates}, self.end_nodes, self.inputs)

    def _counted(self) -> Iterator[Node]:
        nodes = self.trace.graph.nodes
        return (n for n in nodes if aten.name_of(n) in aten.COUNTED and n not in self.trace.static)

    def _n_classes(self) -> int | None:
        size = self.trace.output_size
        return size[1] if size is not None and len(size) == 2 else None

    def _add(self, candidate: _Candidate, branches: _Branches | None) -> None:
        chain = candidate.chain if branches is None else branches.chain
        link, end = next(ends_of(self.trace, chain))
        name = self._gate_to_share(candidate, branches)
        if name is None:
            name = candidate.name
            self._new_gate(candidate)
        gate = self.gates[name]
        ends = gate.ends if end in gate.ends else (*gate.ends, end)
        self.gates[name] = replace(gate, sites=(*gate.sites, candidate.name), ends=ends)
        self.end_nodes[end] = link.node
        self._gate_of_value[link.node] = name
        self.sites.append(self._site(candidate, name, end, _skips(candidate, branches, link)))

    def _gate_to_share(self, candidate: _Candidate, branches: _Branches | None) -> str | None:
        """The gate of the producer for a depthwise convolution, of the first branch for parallel branches."""
        if _is_depthwise(candidate.conv):
            producer = self._producer(candidate.conv)
            if producer is not None and self.gates[producer].n_filters == _n_filters(candidate):
                return producer
        if branches is not None and branches.first in self.gates:
            return branches.first
        return None

    def _producer(self, conv: Node) -> str | None:
        """The gate that decides which input channels of a depthwise convolution are zero, if one gate does."""
        node = conv.args[0]
        while isinstance(node, Node) and node not in self._gate_of_value:
            if not _keeps_channels(node):
                return None
            node = node.args[0]
        return self._gate_of_value.get(node) if isinstance(node, Node) else None

    def _new_gate(self, candidate: _Candidate) -> None:
        is_conv = aten.name_of(candidate.conv) in aten.CONV2D
        axis = 1 if is_conv else -1
        n_inputs = int(aten.value_of(candidate.x).shape[axis])
        self.gates[candidate.name] = Gate(candidate.name, n_inputs, _n_filters(candidate), axis, (), ())
        self.inputs[candidate.name] = candidate.x

    def _site(self, candidate: _Candidate, gate: str, end: End, skips: bool) -> Site:
        is_conv = aten.name_of(candidate.conv) in aten.CONV2D
        weight = aten.value_of(candidate.conv.args[1])  # type: ignore[arg-type]  # checked to be a node
        groups = aten.conv_arguments(candidate.conv)[3] if is_conv else 1
        return Site(
            name=candidate.name,
            gate=gate,
            kind="conv" if is_conv else "linear",
            in_channels=int(weight.shape[1]) * groups,
            out_channels=int(weight.shape[0]),
            kernel_size=tuple(weight.shape[2:]),
            groups=groups,
            n_macs=n_macs(candidate.conv),
            end=end,
            skips=skips,
        )


def _n_filters(candidate: _Candidate) -> int:
    return int(aten.value_of(candidate.conv.args[1]).shape[0])  # type: ignore[arg-type]  # checked to be a node


def _is_depthwise(conv: Node) -> bool:
    if aten.name_of(conv) not in aten.CONV2D:
        return False
    groups = aten.conv_arguments(conv)[3]
    weight = aten.value_of(conv.args[1])  # type: ignore[arg-type]  # checked to be a node
    return groups > 1 and weight.shape[0] == groups and weight.shape[1] == 1


def _keeps_channels(node: Node) -> bool:
    """Whether channel k of a node's output is zero wherever channel k of its first input is."""
    name = aten.name_of(node)
    if name in aten.PADS:
        return aten.is_spatial_zero_pad(node)
    return name in aten.IDENTITIES | aten.SPATIAL or aten.is_zero_preserving(node)


def _skips(candidate: _Candidate, branches: _Branches | None, end: Node | Link) -> bool:
    """Whether everything between the convolution and its gate treats each channel by itself."""
    node = end.node if isinstance(end, Link) else end
    chain = [*candidate.chain, *(branches.chain if branches is not None else ())]
    for link in chain:
        if link.kind == "norm" and aten.name_of(link.node) not in aten.CHANNEL_LOCAL_NORMS:
            return False
        if link.node is node:
            break
    return True


@dataclass(frozen=True)
class _Branches:
    """Convolutions that read one value and whose outputs meet in one sum: one gate after the sum serves them all."""

    first: str
    chain: tuple[Link, ...]


def _find_parallel_branches(trace: Trace, candidates: list[_Candidate]) -> dict[str, _Branches]:
    """Groups of parallel branches (RepVGG, MobileOne) by the name of each member."""
    by_end = {c.chain[-1].node: c for c in candidates if len(c.chain[-1].node.users) == 1}
    found: dict[str, _Branches] = {}
    for node in reversed(trace.graph.nodes):  # the outermost sum first
        members = _branches_of_sum(trace, node, by_end) if aten.name_of(node) == "add" else None
        if members is None or len(members) < 2 or any(m.name in found for m in members):
            continue
        if len({_is_depthwise(m.conv) for m in members}) > 1:
            continue  # a depthwise branch may owe its gate to its producer, the others cannot share that one
        chain = tuple(extend(trace, [Link(node, members[0].chain[-1].axis, "sum")]))
        if next(ends_of(trace, chain), None) is not None:
            first = min(members, key=candidates.index).name
            found.update({m.name: _Branches(first, chain) for m in members})
    return found


def _branches_of_sum(trace: Trace, node: Node, by_end: dict[Node, _Candidate]) -> list[_Candidate] | None:
    """The convolutions summed up in ``node`` if all its terms are branches of one value, else None.

    A term is the end of a convolution of that value, or a norm of it. The bare value is no branch: gating the sum would
    cut the identity path of a residual block.
    """
    members: list[_Candidate] = []
    norms: list[Node] = []
    stack = [node]
    while stack:
        term = stack.pop()
        if term in by_end:
            members.append(by_end[term])
        elif aten.name_of(term) == "add" and (term is node or len(term.users) == 1):
            operands = term.args[:2]
            if not all(isinstance(o, Node) for o in operands) or term in trace.hazards:
                return None
            stack.extend(o for o in operands if isinstance(o, Node))
        elif aten.name_of(term) in aten.IDENTITIES:
            stack.append(term.args[0])  # type: ignore[arg-type]  # its first argument is a tensor
        elif aten.name_of(term) in aten.NORMS:
            norms.append(term.args[0])  # type: ignore[arg-type]  # its first argument is a tensor
        else:
            return None
    same_value = len({m.x for m in members} | set(norms)) == 1
    return sorted(members, key=lambda m: m.name) if same_value else None
