"""Record one run of a network as a ``torch.fx.Graph`` of aten calls, each of which knows its owner module.

Symbolic tracing stops at control flow and hides what its leaf modules do. Running the network once does neither: every
operator passes a dispatch mode on its way, whatever Python did to get there. The run uses fake tensors (no memory, no
arithmetic) on a copy that shares nothing writable with the user's model, so a failed recording leaves no trace on it.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from decouplify import aten
from decouplify.errors import TraceError
from decouplify.modes import uncollected

__all__ = ["ModuleCall", "Trace", "copy_sharing_tensors", "default_input_size", "quiet_fake_tensors", "trace"]


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module during the recorded run.

    Attributes:
        name: Qualified module name, "" for the model itself.
        inputs: Node of each positional argument that is a tensor, None for any other argument.
        outputs: Nodes of all tensors returned, in order.
        returns_tensor: Whether the call returned one bare tensor (a hook may replace it).
        start: Number of nodes recorded before the call.
    """

    name: str
    inputs: tuple[Node | None, ...]
    outputs: tuple[Node, ...]
    returns_tensor: bool
    start: int

    def computed(self, node: Node) -> bool:
        """Whether a returned node was computed during the call, not passed through as ``nn.Identity`` does."""
        return bool(self.start <= node.meta["order"])


@dataclass
class Trace:
    """A recorded run.

    Attributes:
        graph: One placeholder (the images, batch of one), ``get_attr`` nodes for tensors, aten calls, one output.
            ``node.meta``: ``val`` example value, ``order`` of recording, ``call`` index into ``calls`` of the innermost
            running module.
        calls: All module calls, in the order in which they *returned*.
        tensors: Real tensors by ``get_attr`` target: parameters and buffers under their own names, others numbered.
        parameters: Which of these targets are parameters.
        output_size: Shape of the output when the model returns one tensor.
    """

    graph: Graph
    image: Node
    calls: tuple[ModuleCall, ...]
    tensors: dict[str, Tensor]
    parameters: frozenset[str]
    output_size: tuple[int, ...] | None
    static: frozenset[Node] = field(default_factory=frozenset)
    hazards: frozenset[Node] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        self.n_calls = Counter(call.name for call in self.calls)
        self.static = frozenset(_find_static(self.graph))
        self.hazards = frozenset(_find_aliased_writes(self.graph))

    def call_of(self, node: Node) -> ModuleCall:
        """The innermost module call that computed a node."""
        return self.calls[node.meta["call"]]

    def owner_of(self, node: Node) -> str:
        """Name of the innermost module that computed a node."""
        return self.call_of(node).name


def trace(model: nn.Module, input_size: tuple[int, ...]) -> Trace:
    """The recorded run of ``model`` in eval mode on one image of ``input_size``.

    Args:
        model: Any module that takes one image tensor. It is not changed.
        input_size: Shape of one image without the batch dimension, (C, H, W).

    Raises:
        TraceError: If the model does not run on this size, or its control flow depends on values of the features.
    """
    try:
        with quiet_fake_tensors(), uncollected():
            return _record(model, input_size, fake=True)
    except Exception as fake_error:  # anything a forward may raise; the real run below tells apart whose fault it is
        try:
            return _record(model, input_size, fake=False)
        except TraceError:
            raise
        except Exception as error:
            del fake_error
            raise TraceError(
                f"{type(model).__name__} does not run on one image of size {tuple(input_size)}: "
                f"{type(error).__name__}: {error}. Give the size of your images as input_size=(channels, height, "
                "width); for a model that takes something else than one image tensor, wrap its convolutional backbone "
                "instead."
            ) from error


def default_input_size(model: nn.Module) -> tuple[int, int, int]:
    """The image size (C, H, W) that a timm model declares, else 224 x 224 with the first convolution's channels."""
    config = getattr(model, "pretrained_cfg", None)
    declared = config.get("input_size") if isinstance(config, dict) else None
    if declared is not None:
        return (int(getattr(model, "in_chans", declared[0])), int(declared[1]), int(declared[2]))
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return (first.in_channels if first is not None else 3, 224, 224)


def copy_sharing_tensors(model: nn.Module, replace: Callable[[Tensor], Tensor] = lambda t: t) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the originals, or what ``replace`` makes of them."""
    memo: dict[int, Any] = {id(t): replace(t) for t in [*model.parameters(), *model.buffers()]}
    # deepcopy keeps memoised originals alive through this list; the ids above would be reusable without it.
    memo[id(memo)] = [model]
    return copy.deepcopy(model, memo)


def _record(model: nn.Module, input_size: tuple[int, ...], fake: bool) -> Trace:
    sample = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
    replicas: dict[int, Tensor] = {}

    def replica(tensor: Tensor) -> Tensor:
        if id(tensor) not in replicas:
            if mode is not None:
                replicas[id(tensor)] = mode.from_tensor(tensor)
            else:  # a forward may write to buffers
                replicas[id(tensor)] = tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
        return replicas[id(tensor)]

    body = copy_sharing_tensors(model, replica).eval()
    names = {id(replica(t)): (name, t) for name, t in [*model.named_buffers(), *model.named_parameters()]}
    recorder = _Recorder(names, reads_values=not fake)
    with torch.inference_mode(), mode or _nothing():
        image = torch.zeros(1, *input_size, dtype=sample.dtype, device=sample.device)
        recorder.start(image)
        with _module_hooks(body, recorder), recorder:
            output = body(image)
        recorder.finish(output)
    parameters = frozenset(name for name, _ in model.named_parameters()) & recorder.tensors.keys()
    size = tuple(output.shape) if isinstance(output, Tensor) else None
    return Trace(recorder.graph, recorder.image, tuple(recorder.calls), recorder.tensors, parameters, size)


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Fake tensors log a traceback when an operator fails, although the error is raised for the caller to deal with."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Recorder(TorchDispatchMode):
    """Turns every operator call into a node.

    Tensors are told apart by identity. An in-place call returns the object it was given, so from then on that object
    means the new node: the graph is in static single assignment form even where the network is not. Every tensor met
    is kept alive until the end, because a freed one would pass its identity on.
    """

    def __init__(self, names: dict[int, tuple[str, Tensor]], reads_values: bool) -> None:
        super().__init__()
        self.graph = Graph()
        self.calls: list[ModuleCall] = []
        self.tensors: dict[str, Tensor] = {}
        self._names = names
        self._refuse_reads = reads_values
        self._nodes: dict[int, Node] = {}
        self._alive: list[Any] = []
        self._n_nodes = 0
        self._running: list[tuple[str, tuple[Node | None, ...], list[Node], int]] = []
        self._from_image: set[Node] = set()

    def start(self, image: Tensor) -> None:
        self.image = self.graph.placeholder("image")
        self._bind(image, self.image)
        self._from_image.add(self.image)

    def finish(self, output: Any) -> None:
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(output)):
            raise TraceError(
                f"the model returns {type(output).__name__}, in which no tensor was found; "
                "wrap the part of it that maps images to feature maps or logits"
            )
        self.graph.output(self._to_nodes(output))
        self.graph.lint()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        node_args, node_kwargs = self._to_nodes(args), self._to_nodes(kwargs)
        result = func(*args, **kwargs)
        self._check_read(func, (node_args, node_kwargs))
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result
        if id(result) in self._nodes and not func._schema.is_mutable:
            return result  # nothing was computed, as by dropout in eval mode; the tensor keeps its node
        node = self.graph.call_function(func, node_args, node_kwargs)
        self._bind(result, node)
        for declared, arg in zip(func._schema.arguments, args, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write and isinstance(arg, Tensor):
                self._bind(arg, node)
        if any(n in self._from_image for n in node.all_input_nodes):
            self._from_image.update((node, *node.users))  # its users so far are the items of a list
        return result

    def _check_read(self, func: Any, node_arguments: Any) -> None:
        """With real tensors a value read from the features would silently become a constant of the graph."""
        if not self._refuse_reads:
            return
        name = func._schema.name.split("::")[1]
        reads = [n for n in pytree.tree_leaves(node_arguments) if isinstance(n, Node) and n in self._from_image]
        by_mask = name == "index" and any(aten.value_of(n).dtype == torch.bool for n in reads)
        if reads and (by_mask or aten.depends_on_values(func)):
            module = self._running[-1][0] if self._running else ""
            raise TraceError(
                f"module '{module}' reads values of the features ({name}), so what it does differs from image to image "
                "and one recorded run does not describe it. Wrap a part of the model that has no such control flow, "
                "such as model.backbone."
            )

    def _bind(self, value: Any, node: Node) -> None:
        node.meta["val"] = value
        node.meta["order"] = self._n_nodes
        self._n_nodes += 1
        self._alive.append(value)
        if self._running:
            self._running[-1][2].append(node)
        if isinstance(value, Tensor):
            self._nodes[id(value)] = node
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if isinstance(item, Tensor):
                    self._bind(item, self.graph.call_function(operator.getitem, (node, i)))

    def _to_nodes(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._nodes.get(id(value)) or self._constant(value)
        if isinstance(value, dict):
            return {k: self._to_nodes(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            items = [self._to_nodes(v) for v in value]
            return items if isinstance(value, list) else tuple(items)
        return value

    def _constant(self, value: Tensor) -> Node:
        """A node for a parameter, a buffer, or a tensor that the model keeps in a plain attribute."""
        name, real = self._names.get(id(value), (f"_constant{len(self.tensors)}", value))
        self.tensors[name] = real  # not detached here: under fake tensors even that would return a fake
        # Tensors go in front, so that passes may use them anywhere; their names are dotted, hence no graph.get_attr.
        with self.graph.inserting_after(self.image):
            node = self.graph.create_node("get_attr", name)
        running, self._running = self._running, []
        self._bind(value, node)
        self._running = running
        return node

    def enter(self, name: str, args: tuple[Any, ...]) -> None:
        inputs = tuple(self._nodes.get(id(a)) if isinstance(a, Tensor) else None for a in args)
        self._running.append((name, inputs, [], self._n_nodes))

    def leave(self, output: Any) -> None:
        name, inputs, computed, start = self._running.pop()
        for node in computed:
            node.meta["call"] = len(self.calls)
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        outputs = tuple(self._nodes[id(leaf)] for leaf in leaves if id(leaf) in self._nodes)
        self.calls.append(ModuleCall(name, inputs, outputs, isinstance(output, Tensor), start))


@contextmanager
def _module_hooks(body: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Tell the recorder which module runs. ``body`` is a throw-away copy, so the hooks are never removed."""
    for name, module in body.named_modules():

        def enter(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            recorder.enter(name, args)

        def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            recorder.leave(output)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    yield


def _find_static(graph: Graph) -> Iterator[Node]:
    """Nodes that do not depend on the image: tensors and what is computed from tensors and numbers alone."""
    static: set[Node] = set()
    for node in graph.nodes:
        is_constant = node.op == "call_function" and all(n in static for n in node.all_input_nodes)
        if node.op == "get_attr" or (is_constant and not aten.is_random(node.target)):
            static.add(node)
            yield node


def _find_aliased_writes(graph: Graph) -> Iterator[Node]:
    """Nodes whose memory is written through another name and read afterwards.

    ``x[:, :4].add_(y)`` changes ``x`` without an edge in the graph. Passes must not reason about such values; all
    nodes of that memory are yielded.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    by_storage: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            by_storage.setdefault(node.meta["val"].untyped_storage()._cdata, []).append(node)
    for nodes in by_storage.values():
        if any(_is_stale(node, nodes, order) for node in nodes):
            yield from nodes


def _is_stale(node: Node, same_memory: list[Node], order: dict[Node, int]) -> bool:
    """Whether ``node`` is read after another node of the same memory was written in place."""
    last_read = max((order[user] for user in node.users), default=-1)
    return any(_writes(other) and order[node] < order[other] < last_read for other in same_memory if other is not node)


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
