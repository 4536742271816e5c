"""This CPU: a name exact enough that two machines of one name compute alike, and what it can compute with."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

__all__ = ["computes_in", "cpu_name"]

_INFO = Path("/proc/cpuinfo")


@functools.cache
def cpu_name() -> str:
    """Name, family and model, such as "AMD EPYC (family 26, model 2)": virtual machines tend to hide all but these.

    What ``platform`` knows where the system does not list its processors.
    """
    try:
        lines = _INFO.read_text().splitlines()
    except OSError:
        lines = []
    fields = dict(_field(line) for line in reversed(lines) if ":" in line)  # those of the first processor
    name = fields.get("model name") or platform.processor() or platform.machine()
    labels = {"family": "cpu family", "model": "model", "part": "CPU part"}  # the last one on ARM
    numbers = [f"{label} {fields[key]}" for label, key in labels.items() if fields.get(key)]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def computes_in(dtype: torch.dtype) -> bool:
    """Whether torch's convolutions have instructions for this type here; True where torch cannot tell."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    found = None if asked is None else getattr(torch.ops.mkldnn, asked, None)
    return found is None or bool(found())


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()
