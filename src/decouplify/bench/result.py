"""What a benchmark found, as plain data and as a table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from decouplify.bench.timing import Spread
from decouplify.cpu import cpu_name

__all__ = ["DENSE_TOLERANCE", "Machine", "Result", "Timing", "TwinTiming"]

#: Largest error of a dense runtime, relative to the largest output, with which it still computes the same network.
DENSE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Machine:
    """Where the numbers come from.

    Attributes:
        cpu: Its name, see ``cpu_name``.
        simd: The widest vectors torch found.
        n_cores: Cores that this process could use.
        load: Load average of the last minute when the benchmark ended; None where the system has none.
        torch: Version of torch.
    """

    cpu: str
    simd: str
    n_cores: int
    load: float | None
    torch: str

    @classmethod
    def here(cls) -> Machine:
        """This machine."""
        load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        simd = torch.backends.cpu.get_cpu_capability()
        return cls(cpu_name(), simd, os.cpu_count() or 1, load, torch.__version__)


@dataclass(frozen=True)
class Timing:
    """One contender.

    Attributes:
        name: Its name.
        version: The runtime's version, or which implementation ran.
        wall_ms: Elapsed milliseconds per call.
        cpu_ms: Processor milliseconds per call, of all threads.
        error: max |found - expected| / max |expected| of its output; expected is what the model in PyTorch returns.
        agreement: Share of the images for which the largest output is the same.
    """

    name: str
    version: str
    wall_ms: Spread
    cpu_ms: Spread
    error: float
    agreement: float


@dataclass(frozen=True)
class TwinTiming:
    """The static twin.

    Attributes:
        width: Share of the filters it has.
        n_macs: Its multiply-accumulates.
        runtime: Which runtime ran it.
        speedup: Time of the fastest dense runtime on the full network / time of the twin.
    """

    width: float
    n_macs: int
    runtime: str
    speedup: Spread


@dataclass(frozen=True)
class Result:
    """One network, one choice of gates, one machine.

    Attributes:
        model: Name.
        input_size: Size of one image.
        gates: Where the gates come from, in words.
        n_paths: Images, each with a path of its own unless all gates are open.
        dense_macs: Multiply-accumulates of the dense network for one image.
        executed_macs: Of each image under its gates, controllers included.
        controller_macs: The controllers' part.
        threads: Threads of each contender.
        cores: Cores the process was pinned to, None if it was not.
        batch: Images per call.
        rounds: Rounds measured.
        backend: Which implementation ran the sparse form.
        machine: Where.
        timings: All contenders.
        missing: Runtimes that could not run, with the reason.
        fastest: The dense runtime with the smallest median time.
        speedup: Its time / ours, by round.
        speedup_open: Its time / ours with all gates open.
        speedup_own: Our time with all gates open / ours: what the gates alone bring.
        twin: The static twin, None if it was not timed.
    """

    model: str
    input_size: tuple[int, ...]
    gates: str
    n_paths: int
    dense_macs: int
    executed_macs: tuple[int, ...]
    controller_macs: int
    threads: int
    cores: tuple[int, ...] | None
    batch: int
    rounds: int
    backend: str
    machine: Machine
    timings: tuple[Timing, ...]
    missing: Mapping[str, str]
    fastest: str | None
    speedup: Spread | None
    speedup_open: Spread | None
    speedup_own: Spread | None
    twin: TwinTiming | None

    @property
    def mac_reduction(self) -> float:
        """Dense MACs / mean executed MACs, controllers included."""
        return self.dense_macs * len(self.executed_macs) / sum(self.executed_macs)

    @property
    def ratio(self) -> float | None:
        """Speedup over the fastest dense runtime / MAC reduction: 1 where saved work became saved time in full."""
        return None if self.speedup is None else self.speedup.median / self.mac_reduction

    def timing(self, name: str) -> Timing | None:
        """The timing of one contender, None if it is missing."""
        return next((t for t in self.timings if t.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with the derived numbers."""
        return {**asdict(self), "mac_reduction": self.mac_reduction, "ratio": self.ratio}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The inverse of ``to_dict``; numbers that can be derived are derived again."""
        values = {field.name: data[field.name] for field in fields(cls)}
        for name in ("speedup", "speedup_open", "speedup_own"):
            values[name] = None if data[name] is None else Spread(**data[name])
        for name in ("input_size", "executed_macs", "cores"):
            values[name] = None if data[name] is None else tuple(data[name])
        twin = data["twin"]
        values["twin"] = None if twin is None else TwinTiming(**{**twin, "speedup": Spread(**twin["speedup"])})
        values["machine"] = Machine(**data["machine"])
        values["timings"] = tuple(
            Timing(**{**t, "wall_ms": Spread(**t["wall_ms"]), "cpu_ms": Spread(**t["cpu_ms"])}) for t in data["timings"]
        )
        return cls(**values)

    def __str__(self) -> str:
        size = "x".join(map(str, self.input_size))
        lines = [
            f"{self.model}, {size}, batch {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}, "
            f"{self.rounds} rounds; gates {self.gates}",
            f"MACs: {self.dense_macs / 1e6:.1f} M dense, {self.mac_reduction:.2f}x fewer executed "
            f"(mean of {self.n_paths} paths)",
            f"{'':24} {'median':>8} {'p20':>8} {'p80':>8} {'p99':>8} {'CPU':>8}   error",
        ]
        lines += [_line(timing) for timing in self.timings]
        lines += [f"{name:24} missing: {reason}" for name, reason in self.missing.items()]
        return "\n".join([*lines, *self._conclusions()])

    def _conclusions(self) -> list[str]:
        if self.speedup is None:
            return ["no dense runtime to compare with"]
        lines = [
            f"{_times(self.speedup)} the speed of {self.fastest}, {self.ratio:.2f} of the MAC reduction; sparse form: "
            f"{self.backend}"
        ]
        if self.speedup_own is not None:
            lines.append(f"{_times(self.speedup_own)} the speed of the same form with all gates open")
        if self.twin is not None:
            lines.append(
                f"static twin ({100 * self.twin.width:.0f} % of the filters, same MACs) in {self.twin.runtime}: "
                f"{_times(self.twin.speedup)}"
            )
        return lines


def _times(spread: Spread) -> str:
    return f"{spread.median:.2f}x ({spread.p20:.2f} to {spread.p80:.2f})"


def _line(t: Timing) -> str:
    wall = " ".join(f"{value:8.2f}" for value in (t.wall_ms.median, t.wall_ms.p20, t.wall_ms.p80, t.wall_ms.p99))
    return f"{t.name:24} {wall} {t.cpu_ms.median:8.2f}   {t.error:.0e}"
