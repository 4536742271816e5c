"""How each convolution of a program is computed: directly, packed or by Winograd, whichever is fastest on this CPU.

The answer depends on caches and memory as much as on arithmetic, so it is measured, once per shape and CPU: each way
computes the layer a few times with half of its filters and channels, and the results are kept in a file.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from decouplify.sparse import native
from decouplify.sparse.drafts import Step
from decouplify.sparse.executor import Program
from decouplify.sparse.native import Algorithm

__all__ = ["cache_file", "choose_algorithms"]

#: Directory of the file with measured choices; the system's cache directory if not set, none if empty.
CACHE_VARIABLE = "DECOUPLIFY_CACHE"

#: Raised whenever kernels change so much that choices measured before may be wrong.
_EDITION = 2
_N_ROUNDS = 5
_SECONDS_PER_WAY = 0.02


def choose_algorithms(program: Program, *, exact: bool) -> None:
    """Set the algorithm of every convolution, by measuring those not yet known.

    Args:
        program: What to tune; nothing else may run it meanwhile.
        exact: Whether Winograd, whose rounding differs, is forbidden.
    """
    known = _read(cache_file())
    measured: dict[str, str] = {}
    for i, step in enumerate(program.steps):
        ways = tuple(way for way in step.algorithms if not (exact and way.is_winograd))
        if len(ways) > 1:
            key = f"{_key(step)} {'exact' if exact else 'fast'}"
            if known.get(key) not in {way.name for way in ways}:  # a file may hold anything
                known[key] = measured[key] = _fastest(program, i, ways).name
            program.set_algorithm(i, Algorithm[known[key]])
    if measured:
        _write(cache_file(), measured)


def _key(step: Step) -> str:
    """What the choice depends on: the CPU, the kernels, the threads, and the layer."""
    assert step.input is not None and step.output is not None and step.output.size is not None
    sliding = step.sliding
    pairs = (sliding.kernel, sliding.stride, sliding.padding, sliding.dilation, step.output.size)
    kernel, stride, padding, dilation, size = (f"{a}x{b}" for a, b in pairs)
    channels = f"{step.input.channels}->{step.output.channels} in {step.groups}"
    layer = f"{channels} {kernel}/{stride}+{padding}:{dilation} at {size}"
    halves = f"{'half' if step.reads_part else 'all'}->{'half' if step.gate >= 0 else 'all'}"
    kernels = f"{native.instruction_set()} {_EDITION}"
    return f"{_cpu()} {kernels} {torch.get_num_threads()} threads: {layer} {halves}"


@functools.cache
def _cpu() -> str:
    """The CPU's name; two machines of one name share their choices."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    identity = [
        line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "model\t", "CPU part"))
    ]
    return " ".join(dict.fromkeys(identity)) or platform.machine()


def _fastest(program: Program, i: int, ways: tuple[Algorithm, ...]) -> Algorithm:
    """The fastest of some ways for one step, by the minimum over a few rounds in which the ways take turns."""
    best = dict.fromkeys(ways, float("inf"))
    kept = [program.weights_for(i, algorithm) for algorithm in ways]  # else each round would make them again
    with program.prepared_for_timing(i) as run:
        for _ in range(_N_ROUNDS):
            for algorithm in ways:
                program.set_algorithm(i, algorithm)
                best[algorithm] = min(best[algorithm], _time(run))
    del kept
    return min(best, key=lambda algorithm: best[algorithm])


def _time(run: Callable[[], object]) -> float:
    """Seconds of one run, the shortest of as many as fit a short while (at least two: the first warms the caches)."""
    run()
    shortest, end = float("inf"), time.perf_counter() + _SECONDS_PER_WAY / _N_ROUNDS
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        shortest = min(shortest, now - start)
        if now >= end:
            return shortest


def cache_file() -> Path | None:
    """Where measured choices are kept, None if nowhere."""
    given = os.environ.get(CACHE_VARIABLE)
    if given == "":
        return None
    directory = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "decouplify"
    return directory / "algorithms.json"


def _read(path: Path | None) -> dict[str, str]:
    """Choices by key; empty if there is no file, or one that somebody else wrote."""
    try:
        found = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(key): str(name) for key, name in found.items() if name in Algorithm.__members__}


def _write(path: Path | None, measured: dict[str, str]) -> None:
    """Add choices to the file. Another process may do the same: the file is replaced in one piece."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump({**_read(path), **measured}, file, indent=1, sort_keys=True)
        Path(file.name).replace(path)
    except OSError:
        pass  # a read-only home: the next process measures again
