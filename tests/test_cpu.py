"""The name under which measurements of this CPU are kept."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from decouplify import cpu

AMD = (
    "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nmodel name\t: another\n"
)
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU part\t: 0xd40\n"


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    cpu.cpu_name.cache_clear()
    yield
    cpu.cpu_name.cache_clear()


@pytest.mark.parametrize(
    ("text", "wanted"), [(AMD, "AMD EPYC (family 26, model 2)"), (ARM, "Cortex (part 0xd40)"), ("", "Cortex")]
)
def test_it_tells_processors_of_one_name_apart(
    text: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "processor", lambda: "Cortex")
    assert cpu.cpu_name() == wanted


def test_without_a_list_of_processors_it_is_what_python_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_INFO", tmp_path / "nothing")
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert cpu.cpu_name() == platform.machine()


def test_any_processor_computes_in_single_and_double_precision() -> None:
    assert all(cpu.computes_in(dtype) for dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_torch_is_asked_about_half_precision(
    dtype: torch.dtype, name: str, answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**{f"_is_mkldnn_{name}_supported": lambda: answer}))
    assert cpu.computes_in(dtype) is answer


def test_nothing_is_said_against_a_processor_that_torch_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    assert cpu.computes_in(torch.bfloat16)
