"""One image through a program step by step, with the time that each step took."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from decouplify.sparse import native
from decouplify.sparse.executor import Program, Run, Stretch
from decouplify.sparse.native import StepKind

__all__ = ["TimedRun"]


class TimedRun(Run):
    """Runs step by step; a controller runs, and then its gate is set to what is wanted.

    Args:
        program: What to run.
        workspace: Memory for it.
        image: Shape (1, C, H, W), float32.
        gates: Values of gates, zeros and ones, shape (K,) each, by the name of the node that decides them.

    Attributes:
        times: Seconds and multiply-accumulates of each step so far.
    """

    def __init__(
        self, program: Program, workspace: native.Workspace, image: Tensor, gates: Mapping[str, Tensor]
    ) -> None:
        super().__init__(program, workspace, image, forced=gates)
        self.times: list[tuple[float, int]] = []

    def run_steps(self, stretch: Stretch) -> None:
        slots = self.slots(stretch)
        for i in range(stretch.begin, stretch.end):
            step = self.program.steps[i]
            start = time.perf_counter()
            self.workspace.run(i, i + 1, slots, self.n_threads)
            self.times.append((time.perf_counter() - start, self.workspace.take_macs()))
            if step.kind is StepKind.CONTROL and step.node.name in self.forced:
                self.workspace.set_gate(step.gate, self.forced[step.node.name])
