"""Multiply-accumulates that one image needs, as a function of its gates; the only cost model of the library.

A convolution computes its *open* filters from the input channels that *exist*: those that are not known to be zero. A
filter is not computed if its gate is closed; a channel does not exist if all gates of its set (see ``flow``) are
closed. A channel that then holds a constant is not read either where the constant can be made a part of the bias: that
costs one multiply-accumulate per open filter, instead of one per position as well.

Counted are convolutions, linear layers and the controllers; sums, norms and activations are not, nor is what does not
depend on the image, such as an embedding of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from decouplify import aten
from decouplify.flow import Flow, GateSet, gate_columns
from decouplify.modes import uncollected
from decouplify.plan import Plan
from decouplify.sites import Matching, n_macs
from decouplify.trace import Trace

__all__ = ["CostModel", "Reader", "channels_exist", "find_readers", "index_matrix"]

_LARGEST = 2**22  # gate values looked up at once


@dataclass(frozen=True)
class Reader:
    """A convolution or linear layer as the cost model sees it.

    Attributes:
        node: Name of the node in the recorded graph.
        name: Name of the module.
        receives: Whether the module receives what it reads as its first argument, and may be asked for it.
        axis: Channel axis of what is read, 1 or -1.
        n_positions: Multiply-accumulates per pair of one filter and one input channel.
        n_inputs: Input channels.
        n_outputs: Filters.
        groups: Groups of the convolution.
        exists: For each input channel the gates that must all be closed for it to be zero.
        constant: For each input channel the gates that must all be closed for it to hold another constant that can be
            made a part of the bias; None where there are no such gates, or the bias cannot stand for it.
        gate: Gate that decides which filters are computed, None if all are.
    """

    node: str
    name: str
    receives: bool
    axis: int
    n_positions: int
    n_inputs: int
    n_outputs: int
    groups: int
    exists: tuple[GateSet, ...]
    constant: tuple[GateSet, ...]
    gate: str | None

    @cached_property
    def read(self) -> tuple[GateSet, ...]:
        """For each input channel the gates that must all be closed for it not to be read."""
        return tuple(z if z is not None else c for z, c in zip(self.exists, self.constant, strict=True))

    @property
    def n_macs(self) -> int:
        """Multiply-accumulates with all filters and all channels."""
        return self.n_positions * self.n_outputs * self.n_inputs // self.groups

    @cached_property
    def is_product(self) -> bool:
        """Whether its MACs are the number of open filters times that of existing channels.

        That is so with one group and no constant to be folded.
        """
        return self.groups == 1 and all(s is None for s in self.constant)


def find_readers(trace: Trace, matching: Matching, flow: Flow) -> list[Reader]:
    """Every operator whose multiply-accumulates are counted, in execution order."""
    gate_of = {site.name: site.gate if site.skips else None for site in matching.plan.sites}
    site_of = {node: name for name, node in matching.convs.items()}
    readers = []
    for node in trace.graph.nodes:
        if aten.name_of(node) in aten.COUNTED and node not in trace.static:
            site = site_of.get(node)
            readers.append(_reader(trace, flow, node, gate_of[site] if site is not None else None))
    return readers


def _reader(trace: Trace, flow: Flow, node: Node, gate: str | None) -> Reader:
    data, weight = node.args[:2]
    assert isinstance(data, Node) and isinstance(weight, Node)
    shape = aten.value_of(weight).shape
    is_linear = aten.name_of(node) in aten.LINEAR
    is_conv = aten.name_of(node) in aten.CONV2D and not aten.is_transposed(node)
    understood = (is_linear or is_conv) and weight in trace.static
    groups = aten.conv_arguments(node)[3] if is_conv else 1
    n_inputs = int(shape[1]) * groups
    n_positions = n_macs(node) * groups // (int(shape[0]) * n_inputs)
    # A border of zeros would show in the output; at a single position there is nothing to gain.
    folds = n_positions > 1 and (is_linear or (is_conv and aten.is_unpadded(node)))
    axis = -1 if is_linear else 1
    zeros = flow.zeros(data, axis) if understood else [None] * n_inputs
    constants = flow.constants(data, axis) if understood and folds else [None] * n_inputs
    return Reader(
        node=node.name,
        name=trace.owner_of(node),
        receives=_receives(trace, node),
        axis=axis,
        n_positions=n_positions,
        n_inputs=n_inputs,
        n_outputs=int(shape[0]),
        groups=groups,
        exists=tuple(zeros),
        constant=tuple(constants),
        gate=gate,
    )


def _receives(trace: Trace, node: Node) -> bool:
    """Whether the innermost module is called once, with what the node reads as its first argument."""
    call = trace.call_of(node)
    x = call.inputs[0] if call.inputs else None
    return x is not None and trace.n_calls[call.name] == 1 and aten.is_padded_view_of(node.args[0], x)


def channels_exist(gates: Tensor, columns: Tensor) -> Tensor:
    """Whether (or how likely) each channel exists, 1 - prod over its gate set of (1 - z).

    Args:
        gates: Gate values with two columns appended, one of zeros and one of ones, shape (N, F + 2), in [0, 1].
        columns: For each channel the columns of its gate set, shape (C, M), padded with the column of zeros.

    Returns:
        Shape (N, C). For binary gates exactly 0 or 1; in between it is differentiable.
    """
    return 1 - _product(1 - gates[:, columns])


def _product(factors: Tensor) -> Tensor:
    """Product over the last dimension.

    The gradient of ``torch.prod`` asks the host whether a factor is 0, which makes a GPU wait at every step.
    """
    while factors.shape[-1] > 1:
        half = factors.shape[-1] // 2
        pairs = factors[..., :half] * factors[..., half : 2 * half]
        factors = torch.cat([pairs, factors[..., 2 * half :]], -1)
    return factors.squeeze(-1)


def index_matrix(sets: Sequence[GateSet], columns: Sequence[int]) -> Tensor:
    """Gate sets as an index matrix for ``channels_exist``.

    Args:
        sets: Gate set of each of C channels.
        columns: The columns of a path that will be there, in their order; two more follow, of zeros and of ones.

    Returns:
        Positions in ``columns``, int64, shape (C, M) with M the size of the largest set, at least 1.
    """
    position = {column: i for i, column in enumerate(columns)}
    return _index_matrix(sets, position.__getitem__, len(position))


def _index_matrix(sets: Sequence[GateSet], position: Callable[[int], int], n_columns: int) -> Tensor:
    never, always = n_columns, n_columns + 1
    rows = [[always] if s is None else [position(column) for column in sorted(s)] for s in sets]
    width = max(1, *(len(row) for row in rows))
    return torch.tensor([row + [never] * (width - len(row)) for row in rows])


@dataclass(frozen=True)
class _Factors:
    """How many filters and channels each reader that is a product has, as a linear function of what is known.

    Attributes:
        filters: Which gates count as filters of each of R readers, shape (F + 1, R); the last row counts those that are
            always computed.
        channels: Likewise for channels, with a row for each set of several gates, shape (F + 1 + S, R).
        sets: Those sets as index matrices for ``channels_exist``; sets of about the same size are together.
        n_positions: Shape (R,).
    """

    filters: Tensor
    channels: Tensor
    sets: tuple[Tensor, ...]
    n_positions: Tensor

    def to(self, like: Tensor) -> _Factors:
        """On the device of a tensor, and in its precision."""
        sets = tuple(columns.to(like.device) for columns in self.sets)
        return _Factors(self.filters.to(like), self.channels.to(like), sets, self.n_positions.to(like))


def _factors(readers: Sequence[Reader], columns: dict[str, range], n_filters: int) -> _Factors:
    readers = [reader for reader in readers if reader.is_product]
    by_size: dict[int, dict[frozenset[int], int]] = {}  # powers of two, so that padding at most doubles a set
    for s in (s for reader in readers for s in reader.exists if s is not None and len(s) > 1):
        alike = by_size.setdefault((len(s) - 1).bit_length(), {})
        alike.setdefault(s, len(alike))
    row, rows = n_filters + 1, dict[frozenset[int], int]()
    for alike in by_size.values():
        rows.update({s: row + i for s, i in alike.items()})
        row += len(alike)
    filters = torch.zeros(n_filters + 1, len(readers), dtype=torch.float64)
    channels = torch.zeros(row, len(readers), dtype=torch.float64)
    for r, reader in enumerate(readers):
        if reader.gate is None:
            filters[n_filters, r] = reader.n_outputs
        else:
            own = columns[reader.gate]
            filters[own.start : own.stop, r] = 1
        deciding = [n_filters if s is None else rows.get(s) or min(s) for s in reader.exists if s is None or s]
        channels[:, r] = torch.bincount(torch.tensor(deciding, dtype=torch.int64), minlength=row)
    sets = tuple(_index_matrix(list(alike), lambda column: column, n_filters) for alike in by_size.values())
    n_positions = torch.tensor([reader.n_positions for reader in readers], dtype=torch.float64)
    return _Factors(filters, channels, sets, n_positions)


def _in_parts(sets: Tensor, n_images: int) -> Sequence[Tensor]:
    """Sets in parts whose gates need at most so much memory: deep networks have tens of thousands of them."""
    return sets.split(max(1, _LARGEST // max(1, n_images * sets.shape[1])))


class CostModel:
    """Dense and executed multiply-accumulates of one network under its gates.

    Attributes:
        n_dense: Multiply-accumulates of the original network for one image.
        n_controllers: Multiply-accumulates of all controllers for one image.
        readers: What is counted, in execution order.
    """

    def __init__(self, plan: Plan, readers: list[Reader], columns: dict[str, range]) -> None:
        self.readers = tuple(readers)
        self.n_dense = sum(reader.n_macs for reader in readers)
        self.n_controllers = sum(self._controller_macs(plan, g.n_inputs, g.n_filters) for g in plan.gates)
        self._columns = columns
        self._n_filters = plan.n_filters
        self._index: dict[tuple[int, torch.device], Tensor | None] = {}
        self._factors: dict[tuple[torch.device, torch.dtype], _Factors] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> CostModel:
        return self  # it never changes, and to copy millions of gate sets takes seconds

    @classmethod
    def of(cls, trace: Trace, matching: Matching) -> CostModel:
        """The cost model of a recorded run."""
        with uncollected():
            flow = Flow(trace, matching)
            return cls(matching.plan, find_readers(trace, matching, flow), gate_columns(matching))

    def executed(self, gates: Tensor) -> Tensor:
        """Multiply-accumulates per image, controllers included.

        Args:
            gates: All gates concatenated in the order of the plan, shape (N, F), in [0, 1].

        Returns:
            Shape (N,), in the precision of ``gates`` (use float64 for exact counts), differentiable.
        """
        others = [i for i, reader in enumerate(self.readers) if not reader.is_product]
        with torch.autocast(gates.device.type, enabled=False):  # counts are not for half precision
            return self.n_controllers + self._of_products(gates) + sum(self.of_reader(i, gates) for i in others)

    def _of_products(self, gates: Tensor) -> Tensor:
        """Executed multiply-accumulates of all readers that are products, shape (N,).

        Two matrix products in all: one at a time they would be thousands of small kernels in each step of training.
        """
        factors = self._product_factors(gates)
        always = gates.new_ones(len(gates), 1)
        n_open = torch.cat([gates, always], 1) @ factors.filters
        padded = torch.cat([gates, torch.zeros_like(always), always], 1)
        shared = [channels_exist(padded, part) for sets in factors.sets for part in _in_parts(sets, len(gates))]
        n_read = torch.cat([gates, always, *shared], 1) @ factors.channels
        return (n_open * n_read * factors.n_positions).sum(1)

    def _product_factors(self, gates: Tensor) -> _Factors:
        key = (gates.device, gates.dtype)
        if key not in self._factors:
            with torch.inference_mode(False):  # a later training step, too, will use what is kept
                self._factors[key] = _factors(self.readers, self._columns, self._n_filters).to(gates)
        return self._factors[key]

    def of_reader(self, i: int, gates: Tensor) -> Tensor:
        """Executed multiply-accumulates of one reader, shape (N,)."""
        reader = self.readers[i]
        n_open = self._per_group(self._open(reader, gates), reader.groups)
        read = self._read(i, gates)
        n_macs = reader.n_positions * (n_open * self._per_group(read, reader.groups)).sum(1)
        if all(s is None for s in reader.constant):
            return n_macs
        constant = torch.tensor([s is not None for s in reader.constant], device=gates.device)
        n_folded = self._per_group((1 - read) * constant, reader.groups)
        return n_macs + (n_open * n_folded).sum(1)

    def _open(self, reader: Reader, gates: Tensor) -> Tensor:
        if reader.gate is None:
            return gates.new_ones(len(gates), reader.n_outputs)
        columns = self._columns[reader.gate]
        return gates[:, columns.start : columns.stop]

    def _read(self, i: int, gates: Tensor) -> Tensor:
        reader = self.readers[i]
        columns = self.columns_of(i, gates.device)
        if columns is None:
            return gates.new_ones(len(gates), reader.n_inputs)
        padded = torch.cat([gates, gates.new_zeros(len(gates), 1), gates.new_ones(len(gates), 1)], 1)
        return channels_exist(padded, columns)

    def columns_of(self, i: int, device: torch.device) -> Tensor | None:
        """Index matrix of a reader's input channels for ``channels_exist``; None if every channel is always read."""
        key = (i, device)
        if key not in self._index:
            sets, known = self.readers[i].read, None
            if any(s is not None for s in sets):
                with torch.inference_mode(False):  # a later training step, too, will use what is kept
                    known = _index_matrix(sets, lambda column: column, self._n_filters).to(device)
            self._index[key] = known
        return self._index[key]

    @staticmethod
    def _per_group(channels: Tensor, groups: int) -> Tensor:
        return channels.unflatten(1, (groups, channels.shape[1] // groups)).sum(2)

    @staticmethod
    def _controller_macs(plan: Plan, n_inputs: int, n_filters: int) -> int:
        hidden = max(1, n_inputs // plan.options.reduction)
        return hidden * (n_inputs + n_filters)
