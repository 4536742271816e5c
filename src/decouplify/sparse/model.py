"""``sparsify``: a wrapped model as a module for inference on a CPU that computes only what each image's path needs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from decouplify.decoupling import Decoupling, decoupling_of
from decouplify.paths import PathSet
from decouplify.sparse import native
from decouplify.sparse.executor import Program, Transformed, UndefinedGateError
from decouplify.sparse.lower import Lowered, lower
from decouplify.sparse.ops import SparseConv2d, SparseLinear, count
from decouplify.sparse.profit import GateProfit, measure_profits
from decouplify.sparse.static import Assumptions, Habits, lower_statically
from decouplify.sparse.translate import obstacle
from decouplify.sparse.tuning import choose_algorithms
from decouplify.surgery import record_again, unwrap
from decouplify.trace import copy_sharing_tensors

__all__ = ["Mode", "SparseModel", "backend", "sparsify"]

#: How convolutions may be computed: "fast" allows Winograd, whose rounding differs (relative error up to 1e-5); "exact"
#: sums products as they are (2e-6).
Mode = Literal["fast", "exact"]


def backend() -> str:
    """Which implementation runs the sparse operators, and why."""
    absence = native.reason_for_absence()
    if absence:
        return f"reference: pure torch (index_select and dense convolutions), because {absence}"
    return f"native: compiled engine for {native.instruction_set()}"


def sparsify(
    model: nn.Module, *, mode: Mode = "fast", paths: PathSet | None = None, drop_costly: bool = False
) -> SparseModel:
    """A copy of a wrapped model that computes, for each image, only open filters from existing channels.

    The copy is a snapshot on the CPU: norms are folded, later training of ``model`` does not reach it. Its output is
    that of ``model.eval()`` up to rounding; ``verify`` checks it.

    Args:
        model: A wrapped model; unchanged.
        mode: "fast" chooses for every convolution the fastest way on this CPU, Winograd among them, after timing them
            once; "exact" forbids Winograd.
        paths: Paths that stand for all images to come. Filters that none of them opens are removed, and controllers
            of which they open every remaining filter are dropped. For images with other paths the output may differ
            from the model's. By default nothing is assumed.
        drop_costly: With ``paths``: measure every gate on a typical one of them, and leave those open whose controller
            takes longer than the filters it closes; the printout names them. Their filters are then computed for all
            images, so the output is that of the model with these gates open, also for the recorded paths. Without a
            compiled engine nothing is measured or left open.

    Raises:
        ValueError: If the model is not wrapped, the mode is unknown, the paths are not of this model, or there are
            none to judge gates by.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"sparsify: mode={mode!r} given; one of {', '.join(map(repr, get_args(Mode)))} wanted")
    if drop_costly and paths is None:
        raise ValueError("sparsify: drop_costly=True needs paths to judge gates by; give paths=record(model, loader)")
    decoupling = decoupling_of(model, "sparsify")
    owner = next(m for m in model.modules() if getattr(m, "decoupling", None) is decoupling)
    fast = SparseModel(owner, mode, None if paths is None else Habits.of(paths, decoupling.plan))
    if drop_costly:
        fast.drop_costly_gates()
    return fast


class SparseModel(nn.Module):
    """The sparse form of a wrapped model. Each image has its own path, so a batch runs image by image.

    Image sizes other than the one the model was wrapped for are recorded when they first occur. Any number of threads
    may call one object; each call uses ``torch.get_num_threads()`` threads.

    Attributes:
        n_undefined: Images that the engine left to the slow reference, because the logit of a gate was NaN.
    """

    def __init__(self, model: nn.Module, mode: Mode = "fast", habits: Habits | None = None) -> None:
        super().__init__()
        snapshot = copy_sharing_tensors(model, _to_cpu)
        decoupling = snapshot.decoupling
        assert isinstance(decoupling, Decoupling)
        self.plan, self.mode, self._habits = decoupling.plan, mode, habits
        self.costly: tuple[GateProfit, ...] = ()
        self.n_undefined = 0
        _put_features_first(snapshot)
        # In a list, because the snapshot is material for lowering and not a part of this module.
        self._source = [unwrap(snapshot).eval()]
        self._decoupling = [decoupling.eval()]
        self.graphs = nn.ModuleList()
        self._forget()
        self.lowered_for(self.plan.input_size)

    def drop_costly_gates(self) -> None:
        """Leave gates open whose controllers take longer than what they save, on the typical path; see ``sparsify``."""
        size, habits = self.plan.input_size, self._habits
        program, assumptions = self.program_for(size), self._assumptions.get(size)
        if program is None or habits is None or assumptions is None:
            return
        names = {node: name for name, node in self.lowered_for(size).gates.items() if name not in assumptions.dropped}
        profits = measure_profits(program, assumptions.narrow(habits.typical), names)
        self.costly = tuple(profit for profit in profits if profit.cost > profit.saved)
        self._habits = replace(habits, left_open=frozenset(profit.gate for profit in self.costly))
        self._forget()
        self.lowered_for(size)

    @property
    def left_open(self) -> dict[str, Tensor]:
        """Gates that are open although the model decides them, with their values, shape (K,) each; usually none."""
        assumptions = self._assumptions.get(self.plan.input_size)
        return {} if assumptions is None else assumptions.opened()

    def _forget(self) -> None:
        """Start without programs; they hold memory of the engine, which can be neither copied nor pickled."""
        self._lowered: dict[tuple[int, ...], Lowered] = {}
        self._assumptions: dict[tuple[int, ...], Assumptions] = {}
        self._programs: dict[tuple[tuple[int, ...], bool], Program | None] = {}
        self._transformed = Transformed()
        self._lock = threading.RLock()
        self.graphs = nn.ModuleList()

    def __getstate__(self) -> dict[str, Any]:
        forgotten = ("_lowered", "_assumptions", "_programs", "_transformed", "_lock")
        state = {name: value for name, value in self.__dict__.items() if name not in forgotten}
        return {**state, "_modules": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self.lowered_for(self.plan.input_size)

    def forward(self, images: Tensor) -> Any:
        """What the wrapped model returns for a batch, computed image by image.

        Args:
            images: Shape (N, C, H, W), on the CPU, N >= 1.

        Raises:
            ValueError: If the images have another rank, are not on the CPU, or of a type that the weights cannot meet.
            TypeError: If they are no tensor.
        """
        self._check(images)
        lowered = self.lowered_for(tuple(images.shape[1:]))
        count(lowered.n_recorded_macs * len(images))
        if len(images) == 1:
            return self._run(lowered, images)
        return _stack([self._run(lowered, image) for image in images.split(1)])

    def _run(self, lowered: Lowered, image: Tensor) -> Any:
        program = self.program_for(tuple(image.shape[1:])) if image.dtype == torch.float32 else None
        if program is not None:
            # The engine knows no gradients, so nothing here switches them off: that takes longer than one thinks.
            try:
                return program.run(image)
            except UndefinedGateError:
                with self._lock:
                    self.n_undefined += 1
        with torch.no_grad():
            try:
                return lowered.module(image)
            except RuntimeError as error:
                if image.dtype == self._dtype:
                    raise
                raise ValueError(
                    f"SparseModel: images of {image.dtype} given; {self._dtype} wanted, as the weights are. "
                    f"Convert the images: .to({self._dtype})"
                ) from error

    @property
    def _dtype(self) -> torch.dtype | None:
        return next((p.dtype for p in self._source[0].parameters() if p.is_floating_point()), None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseModel:
        """Converts (``half()``, ``double()``, ``to``) what later programs are made of as well."""
        before = self._dtype  # first, for programs may share tensors with what they are made of
        super()._apply(fn, recurse)
        for module in (self._source[0], self._decoupling[0]):
            module._apply(fn)
        if self._dtype != before:
            self._forget()
            self.lowered_for(self.plan.input_size)
        return self

    @torch.no_grad()
    def run_observed(
        self,
        image: Tensor,
        observer: Callable[[str, Tensor], None],
        forced: Mapping[str, Tensor] | None = None,
    ) -> Any:
        """Run one image, (1, C, H, W), calling ``observer(node name, value)``; ``forced`` replaces gates by name.

        Every value is there to be seen. The arithmetic is that of ``forward``, but no operators are joined.
        """
        size = tuple(image.shape[1:])
        replaced, program = self._prepared(image, forced or {}, fuse=False)
        lowered = self.lowered_for(size)
        if size in self._assumptions:
            observer = self._assumptions[size].widen(lowered.gates, observer)
        if program is not None:
            with suppress(UndefinedGateError):
                return program.run_observed(image, observer, replaced)
        return _Observing(lowered.module, observer, replaced).run(image)

    @torch.no_grad()
    def run_forced(self, image: Tensor, forced: Mapping[str, Tensor]) -> Any:
        """What ``forward`` would return for one image, (1, C, H, W), if its gates were the given ones, by name."""
        replaced, program = self._prepared(image, forced, fuse=True)
        if program is not None and program.can_force(replaced):
            with suppress(UndefinedGateError):
                return program.run_forced(image, replaced)
        return _Observing(self.lowered_for(tuple(image.shape[1:])).module, lambda *_: None, replaced).run(image)

    def _prepared(
        self, image: Tensor, forced: Mapping[str, Tensor], *, fuse: bool
    ) -> tuple[dict[str, Tensor], Program | None]:
        """Forced gates by the name of their node, and the program that can run with them, if any."""
        self._check(image)
        size = tuple(image.shape[1:])
        lowered = self.lowered_for(size)
        if size in self._assumptions:
            forced = self._assumptions[size].narrow(forced)
        replaced = {lowered.gates[name]: value for name, value in forced.items()}
        is_binary = all(bool(((z == 0) | (z == 1)).all()) for z in replaced.values())
        return replaced, self.program_for(size, fuse=fuse) if is_binary and image.dtype == torch.float32 else None

    def lowered_for(self, size: tuple[int, ...]) -> Lowered:
        """The sparse form for one image size (C, H, W)."""
        with self._lock:
            if size not in self._lowered:
                recorded, matching = record_again(self._source[0], size, self.plan, "SparseModel")
                if self._habits is None:
                    self._lowered[size] = lower(recorded, matching, self._decoupling[0])
                else:
                    found = lower_statically(recorded, matching, self._decoupling[0], self._habits)
                    self._lowered[size], self._assumptions[size] = found
                self.graphs.append(self._lowered[size].module)
            return self._lowered[size]

    def program_for(self, size: tuple[int, ...], *, fuse: bool = True) -> Program | None:
        """The engine's program for one image size, made when first asked for; None if the reference runs instead.

        Args:
            size: (C, H, W).
            fuse: False for the program that shows every value (``run_observed``).
        """
        with self._lock:
            key = (size, fuse)
            if key not in self._programs:
                module = self.lowered_for(size).module
                possible = native.engine() is not None and not obstacle(module)
                self._programs[key] = self._compile(module, fuse) if possible else None
            return self._programs[key]

    def _compile(self, module: Any, fuse: bool) -> Program:
        native.trim()  # of what recording and lowering left
        program = Program(module, fuse, self._transformed)
        choose_algorithms(program, exact=self.mode == "exact")
        native.trim()
        return program

    def __repr__(self) -> str:
        lowered = self.lowered_for(self.plan.input_size)
        program = self.program_for(self.plan.input_size)
        kinds = Counter(
            type(m).__name__ for m in lowered.module.modules() if isinstance(m, (SparseConv2d, SparseLinear))
        )
        lines = [
            f"SparseModel of {self.plan.model} for {self.plan.input_size} images, mode {self.mode!r}",
            f"  backend: {self._backend(lowered)}",
            f"  gates: {len(lowered.gates)}, filters: {self.plan.n_filters}",
            "  sparse operators: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
        ]
        if self.plan.input_size in self._assumptions:
            lines.append(f"  {self._assumptions[self.plan.input_size]}")
        if self.costly:
            lines.append(f"  left open, as deciding takes longer than it saves: {', '.join(map(str, self.costly))}")
        if program is None:
            others = Counter(_operator_name(n) for n in lowered.module.graph.nodes if n.op == "call_function")
            listed = ", ".join(f"{n} {name}" for name, n in others.most_common())
            lines.append(f"  as recorded: {listed or 'nothing'}")
        else:
            lines += [f"  {line}" for line in program.describe()]
        if self.n_undefined:
            lines.append(f"  images with undefined gates (NaN), which the reference computed: {self.n_undefined}")
        return "\n".join(lines)

    def _backend(self, lowered: Lowered) -> str:
        reason = obstacle(lowered.module)
        return f"reference: pure torch, because {reason}" if reason and native.engine() is not None else backend()

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"SparseModel: {type(images).__name__} given; a tensor of shape (N, C, H, W) wanted")
        if images.dim() != 4 or len(images) == 0:
            raise ValueError(
                f"SparseModel: images of shape {tuple(images.shape)} given; (N, C, H, W) with N >= 1 wanted"
            )
        if images.device.type != "cpu":
            raise ValueError(f"SparseModel runs on the CPU; the images are on {images.device}, move them with .cpu()")


class _Observing(Interpreter):
    """Runs a graph node by node, showing each value and replacing some."""

    def __init__(self, module: Any, observer: Callable[[str, Tensor], None], replaced: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self._observer, self._replaced = observer, replaced

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op.startswith("call_"):
            # In-place operators that follow would change what the observer has seen.
            self._observer(n.name, value.clone())
        return self._replaced.get(n.name, value)


def _put_features_first(snapshot: nn.Module) -> None:
    """Lay linear weights out as ``SparseLinear`` wants them, so that it need not keep a second copy of each."""
    for module in snapshot.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


def _to_cpu(tensor: Tensor) -> Tensor:
    copied = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(copied, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _stack(results: list[Any]) -> Any:
    """Batches of one joined along the first dimension, in whatever structure the model returns."""
    leaves = [pytree.tree_flatten(result)[0] for result in results]
    structure = pytree.tree_flatten(results[0])[1]
    if any(isinstance(leaf, Tensor) and leaf.dim() == 0 for leaf in leaves[0]):
        raise ValueError("SparseModel: the model returns a number for the whole batch; give it one image at a time")
    joined = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(joined, structure)


def _operator_name(node: Node) -> str:
    return getattr(getattr(node.target, "_schema", None), "name", getattr(node.target, "__name__", "?")).removeprefix(
        "aten::"
    )
