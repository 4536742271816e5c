"""From the graph of a sparse form to steps of the engine.

Each node is looked up in a table of rules. A rule emits steps and returns the map that stands for the node's value, or
returns None if it cannot: then torch runs the node between steps, and its operands and results cross over.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from decouplify import aten
from decouplify.sparse.drafts import Draft
from decouplify.sparse.ops import Controller, Mask, SparseConv2d, SparseLinear
from decouplify.sparse.rules import arithmetic, gates, layers, pools, shapes
from decouplify.sparse.translation import Rule, Translation

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
    return Translation(module, _RULES, fuse).run()


_RULES: dict[Any, Rule] = {
    Controller: gates.controller,
    Mask: gates.mask,
    SparseConv2d: layers.convolution,
    SparseLinear: layers.linear,
    "add": arithmetic.add,
    "batch_norm": arithmetic.norm,
    "max_pool2d": pools.max_pool,
    "avg_pool2d": pools.average_pool,
    "adaptive_avg_pool2d": pools.global_mean,
    "mean": pools.global_mean,
    "cat": shapes.concatenate,
    "pad": shapes.pad,
    "constant_pad_nd": shapes.pad,
    "slice": shapes.part,
    "permute": shapes.permute,
    "layer_norm": arithmetic.layer_norm,
    "mul": arithmetic.multiply,
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "_unsafe_view"), shapes.reshape),
    **dict.fromkeys(aten.IDENTITIES, shapes.identity),
    **dict.fromkeys(aten.ACTIVATIONS, arithmetic.activation),
}


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
