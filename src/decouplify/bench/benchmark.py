"""Measure one network: its gated form against the fastest dense runtimes, all in one process."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from decouplify.bench.dense import dense_module
from decouplify.bench.masks import max_paths, random_images, random_path, steer
from decouplify.bench.result import DENSE_TOLERANCE, Machine, Result, Timing, TwinTiming
from decouplify.bench.runtimes import RUNTIMES, Contender, start
from decouplify.bench.timing import Samples, Spread, interleave, pinned, ratios
from decouplify.bench.twin import static_twin
from decouplify.decoupling import Decoupling, decoupling_of
from decouplify.macs import MacCount, count_macs
from decouplify.modes import eval_mode
from decouplify.selfcheck import outputs
from decouplify.sparse import backend, sparsify
from decouplify.sparse.verification import relative_error
from decouplify.surgery import unwrap, wrap
from decouplify.trace import copy_sharing_tensors, trace

__all__ = ["Gates", "Protocol", "benchmark"]

OURS, OPEN, TWIN = "decouplify", "decouplify, gates open", "static twin"
_N_PATHS = 8
_LEAST_FOR_TWIN = 1.02  # below this MAC reduction the static twin is the network itself


@dataclass(frozen=True)
class Gates:
    """Gates to give a network that has none: random ones at a stated cost, or all open.

    Attributes:
        keep: Probability of each gate to be open, in (0, 1]; or
        mac_reduction: dense MACs / mean executed MACs; or None of both for gates that are all open.
        only: Names or globs of the convolutions to gate; empty for all that ``wrap`` gates.
        linear_as_conv: Also gate linear layers on (N, H, W, C) maps.
        seed: Of the random paths.
    """

    keep: float | None = None
    mac_reduction: float | None = None
    only: tuple[str, ...] = ()
    linear_as_conv: bool = False
    seed: int = 0

    @property
    def are_open(self) -> bool:
        """Whether nothing was asked for but gates that are all open."""
        return self.keep is None and self.mac_reduction is None

    def __str__(self) -> str:
        where = f" at {', '.join(self.only)}" if self.only else ""
        if self.are_open:
            return f"all open{where}"
        asked = f"each open with probability {self.keep:g}" if self.keep is not None else f"{self.mac_reduction:g}x"
        return f"random, {asked}{where}"


@dataclass(frozen=True)
class Protocol:
    """How to measure.

    Attributes:
        threads: Threads of every contender.
        cores: Cores to pin the process to, one per thread; not pinned if not given.
        batch: Images per call.
        rounds: Rounds, in each of which every contender runs once.
        seconds: Start no round after this time.
        runtimes: Which dense runtimes to start, of ``RUNTIMES``.
        twin: Also time the static twin, in the fastest of these runtimes, if the gates save anything.
        gates_open: Also time the gated form with all gates open.
    """

    threads: int = 1
    cores: tuple[int, ...] | None = None
    batch: int = 1
    rounds: int = 30
    seconds: float = 60.0
    runtimes: tuple[str, ...] = tuple(RUNTIMES)
    twin: bool = True
    gates_open: bool = True


def benchmark(
    model: nn.Module,
    images: Tensor | None = None,
    *,
    name: str = "",
    input_size: tuple[int, ...] | None = None,
    gates: Gates = Gates(),
    protocol: Protocol = Protocol(),
    folder: Path | None = None,
) -> Result:
    """Time a network with gates against itself without, in every dense runtime that is installed.

    A wrapped model is timed with the gates its controllers choose for ``images``. A model without gates gets, on a
    copy, controllers that choose given paths, a different one for each image; they run as trained ones would.

    Args:
        model: A wrapped or plain model on the CPU; unchanged.
        images: Shape (N, C, H, W); for a plain model noise if not given. The gates of a wrapped model depend on its
            images, so for one that was trained give images it was trained for.
        name: What to call the model; its class if not given.
        input_size: Size of one image, of a plain model without ``images``.
        gates: Gates for a plain model; not used for a wrapped one.
        protocol: How to measure.
        folder: Where to keep exported networks for the next time; a temporary directory if not given.

    Returns:
        Every runtime's times, errors and what could not run; print it for a table.

    Raises:
        ValueError: If an argument does not fit, or no gates give the MAC reduction.
    """
    if unknown := [runtime for runtime in protocol.runtimes if runtime not in RUNTIMES]:
        raise ValueError(f"benchmark: no runtime {unknown[0]!r}; there are {', '.join(RUNTIMES)}")
    with pinned(protocol.threads, protocol.cores), _folder(folder) as directory:
        subject = _subject(model, images, input_size, gates)
        return _Measuring(subject, name or type(model).__name__, protocol, Path(directory)).run()


def _folder(folder: Path | None) -> AbstractContextManager[str]:
    """The given directory, or one that is removed afterwards."""
    if folder is None:
        return tempfile.TemporaryDirectory()
    folder.mkdir(parents=True, exist_ok=True)
    return nullcontext(str(folder))


@dataclass(frozen=True)
class _Subject:
    """What is measured.

    Attributes:
        plain: The model without gates, sharing its tensors with the user's.
        wrapped: The same with the gates to measure.
        images: Images for which the paths are as wanted.
        macs: What they execute.
        gates: The gates in words.
    """

    plain: nn.Module
    wrapped: nn.Module
    images: Tensor
    macs: MacCount
    gates: str


def _subject(model: nn.Module, images: Tensor | None, input_size: tuple[int, ...] | None, gates: Gates) -> _Subject:
    wrapped = copy_sharing_tensors(model).eval()
    if any(isinstance(module, Decoupling) for module in wrapped.modules()):
        plan = decoupling_of(wrapped, "benchmark").plan
        images = random_images(_N_PATHS, plan.input_size) if images is None else images
        plain = unwrap(copy_sharing_tensors(model)).eval()
        return _Subject(plain, wrapped, images, count_macs(wrapped, images), "of the model's own controllers")
    size = tuple(images.shape[1:]) if images is not None else input_size
    wrapped = _wrap(wrapped, size, gates.only, gates.linear_as_conv)
    decoupling = decoupling_of(wrapped)
    plan = decoupling.plan
    n_paths = min(_N_PATHS, max_paths(plan))
    images = random_images(n_paths, plan.input_size) if images is None else images[:n_paths]
    if not gates.are_open:
        cost = {"keep": gates.keep, "mac_reduction": gates.mac_reduction}
        steer(wrapped, images, random_path(plan, decoupling.costs, len(images), **cost, seed=gates.seed))
    return _Subject(copy_sharing_tensors(model).eval(), wrapped, images, count_macs(wrapped, images), str(gates))


def _wrap(model: nn.Module, size: tuple[int, ...] | None, only: tuple[str, ...], linear_as_conv: bool) -> nn.Module:
    # Verification would cost several runs; every output is compared before anything is timed.
    return wrap(model, size, only=only, linear_as_conv=linear_as_conv, frozen_ok=True, verify=False).eval()


class _Measuring:
    """Starts the contenders, compares their outputs, times them."""

    def __init__(self, subject: _Subject, name: str, protocol: Protocol, folder: Path) -> None:
        self.subject, self.name, self.protocol, self.folder = subject, name, protocol, folder
        n = len(subject.images)
        self.inputs = [subject.images[(torch.arange(protocol.batch) + i) % n] for i in range(n)]
        self.missing = {runtime: "not asked for" for runtime in RUNTIMES if runtime not in protocol.runtimes}
        self.errors: dict[str, float] = {}
        self.agreement: dict[str, float] = {}

    @torch.inference_mode()
    def run(self) -> Result:
        with torch.inference_mode(False):  # tensors made here outlive this call, in the runtimes
            dense = self._start_dense()
            ours = self._start_ours()
            fastest = self._fastest(dense)
            twin_macs, width, twins = self._start_twin(fastest)
        contenders = {c.name: c for c in (*dense, *ours, *twins)}
        samples = self._time(contenders, self.protocol.rounds, self.protocol.seconds)
        # Which one is fastest is decided by the measurement itself; the look before only chose the twin's runtime.
        best = min((c.name for c in dense), key=lambda c: Spread.of(samples[c].wall_ms).median, default=None)
        macs = self.subject.macs
        return Result(
            model=self.name,
            input_size=tuple(self.subject.images.shape[1:]),
            gates=self.subject.gates,
            n_paths=len(self.subject.images),
            dense_macs=macs.dense,
            executed_macs=tuple(macs.executed.tolist()),
            controller_macs=macs.controllers,
            threads=self.protocol.threads,
            cores=self.protocol.cores,
            batch=self.protocol.batch,
            rounds=len(samples[OURS].wall_ms),
            backend=backend(),
            machine=Machine.here(),
            timings=tuple(self._timing(c, samples[c.name]) for c in contenders.values()),
            missing=dict(self.missing),
            fastest=best,
            speedup=None if best is None else ratios(samples[best], samples[OURS]),
            speedup_open=None if best is None or not ours[1:] else ratios(samples[best], samples[OPEN]),
            speedup_own=ratios(samples[OPEN], samples[OURS]) if ours[1:] else None,
            twin=TwinTiming(width, twin_macs, fastest.name, ratios(samples[best], samples[TWIN]))
            if twins and fastest is not None and best is not None
            else None,
        )

    def _time(self, contenders: Mapping[str, Contender], rounds: int, seconds: float) -> dict[str, Samples]:
        # Worker threads of some runtimes spin for a while after their last task.
        pause_s = 0.0 if self.protocol.threads == 1 else 0.005
        runs = {name: contender.run for name, contender in contenders.items()}
        return interleave(runs, len(self.inputs), rounds=rounds, seconds=seconds, pause_s=pause_s)

    def _timing(self, contender: Contender, samples: Samples) -> Timing:
        return Timing(
            contender.name,
            contender.version,
            Spread.of(samples.wall_ms),
            Spread.of(samples.cpu_ms),
            self.errors[contender.name],
            self.agreement[contender.name],
        )

    def _start_dense(self) -> list[Contender]:
        module = dense_module(trace(self.subject.plain, tuple(self.subject.images.shape[1:])))
        expected = [outputs(self.subject.plain, batch) for batch in self.inputs]
        started = (self._start(runtime, runtime, module, expected) for runtime in self.protocol.runtimes)
        return [contender for contender in started if contender is not None]

    def _start(
        self, name: str, runtime: str, module: GraphModule, expected: Sequence[Sequence[Tensor]]
    ) -> Contender | None:
        """A runtime ready to be timed, or the reason why it is not there."""
        try:
            file = self.folder / f"{_fingerprint(module, self.inputs[0])}.onnx"
            found = start(runtime, module, self.inputs, self.protocol.threads, file)
            contender = Contender(name, found.version, found.run)
            self._check(contender, expected)
        except Exception as error:  # whatever a runtime raises, the reader shall see that it is missing, and why
            self.missing[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            return None
        if not self.errors[name] <= DENSE_TOLERANCE:
            self.missing[name] = f"its output is wrong: relative error {self.errors[name]:.1e}"
            return None
        return contender

    def _check(self, contender: Contender, expected: Sequence[Sequence[Tensor]]) -> None:
        errors, same = [0.0], []
        for i, wanted in enumerate(expected):
            before = self.inputs[i].clone()
            found = contender.outputs(i)
            if not torch.equal(before, self.inputs[i]):
                raise RuntimeError("it changes its images, so one round would not be like the next")
            if [t.shape for t in found] != [t.shape for t in wanted]:
                raise RuntimeError(f"outputs of shape {[tuple(t.shape) for t in found]}: it does not take this batch")
            errors += [relative_error(a, b) for a, b in zip(found, wanted, strict=True)]
            same.append((found[0].flatten(1).argmax(1) == wanted[0].flatten(1).argmax(1)).float().mean().item())
        self.errors[contender.name], self.agreement[contender.name] = max(errors), sum(same) / len(same)

    def _start_ours(self) -> list[Contender]:
        """The sparse form, and the sparse form of the same network with gates that are all open."""
        subject, wanted = self.subject, [(OURS, self.subject.wrapped)]
        if self.protocol.gates_open and float(subject.macs.executed.min()) < subject.macs.dense:
            plan = decoupling_of(subject.wrapped).plan
            plain = copy_sharing_tensors(subject.plain)
            wanted.append((OPEN, _wrap(plain, plan.input_size, plan.options.only, plan.options.linear_as_conv)))
        return [self._start_sparse(name, wrapped) for name, wrapped in wanted]

    def _start_sparse(self, name: str, wrapped: nn.Module) -> Contender:
        expected = [outputs(wrapped, batch) for batch in self.inputs]
        fast = sparsify(wrapped)
        contender = Contender(name, backend(), lambda i: fast(self.inputs[i]))
        self._check(contender, expected)
        return contender

    def _fastest(self, dense: Sequence[Contender]) -> Contender | None:
        """By a first look of a few rounds."""
        if not dense:
            return None
        samples = self._time({c.name: c for c in dense}, rounds=3, seconds=self.protocol.seconds / 10)
        return min(dense, key=lambda c: Spread.of(samples[c.name].wall_ms).median)

    def _start_twin(self, fastest: Contender | None) -> tuple[int, float, list[Contender]]:
        size, macs = tuple(self.subject.images.shape[1:]), self.subject.macs
        if fastest is None or not self.protocol.twin or macs.reduction < _LEAST_FOR_TWIN:
            return 0, 1.0, []
        twin = static_twin(trace(self.subject.plain, size), float(macs.executed.double().mean()))
        with eval_mode(twin.module), torch.no_grad():
            expected = [outputs(twin.module, batch) for batch in self.inputs]
        started = self._start(TWIN, fastest.name, twin.module, expected)
        return twin.n_macs, twin.width, [] if started is None else [started]


def _fingerprint(module: GraphModule, example: Tensor) -> str:
    """A name that no other network has: its operators, its weights, the shape of its input."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{module.code} {tuple(example.shape)}".encode())
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
