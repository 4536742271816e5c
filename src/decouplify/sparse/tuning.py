"""How each convolution of a program is computed: directly, packed or by Winograd, whichever is fastest on this CPU.

The answer depends on caches and memory as much as on arithmetic, so it is measured, once per shape and CPU: the network
runs a few times with every way, with two filters of three open in each gate, which leaves about half of the
multiply-accumulates. Measured alone, a layer would find its weights in the cache. The results are kept in a file.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from decouplify.cpu import cpu_name
from decouplify.sparse import native
from decouplify.sparse.drafts import Step
from decouplify.sparse.executor import Program
from decouplify.sparse.native import Algorithm
from decouplify.sparse.timed import TimedRun

__all__ = ["cache_file", "choose_algorithms"]

#: Directory of the file with measured choices; the system's cache directory if not set, none if empty.
CACHE_VARIABLE = "DECOUPLIFY_CACHE"

#: Raised whenever kernels change so much that choices measured before may be wrong.
_EDITION = 3
_N_ROUNDS = 5
#: Winograd keeps weights of its own, up to four times as many; it must be faster by so much to be worth their memory.
_WINOGRAD_GAIN = 1.1
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
        ways = tuple(way for way in step.algorithms if not (exact and way.is_winograd))
        if len(ways) > 1:
            keys[i] = key = f"{_key(step)} {'exact' if exact else 'fast'}"
            if known.get(key) not in {way.name for way in ways}:  # a file may hold anything
                unknown.setdefault(key, _Candidate(key, i, ways))
    _set(program, {i: known[key] for i, key in keys.items() if key not in unknown})
    measured = _measured(program, list(unknown.values())) if unknown else {}
    known |= measured
    _set(program, {i: known[key] for i, key in keys.items() if key in unknown})
    if measured:
        _write(cache_file(), measured)


def _set(program: Program, names: Mapping[int, str]) -> None:
    for i, name in names.items():
        program.set_algorithm(i, Algorithm[name])


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


def _measured(program: Program, candidates: list[_Candidate]) -> dict[str, str]:
    """The name of the fastest way by key."""
    return {key: name for group in _groups(program, candidates) for key, name in _measure(program, group).items()}


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
def _measure(program: Program, group: list[_Candidate]) -> dict[str, str]:
    """The same for candidates that are measured together: by the shortest time over a few rounds."""
    # Else each round would make them again.
    kept = [program.weights_for(candidate.step, way) for candidate in group for way in candidate.ways]
    best = {candidate.key: dict.fromkeys(candidate.ways, float("inf")) for candidate in group}
    image = torch.randn(program.image_shape, generator=torch.Generator().manual_seed(0))
    gates = {name: (torch.arange(n) % 3 != 2).float() for name, n in program.gate_sizes().items()}
    with program.workspace() as workspace:
        for turn in range(_N_ROUNDS * max(len(candidate.ways) for candidate in group)):
            chosen = {candidate: candidate.ways[turn % len(candidate.ways)] for candidate in group}
            _set(program, {candidate.step: way.name for candidate, way in chosen.items()})
            run = TimedRun(program, workspace, image, gates)
            run.result(program.schedule)
            for candidate, way in chosen.items():
                seconds, _ = run.times[candidate.step]
                best[candidate.key][way] = min(best[candidate.key][way], seconds)
    del kept
    names = {key: _best(times).name for key, times in best.items()}
    _set(program, {candidate.step: names[candidate.key] for candidate in group})  # lets go of the others' weights
    return names


def _best(seconds: Mapping[Algorithm, float]) -> Algorithm:
    return min(seconds, key=lambda way: seconds[way] * (_WINOGRAD_GAIN if way.is_winograd else 1.0))


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
