"""Follow a convolution's output to the value that its gate multiplies, and find the hook that can do it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torch.fx import Node

from decouplify import aten
from decouplify.plan import End
from decouplify.trace import ModuleCall, Trace

__all__ = ["Link", "chain_of", "ends_of", "extend"]

LinkKind = Literal["conv", "norm", "activation", "affine", "sum", "move"]


@dataclass(frozen=True)
class Link:
    """One value on the way from a convolution to its end, its channel axis, and what computed it."""

    node: Node
    axis: int
    kind: LinkKind


def chain_of(trace: Trace, conv: Node) -> tuple[Link, ...]:
    """The values from a convolution (or linear layer) as far as the rule follows them."""
    axis = 1 if aten.name_of(conv) in aten.CONV2D else aten.value_of(conv).dim() - 1
    return tuple(extend(trace, [Link(conv, axis, "conv")]))


def extend(trace: Trace, chain: list[Link]) -> list[Link]:
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


def ends_of(trace: Trace, chain: tuple[Link, ...]) -> Iterator[tuple[Link, End]]:
    """The links whose value a hook can multiply, and how, from the last to the first: the order of preference."""
    for i in reversed(range(len(chain))):
        end = _find_end(trace, chain[i], chain[i - 1] if i else None)
        if end is not None:
            yield chain[i], end


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
