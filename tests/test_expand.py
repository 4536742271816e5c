"""A 1x1 convolution and the depthwise one after it in one step give what both give one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import decouplify
from decouplify.sparse import native
from decouplify.sparse.drafts import Act, Draft, Map, Sliding, Step
from decouplify.sparse.executor import build_plan
from decouplify.sparse.memory import place
from decouplify.sparse.native import StepKind
from native_steps import ACTS, NODE, _is_valid, _lists, flags, kernels_of, slidings
from toynets import SIZE, Classifier, conv_bn_relu, random_images, randomise_gates, randomise_statistics, run

pytestmark = pytest.mark.skipif(native.engine() is None, reason=native.reason_for_absence())


@dataclass
class Case:
    """Channels that exist, filters that are open in both convolutions, and how the second one slides."""

    size: tuple[int, int]
    sliding: Sliding
    channels: list[bool]
    filters: list[bool]
    act: Act
    n_threads: int
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        c, k = len(self.channels), len(self.filters)
        shapes = {
            "x": (1, c, *self.size),
            "w1": (k, c, 1, 1),
            "b1": (k,),
            "w2": (k, 1, *self.sliding.kernel),
            "b2": (k,),
        }
        self.tensors = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def expected(case: Case) -> Tensor:
    """The obvious formula in double precision."""
    x, w1, b1, w2, b2 = (t.double() for t in case.tensors.values())
    act, s, z = ACTS[case.act], case.sliding, flags(case.filters)[:, None, None]
    expanded = act(F.conv2d(x * flags(case.channels)[:, None, None], w1, b1)) * z
    return act(F.conv2d(expanded, w2, b2, s.stride, s.padding, s.dilation, len(w2))) * z


def found(case: Case, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The engine's result, and the means over its pixels."""
    x = Map((1, len(case.channels), *case.size), len(case.channels), case.size)
    partial, y = Map(x.shape, x.channels, x.size, base=x), Map(tuple(shape), shape[1], (shape[2], shape[3]))
    means = Map(tuple(shape[:2]), shape[1], None)
    w = case.tensors
    weights = {"weight": w["w2"], "bias": w["b2"], "weight2": w["w1"], "bias2": w["b1"]}
    draft = Draft(gates=[(NODE, len(case.channels)), (NODE, len(case.filters))], loads={0: NODE})
    draft.items += [
        Step(StepKind.LOAD, "x", NODE, output=x, slot=0),
        Step(StepKind.MASK, "x", NODE, input=x, output=partial, gate=0),
        Step(StepKind.EXPAND, "", NODE, partial, y, gate=1, sliding=case.sliding, act=case.act, weights=weights),
        Step(StepKind.MEAN, "means", NODE, input=y, output=means),
        Step(StepKind.STORE, "y", NODE, input=y, slot=1),
        Step(StepKind.STORE, "means", NODE, input=means, slot=2),
    ]
    plan, kept = build_plan(draft, place(draft))
    workspace = native.Workspace(plan)
    workspace.set_gate(0, flags(case.channels))
    workspace.set_gate(1, flags(case.filters))
    result, averages = torch.empty(shape), torch.empty(shape[:2])
    slots = native.slots_of([t.data_ptr() for t in (w["x"], result, averages)])
    for _ in range(2):  # the second run must not depend on what the first one left behind
        result.fill_(torch.nan)
        assert workspace.run(0, plan.n_steps, slots, case.n_threads) is native.Status.DONE
    assert kept
    n_pixels, n_open, n_channels = shape[2:].numel(), sum(case.filters), sum(case.channels)
    height, width = case.size
    n_taps = case.sliding.kernel[0] * case.sliding.kernel[1]
    assert workspace.take_macs() == 2 * n_open * (n_channels * height * width + n_pixels * n_taps)
    return result, averages


def assert_same(case: Case) -> None:
    wanted = expected(case)
    y, means = found(case, wanted.shape)
    scale = max(1.0, float(wanted.abs().max())) * 2e-5
    assert float((y - wanted).abs().max()) <= scale
    assert float((means - wanted.mean((2, 3))).abs().max()) <= scale


@st.composite
def cases(draw: Any) -> Case:
    size, sliding = (draw(st.integers(1, 40)), draw(st.integers(1, 40))), draw(slidings())
    assume(_is_valid(size, sliding))
    return Case(
        size=size,
        sliding=sliding,
        channels=draw(_lists(draw(st.integers(1, 12)))),
        filters=draw(_lists(draw(st.integers(1, 40)))),
        act=draw(st.sampled_from(list(ACTS))),
        n_threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 1000)),
    )


@given(case=cases())
def test_the_step_computes_both_convolutions(case: Case) -> None:
    assert_same(case)


@pytest.mark.parametrize("name", ["avx512", "avx2", "generic"])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_instruction_set_on_the_sizes_of_real_networks(name: str, kernel: int, stride: int) -> None:
    with kernels_of(name):
        # In several bands, in one, and with the input packed.
        for side, n_channels in ((112, 24), (56, 24), (7, 24), (14, 500), (7, 160)):
            sliding = Sliding((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2))
            channels, filters = [i % 2 == 0 for i in range(n_channels)], [i % 2 == 0 for i in range(40)]
            for n_threads in (1, 2):
                assert_same(Case((side, side), sliding, channels, filters, Act(low=0.0, high=6.0), n_threads))


class Inverted(Classifier):
    """An inverted residual block; ``other`` also reads the expanded map of the second one."""

    def __init__(self, spy: bool) -> None:
        super().__init__(8)
        self.expand, self.depthwise = conv_bn_relu(8, 24, kernel=1), conv_bn_relu(24, 24, groups=24)
        self.project = nn.Conv2d(24, 8, 1)
        self.other = nn.Conv2d(24, 8, 1) if spy else None

    def body(self, x: Tensor) -> Tensor:
        y = self.expand(x)
        x = x + self.project(self.depthwise(y))
        return x if self.other is None else x + self.other(y)


@pytest.mark.parametrize("spy", [False, True])
def test_a_network_uses_it_where_nobody_else_reads_the_expanded_map(spy: bool) -> None:
    model = decouplify.wrap(randomise_statistics(Inverted(spy)), SIZE, only=["expand*", "depthwise*"], reduction=1)
    fast = decouplify.sparsify(randomise_gates(model).eval())
    program = fast.program_for(SIZE)
    assert program is not None
    assert sum(step.kind is StepKind.EXPAND for step in program.steps) == (not spy)
    images = random_images(4)
    assert torch.allclose(run(fast, images)[0], run(model, images)[0], rtol=1e-4, atol=1e-5)
    assert decouplify.verify(model, fast, images).max_error <= 1e-5
