"""The engine's program before every buffer has its place: feature maps, steps, and calls of torch in between."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Node

from decouplify.sparse.native import ActivationKind, Algorithm, StepKind, WindowKind

__all__ = ["IDENTITY", "Act", "Draft", "Item", "Map", "ReadGate", "SetGate", "Sliding", "Step", "TorchCall"]


@dataclass(frozen=True)
class Act:
    """An element-wise function the engine knows.

    Attributes:
        kind: Which.
        low: Lower bound of CLAMP, slope of LEAKY.
        high: Upper bound of CLAMP.
    """

    kind: ActivationKind = ActivationKind.CLAMP
    low: float = -math.inf
    high: float = math.inf

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value it can give, as far as it is known."""
        if self.kind is ActivationKind.CLAMP:
            return self.low, self.high
        return (0.0, 1.0) if self.kind is ActivationKind.SIGMOID else (-math.inf, math.inf)

    @property
    def keeps_zero(self) -> bool:
        """Whether it maps 0 to 0."""
        if self.kind is ActivationKind.CLAMP:
            return self.low <= 0 <= self.high
        return self.kind is not ActivationKind.SIGMOID

    def changes_nothing_in(self, bounds: tuple[float, float]) -> bool:
        """Whether every value within bounds is mapped to itself."""
        return self.kind is ActivationKind.CLAMP and self.low <= bounds[0] and bounds[1] <= self.high


IDENTITY = Act()

#: Floats of a packed copy of a layer's inputs, beyond which it costs more memory than it can save time.
LARGEST_PACKED = 1 << 21


@dataclass(eq=False)
class Map:
    """A value in the engine: the feature map of one image, or a vector of features.

    Attributes:
        shape: Shape of the tensor it stands for, the batch of one included.
        channels: Planes, or elements of a vector.
        size: Height and width of a plane; None for a vector.
        bounds: The smallest and the largest value it can hold, as far as it is known.
        channels_last: Whether channels are the last dimension of the tensor it stands for. Planes lie the same.
        base: The map in whose memory this one lies, if any.
        offset: Where it begins there, in planes.
    """

    shape: tuple[int, ...]
    channels: int
    size: tuple[int, int] | None
    bounds: tuple[float, float] = (-math.inf, math.inf)
    channels_last: bool = False
    base: Map | None = None
    offset: int = 0

    @property
    def is_planar(self) -> bool:
        """Whether this is a feature map of shape (1, C, H, W)."""
        return self.size is not None and not self.channels_last

    def storage(self) -> tuple[Map, int]:
        """The map that owns the memory, and where this one begins in it."""
        if self.base is None:
            return self, 0
        owner, offset = self.base.storage()
        return owner, offset + self.offset


def new_map(shape: tuple[int, ...], act: Act = IDENTITY) -> Map:
    """A map, or a vector if the shape is (1, F)."""
    return Map(shape, shape[1], (shape[2], shape[3]) if len(shape) == 4 else None, act.bounds)


def with_zero(bounds: tuple[float, float]) -> tuple[float, float]:
    """Bounds that also hold for channels that do not exist, or for padding."""
    return min(bounds[0], 0.0), max(bounds[1], 0.0)


@dataclass(frozen=True)
class Sliding:
    """A window and how it moves: rows and columns each; padding above and to the left."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def reach(self, axis: int) -> int:
        """How far the last tap lies beyond the output position, with stride 1."""
        return (self.kernel[axis] - 1) * self.dilation[axis] - self.padding[axis]

    def outside(self, size: tuple[int, int], output: tuple[int, int]) -> int:
        """How far windows reach beyond a map of this size, on whichever side it is farthest."""
        last = [(output[i] - 1) * self.stride[i] + self.reach(i) for i in (0, 1)]
        return max(0, *self.padding, *(last[i] - size[i] + 1 for i in (0, 1)))

    @property
    def has_four_taps_per_phase(self) -> bool:
        """Whether this is a square window of stride 2 of which each phase has four taps at most, and more than two."""
        (kernel, columns), (padding, left) = self.kernel, self.padding
        is_square = kernel == columns and padding == left and self.stride == (2, 2) and self.dilation == (1, 1)
        return is_square and 5 <= kernel <= 7 and (kernel - 1 - padding) // 2 - (-padding // 2) == 3

    def border(self, same_size: bool) -> int:
        """Columns of zeros between rows of the output that the engine needs to run this (see gather.h)."""
        needed = 0
        for axis in (0, 1):
            first = -self.padding[axis] // self.stride[axis]
            last = self.reach(axis) // self.stride[axis]
            in_place = same_size and self.stride == (1, 1)
            needed = max(needed, max(-first, last) if in_place else last - first)
        return needed


@dataclass(eq=False)
class Step:
    """One step of the engine; fields as in ``decouplify_step`` in engine.h.

    Attributes:
        name: What the user calls it: the module's name, or the operator's.
        node: The node of the lowered graph whose value this step completes.
        reads_part: Whether some channels of the input may not exist.
    """

    kind: StepKind
    name: str
    node: Node
    input: Map | None = None
    output: Map | None = None
    other: Map | None = None
    gate: int = -1
    slot: int = -1
    position: int = 0
    algorithm: Algorithm = Algorithm.DIRECT
    window: WindowKind = WindowKind.DEPTHWISE
    groups: int = 1
    sliding: Sliding = Sliding()
    act: Act = IDENTITY
    clears: bool = False
    counts_padding: bool = False
    leaves_constants: bool = False
    joined: int = 0
    reads_part: bool = False
    epsilon: float = 0.0
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def algorithms(self) -> tuple[Algorithm, ...]:
        """The ways this convolution can be computed; empty for any other step."""
        if self.kind is not StepKind.CONVOLUTION:
            return ()
        assert self.input is not None and self.output is not None and self.output.size is not None
        found = [Algorithm.DIRECT]
        rows = self.input.channels * math.prod(self.sliding.kernel)
        if self.groups == 1 and rows * math.prod(self.output.size) <= LARGEST_PACKED:
            found.append(Algorithm.PACKED)
        same_size = self.input.size == self.output.size
        if self.groups == 1 and same_size and self.sliding == Sliding(kernel=(3, 3), padding=(1, 1)):
            found += [Algorithm.WINOGRAD_2, Algorithm.WINOGRAD_4]
        if self.groups == 1 and self.sliding.has_four_taps_per_phase:
            found.append(Algorithm.WINOGRAD_STRIDED)
        return tuple(found)


@dataclass(eq=False)
class TorchCall:
    """A node that torch runs, since the engine has no step for it."""

    node: Node


@dataclass(eq=False)
class SetGate:
    """Give a gate that torch computed to the engine."""

    gate: int
    node: Node


@dataclass(eq=False)
class ReadGate:
    """Give a gate of the engine to torch."""

    gate: int
    node: Node


Item = Step | TorchCall | SetGate | ReadGate


@dataclass
class Draft:
    """A program whose maps have no place yet.

    Attributes:
        items: What happens, in order.
        gates: Filters of each gate, and the node that decides it.
        loads: For each slot that torch fills, the node whose value goes there.
        stores: For each slot that the engine fills, the node whose value comes from there, and its map.
        always_open: Controllers that need not run, because they open every filter whatever they see.
    """

    items: list[Item] = field(default_factory=list)
    gates: list[tuple[Node, int]] = field(default_factory=list)
    loads: dict[int, Node] = field(default_factory=dict)
    stores: dict[int, tuple[Node, Map]] = field(default_factory=dict)
    always_open: list[Node] = field(default_factory=list)

    @property
    def steps(self) -> list[Step]:
        """The engine's steps."""
        return [item for item in self.items if isinstance(item, Step)]

    @property
    def n_slots(self) -> int:
        """Slots that steps mention."""
        return len(self.loads) + len(self.stores)
