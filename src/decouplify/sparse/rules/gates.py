"""Rules for controllers and for the gates they set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from decouplify.sparse.drafts import Map, with_zero
from decouplify.sparse.native import StepKind
from decouplify.sparse.translation import ALWAYS_OPEN, Translation

__all__ = ["controller", "mask"]


def controller(t: Translation, node: Node) -> None:
    """A controller: pool, two linear layers, threshold. Its result is a gate, no map."""
    decides = t.controller_of(node)
    if t.fuse and _is_always_open(decides):
        t.gates[node] = ALWAYS_OPEN
        t.draft.always_open.append(node)
        return
    x = t.map_of(node.args[0])
    if x is None or not _has_channels_at(x, decides.input_axis):
        return
    t.add_gate(node, decides.fc2.out_features)
    t.emit(StepKind.CONTROL, node, input=x, gate=t.gates[node], weights=_controller_weights(decides))


def mask(t: Translation, node: Node) -> Map | None:
    """A gate on a value: its closed channels exist no longer."""
    x = t.map_of(node.args[0])
    if x is None or not _has_channels_at(x, t.modules[str(node.target)].axis):
        return None
    gate = t.gate_of(node.args[1])
    if gate == ALWAYS_OPEN:
        return x
    y = Map(x.shape, x.channels, x.size, with_zero(x.bounds), x.channels_last, base=x)
    t.emit(StepKind.MASK, node, input=x, output=y, gate=gate)
    return y


def _has_channels_at(x: Map, axis: int) -> bool:
    return x.channels_last == (axis == -1) if x.size is not None else axis == 1


def _is_always_open(controller: Any) -> bool:
    """Whether a controller opens every filter whatever it sees, as a fresh one does."""
    return not bool(controller.fc2.weight.any()) and bool((controller.fc2.bias > 0).all())


def _controller_weights(controller: Any) -> dict[str, Tensor]:
    """Both linear layers, inputs first, with the norm of the pooled input folded in."""
    w1, b1 = controller.fc1.weight.detach().double(), controller.fc1.bias.detach().double()
    if controller.norm is not None:
        scale = torch.rsqrt(controller.norm.running_var.double() + controller.norm.eps)
        b1 = b1 - w1 @ (controller.norm.running_mean.double() * scale)
        w1 = w1 * scale
    return {
        "weight": w1.t().float().contiguous(),
        "bias": b1.float(),
        "weight2": controller.fc2.weight.detach().t().float().contiguous(),
        "bias2": controller.fc2.bias.detach().float().contiguous(),
    }
