"""Where each feature map of a program lies.

Maps of one height and width share an arena, because their zero borders are written once and never again: memory that
served another size would hold that size's features where zeros must be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from decouplify.sparse.drafts import Draft, Map, Step
from decouplify.sparse.native import Geometry, StepKind, Value, WindowKind

__all__ = ["Placement", "place"]

_VECTORS = None  # the arena of vectors, which have no height and width
_CACHE_LINE = 16  # floats


@dataclass
class Placement:
    """Where everything lies.

    Attributes:
        geometries: One per height and width.
        values: One per map.
        index: Position of each map in ``values``.
    """

    geometries: list[Geometry]
    values: list[Value]
    index: dict[Map, int]


def place(draft: Draft) -> Placement:
    """Share memory between maps that can, and give each its place. Changes ``base`` and ``offset`` of the maps."""
    _join_concatenations(draft.steps)
    _share_concatenations(draft.steps)
    _join_sums(draft.steps)
    summed = _maps_with_sums(draft.steps)
    maps = list(dict.fromkeys(m for step in draft.steps for m in _maps_of(step)))
    first, n_planes = _pack(draft.steps)
    borders = _borders(draft.steps)
    sizes = list(borders)
    geometries = [Geometry(h, w, borders[h, w], n_planes[h, w]) for h, w in sizes]
    values = []
    for m in maps:
        owner, offset = m.storage()
        geometry = -1 if m.size is None else sizes.index(m.size)
        values.append(Value(geometry, first[owner] + offset, m.channels, m in summed))
    return Placement(geometries, values, {m: i for i, m in enumerate(maps)})


def _maps_of(step: Step) -> Iterator[Map]:
    return (m for m in (step.input, step.other, step.output) if m is not None)


def _join_concatenations(steps: list[Step]) -> None:
    """Let the parts of a concatenation be computed where they are wanted, the last (widest) one first."""
    for step in reversed(steps):
        if step.kind is not StepKind.COPY or step.input is None or step.output is None:
            continue
        part, whole = step.input, step.output
        if _is_plain(step) and part.storage()[0] is part and whole.storage()[0] is not part:
            part.base, part.offset = whole, step.position


def _is_plain(step: Step) -> bool:
    """Whether a copy moves its input as it is."""
    assert step.input is not None and step.output is not None
    moved = step.sliding.stride != (1, 1) or step.sliding.padding != (0, 0)
    return step.input.size == step.output.size and not moved


def _share_concatenations(steps: list[Step]) -> None:
    """Let a concatenation lie within a wider one, where its parts already are side by side.

    In a dense block, where every layer reads all that were before it, each map would otherwise be copied once for every
    layer that follows.
    """
    parts: dict[Map, list[Step]] = defaultdict(list)
    for step in steps:
        if step.kind is StepKind.COPY and step.output is not None:
            parts[step.output].append(step)
    for whole, copies in parts.items():
        places = {_place_of_whole(copy) for copy in copies}
        covers = sum(copy.input.channels for copy in copies if copy.input is not None) == whole.channels
        if whole.base is not None or len(places) != 1 or not covers or not all(map(_is_plain, copies)):
            continue
        owner, offset = places.pop()
        if owner is not whole and offset >= 0:
            whole.base, whole.offset = owner, offset


def _place_of_whole(copy: Step) -> tuple[Map, int]:
    """Where a concatenation would have to begin for this part of it to be in its place already."""
    assert copy.input is not None
    owner, offset = copy.input.storage()
    return owner, offset - copy.position


def _join_sums(steps: list[Step]) -> None:
    """Let a sum replace the operand that nobody reads afterwards."""
    last_use: dict[Map, int] = {}
    read_in_bands: dict[Step, Map] = {}  # by the last one of joined steps, what the first one reads
    for i, step in enumerate(steps):
        last_use.update({m.storage()[0]: i for m in _maps_of(step)})
        if step.joined and step.input is not None:
            read_in_bands[steps[i + step.joined]] = step.input
    for i, step in enumerate(steps):
        operand = step.other if step.kind is StepKind.CONVOLUTION else step.input
        if step.kind not in (StepKind.CONVOLUTION, StepKind.ADD) or operand is None or step.output is None:
            continue
        owner = operand.storage()[0]
        free = last_use[owner] == i and owner.channels == operand.channels == step.output.channels
        is_convolution = step.kind is StepKind.CONVOLUTION
        read = (step.input if is_convolution else None, read_in_bands.get(step))
        reads_it_elsewhere = any(m is not None and m.storage()[0] is owner for m in read)
        if free and not reads_it_elsewhere and step.output.base is None and owner.base is None:
            last_use[owner] = last_use.pop(step.output, i)
            step.output.base, step.output.offset = owner, 0


def _maps_with_sums(steps: list[Step]) -> set[Map]:
    """The maps whose sums over pixels somebody asks for, directly or through maps that pass them on."""
    found: set[Map] = set()
    for step in reversed(steps):
        if step.kind in (StepKind.CONTROL, StepKind.MEAN) and step.input is not None:
            found.add(step.input)
        if step.output not in found:
            continue
        if step.kind in (StepKind.COPY, StepKind.MASK) and step.input is not None:
            found.add(step.input)
        if step.kind is StepKind.CONVOLUTION and step.other is not None:
            found.add(step.other)
    return {m for m in found if m.size is not None}


def _borders(steps: list[Step]) -> dict[tuple[int, int], int]:
    """The border each size needs: that of the most demanding step that writes or reads it."""
    borders: dict[tuple[int, int], int] = defaultdict(int)
    for step in steps:
        for m in _maps_of(step):
            if m.size is not None:
                borders[m.size] += 0
        if step.kind in (StepKind.CONVOLUTION, StepKind.WINDOW, StepKind.EXPAND):
            assert step.input is not None and step.output is not None and step.output.size is not None
            # A maximum never reads in place: outside the image it needs minus infinity, not zero.
            is_maximum = step.kind is StepKind.WINDOW and step.window is WindowKind.MAX
            needed = step.sliding.border(step.input.size == step.output.size and not is_maximum)
            borders[step.output.size] = max(borders[step.output.size], needed)
            if step.weights and step.kind is not StepKind.CONVOLUTION:
                # Depthwise; the engine reads it in place whatever its stride.
                assert step.input.size is not None
                outside = step.sliding.outside(step.input.size, step.output.size)
                borders[step.input.size] = max(borders[step.input.size], outside)
    return borders


def _pack(steps: list[Step]) -> tuple[dict[Map, int], dict[tuple[int, int] | None, int]]:
    """First plane (or element) of each map that owns memory, and the size of each arena."""
    lifetimes: dict[Map, list[int]] = {}
    for i, step in enumerate(steps):
        for m in _maps_of(step):
            # What joined steps read is wanted until the last of them has written its last band.
            end = i + step.joined
            lifetime = lifetimes.setdefault(m.storage()[0], [i, end])
            lifetime[1] = max(lifetime[1], end)
    placed: dict[tuple[int, int] | None, list[tuple[int, int, list[int]]]] = defaultdict(list)
    first: dict[Map, int] = {}
    for m, lifetime in lifetimes.items():
        width = m.channels if m.size is not _VECTORS else -(-m.channels // _CACHE_LINE) * _CACHE_LINE
        start = 0
        for begin, end, other in sorted(placed[m.size], key=lambda block: block[0]):
            if other[1] >= lifetime[0] and lifetime[1] >= other[0] and begin < start + width:
                start = max(start, end)
        placed[m.size].append((start, start + width, lifetime))
        first[m] = start
    return first, {size: max(end for _, end, _ in blocks) for size, blocks in placed.items()}
