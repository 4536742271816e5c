"""Run the program of a sparse form: stretches of engine steps in one call each, torch in between."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from decouplify import aten
from decouplify.sparse import native
from decouplify.sparse.absent import leave_constants
from decouplify.sparse.bands import join_bands
from decouplify.sparse.drafts import Act, Draft, Item, Map, ReadGate, SetGate, Step, TorchCall
from decouplify.sparse.memory import Placement, place
from decouplify.sparse.native import Algorithm, StepKind
from decouplify.sparse.ops import count
from decouplify.sparse.translate import translate

__all__ = ["Program", "Run", "Stretch", "Transformed", "UndefinedGateError", "build_plan"]


class UndefinedGateError(ArithmeticError):
    """A controller's logit is NaN. The engine knows only open and closed; the reference passes NaN on."""


@dataclass(frozen=True)
class Stretch:
    """Engine steps [begin, end), and what they read from torch and give to it, by slot.

    A small network takes a few milliseconds, after which nothing of Python is in the caches: everything that is the
    same for all images is found once.
    """

    begin: int
    end: int
    loads: tuple[tuple[int, Node, int], ...]  # and how many numbers each has
    stores: tuple[tuple[int, Node, Map], ...]


#: What is done for an image, in order, each with the values of torch that nobody reads afterwards.
Schedule = list[tuple["Stretch | Item", tuple[Node, ...]]]
#: Tensors that vanish when no program uses them any more.
Transformed = WeakValueDictionary[tuple[str, Algorithm], Tensor]


class Program:
    """A sparse form for one image size, ready to run. Any number of threads may run it at once.

    Args:
        module: The lowered graph; torch runs its modules where the engine has no step.
        fuse: See ``translate``.
        transformed: Winograd weights by convolution and algorithm, as long as a program of the same weights uses them.
    """

    def __init__(self, module: GraphModule, fuse: bool = True, transformed: Transformed | None = None) -> None:
        self.module = module
        self._transformed = Transformed() if transformed is None else transformed
        self._used: dict[int, Tensor | None] = {}  # by step; the engine has only their addresses
        self.draft = translate(module, fuse)
        self.steps = self.draft.steps
        leave_constants(self.steps)
        if fuse:
            join_bands(self.draft)
        self._placement = place(self.draft)
        self._plan, self._kept = build_plan(self.draft, self._placement)
        nodes = list(module.graph.nodes)
        # What every run begins and ends with.
        self._image = next(n for n in nodes if n.op == "placeholder")
        self._constants = {n: getattr(module, str(n.target)) for n in nodes if n.op == "get_attr"}
        # For operators that torch runs; the engine knows that these gates are open.
        self._constants |= {n: torch.ones(_n_gates(module, n)) for n in self.draft.always_open}
        self._output = next(n for n in reversed(nodes) if n.op == "output")
        # Without fusing, somebody looks at what each step leaves.
        self.schedule = self._schedule(lambda step: not fuse)
        self._idle: list[native.Workspace] = []
        self._lock = threading.Lock()
        self.torch_seconds: dict[Node, float] = {}  # of the last image, by node that torch runs

    @property
    def plan(self) -> native.Plan:
        """The plan inside the engine."""
        return self._plan

    def run(self, image: Tensor) -> Any:
        """What the model returns for one image.

        Args:
            image: Shape (1, C, H, W), float32.

        Raises:
            UndefinedGateError: If a gate is neither open nor closed.
        """
        with self.workspace() as workspace:
            return Run(self, workspace, image).result(self.schedule)

    def run_forced(self, image: Tensor, forced: Mapping[str, Tensor]) -> Any:
        """As ``run``, with gates given by node name, 0 or 1 each, in place of the controllers' decisions."""
        schedule = self._schedule(lambda step: step.kind is StepKind.CONTROL)
        with self.workspace() as workspace:
            return Run(self, workspace, image, forced=forced).result(schedule)

    def run_observed(self, image: Tensor, observer: Callable[[str, Tensor], None], forced: Mapping[str, Tensor]) -> Any:
        """As ``run``, calling ``observer(node name, value)``; ``forced`` replaces gates by node name, 0 or 1 each."""
        with self.workspace() as workspace:
            return Run(self, workspace, image, observer, forced).result(self.schedule)

    def _schedule(self, is_alone: Callable[[Step], bool]) -> Schedule:
        return _with_last_reads(list(_stretches(self.draft, is_alone)), set(self._output.all_input_nodes))

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(1, C, H, W)."""
        return tuple(self._image.meta["val"].shape)

    def gate_sizes(self) -> dict[str, int]:
        """Filters of every gate that is decided, by the name of the node that decides it."""
        decided = [(step.node, step.gate) for step in self.steps if step.kind is StepKind.CONTROL]
        given = [(item.node, item.gate) for item in self.draft.items if isinstance(item, SetGate)]
        return {node.name: self._plan.gate_sizes[gate] for node, gate in decided + given}

    def can_force(self, forced: Mapping[str, Tensor]) -> bool:
        """Whether these gates, by node name, leave all those open whose controllers do not run."""
        return all(bool(forced[node.name].all()) for node in self.draft.always_open if node.name in forced)

    def describe(self) -> list[str]:
        """How convolutions are computed and what torch runs, a line each."""
        algorithms = Counter(s.algorithm for s in self.steps if s.kind is StepKind.CONVOLUTION)
        named = dict(zip(Algorithm, ("direct", "packed", "F(2,3)", "F(4,3)", "F(4,4)"), strict=True))
        cost = f" ({1e3 * sum(self.torch_seconds.values()):.2f} ms of the last image)" if self.torch_seconds else ""
        in_torch = Counter(name_of_call(self.module, i.node) for i in self.draft.items if isinstance(i, TorchCall))
        return [
            f"engine: {len(self.steps)} steps in {sum(isinstance(s, Stretch) for s, _ in self.schedule)} calls",
            "convolutions: " + (", ".join(f"{n} {named[a]}" for a, n in algorithms.most_common()) or "none"),
            f"controllers: {len(self.draft.gates)} run, {len(self.draft.always_open)} gates always open",
            "run by torch: " + (", ".join(f"{n} {name}" for name, n in in_torch.most_common()) or "nothing") + cost,
        ]

    @contextmanager
    def workspace(self) -> Iterator[native.Workspace]:
        """Memory that nobody else uses meanwhile."""
        with self._lock:
            workspace = self._idle.pop() if self._idle else None
        workspace = native.Workspace(self._plan) if workspace is None else workspace
        try:
            yield workspace
        finally:
            count(workspace.take_macs())
            with self._lock:
                self._idle.append(workspace)

    def set_algorithm(self, step: int, algorithm: Algorithm) -> None:
        """Choose how a convolution is computed, one of its ``algorithms``; not while anything runs."""
        chosen = self.steps[step]
        weights = self.weights_for(step, algorithm)
        self._plan.set_algorithm(step, algorithm, weights)
        self._used[step] = weights
        chosen.algorithm = algorithm

    def weights_for(self, step: int, algorithm: Algorithm) -> Tensor | None:
        """The weights of a convolution as an algorithm reads them, None if that reads them as they are."""
        if not algorithm.is_winograd:
            return None
        chosen = self.steps[step]
        key = (chosen.name, algorithm)
        found = self._transformed.get(key)
        if found is None:
            found = native.transform_weights(chosen.weights["weight"], algorithm, chosen.sliding.padding[0])
            self._transformed[key] = found
        return found

    def bytes_kept(self, step: int, algorithm: Algorithm) -> int:
        """How much memory an algorithm's own weights take."""
        own = self.steps[step].weights["weight"]
        return own.shape[0] * own.shape[1] * algorithm.n_kept * own.element_size()


class Run:
    """One image on its way through a program."""

    def __init__(
        self,
        program: Program,
        workspace: native.Workspace,
        image: Tensor,
        observer: Callable[[str, Tensor], None] | None = None,
        forced: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.program, self.workspace, self.draft = program, workspace, program.draft
        self.observer, self.forced = observer, forced or {}
        self.values: dict[Node, Any] = {**program._constants, program._image: image}
        self.n_threads = torch.get_num_threads()

    def result(self, schedule: Schedule) -> Any:
        """What the model returns."""
        for item, finished in schedule:
            self._do(item)
            for node in finished:
                del self.values[node]
        return self._resolve(self.program._output.args[0])

    def _resolve(self, value: Any) -> Any:
        """A structure of nodes as a structure of their values; ``map_arg`` would return immutable containers."""
        if isinstance(value, Node):
            return self.values[value]
        if isinstance(value, dict):
            return {key: self._resolve(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._resolve(item) for item in value]
        if isinstance(value, tuple):
            items = [self._resolve(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value

    def _do(self, item: Stretch | Item) -> None:
        if isinstance(item, Stretch):
            self.run_steps(item)
        elif isinstance(item, TorchCall):
            self._call_torch(item.node)
        elif isinstance(item, SetGate):
            self.workspace.set_gate(item.gate, self._binary(self.forced.get(item.node.name, self.values[item.node])))
        elif isinstance(item, ReadGate):
            self.values[item.node] = self.workspace.gate(item.gate)

    def _binary(self, z: Tensor) -> Tensor:
        if bool(z.isnan().any()):
            raise UndefinedGateError
        return z

    def run_steps(self, stretch: Stretch) -> None:
        """Run the engine once, from values of torch to values of torch."""
        last = self.program.steps[stretch.end - 1]
        if stretch.end - stretch.begin == 1 and last.kind is StepKind.CONTROL and self._force(last):
            return
        slots = self.slots(stretch)
        if self.workspace.run(stretch.begin, stretch.end, slots, self.n_threads) is native.Status.UNDEFINED_GATE:
            raise UndefinedGateError
        if self.observer is not None:
            self._show(last)

    def _force(self, step: Step) -> bool:
        """Whether a gate was given instead of decided. The decision is shown in any case."""
        z = self.forced.get(step.node.name)
        if z is not None:
            self.workspace.set_gate(step.gate, z)
        return z is not None

    def _show(self, step: Step) -> None:
        assert self.observer is not None
        if step.kind is StepKind.CONTROL:
            self.observer(step.node.name, self.workspace.gate(step.gate))
        if step.kind is StepKind.STORE:
            self.observer(step.node.name, self.values[step.node].clone())

    def slots(self, stretch: Stretch) -> Any:
        """The addresses of what the engine reads and of new tensors that it fills."""
        addresses = [0] * self.draft.n_slots
        for slot, node, size in stretch.loads:
            value = self.values[node] = self.values[node].contiguous()
            if value.numel() != size:  # the engine would read what lies behind it
                raise RuntimeError(
                    f"'{node}' has {value.numel()} values, {size} were recorded; please report this model"
                )
            addresses[slot] = value.data_ptr()
        for slot, node, stored in stretch.stores:
            value = torch.empty((1, stored.channels, *stored.size) if stored.size else stored.shape)
            addresses[slot] = value.data_ptr()
            self.values[node] = value.permute(0, 2, 3, 1) if stored.channels_last else value
        return native.slots_of(addresses)

    @torch.no_grad()
    def _call_torch(self, node: Node) -> None:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        start = time.perf_counter()
        if node.op == "call_module":
            value = self.program.module.get_submodule(str(node.target))(*args, **kwargs)
        else:
            value = node.target(*args, **kwargs)  # type: ignore[operator]  # an operator
        self.program.torch_seconds[node] = time.perf_counter() - start
        self.values[node] = self.forced.get(node.name, value)
        if self.observer is not None and isinstance(value, Tensor):
            self.observer(node.name, value.clone())


def _n_gates(module: GraphModule, node: Node) -> int:
    controller: Any = module.get_submodule(str(node.target))
    return int(controller.controller.fc2.out_features)


def name_of_call(module: GraphModule, node: Node) -> str:
    """What a node runs: the class of a module, or the name of an operator."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return aten.name_of(node)


def _stretches(draft: Draft, is_alone: Callable[[Step], bool]) -> Iterator[Stretch | Item]:
    """Items with runs of steps joined, but for steps that are to be alone."""
    begin = end = 0
    for item in draft.items:
        joins = isinstance(item, Step) and not is_alone(item)
        if begin < end and not joins:
            yield _stretch(draft, begin, end)
            begin = end
        if not isinstance(item, Step):
            yield item
            continue
        end += 1
        if not joins:
            yield _stretch(draft, begin, end)
            begin = end
    if begin < end:
        yield _stretch(draft, begin, end)


def _with_last_reads(items: list[Stretch | Item], kept: set[Node]) -> Schedule:
    """Each item with the values that nobody reads after it, but for those to keep."""
    seen, schedule = set(kept), []
    for item in reversed(items):
        finished = tuple(dict.fromkeys(node for node in _values_of(item) if node not in seen))
        seen.update(finished)
        schedule.append((item, finished))
    return schedule[::-1]


def _values_of(item: Stretch | Item) -> Iterator[Node]:
    """The values of torch that an item reads or leaves."""
    if isinstance(item, Stretch):
        yield from (node for _, node, _ in item.loads)
        yield from (node for _, node, _ in item.stores)
    elif not isinstance(item, Step):
        yield item.node
        if isinstance(item, TorchCall):
            yield from item.node.all_input_nodes


def _stretch(draft: Draft, begin: int, end: int) -> Stretch:
    steps = draft.steps[begin:end]
    loaded = ((s.slot, draft.loads[s.slot]) for s in steps if s.kind is StepKind.LOAD)
    loads = tuple((slot, node, node.meta["val"].numel()) for slot, node in loaded)
    stores = tuple((s.slot, *draft.stores[s.slot]) for s in steps if s.kind is StepKind.STORE)
    return Stretch(begin, end, loads, stores)


def build_plan(draft: Draft, placement: Placement) -> tuple[native.Plan, dict[str, Tensor]]:
    """The plan inside the engine, and the tensors it points to."""
    kept: dict[str, Tensor] = {}
    steps = [_native_step(i, step, placement, kept) for i, step in enumerate(draft.steps)]
    sizes = [n_filters for _, n_filters in draft.gates]
    return native.Plan(placement.geometries, placement.values, steps, sizes), kept


def _native_step(i: int, step: Step, placement: Placement, kept: dict[str, Tensor]) -> native.Step:
    def index(m: Any) -> int:
        return -1 if m is None else placement.index[m]

    found = native.Step(
        kind=step.kind, input=index(step.input), other=index(step.other), output=index(step.output), gate=step.gate,
        slot=step.slot, position=step.position, algorithm=native.Algorithm.DIRECT, window=step.window,
        groups=step.groups, activated=_activated(step), clears=step.clears, counts_padding=step.counts_padding,
        leaves_constants=step.leaves_constants, joined=step.joined,
        kernel=step.sliding.kernel, stride=step.sliding.stride, padding=step.sliding.padding,
        dilation=step.sliding.dilation, activation=_native_act(step.act), epsilon=step.epsilon,
    )  # fmt: skip
    for name, tensor in step.weights.items():
        kept[f"{name} {i}"] = tensor
        setattr(found, name, tensor.data_ptr())
    if step.kind is StepKind.CONTROL:
        found.hidden = len(step.weights["bias"])
    return found


def _activated(step: Step) -> bool:
    return step.other is not None and step.act.changes_nothing_in(step.other.bounds)


def _native_act(act: Act) -> native.Activation:
    return native.Activation(act.kind, act.low, act.high)
