"""The engine's functions for activations of the graph."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.fx import Node

from decouplify import aten
from decouplify.sparse.drafts import IDENTITY, Act
from decouplify.sparse.native import ActivationKind

__all__ = ["act_of", "act_of_node"]


def act_of(activation: Any) -> Act | None:
    """The engine's function for the activation of an operator; None if it has none."""
    if activation is None:
        return IDENTITY
    schema = getattr(activation.target, "_schema", None)
    if schema is None:
        return None
    names = [a.name for a in schema.arguments][1:]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    arguments = {**defaults, **dict(zip(names, activation.args, strict=False)), **activation.kwargs}
    return _act(schema.name.split("::")[1].rstrip("_"), arguments)


def act_of_node(node: Node) -> Act | None:
    """The engine's function for a node that is an activation; None if it is none, or one the engine does not know."""
    schema = getattr(node.target, "_schema", None)
    if aten.name_of(node) not in aten.ACTIVATIONS or schema is None or len(node.all_input_nodes) != 1:
        return None
    return _act(aten.name_of(node), {a.name: aten.argument(node, a.name) for a in schema.arguments[1:]})


def _act(name: str, arguments: dict[str, Any]) -> Act | None:
    if name in ("hardtanh", "clamp", "clamp_min", "clamp_max"):
        low = arguments.get("min_val", arguments.get("min"))
        high = arguments.get("max_val", arguments.get("max"))
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return None
        return Act(low=-math.inf if low is None else float(low), high=math.inf if high is None else float(high))
    if name == "leaky_relu":
        return Act(ActivationKind.LEAKY, low=float(arguments["negative_slope"]))
    if name == "gelu":
        name += "_" + str(arguments.get("approximate"))
    return _PLAIN.get(name)


_PLAIN = {
    "relu": Act(low=0.0),
    "relu6": Act(low=0.0, high=6.0),
    "silu": Act(ActivationKind.SILU),
    "hardswish": Act(ActivationKind.HARDSWISH),
    "gelu_none": Act(ActivationKind.GELU),
    "gelu_tanh": Act(ActivationKind.GELU_TANH),
    "sigmoid": Act(ActivationKind.SIGMOID),
}
