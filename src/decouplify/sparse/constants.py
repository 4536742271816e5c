"""The constants that channels hold while their gates are closed, found by closing all gates and looking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from decouplify import aten
from decouplify.costs import Reader
from decouplify.sites import Matching
from decouplify.trace import Trace

__all__ = ["bias_products", "constants_of"]


@torch.no_grad()
def constants_of(
    trace: Trace, matching: Matching, readers: tuple[Reader, ...], static: Mapping[Node, Any]
) -> dict[str, Tensor]:
    """For each reader with constant channels what all of its input channels hold while every gate is closed.

    Args:
        trace: The recorded run.
        matching: Its sites.
        readers: What reads; see ``CostModel``.
        static: Value of every node that does not depend on the image.

    Returns:
        By name of the reader's node, shape (C,). Meaningful only for channels with a gate set in ``Reader.constant``.
    """
    wanted = {reader.node for reader in readers if any(s is not None for s in reader.constant)}
    if not wanted:
        return {}
    image = aten.value_of(trace.image)
    run = _AllClosed(trace, set(matching.ends.values()), wanted, static)
    run.run(torch.zeros(image.shape, dtype=image.dtype))
    return run.found


def bias_products(weight: Tensor, constants: Tensor, groups: int = 1) -> Tensor:
    """What each constant channel adds to each filter at every position of an unpadded convolution.

    Args:
        weight: Shape (K, C / groups, ...), also of a linear layer.
        constants: Shape (C,).
        groups: Groups.

    Returns:
        Weights summed over the kernel times the constants, shape (K, C / groups).
    """
    summed = weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()
    of_filter = constants.double().view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return (summed * of_filter).to(weight.dtype)


class _AllClosed(Interpreter):
    """Runs the recorded graph with zeros at every gate and keeps one position of what some nodes read."""

    def __init__(self, trace: Trace, ends: set[Node], wanted: set[str], static: Mapping[Node, Any]) -> None:
        super().__init__(nn.Module(), graph=trace.graph)
        self._ends, self._wanted, self._static = ends, wanted, static
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        if n in self._static:
            return self._static[n]
        if n.name in self._wanted:
            data = self.fetch_args_kwargs_from_env(n)[0][0]
            is_linear = aten.name_of(n) in aten.LINEAR
            self.found[n.name] = (data.flatten(0, -2)[0] if is_linear else data[0, :, 0, 0]).clone()
        value = super().run_node(n)
        return torch.zeros_like(value) if n in self._ends else value
