"""Where each layer's gates lie in a bit-packed path, and how to get bits in and out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Unpacked bits held at once while streaming over a path set: 32 MiB as bool, 128 MiB as float32. The limit on rows
# keeps one-hot classes small beside that, and sums of bits exact in float32.
_BITS_PER_CHUNK = 1 << 25
_ROWS_PER_CHUNK = 8192


@dataclass(frozen=True)
class LayerSpec:
    """One gated layer of a path.

    Attributes:
        name: Dotted name of the convolution whose gate it is.
        n_filters: Number of gates K, at least 1.
        offset: First byte of the layer in a packed row. Every layer starts on a byte of its own.
        depth: Position in execution order, from 0.
    """

    name: str
    n_filters: int
    offset: int
    depth: int

    @property
    def n_bytes(self) -> int:
        """Bytes the layer takes in a packed row; unused bits of the last one are 0."""
        return -(-self.n_filters // 8)

    @property
    def columns(self) -> slice:
        """The layer's bytes in a packed row."""
        return slice(self.offset, self.offset + self.n_bytes)


def lay_out(sizes: Iterable[tuple[str, int]]) -> tuple[LayerSpec, ...]:
    """Layers one after another, each starting on a fresh byte.

    Args:
        sizes: Name and number of filters per layer, in execution order.

    Raises:
        ValueError: If there is no layer, a layer has no filter, or two layers share a name.
    """
    layers: list[LayerSpec] = []
    offset = 0
    for depth, (name, n_filters) in enumerate(sizes):
        if n_filters < 1:
            raise ValueError(f"layer {name!r} has {n_filters} filters; a path needs at least 1 per layer")
        layers.append(LayerSpec(name, n_filters, offset, depth))
        offset += layers[-1].n_bytes
    check_layers(layers)
    return tuple(layers)


def check_layers(layers: Sequence[LayerSpec]) -> None:
    """Raise ``ValueError`` unless the layers are named apart, in order and without gaps."""
    if not layers:
        raise ValueError("a path needs at least one layer, got none")
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"layer names must differ, got {', '.join(map(repr, twice))} more than once")
    offset = 0
    for layer in layers:
        if layer.offset != offset:
            raise ValueError(
                f"layer {layer.name!r} starts at byte {layer.offset}, wanted {offset}: no gaps between layers"
            )
        offset += layer.n_bytes
    depths = [layer.depth for layer in layers]
    if depths != sorted(set(depths)):
        raise ValueError(f"layers must come in execution order, got depths {depths}")


def pack(gates: Sequence[NDArray[np.bool_]]) -> NDArray[np.uint8]:
    """Bit-packed rows of several layers.

    Args:
        gates: One boolean array (N, K) per layer.

    Returns:
        Shape (N, B), least significant bit first, each layer padded with zeros to a whole byte.
    """
    return np.concatenate([np.packbits(z, axis=1, bitorder="little") for z in gates], axis=1)


def unpack(bits: NDArray[np.uint8], layers: Sequence[LayerSpec]) -> NDArray[np.bool_]:
    """Gates of the given layers side by side, pad bits left out.

    Args:
        bits: Packed rows, shape (N, B).
        layers: The layers wanted, in the order wanted.

    Returns:
        Shape (N, F), F the number of filters of ``layers`` together.
    """
    parts = [np.unpackbits(bits[:, s.columns], axis=1, count=s.n_filters, bitorder="little") for s in layers]
    # A bool takes one byte that is 0 or 1, which is what unpackbits wrote: no copy needed.
    return (parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)).view(np.bool_)


def pad_bits_are_zero(bits: NDArray[np.uint8], layers: Sequence[LayerSpec]) -> bool:
    """Whether no pad bit is set; set ones would make equal paths look different."""
    partial = [layer for layer in layers if layer.n_filters % 8]
    return not any((bits[:, s.offset + s.n_bytes - 1] >> (s.n_filters % 8)).any() for s in partial)


def filter_slices(layers: Sequence[LayerSpec]) -> list[slice]:
    """Per layer, its columns in an unpacked row of all layers."""
    stops = np.cumsum([layer.n_filters for layer in layers]).tolist()
    return [slice(stop - layer.n_filters, stop) for layer, stop in zip(layers, stops, strict=True)]


def row_chunks(n_rows: int, n_filters: int) -> Iterator[slice]:
    """Slices over the rows, each small enough to be unpacked."""
    step = min(_ROWS_PER_CHUNK, max(1, _BITS_PER_CHUNK // n_filters))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))
