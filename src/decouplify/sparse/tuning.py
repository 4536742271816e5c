"""How each convolution of a program is computed: directly, packed or by Winograd, whichever is fastest on this CPU.

The answer depends on caches and memory as much as on arithmetic, so it is measured, once per shape and CPU: the network
runs a few times with every way, with two filters of three open in each gate, which leaves about half of the
multiply-accumulates. Measured alone, a layer would find its weights in the cache. The times are kept in a file.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from decouplify.cpu import cpu_name
from decouplify.sparse import native
from decouplify.sparse.drafts import Step
from decouplify.sparse.executor import Program
from decouplify.sparse.native import Algorithm
from decouplify.sparse.timed import TimedRun

__all__ = ["cache_file", "choose_algorithms"]

#: The time of a layer by way.
Seconds = dict[Algorithm, float]
#: Directory of the file with measured times; the system's cache directory if not set, none if empty.
CACHE_VARIABLE = "DECOUPLIFY_CACHE"

#: Raised whenever kernels change so much that choices measured before may be wrong.
_EDITION = 9
_N_ROUNDS = 9
_N_FIRST = 3  # rounds after which ways that take so many times as long as the best are given up
_HOPELESS = 1.5
#: Winograd keeps weights of its own, up to four times as many. A way must be faster by so much than all that keep less.
_GAIN = 1.05
_LARGEST_KEPT = 1.5  # times the network's own weights, for all that Winograd keeps
_FEW_TILES = 4
_LARGEST_GROUP = 8 << 20  # bytes of weights that are there in Winograd's forms, too, which take several times as much


@dataclass(frozen=True)
class _Candidate:
    """A step whose algorithm is to be measured, for all steps of the same key."""

    key: str
    step: int
    ways: tuple[Algorithm, ...]


def choose_algorithms(program: Program, *, exact: bool) -> None:
    """Set the algorithm of every convolution, by measuring those not yet known.

    Args:
        program: What to tune; nothing else may run it meanwhile.
        exact: Whether Winograd, whose rounding differs, is forbidden.
    """
    known, unknown = _read(cache_file()), dict[str, _Candidate]()
    keys = dict[int, str]()
    for i, step in enumerate(program.steps):
        ways = tuple(way for way in step.algorithms if not (exact and way.is_winograd) and _is_thinkable(step, way))
        if len(ways) > 1:
            keys[i] = key = f"{_key(step)} {'exact' if exact else 'fast'}"
            if known.get(key, {}).keys() != set(ways):
                unknown.setdefault(key, _Candidate(key, i, ways))
    if unknown:
        # The others are measured beside what will run.
        _set(program, {i: _best(known[key]) for i, key in keys.items() if key not in unknown})
        measured = _measured(program, list(unknown.values()))
        _write(cache_file(), measured)
        known |= measured
    _set(program, _affordable(program, {i: known[key] for i, key in keys.items()}))


def _best(seconds: Seconds) -> Algorithm:
    """The fastest way, unless one that keeps less memory is nearly as fast."""
    best, *others = sorted(seconds, key=lambda way: (way.n_kept, seconds[way]))
    for way in others:
        gain = 1.0 if way.n_kept == best.n_kept else _GAIN
        best = way if seconds[way] * gain < seconds[best] else best
    return best


def _affordable(program: Program, seconds: Mapping[int, Seconds]) -> dict[int, Algorithm]:
    """The best way by step, where memory allows it; what saves least time for its memory is given up first."""
    chosen = {i: _best(found) for i, found in seconds.items()}
    own = sum(weight.nbytes for step in program.steps for weight in step.weights.values())
    kept = {i: program.bytes_kept(i, way) for i, way in chosen.items()}
    while sum(kept.values()) > _LARGEST_KEPT * own:
        smaller = {
            i: _best({way: found[way] for way in found if way.n_kept < chosen[i].n_kept})
            for i, found in seconds.items()
            if kept[i]
        }
        saved = {i: seconds[i][way] - seconds[i][chosen[i]] for i, way in smaller.items()}
        freed = {i: kept[i] - program.bytes_kept(i, way) for i, way in smaller.items()}
        least = min(smaller, key=lambda i: saved[i] / freed[i])
        chosen[least] = smaller[least]
        kept[least] -= freed[least]
    return chosen


def _is_thinkable(step: Step, way: Algorithm) -> bool:
    """Whether a way need be tried: F(4,3) fetches four times the weights, which a few tiles cannot make up for."""
    assert step.output is not None and step.output.size is not None
    n_tiles = math.prod(-(-extent // 4) for extent in step.output.size)
    return way is not Algorithm.WINOGRAD_4 or n_tiles > _FEW_TILES


def _set(program: Program, ways: Mapping[int, Algorithm]) -> None:
    for i, way in ways.items():
        program.set_algorithm(i, way)


def _key(step: Step) -> str:
    """What the choice depends on: the CPU, the kernels, the threads, and the layer."""
    assert step.input is not None and step.output is not None and step.output.size is not None
    sliding = step.sliding
    pairs = (sliding.kernel, sliding.stride, sliding.padding, sliding.dilation, step.output.size)
    kernel, stride, padding, dilation, size = (f"{a}x{b}" for a, b in pairs)
    channels = f"{step.input.channels}->{step.output.channels} in {step.groups}"
    layer = f"{channels} {kernel}/{stride}+{padding}:{dilation} at {size}"
    parts = f"{'part' if step.reads_part else 'all'}->{'part' if step.gate >= 0 else 'all'}"
    kernels = f"{native.instruction_set()} {_EDITION}"
    return f"{cpu_name()} {kernels} {torch.get_num_threads()} threads: {layer} {parts}"


def _measured(program: Program, candidates: list[_Candidate]) -> dict[str, Seconds]:
    """The seconds of each way by key."""
    return {key: found for group in _groups(program, candidates) for key, found in _measure(program, group).items()}


def _groups(program: Program, candidates: list[_Candidate]) -> Iterator[list[_Candidate]]:
    """Candidates to be measured in the same runs: as many as memory for their transformed weights is to spare for."""
    group, n_bytes = list[_Candidate](), 0
    for candidate in candidates:
        is_winograd = any(way.is_winograd for way in candidate.ways)
        needed = program.steps[candidate.step].weights["weight"].nbytes if is_winograd else 0
        if group and n_bytes + needed > _LARGEST_GROUP:
            yield group
            group, n_bytes = [], 0
        group.append(candidate)
        n_bytes += needed
    yield group


@torch.no_grad()
def _measure(program: Program, group: list[_Candidate]) -> dict[str, Seconds]:
    """The same for candidates that are measured together, over a few rounds of all their ways."""
    # Else each round would make them again.
    kept = [program.weights_for(candidate.step, way) for candidate in group for way in candidate.ways]
    times = {candidate.key: {way: list[float]() for way in candidate.ways} for candidate in group}
    image = torch.randn(program.image_shape, generator=torch.Generator().manual_seed(0))
    gates = {name: (torch.arange(n) % 3 != 2).float() for name, n in program.gate_sizes().items()}
    with program.workspace() as workspace:
        ways = {candidate: candidate.ways for candidate in group}
        for n in range(_N_ROUNDS):
            if n == _N_FIRST:
                ways = {candidate: _hopeful(times[candidate.key]) for candidate in group}
            for turn in range(max(map(len, ways.values()))):
                chosen = {candidate: found[turn % len(found)] for candidate, found in ways.items()}
                _set(program, {candidate.step: way for candidate, way in chosen.items()})
                run = TimedRun(program, workspace, image, gates)
                run.result(program.schedule)
                for candidate, way in chosen.items():
                    if turn < len(ways[candidate]):
                        seconds, _ = run.times[candidate.step]
                        times[candidate.key][way].append(seconds)
    del kept
    measured = {key: _settled(found) for key, found in times.items()}
    # Lets go of the others' weights.
    _set(program, {candidate.step: _best(measured[candidate.key]) for candidate in group})
    return measured


def _hopeful(times: Mapping[Algorithm, Sequence[float]]) -> tuple[Algorithm, ...]:
    """The ways that may turn out to be the best, from their times in the first rounds."""
    settled = _settled(times)
    return tuple(way for way, seconds in settled.items() if seconds <= _HOPELESS * min(settled.values()))


def _settled(times: Mapping[Algorithm, Sequence[float]]) -> Seconds:
    """The time of each way, from its times in all rounds.

    Other programs slow a CPU for longer than a round takes, and so all ways in turn: the median of the ratios within
    each round tells more than the shortest times, which may come from different moments.
    """
    base = max(times.values(), key=len)
    shortest = min(base)
    return {way: shortest * median(a / b for a, b in zip(found, base, strict=False)) for way, found in times.items()}


def cache_file() -> Path | None:
    """Where measured times are kept, None if nowhere."""
    given = os.environ.get(CACHE_VARIABLE)
    if given == "":
        return None
    directory = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "decouplify"
    return directory / "algorithms.json"


def _read(path: Path | None) -> dict[str, Seconds]:
    """Seconds of each way by key; empty if there is no file, or one that somebody else wrote."""
    try:
        found = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(key): seconds for key, value in found.items() if (seconds := _parsed(value))}


def _parsed(value: Any) -> Seconds:
    """What the file says of one layer; empty if that is something else."""
    if not isinstance(value, dict) or not all(isinstance(x, float) for x in value.values()):
        return {}
    return {Algorithm[name]: x for name, x in value.items() if name in Algorithm.__members__}


def _write(path: Path | None, measured: dict[str, Seconds]) -> None:
    """Add measurements to the file. Another process may do the same: the file is replaced in one piece."""
    if path is None:
        return
    content = {key: {way.name: x for way, x in found.items()} for key, found in (_read(path) | measured).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump(content, file, indent=1, sort_keys=True)
        Path(file.name).replace(path)
    except OSError:
        pass  # a read-only home: the next process measures again
