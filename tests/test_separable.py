"""A convolution, a depthwise one and a 1x1 one in bands of rows give what they give one after another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import decouplify
from decouplify.sparse import bands, native
from decouplify.sparse.drafts import Act, Draft, Map, Sliding, Step
from decouplify.sparse.executor import build_plan
from decouplify.sparse.memory import place
from decouplify.sparse.native import StepKind
from native_steps import ACTS, NODE, _is_valid, _lists, flags, kernels_of, slidings
from toynets import SIZE, Classifier, conv_bn_relu, random_images, randomise_gates, randomise_statistics, run

pytestmark = [
    pytest.mark.skipif(native.engine() is None, reason=native.reason_for_absence()),
    pytest.mark.usefixtures("joins_small_maps"),
]

POINT = Sliding()


@dataclass
class Case:
    """Which channels exist, which filters are open, and how the first two convolutions slide.

    Attributes:
        inner: Filters that are open in the first two convolutions.
        outer: Those of the last one.
        residual: Whether the input is added to the result.
    """

    size: tuple[int, int]
    first: Sliding
    sliding: Sliding
    channels: list[bool]
    inner: list[bool]
    outer: list[bool]
    acts: tuple[Act, Act, Act]
    residual: bool = False
    n_threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        c, k, p = len(self.channels), len(self.inner), len(self.outer)
        shapes = {
            "x": (1, c, *self.size), "w1": (k, c, *self.first.kernel), "b1": (k,),
            "w2": (k, 1, *self.sliding.kernel), "b2": (k,), "w3": (p, k, 1, 1), "b3": (p,),
        }  # fmt: skip
        self.tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}

    @property
    def is_expand(self) -> bool:
        """Whether the first two are one step anyway."""
        return self.first == POINT and self.acts[0] == self.acts[1]


def expected(case: Case) -> list[Tensor]:
    """What each convolution gives, by the obvious formula in double precision."""
    x, w1, b1, w2, b2, w3, b3 = (t.double() for t in case.tensors.values())
    f, s, (act1, act2, act3) = case.first, case.sliding, (ACTS[act] for act in case.acts)
    z, z3 = flags(case.inner)[:, None, None], flags(case.outer)[:, None, None]
    x = x * flags(case.channels)[:, None, None]
    expanded = act1(F.conv2d(x, w1, b1, f.stride, f.padding, f.dilation)) * z
    slid = act2(F.conv2d(expanded, w2, b2, s.stride, s.padding, s.dilation, len(w2))) * z
    y = F.conv2d(slid, w3, b3) * z3
    return [expanded, slid, act3(y + x if case.residual else y) * (1 if case.residual else z3)]


def map_like(t: Tensor, base: Map | None = None) -> Map:
    return Map(tuple(t.shape), t.shape[1], (t.shape[2], t.shape[3]), base=base)


def steps_of(case: Case, wanted: list[Tensor]) -> list[Step]:
    """The steps of the three convolutions, joined, after those that load the input and before those that store."""
    w, (act1, act2, act3) = case.tensors, case.acts
    x = map_like(w["x"])
    partial, expanded, slid, y = map_like(w["x"], x), *map(map_like, wanted)
    means = Map(tuple(y.shape[:2]), y.channels, None)
    first = {"weight": w["w1"], "bias": w["b1"]}
    second = {"weight": w["w2"], "bias": w["b2"]}
    if case.is_expand:
        both = {**second, "weight2": w["w1"], "bias2": w["b1"]}
        steps = [Step(StepKind.EXPAND, "", NODE, partial, slid, gate=1, sliding=case.sliding, act=act1, weights=both)]
    else:
        steps = [
            Step(
                StepKind.CONVOLUTION, "", NODE, partial, expanded, gate=1, sliding=case.first, act=act1, weights=first
            ),
            Step(StepKind.WINDOW, "", NODE, expanded, slid, gate=1, sliding=case.sliding, act=act2, weights=second),
        ]
    other = partial if case.residual else None
    third = {"weight": w["w3"], "bias": w["b3"]}
    steps.append(Step(StepKind.CONVOLUTION, "", NODE, slid, y, other, gate=2, act=act3, weights=third))
    return [
        Step(StepKind.LOAD, "x", NODE, output=x, slot=0),
        Step(StepKind.MASK, "x", NODE, input=x, output=partial, gate=0),
        *steps,
        Step(StepKind.MEAN, "means", NODE, input=y, output=means),
        Step(StepKind.STORE, "y", NODE, input=y, slot=1),
        Step(StepKind.STORE, "means", NODE, input=means, slot=2),
    ]


def found(case: Case, wanted: list[Tensor], joined: bool) -> tuple[Tensor, Tensor, int]:
    """The engine's result, the means over its pixels, and the multiply-accumulates."""
    gates = [case.channels, case.inner, case.outer]
    draft = Draft(gates=[(NODE, len(gate)) for gate in gates], loads={0: NODE})
    draft.items += steps_of(case, wanted)
    if joined:
        bands.join_bands(draft)
        assert draft.steps[2].joined == (1 if case.is_expand else 2)
    plan, kept = build_plan(draft, place(draft))
    workspace = native.Workspace(plan)
    for i, gate in enumerate(gates):
        workspace.set_gate(i, flags(gate))
    result, averages = torch.empty(wanted[-1].shape), torch.empty(wanted[-1].shape[:2])
    slots = native.slots_of([t.data_ptr() for t in (case.tensors["x"], result, averages)])
    for _ in range(2):  # the second run must not depend on what the first one left behind
        result.fill_(torch.nan)
        assert workspace.run(0, plan.n_steps, slots, case.n_threads) is native.Status.DONE
    assert kept
    return result, averages, workspace.take_macs()


def assert_same(case: Case) -> None:
    wanted = expected(case)
    y, means, n_macs = found(case, wanted, joined=True)
    # Two sums in a row: errors are relative to what the intermediate maps hold.
    scale = max(1.0, *(float(t.abs().max()) for t in wanted)) * 3e-5
    assert float((y - wanted[-1]).abs().max()) <= scale
    assert float((means - wanted[-1].mean((2, 3))).abs().max()) <= scale
    assert n_macs == found(case, wanted, joined=False)[2]


@st.composite
def cases(draw: Any) -> Case:
    size = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    first = draw(st.one_of(st.just(POINT), slidings()))
    assume(_is_valid(size, first))
    sliding = draw(slidings())
    between = tuple(
        (n + 2 * first.padding[i] - first.dilation[i] * (first.kernel[i] - 1) - 1) // first.stride[i] + 1
        for i, n in enumerate(size)
    )
    assume(_is_valid(between, sliding))  # type: ignore[arg-type]
    act, channels = draw(st.sampled_from(list(ACTS))), draw(_lists(draw(st.integers(1, 12))))
    same = Sliding(sliding.kernel, padding=(sliding.kernel[0] // 2, sliding.kernel[1] // 2))
    is_odd = sliding.kernel[0] % 2 == sliding.kernel[1] % 2 == 1
    residual = first == POINT and sliding == same and is_odd and draw(st.booleans())
    return Case(
        size=size,
        first=first,
        sliding=sliding,
        channels=channels,
        inner=draw(_lists(draw(st.integers(1, 40)))),
        outer=draw(_lists(len(channels) if residual else draw(st.integers(1, 14)))),
        acts=(act, draw(st.sampled_from([act, Act(low=0.0)])), draw(st.sampled_from(list(ACTS)))),
        residual=residual,
        n_threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 1000)),
    )


@given(case=cases())
def test_bands_give_what_the_three_give_one_after_another(case: Case) -> None:
    assert_same(case)


@pytest.mark.parametrize("name", ["avx512", "avx2", "generic"])
@pytest.mark.parametrize("side", [112, 57, 23])
def test_every_instruction_set_in_several_bands(name: str, side: int) -> None:
    relu6 = Act(low=0.0, high=6.0)
    with kernels_of(name):
        for first, stride in ((Sliding((3, 3), (2, 2), (1, 1)), 1), (POINT, 2), (POINT, 1)):
            for kernel, n_threads in ((3, 1), (5, 2), (3, 3)):
                sliding = Sliding((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2))
                halves = [[i % 2 == 0 for i in range(n)] for n in (24, 72, 24)]
                residual = first == POINT and stride == 1
                acts = (relu6, relu6, Act())
                assert_same(Case((side, side), first, sliding, *halves, acts, residual, n_threads))


class Block(Classifier):
    """What MobileNets begin with: a stem, a depthwise convolution, and an inverted residual block."""

    def __init__(self, spy: bool = False) -> None:
        super().__init__(8)
        self.first = conv_bn_relu(8, 12, kernel=3)
        self.second, self.third = conv_bn_relu(12, 12, groups=12), nn.Conv2d(12, 8, 1)
        self.expand, self.depthwise = conv_bn_relu(8, 24, kernel=1), conv_bn_relu(24, 24, groups=24)
        self.project = nn.Conv2d(24, 8, 1)
        self.other = nn.Conv2d(12, 8, 1) if spy else None

    def body(self, x: Tensor) -> Tensor:
        slid = self.second(self.first(x))
        y = self.third(slid)
        y = y + self.project(self.depthwise(self.expand(y)))
        return y if self.other is None else y + self.other(slid)


@pytest.mark.parametrize("spy", [False, True])
def test_a_network_joins_what_nobody_else_reads(spy: bool) -> None:
    model = decouplify.wrap(randomise_statistics(Block(spy)), SIZE, only=["expand*", "depthwise*"], reduction=1)
    fast = decouplify.sparsify(randomise_gates(model).eval())
    program = fast.program_for(SIZE)
    assert program is not None
    assert [step.joined for step in program.steps if step.joined] == ([1] if spy else [2, 1])
    images = random_images(4)
    assert torch.allclose(run(fast, images)[0], run(model, images)[0], rtol=1e-4, atol=1e-5)
    assert decouplify.verify(model, fast, images).max_error <= 1e-5


def test_only_large_maps_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decouplify.wrap(randomise_statistics(Block()), SIZE, only=["expand*", "depthwise*"], reduction=1)
    randomise_gates(model).eval()

    def steps(limit: int) -> list[Step]:
        monkeypatch.setattr(bands, "SMALLEST_MAP", limit)
        program = decouplify.sparsify(model).program_for(SIZE)
        assert program is not None
        return program.steps

    window = next(step for step in steps(0) if step.kind is StepKind.WINDOW)
    assert window.output is not None
    assert window.output.size is not None
    n_floats = 12 * math.prod(window.output.size)
    # The second map has twice as many channels, of which a gate is expected to open half.
    assert [step.joined for step in steps(n_floats) if step.joined] == [2, 1]
    assert [step.joined for step in steps(n_floats + 1) if step.joined] == []
