"""What each gate costs and saves on this CPU: its controller's time, and that of the filters it closes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from decouplify.sparse.executor import Program
from decouplify.sparse.native import StepKind, Workspace
from decouplify.sparse.timed import TimedRun

__all__ = ["GateProfit", "measure_profits"]

_N_ROUNDS = 5


@dataclass(frozen=True)
class GateProfit:
    """What a gate is worth on a typical path.

    Attributes:
        gate: Its name.
        cost: Time of its controller in seconds.
        saved: Time that the rest of the network takes longer if all filters of the gate are open, in seconds.
    """

    gate: str
    cost: float
    saved: float

    def __str__(self) -> str:
        return f"{self.gate} ({1e6 * self.cost:.0f} us for {1e6 * self.saved:.0f} us)"


def measure_profits(program: Program, path: Mapping[str, Tensor], names: Mapping[str, str]) -> list[GateProfit]:
    """Measure every gate that is decided in the engine, by opening one after another.

    The steps whose multiply-accumulates change are compared; what others take is noise. Every round runs the path
    itself and all of its changes, so that both meet the same clock and the same neighbours, and a gate is judged by
    the round of its median gain: what a busy machine adds to single runs does not enter.

    Args:
        program: The network; nothing else may run it meanwhile.
        path: Values of all gates of a typical image, zeros and ones, shape (K,) each, by gate.
        names: Gate of each node that decides one.
    """
    usual = {node: path[name] for node, name in names.items()}
    nodes = [step.node.name for step in program.steps if step.kind is StepKind.CONTROL and step.node.name in names]
    opened = {node: {**usual, node: torch.ones_like(usual[node])} for node in nodes}
    with program.workspace() as workspace:
        _timed(program, workspace, usual)  # meets the weights for the first time
        rounds = [
            (
                _timed(program, workspace, usual),
                {node: _timed(program, workspace, gates) for node, gates in opened.items()},
            )
            for _ in range(_N_ROUNDS)
        ]
    place = {step.node.name: i for i, step in enumerate(program.steps) if step.kind is StepKind.CONTROL}

    def profit(node: str) -> GateProfit:
        found = [
            GateProfit(names[node], before[place[node]].seconds, _saved(before, after[node]))
            for before, after in rounds
        ]
        return sorted(found, key=lambda one: one.saved - one.cost)[_N_ROUNDS // 2]

    return [profit(node) for node in nodes]


class _Timed(NamedTuple):
    """A step of a run."""

    seconds: float
    n_macs: int


def _saved(usual: list[_Timed], opened: list[_Timed]) -> float:
    """Seconds that the steps take longer whose multiply-accumulates differ."""
    return sum(
        after.seconds - before.seconds
        for before, after in zip(usual, opened, strict=True)
        if after.n_macs != before.n_macs
    )


@torch.no_grad()
def _timed(program: Program, workspace: Workspace, gates: Mapping[str, Tensor]) -> list[_Timed]:
    """Each step of a run of one image with given gates."""
    image = torch.randn(program.image_shape, generator=torch.Generator().manual_seed(0))
    run = TimedRun(program, workspace, image, gates)
    run.result(program.schedule)
    return [_Timed(*time) for time in run.times]
