"""A benchmark compares before it times, changes nothing, and says what it could not run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import decouplify
from decouplify.bench import RUNTIMES, Gates, Protocol, Result, benchmark
from decouplify.bench.runtimes import Contender, start
from toynets import SIZE, TOYS, random_images, randomise_gates, randomise_statistics

QUICK = Protocol(rounds=3, seconds=10.0, runtimes=("eager",))


def plain(name: str = "Plain", width: int = 16) -> nn.Module:
    return randomise_statistics(TOYS[name].build(width)).eval()


@pytest.fixture(scope="module")
def result() -> Result:
    torch.manual_seed(0)
    return benchmark(plain(width=64), input_size=SIZE, gates=Gates(mac_reduction=1.5), protocol=QUICK)


def test_every_contender_is_timed_and_compared(result: Result) -> None:
    names = [timing.name for timing in result.timings]
    assert names == ["eager", "decouplify", "decouplify, gates open", "static twin"]
    assert all(0 < t.wall_ms.p20 <= t.wall_ms.median <= t.wall_ms.p99 for t in result.timings)
    assert all(t.error < 1e-5 and t.agreement == 1 for t in result.timings)
    assert result.missing == dict.fromkeys(["torch.compile", "onnxruntime", "openvino"], "not asked for")


def test_the_numbers_fit_together(result: Result) -> None:
    assert result.mac_reduction == pytest.approx(1.5, rel=0.01)
    assert len(result.executed_macs) == result.n_paths
    assert len(set(result.executed_macs)) > 1, "all images have paths of the same cost"
    assert result.fastest == "eager"
    assert result.speedup is not None
    assert result.twin is not None
    assert result.ratio == pytest.approx(result.speedup.median / result.mac_reduction)
    assert result.twin.n_macs == pytest.approx(result.dense_macs / 1.5, rel=0.1)


def test_a_result_survives_json_and_prints(result: Result) -> None:
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    text = str(result)
    assert "1.50x fewer executed" in text
    assert all(timing.name in text for timing in result.timings)


def test_the_model_is_left_alone() -> None:
    model = plain()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    benchmark(model, input_size=SIZE, gates=Gates(keep=0.5), protocol=replace(QUICK, twin=False))
    assert not hasattr(model, "decoupling")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_wrapped_model_is_timed_with_its_own_gates() -> None:
    model = randomise_gates(TOYS["Plain"].wrapped(16, reduction=1)).eval()
    images = random_images(4)
    found = benchmark(model, images, protocol=QUICK)
    assert found.executed_macs == tuple(decouplify.count_macs(model, images).executed.tolist())
    assert found.gates == "of the model's own controllers"
    assert found.timing("decouplify").error < 1e-5
    assert model.decoupling.plan.gates


def test_open_gates_need_no_twin_and_no_second_run_with_open_gates() -> None:
    found = benchmark(plain(), input_size=SIZE, protocol=QUICK)
    assert [t.name for t in found.timings] == ["eager", "decouplify"]
    assert found.twin is None
    assert found.mac_reduction < 1, "controllers are not counted"


def test_batches_hold_several_paths() -> None:
    found = benchmark(plain(), input_size=SIZE, gates=Gates(keep=0.5), protocol=replace(QUICK, batch=3))
    assert found.batch == 3
    assert found.timing("decouplify").error < 1e-5


def test_what_cannot_run_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(model: nn.Module, inputs: Sequence[Tensor], threads: int, onnx_file: Path) -> Contender:
        raise ImportError("no such package")

    def wrong(model: nn.Module, inputs: Sequence[Tensor], threads: int, onnx_file: Path) -> Contender:
        return Contender("wrong", "", lambda i: model(inputs[i]) + 1)

    def writing(model: nn.Module, inputs: Sequence[Tensor], threads: int, onnx_file: Path) -> Contender:
        return Contender("writing", "", lambda i: model(inputs[i].mul_(1.5)))

    for function in (absent, wrong, writing):
        monkeypatch.setitem(RUNTIMES, function.__name__, function)
    protocol = replace(QUICK, runtimes=("absent", "wrong", "writing"))
    found = benchmark(plain(), input_size=SIZE, protocol=protocol)
    assert found.missing["absent"] == "ImportError: no such package"
    assert "its output is wrong" in found.missing["wrong"]
    assert "changes its images" in found.missing["writing"]
    assert found.fastest is found.speedup is found.ratio is None
    assert "missing: ImportError: no such package" in str(found)
    assert "no dense runtime to compare with" in str(found)


def test_an_unknown_runtime_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="no runtime 'tensorrt'; there are eager, "):
        benchmark(plain(), input_size=SIZE, protocol=replace(QUICK, runtimes=("tensorrt",)))


@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_each_runtime_computes_the_network_and_exports_it_once(name: str, tmp_path: Path) -> None:
    if name != "eager":
        pytest.importorskip(name)
        pytest.importorskip("onnxscript")
    model, inputs = plain(), [random_images(1, seed=i) for i in range(2)]
    for _ in range(2):
        contender = start(name, model, inputs, 1, tmp_path / "model.onnx")
        for i, x in enumerate(inputs):
            assert torch.allclose(contender.outputs(i)[0], model(x), rtol=1e-4, atol=1e-5)
    assert len(list(tmp_path.iterdir())) == (0 if name == "eager" else 1)


@pytest.mark.slow
def test_torch_compile_computes_the_network(tmp_path: Path) -> None:
    model, inputs = plain(), [random_images(1)]
    with torch.no_grad():
        contender = start("torch.compile", model, inputs, 1, tmp_path / "model.onnx")
        assert torch.allclose(contender.outputs(0)[0], model(inputs[0]), rtol=1e-4, atol=1e-5)
