"""The engine computes what torch does, whatever the shapes, the lists and the instruction set."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from conftest import ROOT, resident_bytes
from decouplify.sparse import native
from decouplify.sparse.drafts import Act, Sliding
from decouplify.sparse.native import ActivationKind, Algorithm, StepKind, WindowKind
from native_steps import STRIDED, Case, convolutions, expected, found, kernels_of, windows

pytestmark = pytest.mark.skipif(native.engine() is None, reason=native.reason_for_absence())

INSTRUCTION_SETS = ("avx512", "avx2", "generic")
#: All that compute a 3x3 convolution with stride 1.
SAME_SIZE = tuple(a for a in Algorithm if a is not Algorithm.WINOGRAD_STRIDED)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels_of(request.param):
        yield request.param


def tolerance(case: Case) -> float:
    """Relative to the largest value that enters a sum; the larger Winograd tile loses more."""
    per_product = 1e-5 if case.algorithm.is_winograd else 2e-6
    # Chebyshev fits of exponential and error function.
    return per_product + (2e-6 if case.act.kind is not ActivationKind.CLAMP else 0.0)


def assert_same(case: Case) -> None:
    y, means = found(case)
    wanted = expected(case)
    scale = max(1.0, float(wanted.abs().max()), float(case.x.abs().max() * case.weight.abs().sum((1, 2, 3)).max()) / 8)
    assert y.shape == wanted.shape
    assert float((y - wanted).abs().max()) <= tolerance(case) * scale
    assert float((means - wanted.mean((2, 3))).abs().max()) <= tolerance(case) * scale


@given(case=convolutions())
def test_convolutions_are_those_of_torch(case: Case) -> None:
    assert_same(case)


@given(case=windows())
def test_windows_are_those_of_torch(case: Case) -> None:
    assert_same(case)


@settings(max_examples=15)
@given(case=convolutions())
@pytest.mark.parametrize("name", INSTRUCTION_SETS[1:])
def test_convolutions_of_other_instruction_sets(name: str, case: Case) -> None:
    chosen, engine = native.instruction_set(), native.engine()
    assert engine is not None
    if engine.select(name.encode()):
        try:
            assert_same(case)
        finally:
            engine.select(chosen.encode())


@pytest.mark.parametrize("algorithm", SAME_SIZE)
@pytest.mark.parametrize("size", [(56, 56), (28, 28), (14, 14), (7, 7), (5, 17), (9, 2)])
def test_every_algorithm_on_the_sizes_of_real_networks(
    instruction_set: str, size: tuple[int, int], algorithm: Algorithm
) -> None:
    channels, filters = [c % 3 != 0 for c in range(40)], [f % 4 != 1 for f in range(50)]
    residual = [f % 2 == 0 for f in range(50)]
    sliding = Sliding((3, 3), padding=(1, 1))
    assert_same(Case(size, sliding, channels, filters, act=Act(low=0.0), algorithm=algorithm, residual=residual))


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("sliding", [Sliding((1, 1)), Sliding((1, 1), (2, 2), (0, 1))], ids=str)
def test_one_tap_and_many_filters(instruction_set: str, sliding: Sliding, exists: bool) -> None:
    """Which is where tiles copy what they read: without channels there is nothing, and a tap may be beside it."""
    for groups in (1, 2):
        assert_same(Case((9, 11), sliding, [exists] * 6, [True] * 52, groups=groups))


@pytest.mark.parametrize("sliding", STRIDED, ids=str)
def test_strided_winograd(instruction_set: str, sliding: Sliding) -> None:
    channels, filters = [True, False, True], [f % 4 != 1 for f in range(20)]
    for size in ((64, 64), (33, 51)):
        assert_same(Case(size, sliding, channels, filters, algorithm=Algorithm.WINOGRAD_STRIDED))


def test_threads_change_nothing() -> None:
    cases = [
        Case((28, 28), Sliding((3, 3), padding=(1, 1)), [True] * 32, [True] * 64, algorithm=algorithm, n_threads=n)
        for algorithm in SAME_SIZE
        for n in (1, 2, 3)
    ]
    results = [found(case)[0] for case in cases]
    for i in range(0, len(results), 3):
        assert torch.equal(results[i], results[i + 1])
        assert torch.equal(results[i], results[i + 2])


@pytest.mark.parametrize("n_threads", [2, 3, 100])
def test_sums_do_not_depend_on_which_thread_did_what(n_threads: int) -> None:
    """The engine's threads take work as they come to it; here they come in another order every time."""
    size, sliding = (56, 56), Sliding((3, 3), padding=(1, 1))
    for algorithm in SAME_SIZE:
        case = Case(size, sliding, [True] * 8, [True] * 24, algorithm=algorithm, n_threads=n_threads)
        first = found(case)
        np.testing.assert_allclose(first[1], expected(case).mean((2, 3)), rtol=1e-4, atol=1e-5)
        with busy_cores():
            for _ in range(10):
                assert all(map(torch.equal, found(case), first))


@contextmanager
def busy_cores() -> Iterator[None]:
    """Two processes that take a core each from time to time."""
    code = "import time\nwhile True: time.sleep(2e-4), sum(range(3000))"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_undefined_and_infinite_pixels_reach_every_output_they_reach_in_torch(value: float) -> None:
    for algorithm in SAME_SIZE:
        case = Case((14, 14), Sliding((3, 3), padding=(1, 1)), [True] * 4, [True] * 8, algorithm=algorithm)
        case.x[0, 1, 7, 7] = value
        y, wanted = found(case)[0], expected(case)
        assert not y[~wanted.isfinite()].isfinite().any()
        if not algorithm.is_winograd:
            assert torch.equal(y.isfinite(), wanted.isfinite())
            assert torch.equal(y.isnan(), wanted.isnan())


MAXIMA = [Sliding((3, 3), padding=(1, 1)), Sliding((5, 2), padding=(2, 1)), *(Sliding((k, k), (2, 2)) for k in (2, 3))]


def maxima(size: tuple[int, int], sliding: Sliding) -> Case:
    kind, window = StepKind.WINDOW, WindowKind.MAX
    return Case(size, sliding, [True] * 3, [True] * 3, groups=3, kind=kind, window=window)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sliding", MAXIMA, ids=str)
def test_maxima_of_undefined_and_infinite_pixels_are_those_of_torch(
    instruction_set: str, sliding: Sliding, value: float
) -> None:
    for row, column in ((0, 0), (6, 7), (12, 13)):
        case = maxima((13, 14), sliding)
        case.x[0, 1, row, column] = value
        torch.testing.assert_close(found(case)[0], expected(case).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [1000, 2030, 2100])
def test_maxima_of_long_rows(instruction_set: str, width: int) -> None:
    """Longer ones than are kept of rows are found as other windows are."""
    assert_same(maxima((5, width), MAXIMA[0]))


def test_activations_pass_undefined_values_on() -> None:
    for act in (Act(low=0.0), Act(low=0.0, high=6.0), *map(Act, set(ActivationKind) - {ActivationKind.CLAMP})):
        case = Case((4, 4), Sliding(), [True], [True], act=act)
        case.x.fill_(torch.nan)
        assert found(case)[0].isnan().all()


def test_gates_of_the_wrong_size_are_refused_before_the_engine_sees_them() -> None:
    plan = native.Plan([], [], [], [3])
    workspace = native.Workspace(plan)
    with pytest.raises(ValueError, match=r"gate 0: \(4,\) values given, \(3,\) wanted"):
        workspace.set_gate(0, torch.ones(4))
    workspace.set_gate(0, torch.tensor([0.0, 1.0, 0.5]))
    assert workspace.gate(0).tolist() == [0.0, 1.0, 1.0]


def test_weights_that_winograd_cannot_transform_are_refused() -> None:
    for weight, algorithm in (
        (torch.ones(2, 2, 1, 1), Algorithm.WINOGRAD_2),
        (torch.ones(2, 2, 3, 3).double(), Algorithm.WINOGRAD_2),
        (torch.ones(2, 2, 3, 3), Algorithm.PACKED),
        (torch.ones(2, 2, 3, 3), Algorithm.WINOGRAD_STRIDED),
    ):
        with pytest.raises(ValueError, match=r"transform_weights: .* weights given for .*; contiguous float32 weights"):
            native.transform_weights(weight, algorithm)


def test_winograd_weights_are_those_of_the_formula() -> None:
    weight = torch.randn(5, 4, 3, 3)
    g = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    wanted: Tensor = torch.einsum("ir,kcrs,js->kijc", g, weight.double(), g).reshape(5, 16, 4)
    assert float((native.transform_weights(weight, Algorithm.WINOGRAD_2) - wanted).abs().max()) < 1e-6


@pytest.mark.parametrize("n", [1, 17, (1 << 17) - 1, 1 << 17, (1 << 19) + 1, 3 << 20])
def test_new_memory_is_zero_and_begins_a_cache_line(n: int) -> None:
    blocks = [native.new_tensor(n) for _ in range(3)]
    assert all(block.data_ptr() % 64 == 0 and not block.any() for block in blocks)
    for i, block in enumerate(blocks):
        block.fill_(i)
    assert all(bool((block == i).all()) for i, block in enumerate(blocks))


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="blocks are not mapped there, see memory.cpp")
def test_large_blocks_are_returned_to_the_system() -> None:
    """The C library would keep what is freed after it has seen such sizes, and between blocks that are not."""
    for _ in range(2):
        blocks = [native.new_tensor(2 << 20) for _ in range(8)]  # 8 MB each
        before = resident_bytes()
        del blocks[:7]
        assert before - resident_bytes() > 50e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not asked")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer keeps memory by itself")
def test_the_c_library_returns_what_it_keeps() -> None:
    kept = [torch.ones(1 << 14) for _ in range(1000)]  # 64 KB each, below what it maps by itself
    last = torch.ones(1 << 14)
    del kept
    before = resident_bytes()
    native.trim()
    assert before - resident_bytes() > 50e6
    assert bool(last.all())


@pytest.mark.slow
def test_no_step_reads_or_writes_outside_its_memory(tmp_path: Path) -> None:
    """The fuzz above under the address and undefined behaviour sanitizers, the code for AVX-512 wherever it can run."""
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("needs cmake and g++")
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DDECOUPLIFY_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++"]
    if native.instruction_set() == "avx2":
        configure.append("-DDECOUPLIFY_EMULATE=ON")
    for command in (configure, ["cmake", "--build", str(tmp_path), "--parallel", "2"]):
        subprocess.run(command, check=True, capture_output=True)
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "DECOUPLIFY_LIBRARY": str(tmp_path / "libdecouplify.so"),
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch hold on to much until the end
        "HYPOTHESIS_PROFILE": "ci",
    }
    files = [
        str(ROOT / "tests" / name) for name in ("test_native.py", "test_expand.py", "test_separable.py", "test_pool.py")
    ]
    fuzz = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        [*fuzz, "-m", "not slow"], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout
