"""The engine by itself: a whole small network in a program that has nothing else in it, under valgrind and on ARM."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from ctypes import c_int32, c_int64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import decouplify
from decouplify.sparse import bands, native
from decouplify.sparse.executor import Program, build_plan
from decouplify.sparse.native import Algorithm, StepKind

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "src/decouplify/sparse/kernels"
RUN_PLAN = ROOT / "tests/native/run_plan.cpp"
SIZE = (3, 37, 41)  # no multiple of anything
N_CLASSES = 7
POINTERS = ("weight", "bias", "weight2", "bias2", "transformed")

pytestmark = pytest.mark.skipif(native.engine() is None, reason="needs the compiled engine")


class Small(nn.Module):
    """One layer for every kernel: all kinds of convolutions and windows, a sum, a concatenation, controllers."""

    def __init__(self) -> None:
        super().__init__()

        def layer(c: int, k: int, kernel: int, act: type[nn.Module] = nn.ReLU, **options: int) -> nn.Sequential:
            conv = nn.Conv2d(c, k, kernel, padding=kernel // 2, bias=False, **options)
            return nn.Sequential(conv, nn.BatchNorm2d(k), act())

        self.stem = layer(3, 10, 7, stride=2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.first, self.second = layer(10, 10, 3), layer(10, 10, 3, nn.Identity)
        self.strided, self.grouped = layer(10, 14, 3, stride=2), layer(14, 14, 3, groups=2)
        self.expand, self.depthwise = layer(14, 30, 1, nn.SiLU), layer(30, 30, 5, nn.Hardswish, groups=30)
        self.project, self.average = layer(30, 9, 1, nn.GELU), nn.AvgPool2d(3, 2, 1, ceil_mode=True)
        self.strided_depthwise = nn.Sequential(
            layer(9, 33, 1, nn.ReLU6), layer(33, 33, 3, nn.ReLU6, groups=33, stride=2)
        )
        self.last, self.fc = layer(33, 17, 1), nn.Linear(17, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = torch.relu(x + self.second(self.first(x)))
        x = self.grouped(self.strided(x))
        x = self.average(self.project(self.depthwise(self.expand(x))))
        x = self.last(self.strided_depthwise(x))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = Small().eval()
    # Controllers of these two would read what joined steps do not leave.
    decouplify.wrap(model, SIZE, exclude=["project.0", "last.0"], verify=False)
    for controller in model.decoupling.controllers.values():
        nn.init.normal_(controller.fc2.weight, std=2.0)
        nn.init.normal_(controller.fc2.bias, mean=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bands, "SMALLEST_MAP", 0)
        found = decouplify.sparsify(model).program_for(SIZE)
    assert found is not None
    assert {step.joined for step in found.steps} == {0, 1, 2}
    assert {step.kind for step in found.steps} >= {
        *(StepKind.CONVOLUTION, StepKind.WINDOW, StepKind.EXPAND, StepKind.CONTROL, StepKind.LINEAR, StepKind.MEAN)
    }
    return found


def variants(program: Program) -> Iterator[dict[int, Algorithm]]:
    """Choices of algorithms in which every step has each of its ways once."""
    ways = {i: list(step.algorithms) for i, step in enumerate(program.steps) if len(step.algorithms) > 1}
    for turn in range(max(map(len, ways.values()))):
        yield {i: algorithms[turn % len(algorithms)] for i, algorithms in ways.items()}


def write_plan(program: Program, algorithms: dict[int, Algorithm], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program as run_plan.cpp reads it, with some algorithms."""
    given: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(native, "Plan", lambda *args: given.extend(args))
        _, kept = build_plan(program.draft, program._placement)
    geometries, values, steps, gates = given
    tensors = list(kept.values())
    for i, algorithm in algorithms.items():
        steps[i].algorithm = algorithm
        if algorithm.is_winograd:
            step = program.steps[i]
            tensors.append(native.transform_weights(step.weights["weight"], algorithm, step.sliding.padding[0]))
            steps[i].transformed = tensors[-1].data_ptr()
    positions, n_floats = {None: 0}, 0
    for tensor in tensors:
        positions[tensor.data_ptr()] = 1 + n_floats
        n_floats += tensor.numel()
    for step in steps:
        for name in POINTERS:
            setattr(step, name, positions[getattr(step, name)])
    counts = (len(geometries), len(values), len(steps), len(gates), n_floats, int(np.prod(SIZE)), N_CLASSES)
    with path.open("wb") as file:
        file.write(b"".join(bytes(c_int64(n)) for n in counts))
        file.write(b"".join(bytes(item) for item in (*geometries, *values, *steps, *map(c_int32, gates))))
        file.writelines(tensor.contiguous().numpy().tobytes() for tensor in tensors)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled run_plan, linked to the library that Python uses."""
    if shutil.which("valgrind") is None or shutil.which("g++") is None:
        pytest.skip("needs valgrind and g++")
    found = tmp_path_factory.mktemp("native") / "run_plan"
    library = Path(os.environ.get("DECOUPLIFY_LIBRARY", KERNELS.parent / "libdecouplify.so"))
    command = ["g++", "-std=c++17", "-g", "-Wall", f"-I{KERNELS}", str(RUN_PLAN), str(library), "-o", str(found)]
    subprocess.run([*command, f"-Wl,-rpath,{library.parent}"], check=True)
    return found


@pytest.fixture(scope="module")
def runner_for_arm(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that emulates run_plan as compiled for 64-bit ARM, where vectors of four floats are NEON's."""
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
    if shutil.which(compiler) is None or shutil.which(emulator) is None:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user-static")
    found = tmp_path_factory.mktemp("arm") / "run_plan"
    # One instruction set, so its file is compiled like any other.
    sources = [RUN_PLAN, *(KERNELS / f"{name}.cpp" for name in ("engine", "dispatch", "memory", "threads", "kernels"))]
    options = ["-std=c++17", "-O3", "-static", "-ffp-contract=fast", "-DDECOUPLIFY_ISA=generic", f"-I{KERNELS}"]
    subprocess.run([compiler, *options, *map(str, sources), "-o", str(found)], check=True)
    return [emulator, str(found)]


def check_every_algorithm(
    program: Program, command: list[str], n_threads: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let a runner have each layer's every algorithm; it must succeed and give the numbers of the reference."""
    images = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(1))
    wanted = torch.cat([program.module(image[None]) for image in images])
    (folder / "images").write_bytes(images.numpy().tobytes())
    files = [str(folder / name) for name in ("plan", "images", "outputs")]
    for algorithms in variants(program):
        write_plan(program, algorithms, folder / "plan", monkeypatch)
        done = subprocess.run([*command, *files, str(n_threads)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{algorithms}: {done.stdout}{done.stderr}"
        found = torch.from_numpy(np.fromfile(folder / "outputs", dtype=np.float32)).view(3, N_CLASSES)
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.slow
@pytest.mark.ci_sample
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_network_under_valgrind(
    program: Program, runner: Path, n_threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No access outside of its memory and no leak."""
    # The threads of the pool live until the end; memory that they can reach is not lost.
    leaks = "definite,indirect"
    checker = ["valgrind", "-q", "--error-exitcode=9", "--leak-check=full", f"--errors-for-leak-kinds={leaks}"]
    check_every_algorithm(program, [*checker, str(runner)], n_threads, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.ci_sample
@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_network_on_arm(
    program: Program, runner_for_arm: list[str], n_threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NEON, which no continuous integration on x86 would see otherwise."""
    check_every_algorithm(program, runner_for_arm, n_threads, tmp_path, monkeypatch)
