"""Single steps of the engine and what torch says they should give, for tests and for the sanitizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph

from decouplify.sparse import native
from decouplify.sparse.drafts import IDENTITY, Act, Draft, Map, Sliding, Step
from decouplify.sparse.executor import build_plan
from decouplify.sparse.memory import place
from decouplify.sparse.native import ActivationKind, Algorithm, StepKind, WindowKind

NODE = Graph().placeholder("x")

ACTS = {
    IDENTITY: lambda x: x,
    Act(low=0.0): F.relu,
    Act(low=0.0, high=6.0): F.relu6,
    Act(ActivationKind.SILU): F.silu,
    Act(ActivationKind.HARDSWISH): F.hardswish,
    Act(ActivationKind.GELU): F.gelu,
    Act(ActivationKind.GELU_TANH): lambda x: F.gelu(x, approximate="tanh"),
    Act(ActivationKind.LEAKY, low=0.125): lambda x: F.leaky_relu(x, 0.125),
}


#: Convolutions with stride 2 that Winograd can compute.
STRIDED = tuple(
    s
    for kernel in (5, 6, 7)
    for padding in range(4)
    if (s := Sliding((kernel, kernel), (2, 2), (padding, padding))).has_four_taps_per_phase
)


@dataclass
class Case:
    """One convolution or window with lists of filters and channels.

    Attributes:
        channels: Per input channel whether it exists.
        filters: Per filter (or channel of a depthwise convolution) whether it is open.
        residual: Per filter whether the value to add exists; None to add nothing.
    """

    size: tuple[int, int]
    sliding: Sliding
    channels: list[bool]
    filters: list[bool]
    groups: int = 1
    act: Act = IDENTITY
    algorithm: Algorithm = Algorithm.DIRECT
    residual: list[bool] | None = None
    n_threads: int = 1
    seed: int = 0
    kind: StepKind = StepKind.CONVOLUTION
    window: WindowKind = WindowKind.DEPTHWISE

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        n_channels, n_filters = len(self.channels), len(self.filters)
        fan_in = n_channels // self.groups if self.kind is StepKind.CONVOLUTION else 1
        self.x = random(1, n_channels, *self.size)
        self.weight, self.bias = random(n_filters, fan_in, *self.sliding.kernel), random(n_filters)
        self.other = random(1, n_filters, *self.output_size)

    @property
    def output_size(self) -> tuple[int, int]:
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.size,
                self.sliding.padding,
                self.sliding.dilation,
                self.sliding.kernel,
                self.sliding.stride,
                strict=True,
            )
        )
        return height, width


@contextmanager
def kernels_of(name: str) -> Iterator[None]:
    """Run with the kernels of one instruction set; the test is skipped where they cannot run."""
    chosen, engine = native.instruction_set(), native.engine()
    assert engine is not None
    if not engine.select(name.encode()):
        pytest.skip(f"not compiled, or not for this CPU: {name}")
    try:
        yield
    finally:
        engine.select(chosen.encode())


def flags(values: list[bool]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def expected(case: Case) -> Tensor:
    """The obvious formula in double precision."""
    x = case.x.double() * flags(case.channels)[:, None, None]
    s = case.sliding
    if case.kind is StepKind.WINDOW and case.window is WindowKind.MAX:
        y = F.max_pool2d(x, s.kernel, s.stride, s.padding, s.dilation)
        return y * flags(case.channels)[:, None, None]
    if case.kind is StepKind.WINDOW and case.window is WindowKind.AVERAGE:
        return F.avg_pool2d(x, s.kernel, s.stride, s.padding)
    groups = len(case.channels) if case.kind is StepKind.WINDOW else case.groups
    y = F.conv2d(x, case.weight.double(), case.bias.double(), s.stride, s.padding, s.dilation, groups)
    open_filters = flags(case.filters)[:, None, None]
    if case.residual is None:
        return ACTS[case.act](y) * open_filters
    return ACTS[case.act](y * open_filters + case.other.double() * flags(case.residual)[:, None, None])


def found(case: Case) -> tuple[Tensor, Tensor]:
    """The engine's result, and the mean over the pixels of each channel, which comes with it for free."""
    draft = _draft(case)
    plan, kept = build_plan(draft, place(draft))
    step = draft.steps.index(next(s for s in draft.steps if s.kind is case.kind))
    transformed = None
    if case.algorithm.is_winograd:
        transformed = native.transform_weights(case.weight, case.algorithm, case.sliding.padding[0])
    plan.set_algorithm(step, case.algorithm, transformed)
    workspace = native.Workspace(plan)
    for gate, values in enumerate((case.channels, case.filters, case.residual)):
        if values is not None:
            workspace.set_gate(gate, flags(values))
    y, means = torch.empty(1, len(case.filters), *case.output_size), torch.empty(1, len(case.filters))
    slots = native.slots_of([t.data_ptr() for t in (case.x, case.other, y, means)])
    # Twice: the second run must not depend on what the first one left behind.
    for _ in range(2):
        y.fill_(torch.nan)
        assert workspace.run(0, plan.n_steps, slots, case.n_threads) is native.Status.DONE
    assert kept
    return y, means


def _draft(case: Case) -> Draft:
    x = Map(tuple(case.x.shape), len(case.channels), case.size)
    partial = Map(x.shape, x.channels, x.size, base=x)
    shape = (1, len(case.filters), *case.output_size)
    y = Map(shape, shape[1], case.output_size)
    means = Map(shape[:2], shape[1], None)
    draft = Draft(gates=[(NODE, len(case.channels)), (NODE, len(case.filters))], loads={0: NODE})
    draft.items += [
        Step(StepKind.LOAD, "x", NODE, output=x, slot=0),
        Step(StepKind.MASK, "x", NODE, input=x, output=partial, gate=0),
    ]
    step = Step(
        case.kind, "step", NODE, input=partial, output=y, gate=1, groups=case.groups, sliding=case.sliding,
        act=case.act, window=case.window, counts_padding=True, weights={"weight": case.weight, "bias": case.bias},
    )  # fmt: skip
    if case.residual is not None:
        other, masked = Map(shape, shape[1], y.size), Map(shape, shape[1], y.size)
        masked.base = other
        draft.gates.append((NODE, len(case.residual)))
        draft.items += [
            Step(StepKind.LOAD, "other", NODE, output=other, slot=1),
            Step(StepKind.MASK, "other", NODE, input=other, output=masked, gate=2),
        ]
        step.other = masked
    draft.items += [
        step,
        Step(StepKind.MEAN, "means", NODE, input=y, output=means),
        Step(StepKind.STORE, "y", NODE, input=y, slot=2),
        Step(StepKind.STORE, "means", NODE, input=means, slot=3),
    ]
    return draft


def _lists(n: int) -> st.SearchStrategy[list[bool]]:
    """Any subset; none and all more often than chance would have them."""
    return st.one_of(st.just([False] * n), st.just([True] * n), st.lists(st.booleans(), min_size=n, max_size=n))


@st.composite
def slidings(draw: Any, largest: int = 7) -> Sliding:
    """Kernels up to 7 x 7, strides up to 9, dilation up to 3, padding as torch allows it."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel = draw(st.sampled_from([(1, 1), (3, 3)])) if draw(st.booleans()) else pair(1, largest)
    stride = draw(st.sampled_from([(1, 1), (2, 2)])) if draw(st.booleans()) else pair(1, 9)
    dilation = (1, 1) if draw(st.booleans()) else pair(1, 3)
    padding = draw(st.integers(0, kernel[0])), draw(st.integers(0, kernel[1]))
    return Sliding(kernel, stride, padding, dilation)


@st.composite
def convolutions(draw: Any) -> Case:
    """Convolutions of odd sizes, with groups, sums and activations."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    n_channels, n_filters = groups * draw(st.integers(1, 12)), groups * draw(st.integers(1, 20))
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    three = Sliding((3, 3), padding=(1, 1))
    sliding = draw(st.sampled_from([three, *STRIDED]) | slidings())
    assume(_is_valid(size, sliding))
    ways = [Algorithm.DIRECT]
    if groups == 1:
        ways.append(Algorithm.PACKED)
        ways += [Algorithm.WINOGRAD_2, Algorithm.WINOGRAD_4] if sliding == three else []
        ways += [Algorithm.WINOGRAD_STRIDED] if sliding.has_four_taps_per_phase else []
    return Case(
        size=size,
        sliding=sliding,
        channels=draw(_lists(n_channels)),
        filters=draw(_lists(n_filters)),
        groups=groups,
        act=draw(st.sampled_from(list(ACTS))),
        algorithm=draw(st.sampled_from(ways)),
        residual=draw(st.none() | _lists(n_filters)),
        n_threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def windows(draw: Any) -> Case:
    """Depthwise convolutions and pooling of odd sizes."""
    kind = draw(st.sampled_from(list(WindowKind)))
    sliding = draw(slidings())
    if kind is not WindowKind.DEPTHWISE:
        half = sliding.kernel[0] // 2, sliding.kernel[1] // 2
        padding = min(sliding.padding[0], half[0]), min(sliding.padding[1], half[1])
        sliding = Sliding(
            sliding.kernel, sliding.stride, padding, (1, 1) if kind is WindowKind.AVERAGE else sliding.dilation
        )
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    n = draw(st.integers(1, 10))
    assume(_is_valid(size, sliding))
    case = Case(
        size=size,
        sliding=sliding,
        channels=draw(_lists(n)),
        filters=draw(_lists(n)) if kind is WindowKind.DEPTHWISE else [True] * n,
        groups=n,
        act=draw(st.sampled_from(list(ACTS))) if kind is WindowKind.DEPTHWISE else IDENTITY,
        n_threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 1000)),
        kind=StepKind.WINDOW,
        window=kind,
    )
    assume(bool(expected(case).isfinite().all()))  # a dilated window may see no pixel, and then has no maximum
    return case


def _is_valid(size: tuple[int, int], sliding: Sliding) -> bool:
    return all(size[i] + 2 * sliding.padding[i] > sliding.dilation[i] * (sliding.kernel[i] - 1) for i in (0, 1))
