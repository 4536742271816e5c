"""The script that measures the table of the performance page."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

import decouplify
from conftest import ROOT
from decouplify.bench.result import Machine, Result, Timing, TwinTiming
from decouplify.bench.timing import Spread
from decouplify.registry import build_model

pytest.importorskip("torchvision")
pytest.importorskip("timm")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("latency", ROOT / "benchmarks" / "latency.py")
    module = importlib.util.module_from_spec(spec)
    before, sys.modules["latency"] = list(sys.path), module  # dataclasses look their module up
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as python does for a script
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def result(model: str, ms: float) -> Result:
    spread = Spread(ms, ms, ms, ms)
    timings = tuple(Timing(name, name, spread, spread, 1e-6, 1.0) for name in ("openvino", "decouplify"))
    machine = Machine("cpu", "AVX2", 2, 0.1, "2")
    return Result(
        model, (3, 8, 8), "random, 2x", 2, 1000, (400, 600), 10, 1, (0,), 1, 3, "native", machine, timings,
        {"torch.compile": "RuntimeError: no compiler"}, "openvino", Spread(1.5, 1.4, 1.6, 1.7), None,
        Spread(1.2, 1.1, 1.3, 1.4), TwinTiming(0.7, 500, "openvino", spread),
    )  # fmt: skip


def test_every_row_is_measured_once(script: ModuleType) -> None:
    names = [str(row) for row in script.rows()]
    assert len(set(names)) == len(names)
    assert {row.model for row in script.rows()} == set(script.MODELS)


@pytest.mark.parametrize("model", ["mobilenet_v2", "tf_efficientnet_lite0"])
def test_the_expanded_channels_are_those_of_every_expanding_block(script: ModuleType, model: str) -> None:
    plan = decouplify.inspect(build_model(script.MODELS[model][0]), (3, 64, 64), only=script.EXPANDED[model])
    kinds = [(site.kernel_size, site.groups > 1) for site in plan.sites]
    assert kinds[::2] == [((1, 1), False)] * len(plan.gates)
    assert all(depthwise for _, depthwise in kinds[1::2])
    assert len(plan.gates) == {"mobilenet_v2": 16, "tf_efficientnet_lite0": 15}[model]


def test_the_page_shows_the_last_result_of_each_row_and_what_is_missing(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "latency.jsonl"
    lines = [("a row", result("old", 9.0)), ("another", result("other", 7.0)), ("a row", result("new", 5.0))]
    file.write_text("".join(json.dumps({"key": key, **found.to_dict()}) + "\n" for key, found in lines))
    text = script.page(script.latest(file))
    assert "| new | random, 2x | 1 | 1 | 2.00x | 5.00 (openvino) | 5.00 | 1.50 (1.40 to 1.60) | 0.75 | 1.20 |" in text
    assert "| old |" not in text
    assert "| torch.compile | missing: RuntimeError: no compiler |" in text
    assert all(str(row) in text.partition("Not measured yet")[2] for row in script.rows())


def test_without_results_there_is_no_page(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no results"):
        script.page(script.latest(tmp_path / "absent.jsonl"))


def test_every_machine_has_a_table_of_its_own(script: ModuleType, tmp_path: Path) -> None:
    for name, machine in (("memory-avx2", "second"), ("memory", "first")):
        rows = [{"machine": machine, "network": network} for network in ("a", "b")]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = script.machines.tables(tmp_path / "memory.jsonl", "| network |", lambda row: [row["network"]])
    table = ["", "| network |", "| --- |", "| a |", "| b |", ""]
    assert lines == ["first:", *table, "second:", *table]
    assert script.machines.tables(tmp_path / "absent.jsonl", "| network |", lambda row: []) == []
