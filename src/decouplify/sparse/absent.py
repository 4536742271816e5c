"""Channels that hold a constant while their gates are closed need not be written, if whatever reads them adds it."""

from __future__ import annotations

from collections import defaultdict

from decouplify.sparse.drafts import Map, Step
from decouplify.sparse.native import StepKind

__all__ = ["leave_constants"]


def leave_constants(steps: list[Step]) -> None:
    """Mark the norms whose constants all readers add by themselves.

    A norm of a channel that does not exist is its shift, or what the activation makes of that. Written out, as
    DenseNet's norms would be, closed channels cost their readers as much as open ones.
    """
    readers: dict[Map, list[Step]] = defaultdict(list)
    for step in steps:
        for m in (step.input, step.other):
            if m is not None:
                readers[m].append(step)
        if step.output is not None and step.output.base is not None:
            readers[step.output.base].append(step)  # a map that lies in another is one more use of that
    for step in steps:
        if step.kind is StepKind.SCALE and step.output is not None:
            y = step.output
            has_constants = bool(step.weights["bias"].any()) or not step.act.keeps_zero
            step.leaves_constants = has_constants and all(_adds(r, y) for r in readers[y])


def _adds(reader: Step, y: Map) -> bool:
    """Whether a step that reads a map adds what its missing channels would hold (see engine.h)."""
    if reader.input is not y or reader.other is y:
        return False
    if reader.kind is StepKind.CONVOLUTION:
        is_pointwise = reader.sliding.kernel == (1, 1) and reader.sliding.padding == (0, 0)
        return is_pointwise and reader.groups == 1
    return reader.kind in (StepKind.CONTROL, StepKind.MEAN)
