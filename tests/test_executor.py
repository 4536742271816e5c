"""The engine as a whole: threads, batches, memory, fallbacks, and the choices it makes."""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
import re
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import decouplify
from conftest import resident_bytes
from decouplify.cifar import CifarResNet
from decouplify.errors import VerificationError
from decouplify.sparse import SparseModel, backend, count_executed_macs, native, tuning
from decouplify.sparse.drafts import ReadGate, SetGate, TorchCall
from decouplify.sparse.executor import Run, Stretch
from decouplify.sparse.native import Algorithm, StepKind
from decouplify.sparse.timed import TimedRun
from decouplify.sparse.translate import obstacle
from decouplify.sparse.verification import relative_error
from toynets import (
    SIZE,
    TOYS,
    leaves,
    random_gates,
    random_images,
    randomise_gates,
    randomise_statistics,
    run,
)

needs_engine = pytest.mark.skipif(native.engine() is None, reason=native.reason_for_absence())


def sparse(name: str, **options: Any) -> tuple[nn.Module, SparseModel]:
    model = randomise_gates(TOYS[name].wrapped(verify=False, reduction=1)).eval()
    return model, decouplify.sparsify(model, **options)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tuning.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


# What runs where ------------------------------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("name", ["Plain", "ParallelBranches", "Grouped", "NormBeforeAdd"])
def test_common_networks_run_in_one_call_of_the_engine(name: str) -> None:
    _, fast = sparse(name)
    program = fast.program_for(SIZE)
    assert program is not None
    assert not [item for item in program.draft.items if isinstance(item, TorchCall | SetGate | ReadGate)]
    assert "run by torch: nothing" in repr(fast)


@needs_engine
def test_what_the_engine_cannot_do_runs_in_torch_between_its_steps() -> None:
    model, fast = sparse("OtherNorms")
    assert any(isinstance(item, TorchCall) for item in fast.program_for(SIZE).draft.items)  # type: ignore[union-attr]
    assert "1 group_norm" in repr(fast)
    fast(random_images(1))
    assert re.search(r"run by torch: .* \(\d+\.\d\d ms of the last image\)", repr(fast))
    assert decouplify.verify(model, fast, random_images(2)).max_error <= 1e-5


def test_the_reference_runs_where_there_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "libdecouplify.so was not built"))
    model, fast = sparse("NormBeforeAdd")
    assert backend() == (
        "reference: pure torch (index_select and dense convolutions), because libdecouplify.so was not built"
    )
    assert fast.program_for(SIZE) is None
    assert decouplify.verify(model, fast, random_images(2)).max_error <= 1e-5


def test_other_precisions_run_in_the_reference() -> None:
    model = randomise_gates(decouplify.wrap(TOYS["Plain"].build().double(), SIZE)).eval()
    fast = decouplify.sparsify(model)
    assert fast.program_for(SIZE) is None
    if native.engine() is not None:
        assert "because the weights are not float32" in repr(fast)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_converted_sparse_form_is_one_of_that_type(dtype: torch.dtype) -> None:
    model = randomise_gates(decouplify.wrap(TOYS["Plain"].build(), SIZE)).eval()
    fast, images = decouplify.sparsify(model), random_images(2)
    before = fast(images)
    assert fast.to(dtype) is fast
    assert fast.program_for(SIZE) is None
    assert "engine:" not in repr(fast)
    assert fast(images.to(dtype)).dtype is dtype
    larger = torch.randn(1, SIZE[0], 20, 20)  # another program, made after the conversion
    assert fast(larger.to(dtype)).dtype is dtype
    if dtype is torch.float64:
        assert torch.equal(fast.float()(images), before)
        assert "engine:" in repr(fast) or native.engine() is None


def test_images_that_the_weights_cannot_meet_are_refused() -> None:
    model = decouplify.wrap(TOYS["Plain"].build(), SIZE).eval()
    fast = decouplify.sparsify(model)
    for dtype in (torch.uint8, torch.float64, torch.float16):
        with pytest.raises(ValueError, match=rf"images of {dtype} given; torch.float32 wanted"):
            fast(random_images(1).to(dtype))
    with pytest.raises(TypeError, match="ndarray given; a tensor of shape"):
        fast(random_images(1).numpy())


class _ChangesWhatIsReadAgain(nn.Module):
    """An in-place activation whose input another branch reads afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = y.view(y.shape)
        torch.relu_(z)
        return self.head((self.b(y) + self.c(z)).mean((2, 3)))


@needs_engine
def test_values_changed_under_a_reader_are_left_to_the_reference() -> None:
    model = decouplify.wrap(_ChangesWhatIsReadAgain().eval(), SIZE, verify=False)
    fast = decouplify.sparsify(model)
    assert "changes a value that is read again" in obstacle(fast.lowered_for(SIZE).module)
    images = random_images(2)
    assert relative_error(run(fast, images)[0], run(model, images)[0]) <= 1e-5


def test_an_unknown_mode_is_refused() -> None:
    model = TOYS["Plain"].wrapped()
    with pytest.raises(ValueError, match=r"sparsify: mode='quick' given; one of 'fast', 'exact' wanted"):
        decouplify.sparsify(model, mode="quick")  # type: ignore[arg-type]


# Equal, whoever asks --------------------------------------------------------------------------------------------------


@needs_engine
@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("name", TOYS)
def test_both_modes_agree_with_the_masked_form(name: str, mode: Any) -> None:
    model, fast = sparse(name, mode=mode)
    assert decouplify.verify(model, fast, random_images(2)).max_error <= (1e-5 if mode == "fast" else 2e-6)


@needs_engine
def test_exact_mode_never_uses_winograd() -> None:
    _, fast = sparse("Plain", mode="exact")
    assert not any(step.algorithm.is_winograd for step in fast.program_for(SIZE).steps)  # type: ignore[union-attr]


@needs_engine
@pytest.mark.parametrize("algorithm", [a for a in Algorithm if a is not Algorithm.WINOGRAD_STRIDED])
def test_every_algorithm_gives_the_same_network(algorithm: Algorithm) -> None:
    model, fast = sparse("SharedRelu")
    program = fast.program_for(SIZE)
    assert program is not None
    chosen = [i for i, step in enumerate(program.steps) if algorithm in step.algorithms]
    for i in chosen:
        program.set_algorithm(i, algorithm)
    assert chosen
    images = random_images(2)
    assert relative_error(run(fast, images)[0], run(model, images)[0]) <= 1e-5


@needs_engine
@pytest.mark.parametrize("name", ["Plain", "ParallelBranches"])
def test_threads_and_batches_change_nothing(name: str) -> None:
    _, fast = sparse(name)
    images = random_images(5)
    alone = torch.cat([leaves(fast(image[None]))[0] for image in images])
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            assert torch.equal(leaves(fast(images))[0], alone)
    finally:
        torch.set_num_threads(before)


def test_concurrent_calls_do_not_disturb_each_other() -> None:
    _, fast = sparse("DepthwiseChain")
    images = random_images(4)
    expected = [run(fast, image[None])[0] for image in images]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(20):
            if not torch.equal(run(fast, images[i : i + 1])[0], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_path_leaves_nothing_behind_for_the_next_image() -> None:
    model, fast = sparse("NormBeforeAdd")
    image, other = random_images(2).unsqueeze(1)
    first = run(fast, image)[0]
    for factor in (0.0, 1.0):
        forced = {name: torch.full_like(z, factor) for name, z in random_gates(model).items()}
        fast.run_observed(other, lambda name, value: None, forced=forced)
    fast(other)
    assert torch.equal(run(fast, image)[0], first)


@needs_engine
def test_an_undefined_image_in_a_batch_stays_alone() -> None:
    _, fast = sparse("Plain")
    images = random_images(3)
    expected = run(fast, images)[0]
    images[1] = math.nan
    found = run(fast, images)[0]
    assert found[1].isnan().all()
    assert fast.n_undefined == 1
    assert "undefined gates (NaN), which the reference computed: 1" in repr(fast)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_images_in_any_memory_layout_give_the_same() -> None:
    _, fast = sparse("Plain")
    images = random_images(2)
    expected = run(fast, images)[0]
    assert torch.equal(run(fast, images.to(memory_format=torch.channels_last))[0], expected)
    assert torch.equal(run(fast, images.transpose(2, 3).contiguous().transpose(2, 3))[0], expected)


def test_copies_and_pickles_compute_the_same() -> None:
    _, fast = sparse("DepthwiseChain")
    images = random_images(2)
    expected = run(fast, images)[0]
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(run(other, images)[0], expected)


@needs_engine
@pytest.mark.parametrize("name", ["Plain", "DepthwiseChain", "Grouped", "ParallelBranches", "NormBeforeAdd"])
def test_the_engine_counts_the_work_of_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = sparse(name)
    counted = []
    for engine in (True, False):
        if not engine:
            monkeypatch.setattr(fast, "program_for", lambda size, fuse=True: None)
        with count_executed_macs() as counts:
            fast(random_images(3))
        counted.append(sum(counts))
    assert counted[0] == counted[1] > 0


# Real networks --------------------------------------------------------------------------------------------------------

NETWORKS = (
    "resnet18", "vgg16_bn", "resnet50", "mobilenet_v2", "googlenet", "densenet121", "convnext_tiny", "efficientnet_b0",
)  # fmt: skip


@needs_engine
@pytest.mark.zoo
@pytest.mark.parametrize("name", [pytest.param("resnet18", marks=pytest.mark.ci_sample), *NETWORKS[1:]])
def test_real_networks_agree_with_their_masked_form(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    options = {"init_weights": True} if name == "googlenet" else {}
    model = models.get_model(name, weights=None, **options)
    assert_forms_agree(model, (3, 96, 96), linear_as_conv=name == "convnext_tiny")


@needs_engine
@pytest.mark.parametrize("n_blocks", [3, 9])
def test_residual_networks_for_small_images_agree_with_their_masked_form(n_blocks: int) -> None:
    assert_forms_agree(CifarResNet(n_blocks), (3, 32, 32))


def assert_forms_agree(model: nn.Module, size: tuple[int, int, int], **options: Any) -> None:
    randomise_statistics(model)
    decouplify.wrap(model.eval(), size, verify=False, **options)
    randomise_gates(model)
    images = random_images(2, size)
    for mode, error in (("fast", 1e-5), ("exact", 2e-6)):
        fast = decouplify.sparsify(model, mode=mode)  # type: ignore[arg-type]
        report = decouplify.verify(model, fast, images)
        assert report.output_error <= error
        assert report.max_error <= max(4e-6, error)  # of layers within, some have values close to zero
        expected = run(model, images)[0]
        assert relative_error(run(fast, images)[0], expected) <= error
        assert torch.equal(run(fast, images)[0].argmax(1), expected.argmax(1))


# Choices --------------------------------------------------------------------------------------------------------------


@needs_engine
def test_measured_choices_are_kept_and_used_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse("Plain")[1](random_images(1))
    kept = json.loads((own_cache / "algorithms.json").read_text())
    assert kept
    assert all(0 < seconds < 1 for times in kept.values() for seconds in times.values())
    forced = {key: {way: 1e-3 if way == "DIRECT" else 2e-3 for way in times} for key, times in kept.items()}
    (own_cache / "algorithms.json").write_text(json.dumps(forced))
    monkeypatch.setattr(tuning, "_measure", lambda *args: pytest.fail("measured again"))
    _, fast = sparse("Plain")
    assert {step.algorithm for step in fast.program_for(SIZE).steps} == {Algorithm.DIRECT}  # type: ignore[union-attr]


@needs_engine
@pytest.mark.parametrize("fastest", [Algorithm.DIRECT, Algorithm.PACKED, Algorithm.WINOGRAD_2])
def test_what_is_fastest_within_the_network_is_taken(fastest: Algorithm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way is measured in a run of the whole network, with two filters of three open in each gate."""
    n_open = []

    class Measured(TimedRun):
        def run_steps(self, stretch: Stretch) -> None:
            super().run_steps(stretch)
            n_open.append([(float(z.sum()), len(z)) for z in self.forced.values()])
            is_fastest = [step.algorithm is fastest for step in self.program.steps]
            self.times = [(1.0 if fast else 2.0, macs) for fast, (_, macs) in zip(is_fastest, self.times, strict=True)]

    monkeypatch.setattr(tuning, "TimedRun", Measured)
    _, fast = sparse("Plain")
    program = fast.program_for(SIZE)
    assert program is not None
    candidates = [step for step in program.steps if len(step.algorithms) > 1]
    assert candidates
    assert all(step.algorithm is fastest for step in candidates if fastest in step.algorithms)
    assert n_open[0]
    assert all(z == n - n // 3 for run_gates in n_open for z, n in run_gates)


def test_what_slows_whole_rounds_changes_no_choice() -> None:
    """Ways are compared within rounds: the one quiet moment, which direct convolution had, tells nothing."""
    direct, winograd = [1.0, 3.0, 3.0, 3.3, 3.0], [2.0, 1.8, 1.8, 1.98, 2.4]
    settled = tuning._settled({Algorithm.DIRECT: direct, Algorithm.WINOGRAD_2: winograd})
    assert settled == {Algorithm.DIRECT: 1.0, Algorithm.WINOGRAD_2: pytest.approx(0.6)}


def test_hopeless_ways_are_given_up_and_keep_the_times_of_their_rounds() -> None:
    times = {
        Algorithm.DIRECT: [3.0, 3.1, 3.2],
        Algorithm.PACKED: [1.4, 1.4, 1.4],
        Algorithm.WINOGRAD_2: [1.0, 1.0, 1.0],
    }
    assert tuning._hopeful(times) == (Algorithm.PACKED, Algorithm.WINOGRAD_2)
    times[Algorithm.PACKED] += [0.9, 0.9, 0.9, 0.9]
    times[Algorithm.WINOGRAD_2] += [1.0, 1.0, 1.0, 1.0]
    settled = tuning._settled(times)
    assert settled[Algorithm.PACKED] < settled[Algorithm.WINOGRAD_2]
    assert settled[Algorithm.DIRECT] == pytest.approx(0.9 * 3.1 / 1.4)


@pytest.mark.parametrize(
    ("winograd_2", "winograd_4", "wanted"),
    [
        (0.97, 0.96, Algorithm.PACKED),
        (0.90, 0.88, Algorithm.WINOGRAD_2),
        (0.98, 0.90, Algorithm.WINOGRAD_4),
        (0.90, 0.80, Algorithm.WINOGRAD_4),
        (1.50, 1.10, Algorithm.PACKED),
    ],
)
def test_what_keeps_more_memory_must_be_worth_it(winograd_2: float, winograd_4: float, wanted: Algorithm) -> None:
    plain = {Algorithm.DIRECT: 1.01, Algorithm.PACKED: 1.0}
    assert tuning._best({Algorithm.WINOGRAD_4: winograd_4, Algorithm.WINOGRAD_2: winograd_2, **plain}) is wanted


@needs_engine
def test_winograd_keeps_only_so_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What saves least time for its memory is given up first, F(4,3) for F(2,3) if that is enough."""
    model = decouplify.wrap(CifarResNet(8), input_size=(3, 32, 32), verify=False)
    program = decouplify.sparsify(model).program_for((3, 32, 32))
    assert program is not None
    own = sum(weight.nbytes for step in program.steps for weight in step.weights.values())
    steps = [i for i, step in enumerate(program.steps) if Algorithm.WINOGRAD_4 in step.algorithms]
    small, *_, large = sorted(steps, key=lambda i: program.bytes_kept(i, Algorithm.WINOGRAD_4))
    times = {Algorithm.DIRECT: 1.0, Algorithm.WINOGRAD_2: 0.7, Algorithm.WINOGRAD_4: 0.5}
    seconds = {small: times, large: times}
    kept = {i: {way: program.bytes_kept(i, way) / own for way in times} for i in seconds}
    assert 0 < kept[small][Algorithm.WINOGRAD_4] < kept[large][Algorithm.WINOGRAD_4]
    assert kept[small][Algorithm.WINOGRAD_4] * own == program.weights_for(small, Algorithm.WINOGRAD_4).nbytes  # type: ignore[union-attr]
    for large_way in (Algorithm.WINOGRAD_4, Algorithm.WINOGRAD_2, Algorithm.DIRECT):
        for small_way in (Algorithm.WINOGRAD_4, Algorithm.WINOGRAD_2, Algorithm.DIRECT):
            if small_way is not Algorithm.WINOGRAD_4 and large_way is not Algorithm.DIRECT:
                continue  # the large one goes first
            chosen = {small: small_way, large: large_way}
            monkeypatch.setattr(tuning, "_LARGEST_KEPT", sum(kept[i][way] for i, way in chosen.items()))
            assert tuning._affordable(program, seconds) == chosen


@needs_engine
def test_f_4_3_is_not_tried_on_maps_of_a_few_tiles() -> None:
    _, fast = sparse("Plain")
    program = fast.program_for(SIZE)
    assert program is not None
    step = next(step for step in program.steps if Algorithm.WINOGRAD_4 in step.algorithms)
    assert step.output is not None
    for size, is_tried in (((8, 8), False), ((7, 5), False), ((9, 8), True), ((4, 17), True)):
        step.output.size = size
        assert tuning._is_thinkable(step, Algorithm.WINOGRAD_4) is is_tried
        assert tuning._is_thinkable(step, Algorithm.WINOGRAD_2)


@needs_engine
def test_few_transformed_weights_are_there_at_once_while_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[list[Any]] = []

    def all_alike(_: Any, group: list[Any]) -> dict[str, Any]:
        groups.append(group)
        return {candidate.key: dict.fromkeys(candidate.ways, 1.0) for candidate in group}

    monkeypatch.setattr(tuning, "_measure", all_alike)
    for largest, wanted in ((0, "each by itself"), (1 << 30, "all together")):
        monkeypatch.setenv(tuning.CACHE_VARIABLE, "")
        monkeypatch.setattr(tuning, "_LARGEST_GROUP", largest)
        groups.clear()
        sparse("ParallelBranches")[1].program_for(SIZE)
        n_winograd = [sum(any(way.is_winograd for way in c.ways) for c in group) for group in groups]
        assert sum(n_winograd) > 1
        assert max(n_winograd) == (1 if wanted == "each by itself" else sum(n_winograd))


@needs_engine
def test_measuring_for_another_image_size_takes_no_weights_away() -> None:
    """Winograd's weights are shared; each program measures for itself, and lets go of those that were slower."""
    _, fast = sparse("Plain")
    images = random_images(1)
    program = fast.program_for(SIZE)
    assert program is not None
    chosen = {i: Algorithm.WINOGRAD_4 for i, s in enumerate(program.steps) if Algorithm.WINOGRAD_4 in s.algorithms}
    assert chosen
    for step, algorithm in chosen.items():
        program.set_algorithm(step, algorithm)
    wanted = fast(images)
    shared = [weakref.ref(program.weights_for(step, algorithm)) for step, algorithm in chosen.items()]
    fast(random_images(1, (3, 48, 48)))
    gc.collect()
    assert all(weights() is not None for weights in shared)
    assert torch.equal(fast(images), wanted)


@needs_engine
@pytest.mark.parametrize("content", ["", "[1]", '{"a": "b"}', '{"a": {"DIRECT": "b"}}', '{"a": {"b": 1.0}}', "{"])
def test_a_broken_cache_is_measured_anew(own_cache: Path, content: str) -> None:
    (own_cache / "algorithms.json").write_text(content)
    _, fast = sparse("Plain")
    fast(random_images(1))
    assert (
        "DIRECT" in (own_cache / "algorithms.json").read_text()
        or "PACKED" in (own_cache / "algorithms.json").read_text()
    )


@needs_engine
def test_ways_that_nobody_has_measured_are_measured(own_cache: Path) -> None:
    sparse("Plain")[1](random_images(1))
    file = own_cache / "algorithms.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({key: {"DIRECT": 1e-9} for key in kept}))
    sparse("Plain")[1](random_images(1))
    found = json.loads(file.read_text())
    assert {key: times.keys() for key, times in found.items()} == {key: times.keys() for key, times in kept.items()}


@needs_engine
def test_controllers_that_open_everything_for_every_image_do_not_run() -> None:
    model = TOYS["Plain"].wrapped().eval()  # a fresh controller is open whatever it sees
    fast = decouplify.sparsify(model)
    fast(random_images(1))
    with count_executed_macs() as counts:
        fast(random_images(1))
    assert sum(counts) == model.decoupling.plan.n_macs
    assert "2 gates always open" in repr(fast)
    assert decouplify.verify(model, fast, random_images(2)).max_error <= 1e-5


# Memory ---------------------------------------------------------------------------------------------------------------


class ManySteps(nn.Module):
    """A long chain that only torch can run, and one value that is wanted again at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        early = x = torch.relu(self.second(torch.relu(self.first(x))))
        for _ in range(20):
            x = x.sin()
        return self.last(x + early)


@needs_engine
def test_values_that_nobody_reads_any_more_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decouplify.wrap(ManySteps().eval(), SIZE)
    fast = decouplify.sparsify(model)
    n_alive: list[int] = []
    do = Run._do

    def counting(self: Run, item: Any) -> None:
        do(self, item)
        n_alive.append(len(self.values))

    monkeypatch.setattr(Run, "_do", counting)
    decouplify.verify(model, fast, random_images(1))
    assert len(n_alive) > 3 * 20
    assert max(n_alive) <= 4  # image, early, and what sin reads and returns


@needs_engine
def test_memory_stays_flat() -> None:
    _, fast = sparse("DepthwiseChain")
    images = random_images(8)
    for _ in range(600):  # until the system has made huge pages of what the C library holds
        fast(images)
    gc.collect()
    before = resident_bytes()
    for _ in range(250):
        fast(images)
    gc.collect()
    assert resident_bytes() - before < 2 << 20


@needs_engine
def test_convolutions_that_differ_in_dilation_alone_are_computed_each_in_its_way() -> None:
    """A choice made for one of them once was applied to the other, whose windows Winograd cannot compute."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    assert_forms_agree(model, (3, 32, 32))
    program = decouplify.sparsify(model).program_for((3, 32, 32))
    plain, dilated = (
        next(
            s for s in program.steps if s.kind is StepKind.CONVOLUTION and s.sliding.dilation == (d, d) and s.reads_part
        )
        for d in (1, 2)
    )
    assert tuning._key(plain) != tuning._key(dilated)


class Padded(nn.Module):
    """TensorFlow's way to halve a map: zeros below and to the right alone; ``twice`` reads them in two places."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24), nn.ReLU6())
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.depthwise = nn.Sequential(nn.Conv2d(24, 24, 3, stride=2, groups=24), nn.BatchNorm2d(24), nn.ReLU6())
        self.project = nn.Conv2d(24, 6, 1)
        self.other = nn.Conv2d(24, 24, 5, padding=1, stride=2) if twice else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.pad(self.expand(torch.relu(self.stem(self.pad(x)))))
        y = self.depthwise(x)
        return self.project(y if self.other is None else y + self.other(x)).mean((2, 3))


@needs_engine
@pytest.mark.parametrize("twice", [False, True])
def test_zeros_for_one_convolution_are_not_copied(twice: bool) -> None:
    model = randomise_gates(decouplify.wrap(randomise_statistics(Padded(twice)), SIZE, reduction=1)).eval()
    fast = decouplify.sparsify(model)
    program = fast.program_for(SIZE)
    assert program is not None
    kinds = [step.kind for step in program.steps]
    assert kinds.count(StepKind.COPY) == twice
    assert kinds.count(StepKind.EXPAND) == (not twice)
    assert decouplify.verify(model, fast, random_images(3)).max_error <= 1e-5
    images = random_images(3)
    assert torch.allclose(run(fast, images)[0], run(model, images)[0], rtol=1e-4, atol=1e-5)


@needs_engine
def test_zeros_for_a_convolution_that_torch_runs_are_there() -> None:
    """The engine has no Mish; told to leave the zeros to the convolution, it would hand over a map without them."""
    net = Padded(twice=False)
    net.depthwise[2], net.project = nn.Mish(), nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(24, 6, 3), nn.Mish())
    model = randomise_gates(decouplify.wrap(randomise_statistics(net), SIZE, reduction=1)).eval()
    fast = decouplify.sparsify(model)
    assert re.search(r"run by torch: .*2 SparseConv2d", repr(fast))
    assert decouplify.verify(model, fast, random_images(3)).max_error <= 1e-5


@needs_engine
def test_the_engine_is_not_given_less_than_it_reads() -> None:
    _, fast = sparse("OtherNorms")
    program = fast.program_for(SIZE)
    assert program is not None
    schedule = [
        (replace(item, loads=tuple((slot, node, 2 * n) for slot, node, n in item.loads)), finished)
        if isinstance(item, Stretch)
        else (item, finished)
        for item, finished in program.schedule
    ]
    with program.workspace() as workspace, pytest.raises(RuntimeError, match=r"values, \d+ were recorded"):
        Run(program, workspace, random_images(1)).result(schedule)


def test_a_mean_over_the_positions_of_channels_last_is_not_taken_for_one_over_the_last_two() -> None:
    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.stem(x).relu()).relu().permute(0, 2, 3, 1)
            return self.head(torch.cumsum(y, 1).mean((1, 2)))  # no step of the engine, so torch computes the sums

    model = decouplify.wrap(ChannelsLast(), (3, 8, 8)).eval()
    decouplify.verify(model, decouplify.sparsify(model), torch.randn(1, 3, 8, 8))


@needs_engine
def test_dense_blocks_copy_nothing_and_need_no_torch() -> None:
    """Every layer reads all that were before it: copies, and biases computed for nobody, took half of the time."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.DenseNet(8, (3, 2), 16, num_classes=5).eval()
    size = (3, 64, 64)
    model = decouplify.wrap(net, size, verify=False)
    fast = decouplify.sparsify(model)
    program = fast.program_for(size)
    assert "run by torch: nothing" in repr(fast)
    copies = [step for step in program.steps if step.kind is StepKind.COPY]
    assert len(copies) == (1 + 2 + 2 + 2) + (1 + 2 + 2)  # what was put together before, and one new part
    for step in copies:
        (owner, first), (whole, start) = step.input.storage(), step.output.storage()
        assert (owner, first) == (whole, start + step.position)
    images = torch.randn(3, *size)
    for controller in model.decoupling.controllers.values():
        nn.init.normal_(controller.fc2.weight, 0, 2.0)
        nn.init.normal_(controller.fc2.bias, 0.5, 1.0)
    assert decouplify.verify(model, decouplify.sparsify(model), images).max_error <= 1e-5


class NormOfGated(nn.Module):
    """Closed channels of the first convolution hold constants after the norm."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.stem, self.first, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32)
        self.second, self.third = nn.Conv2d(32, 24, 1), nn.Conv2d(32, 24, kernel, padding=kernel // 2)
        self.heads = nn.ModuleList(nn.Linear(channels, 5) for channels in (32, 32, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        y = torch.sigmoid(self.norm(x))
        z = self.second(y) + self.third(y)
        return sum(head(value.mean((2, 3))) for head, value in zip(self.heads, (x, y, z), strict=True))


@needs_engine
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_constants_of_closed_channels_are_written_only_for_readers_that_cannot_add_them(
    kernel: int, shifted: bool
) -> None:
    """Written out, as a convolution with a border needs them, they cost DenseNet as much as open channels.

    A norm without a shift, as a fresh one is, leaves zeros, of which the sigmoid makes a half.
    """
    network = NormOfGated(kernel)
    model = randomise_gates(decouplify.wrap(randomise_statistics(network) if shifted else network, SIZE, reduction=1))
    model.eval()
    fast, images = decouplify.sparsify(model), random_images(4)
    norms = [step for step in fast.program_for(SIZE).steps if step.kind is StepKind.SCALE]
    assert [step.leaves_constants for step in norms] == [kernel == 1]
    assert decouplify.verify(model, fast, images).max_error <= 1e-5
    with count_executed_macs() as executed:
        fast(images)
    counted = int(decouplify.count_macs(model, images).executed.sum())
    assert (sum(executed) == counted) == (kernel == 1)


@needs_engine
def test_verify_looks_at_what_forward_runs() -> None:
    """With joined operators and whole stretches of steps, of which nothing but the output can be compared."""
    model = randomise_gates(decouplify.wrap(randomise_statistics(NormOfGated(1)), SIZE, reduction=1)).eval()
    fast, images = decouplify.sparsify(model), random_images(2)
    decouplify.verify(model, fast, images)
    norm = next(step for step in fast.program_for(SIZE).steps if step.kind is StepKind.SCALE)
    norm.weights["bias"] += 1
    with pytest.raises(VerificationError, match="in 0 of 3 layers, first in the output"):
        decouplify.verify(model, fast, images)
