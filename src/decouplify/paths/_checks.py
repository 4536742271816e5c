"""Checks of what users hand to a path set."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def as_ids(values: ArrayLike) -> NDArray[Any]:
    """Image ids as int64 or as strings.

    Raises:
        TypeError: If they are neither.
    """
    ids = np.asarray(values)
    if ids.dtype.kind == "U":
        return ids
    if ids.dtype.kind in "iu" or ids.size == 0:
        return ids.astype(np.int64)
    raise TypeError(f"image ids have type {ids.dtype}, wanted integers or strings")


def as_integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """The values as int64; ``TypeError`` if they are not integers."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} have type {array.dtype}, wanted integers")
    return array.astype(np.int64)


def as_gates(name: str, values: ArrayLike) -> NDArray[np.bool_]:
    """The values as booleans (N, K); ``ValueError`` if they are anything else than 0 and 1."""
    gates = np.asarray(values)
    if gates.ndim != 2:
        raise ValueError(f"gates of layer {name!r} have shape {gates.shape}, wanted (images, filters)")
    if not ((gates == 0) | (gates == 1)).all():
        raise ValueError(f"gates of layer {name!r} must be 0 or 1; threshold them first, for instance with `> 0`")
    return gates.astype(np.bool_)


def check_array(name: str, array: Any, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> None:
    """Raise unless the array has one of the types and the shape; ``None`` stands for any size."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"PathSet: {name} is a {type(array).__name__}, wanted a NumPy array of {' or '.join(dtypes)}")
    kind = "str" if array.dtype.kind == "U" else array.dtype.name
    if kind not in dtypes:
        raise TypeError(f"PathSet: {name} has type {array.dtype}, wanted {' or '.join(dtypes)}")
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=False)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"PathSet: {name} has shape {array.shape}, wanted ({wanted}{',' * (len(shape) == 1)})")


def row_index(rows: Any, n: int) -> slice | NDArray[np.intp]:
    """Rows as something that indexes the first axis and keeps it."""
    if rows is None:
        return slice(None)
    if isinstance(rows, slice):
        return rows
    index = np.atleast_1d(np.asarray(rows))
    if index.dtype == np.bool_ and index.shape == (n,):
        return np.flatnonzero(index)
    if index.size == 0:
        return np.zeros(0, np.intp)
    if index.dtype.kind not in "iu" or index.ndim != 1:
        raise TypeError(
            f"rows has type {index.dtype} and shape {index.shape}, wanted an index, a slice, indices, or a mask ({n},)"
        )
    if index.min() < -n or index.max() >= n:
        raise ValueError(f"rows has indices from {index.min()} to {index.max()}, the path set has {n} images")
    return index.astype(np.intp)
