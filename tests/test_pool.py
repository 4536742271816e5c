"""Maxima of stride 2, alone and in bands of rows with the convolution before them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import decouplify
from decouplify.sparse import bands, native
from decouplify.sparse.drafts import IDENTITY, Act, Draft, Map, Sliding, Step
from decouplify.sparse.executor import build_plan
from decouplify.sparse.memory import place
from decouplify.sparse.native import Algorithm, StepKind, WindowKind
from native_steps import ACTS, NODE, STRIDED, _is_valid, _lists, flags, kernels_of
from toynets import Classifier, random_images, randomise_gates, randomise_statistics, run

pytestmark = [
    pytest.mark.skipif(native.engine() is None, reason=native.reason_for_absence()),
    pytest.mark.usefixtures("joins_small_maps"),
]

#: Kernel and padding of the windows that are computed row by row.
WINDOWS = [(2, 0), (3, 0), (3, 1)]
SETS = ["avx512", "avx2", "generic"]


def pooled(x: Tensor, window: tuple[int, int], ceil: bool) -> Tensor:
    return F.max_pool2d(x, window[0], 2, window[1], ceil_mode=ceil)


def map_like(t: Tensor) -> Map:
    return Map(tuple(t.shape), t.shape[1], (t.shape[2], t.shape[3]))


def sliding_of(window: tuple[int, int]) -> Sliding:
    return Sliding((window[0],) * 2, (2, 2), (window[1],) * 2)


def pool_step(x: Map, y: Map, window: tuple[int, int]) -> Step:
    return Step(StepKind.WINDOW, "pool", NODE, x, y, sliding=sliding_of(window), window=WindowKind.MAX)


def tail(y: Map) -> list[Step]:
    means = Map(y.shape[:2], y.channels, None)
    return [
        Step(StepKind.MEAN, "means", NODE, input=y, output=means),
        Step(StepKind.STORE, "y", NODE, input=y, slot=1),
        Step(StepKind.STORE, "means", NODE, input=means, slot=2),
    ]


def run_twice(plan: native.Plan, x: Tensor, y: Tensor, gates: list[list[bool]], n_threads: int) -> tuple[Tensor, int]:
    """The means over the pixels, and the multiply-accumulates of one run; y is filled."""
    workspace, means = native.Workspace(plan), torch.empty(y.shape[:2])
    for i, gate in enumerate(gates):
        workspace.set_gate(i, flags(gate))
    slots = native.slots_of([t.data_ptr() for t in (x, y, means)])
    for _ in range(2):  # the second run must not depend on what the first one left behind
        y.fill_(torch.nan)
        workspace.take_macs()
        assert workspace.run(0, plan.n_steps, slots, n_threads) is native.Status.DONE
    return means, workspace.take_macs()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("ceil", [False, True])
def test_maxima_are_those_of_torch(name: str, window: tuple[int, int], ceil: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    with kernels_of(name):
        for height, width in ((2, 3), (7, 8), (9, 31), (8, 32), (5, 33), (14, 64), (3, 65), (112, 112)):
            if min(height, width) + 2 * window[1] < window[0]:
                continue
            x = torch.randn(1, 3, height, width, generator=generator) - 3  # zeros of the border would win
            x[0, 1, ::3, ::2] = -torch.inf
            x[0, 2, height // 2, width // 2] = torch.nan
            wanted = pooled(x, window, ceil)
            source, y = map_like(x), map_like(wanted)
            draft = Draft(loads={0: NODE})
            draft.items += [
                Step(StepKind.LOAD, "x", NODE, output=source, slot=0),
                pool_step(source, y, window),
                *tail(y),
            ]
            plan, _ = build_plan(draft, place(draft))
            result = torch.empty(wanted.shape)
            means, _ = run_twice(plan, x, result, [], n_threads=2)
            assert torch.equal(result.nan_to_num(9e9), wanted.nan_to_num(9e9))
            torch.testing.assert_close(means, wanted.mean((2, 3)), equal_nan=True)


@dataclass
class Case:
    """A convolution of stride 2 and a pooling, which channels exist, and which filters are open."""

    size: tuple[int, int]
    sliding: Sliding
    window: tuple[int, int]
    ceil: bool
    channels: list[bool]
    filters: list[bool]
    act: Act
    n_threads: int = 1


def assert_same(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    n_channels, n_filters = len(case.channels), len(case.filters)
    x = torch.randn(1, n_channels, *case.size, generator=generator)
    weight = torch.randn(n_filters, n_channels, *case.sliding.kernel, generator=generator)
    bias = torch.randn(n_filters, generator=generator)
    masked = x.double() * flags(case.channels)[:, None, None]
    open_filters = flags(case.filters)[:, None, None]
    y = ACTS[case.act](F.conv2d(masked, weight.double(), bias.double(), 2, case.sliding.padding))
    wanted = pooled(y, case.window, case.ceil) * open_filters
    joined = found(case, x, weight, bias, y, wanted, joins=True)
    scale = max(1.0, float(y.abs().max())) * 3e-5
    assert float((joined[0] - wanted).abs().max()) <= scale
    assert float((joined[1] - wanted.mean((2, 3))).abs().max()) <= scale
    apart = found(case, x, weight, bias, y, wanted, joins=False)
    assert torch.equal(joined[0], apart[0])
    assert joined[2] == apart[2]


def found(
    case: Case, x: Tensor, weight: Tensor, bias: Tensor, between: Tensor, wanted: Tensor, joins: bool
) -> tuple[Tensor, Tensor, int]:
    """The engine's result, the means over its pixels, and the multiply-accumulates."""
    source, middle, y = map_like(x), map_like(between), map_like(wanted)
    partial = Map(source.shape, source.channels, source.size, base=source)
    conv = Step(
        StepKind.CONVOLUTION, "conv", NODE, partial, middle, gate=1, sliding=case.sliding, act=case.act,
        weights={"weight": weight, "bias": bias},
    )  # fmt: skip
    draft = Draft(gates=[(NODE, len(case.channels)), (NODE, len(case.filters))], loads={0: NODE})
    draft.items += [
        Step(StepKind.LOAD, "x", NODE, output=source, slot=0),
        Step(StepKind.MASK, "x", NODE, input=source, output=partial, gate=0),
        conv,
        pool_step(middle, y, case.window),
        *tail(y),
    ]
    if joins:
        bands.join_bands(draft)
        assert conv.joined == 1
    plan, kept = build_plan(draft, place(draft))
    transformed = native.transform_weights(weight, Algorithm.WINOGRAD_STRIDED, case.sliding.padding[0])
    plan.set_algorithm(2, Algorithm.WINOGRAD_STRIDED, transformed)
    result = torch.empty(wanted.shape)
    means, n_macs = run_twice(plan, x, result, [case.channels, case.filters], case.n_threads)
    assert kept
    return result, means, n_macs


@st.composite
def cases(draw: st.DrawFn) -> Case:
    size = (draw(st.integers(1, 120)), draw(st.integers(1, 80)))
    sliding, window = draw(st.sampled_from(STRIDED)), draw(st.sampled_from(WINDOWS))
    assume(_is_valid(size, sliding))
    height, width = ((n + 2 * sliding.padding[0] - sliding.kernel[0]) // 2 + 1 for n in size)
    assume(_is_valid((height, width), sliding_of(window)))
    n_filters = draw(st.sampled_from([1, 5, 12, 300]))  # so many that a band is a few rows
    return Case(
        size=size,
        sliding=sliding,
        window=window,
        ceil=draw(st.booleans()),
        channels=draw(_lists(draw(st.integers(1, 4)))),
        filters=draw(_lists(n_filters) if n_filters < 300 else st.just([i % 40 == 7 for i in range(300)])),
        act=draw(st.sampled_from([IDENTITY, Act(low=0.0)])),
        n_threads=draw(st.integers(1, 3)),
    )


@given(case=cases())
def test_a_pooled_stem_in_bands_is_the_convolution_and_then_the_pooling(case: Case) -> None:
    assert_same(case)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("window", WINDOWS)
def test_the_stem_of_a_resnet_in_several_bands(name: str, window: tuple[int, int]) -> None:
    stem = Sliding((7, 7), (2, 2), (3, 3))
    with kernels_of(name):
        for size, ceil, n_threads in (((224, 224), False, 1), (((150, 201)), True, 2)):
            filters = [i % 3 != 1 for i in range(64)]
            assert_same(Case(size, stem, window, ceil, [True] * 3, filters, Act(low=0.0), n_threads))


class PooledStem(Classifier):
    """What a ResNet begins with; `spy` also reads what the pooling reads."""

    def __init__(self, spy: bool = False) -> None:
        super().__init__(12)
        self.first, self.norm = nn.Conv2d(12, 12, 7, 2, 3, bias=False), nn.BatchNorm2d(12)
        self.last, self.spy = nn.Conv2d(12, 12, 3, padding=1), spy

    def body(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        y = self.last(F.max_pool2d(x, 3, 2, 1))
        return y + F.avg_pool2d(x, 2) if self.spy else y


@pytest.mark.parametrize("spy", [False, True])
def test_a_network_joins_its_stem_and_pooling_if_nobody_else_reads_the_map(spy: bool) -> None:
    model = decouplify.wrap(randomise_statistics(PooledStem(spy)), (3, 48, 48), only=["last"], reduction=1)
    fast = decouplify.sparsify(randomise_gates(model).eval())
    program = fast.program_for((3, 48, 48))
    assert program is not None
    assert [step.joined for step in program.steps if step.joined] == ([] if spy else [1])
    stem = next(i for i, step in enumerate(program.steps) if Algorithm.WINOGRAD_STRIDED in step.algorithms)
    images = random_images(4, (3, 48, 48))
    for algorithm in (Algorithm.WINOGRAD_STRIDED, Algorithm.DIRECT):  # in bands, and one after another
        program.set_algorithm(stem, algorithm)
        assert torch.allclose(run(fast, images)[0], run(model, images)[0], rtol=1e-4, atol=1e-5)
