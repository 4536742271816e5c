"""One path set out of several that hold different images, for instance one per process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decouplify.paths import _storage
from decouplify.paths.pathset import PathSet, check_same_layers

__all__ = ["merge"]

_ROWS = 8192


def merge(parts: Sequence[PathSet | str | Path], out: str | Path | None = None) -> PathSet:
    """One path set with the images of all parts, sorted by id.

    An image that several parts hold is kept once, as the first of them has it: samplers of distributed training repeat
    some images so that all processes have equally many. ``manifest["merged"]`` says how many were left out, and how
    many of those had another path: near its threshold a gate may switch with the batch size.

    Args:
        parts: Path sets, or directories that hold one, with the same layers.
        out: Directory to stream the result to, for sets that do not fit into memory.

    Returns:
        The merged set, memory-mapped from ``out`` if given.

    Raises:
        ValueError: If there are no parts, or they differ in layers, plan, or in having labels.
        FileExistsError: If ``out`` holds something else than a path set.
    """
    sets = [part if isinstance(part, PathSet) else PathSet.load(part) for part in parts]
    merged = _Merged.of(sets)
    if out is None:
        chunks = list(merged.chunks("bits"))
        margins = list(merged.chunks("margins")) if merged.has_margins else None
        return merged.path_set(np.concatenate(chunks), None if margins is None else np.concatenate(margins))
    target = Path(out).resolve()
    with _storage.staged_directory(target) as stage:
        merged.write(stage)
    return PathSet.load(target)


@dataclass(frozen=True)
class _Merged:
    """Which row of which set each row of the result comes from."""

    sets: Sequence[PathSet]
    part: NDArray[np.intp]
    row: NDArray[np.intp]
    n_repeated: int
    n_conflicts: int

    @classmethod
    def of(cls, sets: Sequence[PathSet]) -> _Merged:
        _check_fit(sets)
        sizes = [len(paths) for paths in sets]
        part = np.repeat(np.arange(len(sets)), sizes)
        row = np.concatenate([np.arange(size) for size in sizes])
        ids = np.concatenate([paths.ids for paths in sets])
        order = np.argsort(ids, kind="stable")
        first = np.ones(len(ids), np.bool_)
        first[1:] = ids[order][1:] != ids[order][:-1]
        kept = order[first]
        repeated = np.flatnonzero(~first)
        originals = kept[np.cumsum(first)[repeated] - 1]
        same = [
            np.array_equal(sets[part[a]].bits[row[a]], sets[part[b]].bits[row[b]])
            for a, b in zip(order[repeated], originals, strict=True)
        ]
        return cls(sets, part[kept], row[kept], len(repeated), len(same) - sum(same))

    @property
    def has_margins(self) -> bool:
        return all(paths.margins is not None for paths in self.sets)

    def chunks(self, name: str) -> Iterator[NDArray[Any]]:
        """Rows of one array of the result, a few thousand at a time; that array's memory is not kept."""
        for start in range(0, max(len(self.row), 1), _ROWS):
            chunk = slice(start, start + _ROWS)
            yield self._gather(name, self.part[chunk], self.row[chunk])
            for paths in self.sets:
                _storage.forget_pages(getattr(paths, name))

    def _gather(self, name: str, part: NDArray[np.intp], row: NDArray[np.intp]) -> NDArray[Any]:
        arrays = [getattr(paths, name) for paths in self.sets]
        dtype = np.result_type(*arrays)  # of strings, the longest
        gathered = np.empty((len(row), *arrays[0].shape[1:]), dtype)
        for index in np.unique(part):
            chosen = part == index
            gathered[chosen] = arrays[index][row[chosen]]
        return gathered

    def path_set(self, bits: NDArray[np.uint8], margins: NDArray[np.float16] | None) -> PathSet:
        columns = {name: self._gather(name, self.part, self.row) for name in ("ids", "preds", "conf")}
        labelled = self.sets[0].labels is not None
        near = [paths.manifest.get("n_near_threshold") for paths in self.sets]
        notes = {
            "n_parts": len(self.sets),
            "n_repeated": self.n_repeated,
            "n_conflicts": self.n_conflicts,
        }
        return PathSet(
            bits=bits,
            layers=self.sets[0].layers,
            labels=self._gather("labels", self.part, self.row) if labelled else None,
            margins=margins,
            # Unknown where repeated images are counted more than once.
            manifest={
                **self.sets[0].manifest,
                "n_near_threshold": None if None in near or self.n_repeated else sum(near),
                "merged": notes,
            },
            **columns,
        )

    def write(self, stage: Path) -> None:
        names = ["bits", "margins"] if self.has_margins else ["bits"]
        with ExitStack() as files:
            for name in names:
                first = getattr(self.sets[0], name)
                file = files.enter_context(_storage.GrowingNpy(stage / f"{name}.npy", first.dtype, first.shape[1]))
                for rows in self.chunks(name):
                    file.append(rows)
        bits, margins = (_storage.read_array(stage, name, mmap=True) for name in ("bits", "margins"))
        assert bits is not None
        self.path_set(bits, margins).write_rest(stage)


def _check_fit(sets: Sequence[PathSet]) -> None:
    if not sets:
        raise ValueError("merge: got no path set, wanted at least one")
    for number, paths in enumerate(sets[1:], 1):
        check_same_layers(sets[0], paths)
        if paths.ids.dtype.kind != sets[0].ids.dtype.kind:
            raise ValueError(f"merge: part {number} has ids of type {paths.ids.dtype}, part 0 {sets[0].ids.dtype}")
        if (paths.labels is None) != (sets[0].labels is None):
            raise ValueError(f"merge: only one of part 0 and part {number} has labels; give labels to all or to none")
        ours, theirs = (part.manifest.get("plan_sha256") for part in (sets[0], paths))
        if ours != theirs:
            raise ValueError(
                f"merge: part {number} was recorded with another plan than part 0; record all parts with one model"
            )
