"""Time several things against each other: in turns, in one process, with every measurement kept."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

__all__ = ["Samples", "Spread", "interleave", "pinned", "ratios"]


@dataclass(frozen=True)
class Spread:
    """How a quantity varies over rounds: median, 20th, 80th and 99th percentile, in the unit of the samples."""

    median: float
    p20: float
    p80: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        points = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
        return cls(statistics.median(values), points[19], points[79], points[98])


@dataclass(frozen=True)
class Samples:
    """Milliseconds of one contender, one entry per round.

    Attributes:
        wall_ms: Elapsed time.
        cpu_ms: Processor time of the whole process, so that worker threads of a runtime count as well. It does not
            grow while another process holds the core.
    """

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def add(self, wall_s: float, cpu_s: float) -> None:
        """One more round."""
        self.wall_ms.append(1e3 * wall_s)
        self.cpu_ms.append(1e3 * cpu_s)


def interleave(
    contenders: Mapping[str, Callable[[int], object]],
    n_inputs: int,
    *,
    rounds: int = 30,
    seconds: float = 60.0,
    warm_up: int = 2,
    pause_s: float = 0.0,
) -> dict[str, Samples]:
    """Run all contenders once per round, so that whatever disturbs the machine disturbs all of them.

    The order rotates from round to round, for each contender finds the caches as its predecessor left them.

    Args:
        contenders: Name to a function that runs input number i, 0 <= i < ``n_inputs``.
        n_inputs: Inputs to go through, one per round, the same for all contenders of a round.
        rounds: Rounds to measure.
        seconds: Start no round after this time, warm-up included; at least three are measured.
        warm_up: Rounds before that, not measured.
        pause_s: Seconds to wait before each measurement.

    Returns:
        Samples by name, equally many for all.
    """
    names = list(contenders)
    samples = {name: Samples() for name in names}
    deadline = time.perf_counter() + seconds
    with _no_garbage_collection():
        for i in range(-warm_up, rounds):
            if i >= 3 and time.perf_counter() > deadline:
                break
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                time.sleep(pause_s)
                elapsed = _time(contenders[name], i % n_inputs)
                if i >= 0:
                    samples[name].add(*elapsed)
    return samples


def _time(run: Callable[[int], object], i: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run(i)
    return time.perf_counter() - wall, time.process_time() - cpu


def ratios(slow: Samples, fast: Samples) -> Spread:
    """How many times faster the second is, by wall time, round by round.

    Noise that spans a round cancels in its ratio, as it does not in a ratio of medians.
    """
    return Spread.of([a / b for a, b in zip(slow.wall_ms, fast.wall_ms, strict=True)])


@contextmanager
def pinned(threads: int, cores: Iterable[int] | None = None) -> Iterator[None]:
    """While the context lasts, torch computes with so many threads, on the given cores where the system can pin.

    Other runtimes read the affinity when they are started, so start them inside.

    Args:
        threads: Threads of each runtime, at least 1.
        cores: Numbers of cores; as many as there are threads. The process stays where it is if not given.

    Raises:
        ValueError: If the numbers do not fit, or a core does not exist.
    """
    chosen = None if cores is None else set(cores)
    if threads < 1 or (chosen is not None and len(chosen) != threads):
        raise ValueError(f"{threads} threads on cores {sorted(chosen or [])}: give one core per thread, at least one")
    before = torch.get_num_threads()
    with _affinity(chosen):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def _affinity(cores: set[int] | None) -> Iterator[None]:
    if cores is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    if not cores <= before:
        raise ValueError(f"cores {sorted(cores)} given, this process may run on {sorted(before)}")
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
