"""A recorded run of a network on many images: all of them reach a layer before any of them leaves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from decouplify.aten import value_of
from decouplify.gating import gated
from decouplify.trace import Trace

__all__ = ["GatedNode", "Replay", "Values"]

Values = dict[Node, Any]
GatedNode = tuple[Tensor, int]  # gate values of all images, shape (N, K), and the axis of the channels

_MEMORY = 2**30  # bytes that the values of all images may take up between two layers


class Replay:
    """A network's values at one node after another, for all images.

    A layer can so be changed after all images have reached it and before any of them passes it, in one run through the
    network. Where the values of all images take too much memory to keep, which is near the input, they are computed
    again from where they were kept last.

    Args:
        recorded: The network's recorded run, without writes through other names (``Trace.hazards``).
        tensors: Values of its ``get_attr`` nodes by target, read when a layer runs.
        images: Each of shape (1, C, H, W), as in the recording.
        gates: Values that gates multiply, by node.
    """

    def __init__(
        self,
        recorded: Trace,
        tensors: Mapping[str, Tensor],
        images: Sequence[Tensor],
        gates: Mapping[Node, GatedNode] | None = None,
    ) -> None:
        self._nodes = [node for node in recorded.graph.nodes if node.op == "call_function"]
        self._tensors, self._gates = tensors, gates or {}
        self._position = {node: i for i, node in enumerate(self._nodes)}
        self._last_use = {
            node: max((self._position.get(user, len(self._nodes)) for user in node.users), default=-1)
            for node in (recorded.image, *self._nodes)
        }
        self._kept: list[Values] = [{recorded.image: image} for image in images]
        self._at = 0

    @torch.no_grad()
    def values_before(self, node: Node) -> Iterator[Values]:
        """For each image what is there when ``node`` is about to run; nodes in the order of the network.

        Iterate to the end, and do not change the values.
        """
        stop = self._position[node]
        keeps = self._bytes_between(stop) * len(self._kept) <= _MEMORY
        for i, kept in enumerate(self._kept):
            values = dict(kept)
            for j in range(self._at, stop):
                self._advance(j, i, values, kept)
            if keeps:
                self._kept[i] = values
            yield values
        if keeps:
            self._at = stop

    @torch.no_grad()
    def result(self, node: Node, values: Values) -> Any:
        """What a node returns."""
        return self._run(node, values, {})

    def _advance(self, j: int, image: int, values: Values, kept: Values) -> None:
        node = self._nodes[j]
        value = self._run(node, values, kept)
        if node in self._gates:
            z, axis = self._gates[node]
            value = gated(value, z[image : image + 1].to(value), axis)
        values[node] = value
        for read in (node, *node.all_input_nodes):
            if self._last_use.get(read, len(self._nodes)) <= j:
                values.pop(read, None)

    def _run(self, node: Node, values: Values, kept: Values) -> Any:
        arguments: Any = map_arg((node.args, node.kwargs), lambda n: self._read(n, values))
        args, kwargs = arguments
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            # What is kept will be read again; everything else dies here, or the recording would have a hazard.
            read = zip(node.args, args, strict=True)
            args = tuple(a.clone() if isinstance(n, Node) and n in kept else a for n, a in read)
        return node.target(*args, **kwargs)  # type: ignore[operator]  # of call_function nodes it is one

    def _read(self, node: Node, values: Values) -> Any:
        return self._tensors[str(node.target)] if node.op == "get_attr" else values[node]

    def _bytes_between(self, stop: int) -> int:
        """Of one image's values that are computed before and read after a position."""
        computed = (node for node in self._last_use if self._position.get(node, -1) < stop)
        alive = [value_of(node) for node in computed if self._last_use[node] >= stop]
        return sum(value.numel() * value.element_size() for value in alive if isinstance(value, Tensor))
