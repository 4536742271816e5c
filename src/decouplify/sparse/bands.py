"""Steps that the engine may compute a band of rows at a time, so that what lies between them stays in the cache."""

from __future__ import annotations

import itertools
import math
from collections import Counter

from decouplify.sparse.drafts import Draft, Sliding, Step
from decouplify.sparse.native import Algorithm, StepKind, WindowKind

__all__ = ["join_bands"]

#: Floats of a map that a second-level cache holds beside much else. Smaller ones stay there anyway.
SMALLEST_MAP = 1 << 18


def join_bands(draft: Draft) -> None:
    """Mark inverted residual blocks, and what a network begins with, where maps are large.

    The beginning is a separable convolution, or a convolution of stride 2 and a pooling.

    What such steps leave for each other is read by nobody else and its sums are not asked for; see ``joined`` in
    engine.h.
    """
    uses = Counter(m for step in draft.steps for m in (step.input, step.other, step.output) if m is not None)
    uses.update(step.output.base for step in draft.steps if step.output is not None and step.output.base is not None)

    def feeds(first: Step, second: Step) -> bool:
        """Whether the second step alone reads what the first one writes."""
        return first.output is not None and second.input is first.output and uses[first.output] == 2

    items = draft.items
    for first, *rest in (items[i : i + 3] for i in range(len(items))):
        following = [first, *itertools.takewhile(lambda item: isinstance(item, Step), rest)]
        steps = [item for item in following if isinstance(item, Step)]
        chain = _chain(steps) if isinstance(first, Step) else []
        if chain and all(itertools.starmap(feeds, itertools.pairwise(chain))) and _is_large(chain[-2]):
            chain[0].joined = len(chain) - 1


def _chain(steps: list[Step]) -> list[Step]:
    """The steps from the first one on that could be joined, if they are of the right kinds."""
    kinds = [step.kind for step in steps]
    if kinds[:2] == [StepKind.EXPAND, StepKind.CONVOLUTION] and _is_pointwise(steps[1]):
        return steps[:2]
    if kinds[:2] == [StepKind.CONVOLUTION, StepKind.WINDOW] and _is_pooled_stem(*steps[:2]):
        return steps[:2]
    if kinds != [StepKind.CONVOLUTION, StepKind.WINDOW, StepKind.CONVOLUTION] or not _is_pointwise(steps[2]):
        return []
    first, middle, _ = steps
    is_plain = first.groups == 1 and first.other is None and middle.window is WindowKind.DEPTHWISE
    return steps if is_plain and first.gate == middle.gate else []


def _is_pooled_stem(first: Step, second: Step) -> bool:
    can_be_strided = Algorithm.WINOGRAD_STRIDED in first.algorithms
    return can_be_strided and first.other is None and second.window is WindowKind.MAX


def _is_pointwise(step: Step) -> bool:
    return step.sliding == Sliding() and step.groups == 1


def _is_large(step: Step) -> bool:
    """Whether what a step leaves is too much for the cache, with half of the filters open where a gate decides."""
    m = step.output
    n_floats = 0 if m is None or m.size is None else m.channels * math.prod(m.size)
    return n_floats / (2 if step.gate >= 0 else 1) >= SMALLEST_MAP
