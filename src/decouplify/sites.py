"""Find the sites of a recorded run by one rule.

From a convolution's output follow single consumers through at most one norm (and permutes around it), at most one
activation and any constant scales; stop at anything else. The last value on that way which a hook can replace is where
the gate sits. What is left alone is excluded by structure, never by class name, and carries its reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torch.fx import Node

from decouplify import aten
from decouplify.errors import PlanError
from decouplify.plan import End, Gate, Options, Plan, Refusal, Site
from decouplify.trace import ModuleCall, Trace

__all__ = ["Link", "Matching", "chain_of", "match", "n_macs"]

LinkKind = Literal["conv", "norm", "activation", "affine", "sum", "move"]


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
class Link:
    """One value on the way from a convolution to its end, its channel axis, and what computed it."""

    node: Node
    axis: int
    kind: LinkKind


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
    roles = _Roles(trace)
    refused: dict[Node, str] = {}
    candidates: list[_Candidate] = []
    for conv in convs:
        reason = _why_not(trace, roles, conv, convs, options)
        if reason is None:
            candidates.append(_follow(trace, conv))
        else:
            refused[conv] = reason
    if options.skip_last and candidates:
        refused[candidates.pop().conv] = "last convolution (skip_last)"
    return _Assembly(trace, options, model_name).build(convs, candidates, refused)


def n_macs(node: Node) -> int:
    """Multiply-accumulates of a convolution or linear node for the recorded image."""
    weight = aten.value_of(node.args[1])  # type: ignore[arg-type]  # a tensor argument is a node
    return int(aten.value_of(node).numel() * weight[0].numel())


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


class _Roles:
    """What each node is to the network as a whole, each computed by one sweep over the graph."""

    def __init__(self, trace: Trace) -> None:
        self.near_image: set[Node] = set()
        self.pooled: set[Node] = set()
        for node in trace.graph.nodes:
            inputs = [n for n in node.all_input_nodes if n not in trace.static]
            if node is trace.image or (inputs and not _is_heavy(node) and all(n in self.near_image for n in inputs)):
                self.near_image.add(node)
            if aten.is_global_pool(node) or (inputs and all(n in self.pooled for n in inputs)):
                self.pooled.add(node)
        self.before_parameters: set[Node] = set()
        for node in reversed(trace.graph.nodes):
            if any(_has_parameters(user) or user in self.before_parameters for user in node.users):
                self.before_parameters.add(node)


def _is_heavy(node: Node) -> bool:
    return aten.name_of(node) in aten.HEAVY


def _has_parameters(node: Node) -> bool:
    return _is_heavy(node) or aten.name_of(node) in aten.NORMS


def _why_not(trace: Trace, roles: _Roles, conv: Node, convs: list[Node], options: Options) -> str | None:
    """Why a convolution cannot or shall not be gated; None if it can."""
    name = aten.name_of(conv)
    if name in aten.OTHER_CONVS or _is_transposed(conv):
        return f"not a 2-D convolution ({name})"
    data, weight = conv.args[0], conv.args[1]
    assert isinstance(data, Node) and isinstance(weight, Node)
    if weight not in trace.static:
        return "its weight is computed from the image"
    if not any(n.target in trace.parameters for n in _ancestors(weight)):
        return "its weight is not a parameter"
    if data in trace.static:
        return "what it reads does not depend on the image"
    if not trace.owner_of(conv):
        return "no module of its own to hook"
    if data in roles.near_image and options.skip_first:
        return "first convolution (skip_first)"
    if data in roles.pooled:
        return "reads a globally pooled map (squeeze-excite or head)"
    if conv not in roles.before_parameters:
        return "classifier: nothing with parameters follows"
    return _why_no_hook(trace, conv, convs) or _why_not_wanted(trace.owner_of(conv), options)


def _why_no_hook(trace: Trace, conv: Node, convs: list[Node]) -> str | None:
    """Why the gate could not be computed by a hook in front of the convolving module, or applied behind it."""
    owner = trace.owner_of(conv)
    if trace.n_calls[owner] > 1:
        return f"called {trace.n_calls[owner]} times per image"
    if sum(trace.owner_of(other) == owner for other in convs) > 1:
        return "its module runs several convolutions itself"
    x = trace.call_of(conv).inputs[0] if trace.call_of(conv).inputs else None
    if x is None or not _is_padded_view_of(conv.args[0], x):
        return "its module does not receive the convolved map as its first argument"
    if aten.value_of(conv).shape[0] != aten.value_of(trace.image).shape[0]:
        return "its batch is not the images (windows or frames are folded into it)"
    if conv in trace.hazards:
        return "its output is changed through another name"
    if all(_find_end(trace, link, prior) is None for link, prior in _links(_follow(trace, conv).chain)):
        return "no module returns its output, so no hook can gate it"
    return None


def _why_not_wanted(name: str, options: Options) -> str | None:
    if options.only and not any(fnmatch.fnmatch(name, pattern) for pattern in options.only):
        return "not in only="
    if any(fnmatch.fnmatch(name, pattern) for pattern in options.exclude):
        return "in exclude="
    return None


def _is_transposed(conv: Node) -> bool:
    return bool(aten.argument(conv, "transposed", False))


def _ancestors(node: Node) -> Iterator[Node]:
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        yield current
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)


def _is_padded_view_of(data: object, x: Node) -> bool:
    """Whether ``data`` is ``x``, perhaps zero-padded by the convolving module itself (TensorFlow's SAME)."""
    while isinstance(data, Node) and data is not x:
        if aten.name_of(data) not in aten.IDENTITIES | aten.PADS:
            return False
        data = data.args[0]
    return data is x


def _follow(trace: Trace, conv: Node) -> _Candidate:
    x = trace.call_of(conv).inputs[0]
    assert x is not None
    return _Candidate(conv, trace.owner_of(conv), x, chain_of(trace, conv))


def chain_of(trace: Trace, conv: Node) -> tuple[Link, ...]:
    """The values from a convolution (or linear layer) as far as the rule follows them."""
    axis = 1 if aten.name_of(conv) in aten.CONV2D else aten.value_of(conv).dim() - 1
    return tuple(_extend(trace, [Link(conv, axis, "conv")]))


def _extend(trace: Trace, chain: list[Link]) -> list[Link]:
    """Follow single consumers as far as the rule allows."""
    node, axis = chain[-1].node, chain[-1].axis
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user in trace.hazards or not user.all_input_nodes or user.args[:1] != (node,):
            break
        name = aten.name_of(user)
        kind = _link_kind(trace, user, axis)
        if kind is None or (kind in ("norm", "activation") and any(link.kind == kind for link in chain)):
            break
        if kind == "norm" and any(link.kind == "activation" for link in chain):
            break  # the norm belongs to the next layer (pre-activation)
        if name in ("permute", "transpose"):
            axis = _moved_axis(user, axis)
        chain.append(Link(user, axis, kind))
        node = user
    return chain


def _link_kind(trace: Trace, node: Node, axis: int) -> LinkKind | None:
    name = aten.name_of(node)
    if not name:
        return None  # the output
    if name in aten.IDENTITIES or name in ("permute", "transpose"):
        return "move"
    others = node.all_input_nodes[1:]
    if any(n not in trace.static for n in others) or not isinstance(aten.value_of(node), Tensor):
        return None
    if aten.value_of(node).shape != aten.value_of(node.all_input_nodes[0]).shape:
        return None
    if name in aten.NORMS:
        return "norm" if name in ("layer_norm", "rms_norm") or axis == 1 else None
    if name in aten.ACTIVATIONS:
        return "activation"
    return "affine" if name in aten.AFFINE else None


def _moved_axis(node: Node, axis: int) -> int:
    """Where a channel axis goes under permute or transpose."""
    n_dims = aten.value_of(node).dim()
    if aten.name_of(node) == "transpose":
        a, b = (int(d) % n_dims for d in node.args[1:3])  # type: ignore[arg-type]  # dims are integers
        return {a: b, b: a}.get(axis, axis)
    return [int(d) % n_dims for d in aten.argument(node, "dims")].index(axis)


def _links(chain: tuple[Link, ...]) -> Iterator[tuple[Link, Link | None]]:
    """The links from the last to the first, each with the one before it."""
    for i in reversed(range(len(chain))):
        yield chain[i], chain[i - 1] if i else None


def _find_end(trace: Trace, link: Link, prior: Link | None) -> End | None:
    """Where a hook can multiply the value of ``link``; None if nowhere.

    In this order: the module that computed it, if called once; the same module called several times, told apart by
    the tensor it receives; the innermost container that returns it.
    """
    call = trace.call_of(link.node)
    n_dims = aten.value_of(link.node).dim()
    if link.axis not in (1, n_dims - 1):
        return None
    end = End(
        module=call.name,
        after=None,
        axis=1 if link.axis == 1 else -1,
        non_negative=aten.name_of(link.node) in aten.NON_NEGATIVE,
        before_relu=len(link.node.users) == 1 and aten.name_of(next(iter(link.node.users))) in aten.RECTIFIERS,
    )
    returning = list(_returning(trace, link.node))
    if link.kind == "move" and call not in returning:
        return None  # a permute between modules; the value before it is the better place
    if call in returning and trace.n_calls[call.name] == 1:
        return end
    if call in returning and prior is not None and call.inputs[:1] == (prior.node,):
        source = _sole_source(trace, prior.node)
        if source is not None:
            return replace(end, after=source.name)
    container = next((c for c in returning if trace.n_calls[c.name] == 1), None)
    return replace(end, module=container.name) if container is not None else None


def _sole_source(trace: Trace, node: Node) -> ModuleCall | None:
    """The innermost module that returns a value and is called once."""
    return next((c for c in _returning(trace, node) if trace.n_calls[c.name] == 1), None)


def _returning(trace: Trace, node: Node) -> Iterator[ModuleCall]:
    """The module calls that computed a value and returned it and nothing else, innermost first.

    A module that only passes it through, such as ``nn.Identity``, may stand on one of several ways of the value.
    """
    return (c for c in trace.calls if c.returns_tensor and c.outputs == (node,) and c.name and c.computed(node))


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
        link, end = next(
            (link, end) for link, prior in _links(chain) if (end := _find_end(self.trace, link, prior)) is not None
        )
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
        chain = tuple(_extend(trace, [Link(node, members[0].chain[-1].axis, "sum")]))
        if any(_find_end(trace, link, prior) is not None for link, prior in _links(chain)):
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
