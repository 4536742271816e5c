"""The name of this CPU, exact enough that two machines of one name compute alike."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

__all__ = ["cpu_name"]

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


def _field(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name.strip(), value.strip()
