"""The compiled engine behind its C interface: finding it, and the structures that cross the border.

Nothing here knows about networks. ``kernels/engine.h`` describes every structure and function; the two files change
together, and ``ABI_VERSION`` with them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Activation",
    "ActivationKind",
    "Algorithm",
    "Geometry",
    "Plan",
    "Status",
    "Step",
    "StepKind",
    "Value",
    "WindowKind",
    "Workspace",
    "engine",
    "instruction_set",
    "reason_for_absence",
    "transform_weights",
    "trim",
]

ABI_VERSION = 7
#: Set to "reference" to run without the compiled engine, for instance to compare the two.
BACKEND_VARIABLE = "DECOUPLIFY_BACKEND"
#: Another file to load instead of the installed one, for instance one built with sanitizers.
LIBRARY_VARIABLE = "DECOUPLIFY_LIBRARY"


class StepKind(IntEnum):
    """What a step does; see ``StepKind`` in engine.h."""

    LOAD = 0
    STORE = 1
    CONVOLUTION = 2
    WINDOW = 3
    ADD = 4
    SCALE = 5
    COPY = 6
    MEAN = 7
    FLATTEN = 8
    LINEAR = 9
    CONTROL = 10
    NORM = 11
    MASK = 12
    EXPAND = 13


class WindowKind(IntEnum):
    """What slides over each channel by itself."""

    DEPTHWISE = 0
    MAX = 1
    AVERAGE = 2


class ActivationKind(IntEnum):
    """Element-wise functions; CLAMP is the identity, ReLU and ReLU6."""

    CLAMP = 0
    SILU = 1
    HARDSWISH = 2
    GELU = 3
    SIGMOID = 4
    LEAKY = 5
    GELU_TANH = 6


class Algorithm(IntEnum):
    """How a convolution is computed."""

    DIRECT = 0
    PACKED = 1
    WINOGRAD_2 = 2
    WINOGRAD_4 = 4
    WINOGRAD_STRIDED = 5

    @property
    def is_winograd(self) -> bool:
        """Whether it works on transformed weights, and rounds otherwise than a plain sum."""
        return self in _POINTS

    @property
    def n_kept(self) -> int:
        """Weights that it keeps per filter and channel beside the convolution's own."""
        n_points, per_channel = _POINTS.get(self, (0, 0))
        return n_points * per_channel


#: Points of the transform, times transformed weights per channel and point.
_POINTS = {Algorithm.WINOGRAD_2: (16, 1), Algorithm.WINOGRAD_4: (36, 1), Algorithm.WINOGRAD_STRIDED: (49, 4)}


class Status(IntEnum):
    """How a run ended."""

    DONE = 0
    UNDEFINED_GATE = 1
    OUT_OF_MEMORY = 2


class Geometry(Structure):
    """All planes of one height, width and border."""

    _fields_ = (("height", c_int32), ("width", c_int32), ("border", c_int32), ("n_planes", c_int32))


class Value(Structure):
    """Where a feature map, or with geometry -1 a vector, lies."""

    _fields_ = (("geometry", c_int32), ("first", c_int32), ("channels", c_int32), ("has_sums", c_int32))


class Activation(Structure):
    """An element-wise function with its bounds (CLAMP) or slope (LEAKY, in ``low``)."""

    _fields_ = (("kind", c_int32), ("low", c_float), ("high", c_float))


_Pair = c_int32 * 2


class Step(Structure):
    """One step of a plan."""

    _fields_ = (
        *((name, c_int32) for name in ("kind", "input", "other", "output", "gate", "slot", "position")),
        *((name, c_int32) for name in ("algorithm", "window", "groups", "hidden")),
        *((name, c_int32) for name in ("activated", "clears", "counts_padding", "leaves_constants", "joined")),
        *((name, _Pair) for name in ("kernel", "stride", "padding", "dilation")),
        ("activation", Activation),
        ("epsilon", c_float),
        *((name, c_void_p) for name in ("weight", "bias", "weight2", "bias2", "transformed")),
    )


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "abi_version": (c_int32, []),
    "instruction_set": (c_char_p, []),
    "select": (c_int32, [c_char_p]),
    "allocate": (c_void_p, [c_int64]),
    "release": (None, [c_void_p]),
    "trim": (None, []),
    "transform": (None, [c_int32, c_void_p, c_int32, c_int32, c_int32, c_int32, c_void_p]),
    "plan_new": (
        c_void_p,
        [POINTER(Geometry), c_int32, POINTER(Value), c_int32, POINTER(Step), c_int32, POINTER(c_int32), c_int32],
    ),
    "plan_free": (None, [c_void_p]),
    "plan_set_algorithm": (None, [c_void_p, c_int32, c_int32, c_void_p]),
    "workspace_new": (c_void_p, [c_void_p]),
    "workspace_free": (None, [c_void_p]),
    "workspace_bytes": (c_int64, [c_void_p]),
    "workspace_macs": (c_int64, [c_void_p]),
    "run": (c_int32, [c_void_p, c_void_p, c_int32, c_int32, POINTER(c_void_p), c_int32]),
    "set_gate": (None, [c_void_p, c_void_p, c_int32, c_void_p]),
    "get_gate": (None, [c_void_p, c_void_p, c_int32, c_void_p]),
}


class _Engine:
    """The functions of the library as attributes, without their common prefix."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"decouplify_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:  # for the type checker; every function is set above
        raise AttributeError(name)


@functools.cache
def _load() -> tuple[_Engine | None, str]:
    """The engine, or None and the reason."""
    if os.environ.get(BACKEND_VARIABLE) == "reference":
        return None, f"{BACKEND_VARIABLE}=reference is set"
    given = os.environ.get(LIBRARY_VARIABLE)
    path = Path(given) if given else Path(__file__).with_name("libdecouplify.so")
    if not path.exists():
        return None, f"{path.name} was not built (no C++ compiler at install time?); run `make native` in a checkout"
    try:
        found = _Engine(path)
    except (OSError, AttributeError) as error:
        return None, f"{path} could not be loaded: {error}"
    version = found.abi_version()
    if version != ABI_VERSION:
        return None, f"{path.name} has interface {version}, this version needs {ABI_VERSION}; build it again"
    return found, ""


def engine() -> _Engine | None:
    """The compiled engine, None where there is none."""
    return _load()[0]


def reason_for_absence() -> str:
    """Why there is no compiled engine, "" if there is one."""
    return _load()[1]


def instruction_set() -> str:
    """The instruction set the engine chose for this CPU.

    Raises:
        RuntimeError: If there is no engine.
    """
    name: bytes = _required().instruction_set()
    return name.decode()


def _required() -> _Engine:
    found = engine()
    if found is None:
        raise RuntimeError(f"the compiled engine is not available: {reason_for_absence()}")
    return found


def new_tensor(n: int) -> Tensor:
    """A float32 vector of zeros in memory that suits long streams of weights (huge pages where there are any)."""
    found = _required()
    address = found.allocate(n)
    if not address:
        raise MemoryError(f"no memory for {n} numbers")
    array = (c_float * n).from_address(address)
    weakref.finalize(array, found.release, address)
    return torch.frombuffer(array, dtype=torch.float32)


def trim() -> None:
    """Let the C library return what it keeps of freed memory, which after making a sparse form is as much again."""
    _required().trim()


def transform_weights(weight: Tensor, algorithm: Algorithm, padding: int = 1) -> Tensor:
    """Weights as a Winograd algorithm reads them, shape (filters, points, channels), or 4 per channel if strided.

    Args:
        weight: Shape (filters, channels, k, k), float32, contiguous; k is 3, for WINOGRAD_STRIDED 5 to 7.
        algorithm: One that is_winograd.
        padding: Of the convolution; the strided form depends on it.

    Raises:
        ValueError: If the weights are something else.
    """
    wanted = (5, 6, 7) if algorithm is Algorithm.WINOGRAD_STRIDED else (3,)
    is_plain = weight.dtype == torch.float32 and weight.is_contiguous() and weight.dim() == 4
    if not algorithm.is_winograd or not is_plain or weight.shape[2] not in wanted or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"transform_weights: {tuple(weight.shape)} {weight.dtype} weights given for {algorithm.name}; contiguous "
            f"float32 weights (filters, channels, k, k) with k in {wanted} wanted"
        )
    filters, channels, kernel = weight.shape[:3]
    n_points, per_channel = _POINTS[algorithm]
    transformed = new_tensor(filters * n_points * channels * per_channel)
    address = transformed.data_ptr()
    _required().transform(int(algorithm), weight.data_ptr(), filters, channels, kernel, padding, address)
    return transformed.view(filters, n_points, channels * per_channel)


class Plan:
    """A plan inside the engine.

    Args:
        geometries: Sizes of feature maps.
        values: Every feature map and vector.
        steps: What to do, in order. Tensors whose addresses they hold must be kept alive by the caller.
        gate_sizes: Filters of each gate.
    """

    def __init__(
        self,
        geometries: Sequence[Geometry],
        values: Sequence[Value],
        steps: Sequence[Step],
        gate_sizes: Sequence[int],
    ) -> None:
        self.n_values, self.n_steps, self.gate_sizes = len(values), len(steps), tuple(gate_sizes)
        self.channels = tuple(int(value.channels) for value in values)
        self._engine = _required()
        self.address = self._engine.plan_new(
            *_array(Geometry, geometries), *_array(Value, values), *_array(Step, steps), *_array(c_int32, gate_sizes)
        )
        if not self.address:
            raise MemoryError("no memory for the plan")
        weakref.finalize(self, self._engine.plan_free, self.address)

    def set_algorithm(self, step: int, algorithm: Algorithm, transformed: Tensor | None) -> None:
        """Change how one convolution is computed; not while anything runs."""
        pointer = None if transformed is None else transformed.data_ptr()
        self._engine.plan_set_algorithm(self.address, step, int(algorithm), pointer)

    @property
    def workspace_bytes(self) -> int:
        """Memory of one workspace in bytes, scratch buffers not included."""
        n: int = self._engine.workspace_bytes(self.address)
        return n


class Workspace:
    """The memory of one run at a time."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._engine = plan, _required()
        self.address = self._engine.workspace_new(plan.address)
        if not self.address:
            raise MemoryError("no memory for the feature maps")
        weakref.finalize(self, self._engine.workspace_free, self.address)

    def run(self, begin: int, end: int, slots: Any, n_threads: int) -> Status:
        """Run steps [begin, end). ``slots`` is a ctypes array of addresses, one per slot the steps mention."""
        status = Status(self._engine.run(self._plan.address, self.address, begin, end, slots, n_threads))
        if status is Status.OUT_OF_MEMORY:
            raise MemoryError("no memory for the scratch buffers of a layer")
        return status

    def take_macs(self) -> int:
        """Multiply-accumulates since this was last asked."""
        n: int = self._engine.workspace_macs(self.address)
        return n

    def set_gate(self, gate: int, z: Tensor) -> None:
        """Open the filters where ``z``, shape (K,), is not 0."""
        z = z.to(torch.float32).contiguous()
        if z.shape != (self._plan.gate_sizes[gate],):
            raise ValueError(f"gate {gate}: {tuple(z.shape)} values given, ({self._plan.gate_sizes[gate]},) wanted")
        self._engine.set_gate(self._plan.address, self.address, gate, z.data_ptr())

    def gate(self, gate: int) -> Tensor:
        """The values of a gate, shape (K,), 0 or 1."""
        z = torch.empty(self._plan.gate_sizes[gate])
        self._engine.get_gate(self._plan.address, self.address, gate, z.data_ptr())
        return z


def slots_of(addresses: Sequence[int]) -> Any:
    """Addresses as ``Workspace.run`` takes them."""
    return (c_void_p * max(len(addresses), 1))(*addresses)


def _array(kind: Any, items: Sequence[Any]) -> tuple[Any, int]:
    return (kind * max(len(items), 1))(*items), len(items)
