"""How each convolution of a program is computed: directly or by Winograd, whichever is faster on this CPU."""

from __future__ import annotations

from decouplify.sparse.executor import Program
from decouplify.sparse.native import Algorithm

__all__ = ["choose_algorithms"]


def choose_algorithms(program: Program) -> None:
    """Set the algorithm of every 3x3 convolution that Winograd could compute."""
    for i, step in enumerate(program.steps):
        if step.can_use_winograd:
            assert step.output is not None and step.output.size is not None
            height = min(step.output.size)
            by_size = (
                Algorithm.WINOGRAD_4 if height >= 28 else Algorithm.WINOGRAD_2 if height >= 10 else Algorithm.DIRECT
            )
            program.set_algorithm(i, by_size)
