"""Which convolutions are left alone, and why: by their place in the network, never by class name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

from torch.fx import Node

from decouplify import aten
from decouplify.chains import chain_of, ends_of
from decouplify.plan import Options
from decouplify.trace import Trace

__all__ = ["Roles", "why_not"]


class Roles:
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


def why_not(trace: Trace, roles: Roles, conv: Node, convs: list[Node], options: Options) -> str | None:
    """Why a convolution cannot or shall not be gated; None if it can."""
    name = aten.name_of(conv)
    if name in aten.OTHER_CONVS or aten.is_transposed(conv):
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
    if x is None or not aten.is_padded_view_of(conv.args[0], x):
        return "its module does not receive the convolved map as its first argument"
    if aten.value_of(conv).shape[0] != aten.value_of(trace.image).shape[0]:
        return "its batch is not the images (windows or frames are folded into it)"
    if conv in trace.hazards:
        return "its output is changed through another name"
    if next(ends_of(trace, chain_of(trace, conv)), None) is None:
        return "no module returns its output, so no hook can gate it"
    return None


def _why_not_wanted(name: str, options: Options) -> str | None:
    if options.only and not any(fnmatch.fnmatch(name, pattern) for pattern in options.only):
        return "not in only="
    if any(fnmatch.fnmatch(name, pattern) for pattern in options.exclude):
        return "in exclude="
    return None


def _ancestors(node: Node) -> Iterator[Node]:
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        yield current
        fresh = [n for n in current.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack.extend(fresh)
