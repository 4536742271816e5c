"""The static twin: the same architecture with fewer channels everywhere, at the cost that gates have on average.

It answers the question every dynamic network must: how fast would a network be that is simply smaller? Its channels are
the first ones of each layer, the same share of all layers, so it says nothing about accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from decouplify.bench.dense import dense_module
from decouplify.narrow import ChannelClasses, narrow
from decouplify.trace import Trace

__all__ = ["Twin", "static_twin"]

_N_BISECTIONS = 30


@dataclass(frozen=True)
class Twin:
    """A narrowed network.

    Attributes:
        module: The network, without gates.
        width: Share of all filters that are left.
        n_macs: Its multiply-accumulates for one image.
    """

    module: GraphModule
    width: float
    n_macs: int


def static_twin(trace: Trace, n_macs: float) -> Twin:
    """The narrowed network whose multiply-accumulates come nearest to a number.

    Args:
        trace: The run of the unwrapped model, which is changed.
        n_macs: Multiply-accumulates wanted.
    """
    classes = ChannelClasses(trace)
    low, high = 0.0, 1.0
    for _ in range(_N_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if classes.n_macs(_beyond(classes, middle)) < n_macs else (low, middle)
    removed = min((_beyond(classes, w) for w in (low, high)), key=lambda r: abs(classes.n_macs(r) - n_macs))
    filters = [channel for layer in classes.layers for channel in layer.outputs.ids]
    width = sum(classes.find(channel) not in removed for channel in filters) / max(len(filters), 1)
    found = classes.n_macs(removed)
    return Twin(dense_module(narrow(classes, removed)), width, found)


def _beyond(classes: ChannelClasses, width: float) -> set[int]:
    """Classes all of whose members lie beyond the first ``width`` of their layer's filters."""
    removed: set[int] = set()
    kept: set[int] = set()
    for layer in classes.layers:
        n_first = max(1, round(width * len(layer.outputs.ids)))
        kept.update(classes.find(channel) for channel in layer.outputs.ids[:n_first])
        removed.update(classes.find(channel) for channel in layer.outputs.ids[n_first:])
    return {channel for channel in removed - kept if not classes.is_fixed(channel)}
