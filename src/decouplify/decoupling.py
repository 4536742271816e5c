"""What ``wrap`` adds to a model: one child module with controllers, heads, and the gates of the last forward."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from decouplify.controller import ArchitectureController, binarise, improved_semhash, straight_through
from decouplify.costs import CostModel
from decouplify.gating import gate_and_pool, gated
from decouplify.plan import End, Plan

__all__ = ["Decoupling", "Forward", "decoupling_of", "module_key", "network_of"]


def module_key(name: str) -> str:
    """A dotted module name as the key of a ``ModuleDict``, which may not contain dots."""
    return name.replace(".", "__")


@dataclass
class Forward:
    """What one forward left behind: gates, logits and pooled outputs by gate (or end), and nothing else.

    Attributes:
        gates: z per gate, shape (N, K).
        logits: g per gate, before noise and threshold, shape (N, K).
        pooled: Mean magnitude per channel of each gated value before gating, shape (N, K), only while a loss asks.
        remembered: Outputs that a shared activation is waiting for.
        training: Whether the gates are training gates.
    """

    gates: dict[str, Tensor] = field(default_factory=dict)
    logits: dict[str, Tensor] = field(default_factory=dict)
    pooled: dict[tuple[str, End], Tensor] = field(default_factory=dict)
    remembered: dict[End, Tensor] = field(default_factory=dict)
    training: bool = False


class _Records:
    """The last forward of each thread.

    Copies start empty: graph tensors can be neither copied nor pickled, and belong to the original's forward. A
    compiled region cannot ask for its thread, so it has a record of its own, which any later eager forward removes.
    """

    def __init__(self) -> None:
        self._by_thread: weakref.WeakKeyDictionary[threading.Thread, Forward] = weakref.WeakKeyDictionary()
        self._compiled: Forward | None = None

    def begin(self) -> None:
        self.drop()
        if torch.compiler.is_compiling():
            self._compiled = Forward()
        else:
            self._by_thread[threading.current_thread()] = Forward()

    def running(self) -> Forward:
        """The forward under way; a submodule called by itself starts one."""
        if torch.compiler.is_compiling():
            if self._compiled is None:
                self._compiled = Forward()
            return self._compiled
        return self._by_thread.setdefault(threading.current_thread(), Forward())

    def last(self) -> Forward:
        return self._compiled or self._by_thread.get(threading.current_thread()) or Forward()

    def drop(self) -> None:
        self._compiled = None
        if not torch.compiler.is_compiling():
            self._by_thread.pop(threading.current_thread(), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Records:
        return _Records()

    def __reduce__(self) -> tuple[type[_Records], tuple[()]]:
        return (_Records, ())


class Decoupling(nn.Module):
    """Controllers and heads of a wrapped model, found at ``model.decoupling``.

    Attributes:
        plan: What was gated.
        costs: Multiply-accumulates as a function of the gates.
        controllers: One ``ArchitectureController`` per gate, by ``module_key(gate.name)``.
        heads: One linear layer per gate from its K gates to the classes, for the mutual-information loss.
        noise: Standard deviation of the noise on training gates, a number or a tensor of no dimensions; 1 in the paper.
        hard: Train with noise-free binary gates (straight-through gradient), as evaluation uses them.
        n_classes: Classes of the heads, None if there are no heads.
    """

    def __init__(self, plan: Plan, costs: CostModel, n_classes: int | None) -> None:
        super().__init__()
        self.plan = plan
        self.costs = costs
        self.noise: float | Tensor = 1.0
        self.hard = False
        self.n_classes = n_classes
        self.collects_outputs = False
        self.controllers = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        for gate in plan.gates:
            options = plan.options
            self.controllers[module_key(gate.name)] = ArchitectureController(
                gate.n_inputs, gate.n_filters, options.reduction, options.bias, options.input_norm, gate.input_axis
            )
            if n_classes is not None:
                self.heads[module_key(gate.name)] = nn.Linear(gate.n_filters, n_classes)
        self._records = _Records()
        self._enabled = True
        self._forced: dict[str, Tensor] = {}
        self._observer: Callable[[str, End, Tensor], None] | None = None
        self._surrogate: Callable[[Tensor], Tensor] | None = None

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"gates={len(self.plan.gates)}, filters={self.plan.n_filters}, noise={self.noise}, hard={self.hard}"

    def forward(self, x: Any) -> Any:
        """Its argument: ``nn.Sequential`` and its like run all of their children, so also this one."""
        return x

    def gates(self) -> dict[str, Tensor]:
        """Gate values of this thread's last forward by gate name, shape (N, K) each, in execution order.

        Exactly 0 or 1 in eval mode. Empty before any forward, and after a loss has used the forward.
        """
        gates = self._records.last().gates
        return {gate.name: gates[gate.name] for gate in self.plan.gates if gate.name in gates}

    def margins(self) -> dict[str, Tensor]:
        """Logits g of the last forward by gate name, shape (N, K) each, float32; a gate is open where g > 0."""
        logits = self._records.last().logits
        return {gate.name: logits[gate.name] for gate in self.plan.gates if gate.name in logits}

    def path(self) -> Tensor:
        """All gates of the last forward concatenated in execution order, shape (N, F).

        Raises:
            RuntimeError: If there was no forward, or it did not reach every gate.
        """
        gates = self.gates()
        missing = [gate.name for gate in self.plan.gates if gate.name not in gates]
        if missing:
            raise RuntimeError(
                f"no path: {len(missing)} of {len(self.plan.gates)} gates have no value (first: {missing[0]}). Run "
                "model(images) first, in this thread; a loss uses a forward up."
            )
        return torch.cat([gate.float() for gate in gates.values()], 1)

    def last_forward(self) -> Forward:
        """Everything the last forward of this thread left behind."""
        return self._records.last()

    def drop_forward(self) -> None:
        """Forget the last forward, so that nothing of its graph stays alive."""
        self._records.drop()

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """While the context lasts, the model computes as if it had never been wrapped."""
        enabled, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = enabled

    @contextmanager
    def observed(self, observer: Callable[[str, End, Tensor], None]) -> Iterator[None]:
        """While the context lasts, ``observer(gate, end, features)`` is called with every gated value, after gating."""
        before, self._observer = self._observer, observer
        try:
            yield
        finally:
            self._observer = before

    @contextmanager
    def forced(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """While the context lasts, the named gates have the given values instead of the controllers'.

        Args:
            gates: Gate name to values, shape (K,) for all images or (N, K).

        Raises:
            KeyError: If there is no gate of that name.
            ValueError: If the number of values is not K.
        """
        known = {gate.name: gate.n_filters for gate in self.plan.gates}
        for name, value in gates.items():
            if name not in known:
                raise KeyError(f"no gate is called {name!r}; the gates are {', '.join(known)}")
            if value.shape[-1] != known[name] or value.dim() not in (1, 2):
                raise ValueError(
                    f"gate {name!r}: {tuple(value.shape)} values given, ({known[name]},) or (N, {known[name]}) wanted"
                )
        before, self._forced = self._forced, {**self._forced, **gates}
        try:
            yield
        finally:
            self._forced = before

    @contextmanager
    def differentiable(self, surrogate: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While the context lasts, gates of evaluation keep their values and get the gradient of ``surrogate(g)``.

        Without it their gradient is zero: what is computed from an image's gradient then takes its path for fixed.
        """
        before, self._surrogate = self._surrogate, surrogate
        try:
            yield
        finally:
            self._surrogate = before

    # What follows is called by the hooks that ``surgery`` installs.

    def begin_forward(self) -> None:
        """Start a new record; called before the model runs."""
        if self._enabled:
            self._records.begin()

    def compute_gate(self, name: str, x: Tensor) -> None:
        """Decide the gates of one controller from its convolution's input."""
        if not self._enabled:
            return
        g = self.controllers[module_key(name)](x)
        forward = self._records.running()
        forward.logits[name] = g
        forward.gates[name] = self._gate_values(name, g)
        forward.training = self.training

    def _gate_values(self, name: str, g: Tensor) -> Tensor:
        forced = self._forced.get(name)
        if forced is not None:
            return forced.to(g).expand_as(g)
        if not self.training:
            return binarise(g) if self._surrogate is None else straight_through(g, self._surrogate(g))
        if self.hard:
            return straight_through(g, torch.sigmoid(g))  # not v1: without noise, a gate beyond its flat ends stays
        return improved_semhash(g, self.noise)

    def remember(self, end: End, output: Tensor) -> None:
        """Keep the tensor that a shared activation must receive for ``end`` to be meant."""
        if self._enabled:
            self._records.running().remembered[end] = output

    def is_meant(self, end: End, received: Any) -> bool:
        """Whether a shared activation received the tensor remembered for ``end``."""
        if not self._enabled:
            return False
        remembered = self._records.running().remembered
        if end not in remembered or remembered[end] is not received:
            return False
        del remembered[end]
        return True

    def apply_gate(self, name: str, end: End, y: Tensor) -> Tensor:
        """``Y * z``, with one gate per channel."""
        if not self._enabled:
            return y
        forward = self._records.running()
        if name not in forward.gates:
            raise RuntimeError(
                f"gate '{name}' has no value where '{end.module}' needs it: the convolution whose input it pools did "
                "not run before in this forward. The model's control flow differs from the recorded run; exclude this "
                "site with wrap(exclude=...)."
            )
        z = forward.gates[name].to(y.dtype)
        if end.before_relu and (self.training or self._surrogate is not None):
            z = _never_quite_zero(z)
        if self.collects_outputs and self.training:
            product, forward.pooled[name, end] = gate_and_pool(y, z, end.axis, non_negative=end.non_negative)
        else:
            product = gated(y, z, end.axis)
        product = _laid_out_as(y, product)
        if self._observer is not None:
            self._observer(name, end, product)
        return product


def _laid_out_as(y: Tensor, product: Tensor) -> Tensor:
    """The gated value with the strides of the value itself.

    A product keeps the memory layout, but where dimensions have size one several descriptions fit one layout. Later
    operators choose their arithmetic by the description, and would round otherwise than without a gate.
    """
    strides = list(zip(y.shape, y.stride(), product.stride(), strict=True))
    if all(a == b for _, a, b in strides) or any(n != 1 and a != b for n, a, b in strides):
        return product
    return product.as_strided(y.shape, y.stride())


def _never_quite_zero(z: Tensor) -> Tensor:
    """``z`` with zeros replaced by a number so small that only gradients notice."""
    tiny = 1e-20 if torch.finfo(z.dtype).tiny < 1e-20 else torch.finfo(z.dtype).tiny
    return z + (z == 0).to(z.dtype) * tiny


def decoupling_of(model: nn.Module, caller: str = "decouplify") -> Decoupling:
    """The ``Decoupling`` of a wrapped model, also through DistributedDataParallel and torch.compile.

    Raises:
        ValueError: If the model is not wrapped.
    """
    found = _find_decoupling(model)
    if found is None:
        raise ValueError(f"{caller}: {type(model).__name__} is not wrapped; call decouplify.wrap(model) first")
    return found


def network_of(model: nn.Module) -> nn.Module:
    """Of a wrapped model the network itself, also in DistributedDataParallel and torch.compile."""
    inner: Any = model
    for attribute in ("module", "_orig_mod", "module"):
        if not isinstance(getattr(inner, "decoupling", None), Decoupling):
            inner = getattr(inner, attribute, inner)
    network: nn.Module = inner
    return network


def is_wrapped(model: nn.Module) -> bool:
    """Whether ``decoupling_of`` finds gates."""
    return _find_decoupling(model) is not None


def _find_decoupling(model: nn.Module) -> Decoupling | None:
    found = getattr(network_of(model), "decoupling", None)
    return found if isinstance(found, Decoupling) else None
