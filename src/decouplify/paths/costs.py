"""What recorded paths cost, without running the model again."""

from __future__ import annotations

import torch
from torch import nn

from decouplify.decoupling import decoupling_of
from decouplify.macs import MacCount
from decouplify.paths.pathset import PathSet

__all__ = ["macs_of_paths"]


def macs_of_paths(model: nn.Module, paths: PathSet) -> MacCount:
    """What the sparse form executes for recorded images.

    Args:
        model: The wrapped model the paths were recorded with.
        paths: Paths with all of its gates.

    Raises:
        ValueError: If the model is not wrapped, or the paths have other layers.
    """
    decoupling = decoupling_of(model, "macs_of_paths")
    ours = [(gate.name, gate.n_filters) for gate in decoupling.plan.gates]
    theirs = [(layer.name, layer.n_filters) for layer in paths.layers]
    if ours != theirs:
        raise ValueError(
            f"{paths!r} does not belong to this {decoupling.plan.model}: the model has {len(ours)} gates and "
            f"{decoupling.plan.n_filters} filters, and all must be there, in order"
        )
    costs = decoupling.costs
    executed = [costs.executed(torch.from_numpy(gates).double()) for _, gates in paths.chunks()]
    return MacCount(costs.n_dense, torch.cat(executed).round().long(), costs.n_controllers)
