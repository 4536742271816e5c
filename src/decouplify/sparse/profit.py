"""What each gate costs and saves on this CPU: its controller's time, and that of the filters it closes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from decouplify.sparse.executor import Program
from decouplify.sparse.native import StepKind
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

    The steps whose multiply-accumulates change are compared, each by its shortest time over a few rounds; what others
    take is noise.

    Args:
        program: The network; nothing else may run it meanwhile.
        path: Values of all gates of a typical image, zeros and ones, shape (K,) each, by gate.
        names: Gate of each node that decides one.
    """
    by_node = {node: path[name] for node, name in names.items()}
    usual = _times(program, by_node)
    profits = []
    for step in program.steps:
        if step.kind is not StepKind.CONTROL or step.node.name not in names:
            continue
        z = by_node[step.node.name]
        opened = _times(program, {**by_node, step.node.name: torch.ones_like(z)})
        changed = [i for i, (_, macs) in enumerate(opened) if macs != usual[i][1]]
        saved = sum(opened[i][0] - usual[i][0] for i in changed)
        cost = usual[program.steps.index(step)][0]
        profits.append(GateProfit(names[step.node.name], cost, saved))
    return profits


@torch.no_grad()
def _times(program: Program, gates: Mapping[str, Tensor]) -> list[tuple[float, int]]:
    """Seconds (the shortest of a few rounds) and multiply-accumulates of each step, with given gates."""
    image = torch.randn(program.image_shape, generator=torch.Generator().manual_seed(0))
    rounds = []
    with program.workspace() as workspace:
        for _ in range(_N_ROUNDS):
            run = TimedRun(program, workspace, image, gates)
            run.result(program.schedule)
            rounds.append(run.times)
    return [
        (min(times), int(macs[0])) for times, macs in (zip(*steps, strict=True) for steps in zip(*rounds, strict=True))
    ]
