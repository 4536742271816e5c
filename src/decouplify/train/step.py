"""One optimiser step: eagerly, or recorded once as a CUDA graph and replayed."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from decouplify.train.batches import Batch
from decouplify.train.objective import Objective

__all__ = ["EagerStep", "GraphedStep", "Step"]

Logged = dict[str, Tensor]


class Step(Protocol):
    """Changes the parameters by one or more batches; returns what ``Objective`` logs, means over the batches."""

    def __call__(self, batches: list[Batch], phase: object) -> Logged: ...


class EagerStep:
    """Forward, backward and update, batch by batch.

    Args:
        objective: The loss of one batch.
        optimizer: Its parameters' optimiser.
    """

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer) -> None:
        self.objective, self.optimizer = objective, optimizer
        device = optimizer.param_groups[0]["params"][0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=objective.recipe.precision == "float16")

    def __call__(self, batches: list[Batch], phase: object = None) -> Logged:
        means: Logged = {}
        self.optimizer.zero_grad(set_to_none=True)
        for x, y in batches:
            loss, logged = self.objective(x, y)
            self.scaler.scale(loss / len(batches)).backward()
            for name, value in logged.items():
                means[name] = means.get(name, 0) + value / len(batches)
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return means

    def _clip(self) -> None:
        largest = self.objective.recipe.clip_norm
        if largest < math.inf:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, largest)


class GraphedStep:
    """The same step as a CUDA graph per phase: what a schedule changes must be a tensor, or else begin a new phase.

    The first steps of a phase run eagerly, as recording needs memory, buffers and libraries in place; every step is
    taken once. The optimiser's learning rates must be tensors.

    Args:
        eager: The step to record; it must not synchronise with the host.
    """

    _N_WARM = 3

    def __init__(self, eager: EagerStep) -> None:
        self.eager = eager
        self._stream = torch.cuda.Stream()
        self._n_steps: dict[object, int] = {}
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, Logged]] = {}
        self._x: Tensor | None = None
        self._y: Tensor | None = None

    def __call__(self, batches: list[Batch], phase: object) -> Logged:
        self._fill(*batches[0])
        self._n_steps[phase] = self._n_steps.get(phase, 0) + 1
        if self._n_steps[phase] <= self._N_WARM:
            return self._on_side_stream()
        if phase not in self._graphs:
            self._graphs.clear()  # a phase never comes back, and its graph holds memory
            self._graphs[phase] = self._record()
        graph, logged = self._graphs[phase]
        graph.replay()
        return logged

    def _fill(self, x: Tensor, y: Tensor | None) -> None:
        if self._x is None:
            self._x, self._y = x.clone(), None if y is None else y.clone()
            return
        self._x.copy_(x)
        if self._y is not None and y is not None:
            self._y.copy_(y)

    def _step(self) -> Logged:
        assert self._x is not None
        return self.eager([(self._x, self._y)])

    def _on_side_stream(self) -> Logged:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            logged = self._step()
        torch.cuda.current_stream().wait_stream(self._stream)
        return logged

    def _record(self) -> tuple[torch.cuda.CUDAGraph, Logged]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logged = self._step()
        return graph, logged
