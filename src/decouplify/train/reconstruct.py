"""Weights for the filters that are left: layer by layer, outputs come back to what they were with all gates open."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from decouplify import aten
from decouplify.decoupling import decoupling_of
from decouplify.modes import eval_mode
from decouplify.surgery import record_again, unwrap
from decouplify.trace import Trace, copy_sharing_tensors
from decouplify.train.moments import Moments, fitted, relative_error, rescaled
from decouplify.train.replay import GatedNode, Replay

__all__ = ["Reconstruction"]

_RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)  # tried beside no fit at all
_HELD_OUT = 4  # one of so many images says which ridge is best
_POSITIONS_PER_INPUT = 20  # positions of all images together for each input of a filter
_FEWEST_POSITIONS = 64  # of each image at least, if it has so many
_IMAGES_AT_ONCE = 16


@dataclass(frozen=True)
class _Layer:
    """A convolution or linear layer whose weights belong to it alone.

    Attributes:
        node: Where it runs.
        x: What it reads.
        weight: Its parameter.
        bias: Its bias, if it has one.
        mean: Else what a norm right after it subtracts, if there is one.
        groups: Of a convolution.
    """

    node: Node
    x: Node
    weight: str
    bias: str | None
    mean: str | None
    groups: int


class Reconstruction:
    """Fits weights to closed gates, from images without labels.

    In the order of the network, each layer behind a gate is fitted by least squares, so that from what the gates have
    left of its input it returns what it returned when the object was made, and then scaled and shifted so that means
    and standard deviations of its outputs are those of then. Errors of earlier layers are so made up for by later ones.
    How far weights may go is decided layer by layer on one of every four images.

    Args:
        model: A wrapped network with all of its weights as they were; they are kept here.
        images: Normalised images, shape (N, C, H, W), on the model's device. A few hundred; of several processes, those
            of all count.

    Raises:
        ValueError: If the model is not wrapped, there are fewer images than 4, or the network writes to parts of its
            values in place.
        TraceError: If the model does not run on images of this size.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        decoupling = decoupling_of(model, "Reconstruction")
        if images.dim() != 4 or len(images) < _HELD_OUT:
            raise ValueError(
                f"Reconstruction: images of shape {tuple(images.shape)} given; (N, C, H, W) with N >= {_HELD_OUT} "
                "wanted, and a few hundred to fit anything"
            )
        self._model, self._images = model, images
        plain = unwrap(copy_sharing_tensors(model))
        with eval_mode(plain):
            size = tuple(images.shape[1:])
            self._recorded, matching = record_again(plain, size, decoupling.plan, "Reconstruction")
        if self._recorded.hazards:
            owner = self._recorded.owner_of(min(self._recorded.hazards, key=lambda n: n.meta["order"]))
            raise ValueError(
                f"Reconstruction: module {owner!r} writes to a part of a value that is read elsewhere, so layers "
                "cannot run one by one; train without reconstruction"
            )
        self._ends = {g.name: [(matching.ends[end], end.axis) for end in g.ends] for g in matching.plan.gates}
        self._original = {name: tensor.detach().clone() for name, tensor in self._recorded.tensors.items()}
        self._layers = list(_layers_behind(self._recorded, set(matching.ends.values())))

    @torch.no_grad()
    def __call__(self, gates: Mapping[str, Tensor]) -> None:
        """Replace the model's weights, biases and norms' means.

        Args:
            gates: Gate name to values, shape (K,) for all images or (N, K) as ``Decoupling.gates`` has them; gates that
                are not named are open.

        Raises:
            KeyError: If there is no gate of that name.
        """
        images = self._images.split(1)
        taught = Replay(self._recorded, self._original, images)
        student = Replay(self._recorded, self._recorded.tensors, images, self._gated(gates))
        for layer in self._layers:
            self._fit(layer, *self._moments(layer, taught, student))

    def _gated(self, gates: Mapping[str, Tensor]) -> dict[Node, GatedNode]:
        """What multiplies which node; a plan has no two gates at one."""
        found: dict[Node, GatedNode] = {}
        for name, z in gates.items():
            if name not in self._ends:
                raise KeyError(f"no gate is called {name!r}; the gates are {', '.join(self._ends)}")
            for node, axis in self._ends[name]:
                found[node] = (z.expand(len(self._images), -1), axis)
        return found

    def _moments(self, layer: _Layer, taught: Replay, student: Replay) -> tuple[Moments, Moments]:
        """Of most images, and of those held out."""
        shape = self._original[layer.weight].shape
        wanted = _POSITIONS_PER_INPUT * shape[1:].numel() / len(self._images)
        sums = _Sums(), _Sums()
        pairs = zip(taught.values_before(layer.node), student.values_before(layer.node), strict=True)
        for i, (theirs, ours) in enumerate(pairs):
            held_out = i % _HELD_OUT == _HELD_OUT - 1
            y = taught.result(layer.node, theirs)
            sums[held_out].add(*_columns(layer, ours[layer.x], y, shape[2:], max(_FEWEST_POSITIONS, wanted)))
        return sums[0].over_processes(), sums[1].over_processes()

    def _fit(self, layer: _Layer, most: Moments, held_out: Moments) -> None:
        tensors, both = self._recorded.tensors, most + held_out
        old = tensors[layer.weight]
        weight = old.detach().double().reshape(layer.groups, old.shape[0] // layer.groups, -1)
        shifts = layer.bias is not None or layer.mean is not None
        if shifts:
            most, held_out, central = most.centred(), held_out.centred(), both.centred()
        else:
            central = both
        ridge = _best_ridge(most, held_out, weight)
        if ridge < math.inf:
            weight = fitted(central, weight, ridge)
        weight = rescaled(central, weight)
        old.copy_(weight.reshape(old.shape))
        if shifts:
            shift = ((both.y - (weight @ both.x[..., None])[..., 0]) / both.n).flatten()
            if layer.bias is not None:
                tensors[layer.bias].copy_(shift)
            elif layer.mean is not None:
                tensors[layer.mean].copy_(self._original[layer.mean].double() - shift)


class _Sums:
    """Moments over many images, a few at a time, as one large product is faster than many small ones."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._moments: Moments | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        self._waiting.append((x, y))
        if len(self._waiting) == _IMAGES_AT_ONCE:
            self._flush()

    def over_processes(self) -> Moments:
        self._flush()
        assert self._moments is not None
        self._moments.add_those_of_other_processes()
        return self._moments

    def _flush(self) -> None:
        if self._waiting:
            x, y = (torch.cat(columns, 2) for columns in zip(*self._waiting, strict=True))
            found = Moments.of(x, y)
            self._moments = found if self._moments is None else self._moments + found
            self._waiting.clear()


def _best_ridge(most: Moments, held_out: Moments, weight: Tensor) -> float:
    """The ridge with the least error on images that the fit has not seen; infinity is no fit."""
    candidates = {ridge: fitted(most, weight, ridge) for ridge in _RIDGES} | {math.inf: weight}
    errors = {ridge: relative_error(held_out, rescaled(most, fit)) for ridge, fit in candidates.items()}
    return min(errors, key=lambda ridge: errors[ridge])


def _layers_behind(recorded: Trace, ends: set[Node]) -> Iterator[_Layer]:
    """Layers that read what a gate has changed, in the order in which they run."""
    changed = set(ends)
    for node in recorded.graph.nodes:
        if any(n in changed for n in node.all_input_nodes):
            changed.add(node)
            layer = _layer_of(recorded, node)
            if layer is not None and layer.x in changed:
                yield layer


def _layer_of(recorded: Trace, node: Node) -> _Layer | None:
    """The layer that a node runs, or None if it is none, or its weights serve other nodes as well."""
    name = aten.name_of(node)
    if name not in aten.CONV2D | aten.LINEAR or aten.is_transposed(node):
        return None
    x, weight, bias = node.args[0], aten.argument(node, "weight"), aten.argument(node, "bias")
    assert isinstance(x, Node)
    if not _is_own(recorded, weight) or (bias is not None and not _is_own(recorded, bias)):
        return None
    groups = aten.conv_arguments(node)[3] if name in aten.CONV2D else 1
    return _Layer(node, x, weight.target, None if bias is None else bias.target, _mean_after(node), groups)


def _is_own(recorded: Trace, tensor: object) -> bool:
    return isinstance(tensor, Node) and str(tensor.target) in recorded.parameters and len(tensor.users) == 1


def _mean_after(node: Node) -> str | None:
    """The running mean that a norm right after a node subtracts, if it subtracts it nowhere else."""
    norm = next(iter(node.users), None)
    if len(node.users) != 1 or norm is None or aten.name_of(norm) != "batch_norm" or norm.args[0] is not node:
        return None
    mean = aten.argument(norm, "running_mean")
    alone = aten.has_fixed_statistics(norm) and isinstance(mean, Node) and len(mean.users) == 1
    return str(mean.target) if alone else None


def _columns(layer: _Layer, x: Tensor, y: Tensor, kernel: Sequence[int], wanted: float) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of a layer at about so many positions of an image, shapes (g, c, here) and (g, k, here)."""
    if aten.name_of(layer.node) in aten.LINEAR:
        x, y = x.flatten(0, -2).T, y.flatten(0, -2).T
        every = max(1, int(x.shape[1] / wanted))
        return x[None, :, ::every], y[None, :, ::every]
    every = max(1, int(math.sqrt(y[0, 0].numel() / wanted)))
    x, y = _patches(layer.node, x, kernel, every), y[0, :, ::every, ::every].flatten(1)
    return x.unflatten(0, (layer.groups, -1)), y.unflatten(0, (layer.groups, -1))


def _patches(node: Node, x: Tensor, kernel: Sequence[int], every: int) -> Tensor:
    """What the filters see of one image at every so many rows and columns of their outputs.

    Returns:
        Shape (C * kernel, positions), inputs in the order of a weight's elements.
    """
    stride, padding, dilation, _ = aten.conv_arguments(node)
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        x = F.pad(x, [totals[1] // 2, totals[1] - totals[1] // 2, totals[0] // 2, totals[0] - totals[0] // 2])
        padding = [0, 0]
    stride = [every * s for s in stride]
    if list(kernel) == [1, 1] and not any(padding):
        return x[0, :, :: stride[0], :: stride[1]].flatten(1)
    return F.unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))[0]
