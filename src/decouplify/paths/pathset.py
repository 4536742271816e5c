"""The calculation paths of many images, eight filters to the byte."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decouplify.paths import _storage
from decouplify.paths._checks import as_gates, as_ids, as_integers, check_array, row_index
from decouplify.paths._distance import class_members, hamming_block, stratified_rows, vote_credit
from decouplify.paths._layout import (
    LayerSpec,
    check_layers,
    filter_slices,
    lay_out,
    pack,
    pad_bits_are_zero,
    row_chunks,
    unpack,
)
from decouplify.paths._text import file_size, percent, plain
from decouplify.paths.diff import PathDiff
from decouplify.paths.states import ActivationHistogram, FilterStates, activation_histogram, filter_states

__all__ = ["GroupRates", "LayerSpec", "PathSet"]

LayerRef: TypeAlias = str | int | LayerSpec
Rows: TypeAlias = int | slice | Sequence[int] | NDArray[Any]
By: TypeAlias = str | Sequence[int] | NDArray[Any]


class GroupRates(NamedTuple):
    """How often each filter is open in each group of images.

    Attributes:
        values: The group values, sorted, shape (C,).
        n_images: Images per group, shape (C,).
        counts: Images of the group for which the filter is open, shape (C, F).
        rates: ``counts`` divided by ``n_images``, shape (C, F), in [0, 1].
    """

    values: NDArray[Any]
    n_images: NDArray[np.int64]
    counts: NDArray[np.int64]
    rates: NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class PathSet:
    """Calculation paths: for each of N images, which filters of each gated layer were open.

    Bits are packed, least significant first; every layer starts on a byte of its own and pad bits are 0. All methods
    read the packed rows in chunks, so a set on disk may be larger than memory. ``decouplify.record`` makes path sets,
    ``PathSet.from_gates`` makes one from arrays of your own.

    Attributes:
        bits: Packed rows, shape (N, B), an array or a memory map.
        layers: The gated layers in execution order.
        ids: What identifies each image, integers or strings, shape (N,).
        labels: Class of each image, int64, shape (N,), or ``None``.
        preds: Class predicted by the model, int64, shape (N,); -1 where the model does not classify.
        conf: Softmax probability of that class, float32, shape (N,), in [0, 1]; NaN where the model does not classify.
        margins: Gate logits before the threshold, float16, shape (N, F) without padding, or ``None``.
        manifest: Where the paths come from: model, plan hash, library versions, transform, data set. JSON values only.

    Raises:
        TypeError: If an array has the wrong type.
        ValueError: If shapes do not fit together or a pad bit is set.

    Examples:
        Two images, one layer of three filters:

        >>> paths = PathSet.from_gates({"conv": [[1, 0, 1], [1, 1, 0]]})
        >>> paths.counts()
        array([2, 1, 1])
        >>> paths.hamming()
        array([[0, 2],
               [2, 0]], dtype=int32)
    """

    bits: NDArray[np.uint8]
    layers: tuple[LayerSpec, ...]
    ids: NDArray[Any]
    labels: NDArray[np.int64] | None
    preds: NDArray[np.int64]
    conf: NDArray[np.float32]
    margins: NDArray[np.float16] | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_layers(self.layers)
        n_bytes = self.layers[-1].columns.stop
        check_array("bits", self.bits, ("uint8",), (None, n_bytes))
        n = len(self.bits)
        check_array("ids", self.ids, ("int64", "str"), (n,))
        check_array("preds", self.preds, ("int64",), (n,))
        check_array("conf", self.conf, ("float32",), (n,))
        if self.labels is not None:
            check_array("labels", self.labels, ("int64",), (n,))
        if self.margins is not None:
            check_array("margins", self.margins, ("float16",), (n, self.n_filters))
        # On disk the check would read the whole file; there the writer has made it.
        if not isinstance(self.bits, np.memmap) and not pad_bits_are_zero(self.bits, self.layers):
            raise ValueError("PathSet: bits beyond the last filter of a layer are set, wanted 0; pack with from_gates")

    @classmethod
    def from_gates(
        cls,
        gates: Mapping[str, ArrayLike],
        *,
        ids: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        preds: ArrayLike | None = None,
        conf: ArrayLike | None = None,
        manifest: Mapping[str, Any] | None = None,
    ) -> PathSet:
        """A path set from gates held in memory, for instance from another method of choosing filters.

        Args:
            gates: Layer name to an array (N, K) of 0 and 1, in execution order.
            ids: Shape (N,), integers or strings; the running index if not given.
            labels: Shape (N,), integers; none if not given.
            preds: Shape (N,), integers; -1 if not given.
            conf: Shape (N,), in [0, 1]; NaN if not given.
            manifest: What to remember about the origin, JSON values only.

        Raises:
            ValueError: If a gate is neither 0 nor 1, or shapes do not fit together.
        """
        arrays = {name: as_gates(name, z) for name, z in gates.items()}
        layers = lay_out((name, z.shape[1]) for name, z in arrays.items())
        sizes = {name: len(z) for name, z in arrays.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"from_gates: layers must have equally many images, got {sizes}")
        n = next(iter(sizes.values()))
        return cls(
            bits=pack(list(arrays.values())),
            layers=layers,
            ids=np.arange(n) if ids is None else as_ids(ids),
            labels=None if labels is None else as_integers("labels", labels),
            preds=np.full(n, -1) if preds is None else as_integers("preds", preds),
            conf=np.full(n, np.nan, np.float32) if conf is None else np.asarray(conf, np.float32),
            manifest=dict(manifest or {}),
        )

    def __len__(self) -> int:
        return len(self.bits)

    def __repr__(self) -> str:
        kind = "labelled" if self.labels is not None else "unlabelled"
        place = ", on disk" if isinstance(self.bits, np.memmap) else ""
        return f"PathSet({len(self)} images, {len(self.layers)} layers, {self.n_filters} filters, {kind}{place})"

    @property
    def n_filters(self) -> int:
        """Filters of all layers, F."""
        return sum(layer.n_filters for layer in self.layers)

    @property
    def filter_slices(self) -> dict[str, slice]:
        """Layer name to its columns in every array of length F."""
        return {layer.name: part for layer, part in zip(self.layers, filter_slices(self.layers), strict=True)}

    @property
    def model_name(self) -> str:
        """Name of the model the paths belong to, empty if unknown."""
        return str(self.manifest.get("model") or "")

    def layer(self, ref: LayerRef) -> LayerSpec:
        """One layer by name, by position (-1 is the last), or the layer itself.

        Raises:
            ValueError: If there is no such layer.
        """
        by_name = {layer.name: layer for layer in self.layers}
        if isinstance(ref, int | np.integer) and -len(self.layers) <= ref < len(self.layers):
            return self.layers[ref]
        if isinstance(ref, str) and ref in by_name:
            return by_name[ref]
        if isinstance(ref, LayerSpec) and ref in self.layers:
            return ref
        near = difflib.get_close_matches(ref, by_name, n=3, cutoff=0.4) if isinstance(ref, str) else []
        hint = (
            f"did you mean {', '.join(near)}?" if near else f"the {len(self.layers)} layers are: {', '.join(by_name)}"
        )
        raise ValueError(f"{self!r} has no layer {ref!r}; {hint}")

    def unpack(self, layer: LayerRef | None = None, rows: Rows | None = None) -> NDArray[np.bool_]:
        """Gates as booleans.

        Args:
            layer: One layer; all of them side by side if not given.
            rows: Which images: an index, a slice, indices or a boolean mask; all if not given.

        Returns:
            Shape (n, K) of the layer, or (n, F) of all layers, without pad bits.
        """
        index = row_index(rows, len(self))
        if layer is None:
            return unpack(self.bits[index], self.layers)
        spec = self.layer(layer)
        return unpack(self.bits[index, spec.columns], [replace(spec, offset=0)])

    def subset(self, rows: Rows) -> PathSet:
        """The chosen images, in the order given; see ``unpack`` for ``rows``."""
        index = row_index(rows, len(self))

        def part(array: NDArray[Any]) -> NDArray[Any]:
            return array[index] if isinstance(index, slice) else _storage.take_rows(array, index)

        return replace(
            self,
            bits=part(self.bits),
            ids=self.ids[index],
            labels=None if self.labels is None else self.labels[index],
            preds=self.preds[index],
            conf=self.conf[index],
            margins=None if self.margins is None else part(self.margins),
            manifest=self._manifest_of_part(),
        )

    def select_layers(self, layers: Iterable[LayerRef]) -> PathSet:
        """The same images seen through some of the layers only, in execution order.

        Layers keep their ``depth``, so results still say where in the network they sit.
        """
        wanted = {self.layer(ref).name for ref in layers}
        kept = [layer for layer in self.layers if layer.name in wanted]
        if not kept:
            raise ValueError(f"select_layers: got no layer, wanted some of the {len(self.layers)} of {self!r}")
        packed = lay_out((layer.name, layer.n_filters) for layer in kept)
        slices = self.filter_slices
        margins = self.margins
        if margins is not None:
            margins = np.concatenate([margins[:, slices[layer.name]] for layer in kept], axis=1)
        return replace(
            self,
            bits=np.concatenate([self.bits[:, layer.columns] for layer in kept], axis=1),
            layers=tuple(replace(new, depth=old.depth) for new, old in zip(packed, kept, strict=True)),
            margins=margins,
            manifest=self._manifest_of_part(),
        )

    def _manifest_of_part(self) -> dict[str, Any]:
        # How many gates were close to switching is known of the whole only.
        whole = self.manifest.get("part_of") or {"n_images": len(self), "n_filters": self.n_filters}
        return {**self.manifest, "part_of": whole, "n_near_threshold": None}

    def groups(self, by: By = "labels") -> NDArray[Any]:
        """One group value per image.

        Args:
            by: ``"labels"``, ``"preds"``, or values of your own, shape (N,).

        Raises:
            ValueError: If the set has no such values, or their number is wrong.
        """
        if isinstance(by, str):
            if by not in ("labels", "preds"):
                raise ValueError(f'by is {by!r}, wanted "labels", "preds" or an array with one value per image')
            values = self.labels if by == "labels" else self.preds
            if values is None or (by == "preds" and (self.preds < 0).any()):
                raise ValueError(f"{self!r} has no {by}; give the values themselves: by=array of shape ({len(self)},)")
            return values
        given = np.asarray(by)
        if given.shape != (len(self),):
            raise ValueError(f"by has shape {given.shape}, wanted one value per image: ({len(self)},)")
        return given

    def chunks(self, layer: LayerRef | None = None) -> Iterator[tuple[slice, NDArray[np.bool_]]]:
        """The whole set in pieces that fit in memory: rows, and their gates as ``unpack`` gives them."""
        n_filters = self.n_filters if layer is None else self.layer(layer).n_filters
        for rows in row_chunks(len(self), n_filters):
            yield rows, self.unpack(layer, rows)
            _storage.forget_pages(self.bits)

    def counts(self, layer: LayerRef | None = None) -> NDArray[np.int64]:
        """For how many images each filter is open, in [0, N], shape (F,), or (K,) for one layer."""
        counts = np.zeros(self.n_filters if layer is None else self.layer(layer).n_filters, np.int64)
        for _, gates in self.chunks(layer):
            counts += _column_sums(gates)
        return counts

    def _counts_by(self, group: NDArray[np.intp], n_groups: int) -> NDArray[np.int64]:
        counts = np.zeros((n_groups, self.n_filters), np.int64)
        for rows, gates in self.chunks():
            order = np.argsort(group[rows], kind="stable")
            present, starts = np.unique(group[rows][order], return_index=True)
            sorted_gates = gates[order]
            for value, start, stop in zip(present, starts, [*starts[1:], len(order)], strict=True):
                counts[value] += _column_sums(sorted_gates[start:stop])
        return counts

    @overload
    def rates(self, by: None = None) -> NDArray[np.float64]: ...
    @overload
    def rates(self, by: By) -> GroupRates: ...
    def rates(self, by: By | None = None) -> NDArray[np.float64] | GroupRates:
        """Share of the images for which each filter is open.

        Args:
            by: Split the images by these values first; see ``groups``.

        Returns:
            Shape (F,), in [0, 1]; with ``by``, a ``GroupRates`` with one row per group.

        Raises:
            ValueError: If there are no images.
        """
        if len(self) == 0:
            raise ValueError("rates need at least 1 image, the path set has none")
        if by is None:
            return self.counts() / len(self)
        values, index, sizes = class_members(self.groups(by))
        counts = self._counts_by(index, len(values))
        return GroupRates(values, sizes, counts, counts / sizes[:, None])

    def filter_states(self, tol: float = 0.0) -> FilterStates:
        """Which filters are silent, dynamic or energetic on these images.

        Args:
            tol: Share of the images, in [0, 0.5), that may contradict "open for none" or "open for all".
        """
        return filter_states(self.counts(), len(self), self.layers, tol, self.model_name)

    def activation_histogram(self, layer: LayerRef | None = -1, *, n_bins: int = 20) -> ActivationHistogram:
        """How many filters are open for how many images.

        Args:
            layer: Which layer, the last one by default as in the paper; ``None`` for all together.
            n_bins: Bins between the exact end bins.
        """
        if layer is None:
            return activation_histogram(self.counts(), len(self), "all layers", n_bins)
        return activation_histogram(self.counts(layer), len(self), self.layer(layer).name, n_bins)

    def distinct(self) -> int:
        """Number of different paths.

        Rows are compared by their 256-bit BLAKE2 digests, which take 32 bytes where a path may take thousands; two
        different rows with the same digest are not known to exist.
        """
        digests: set[bytes] = set()
        for rows in row_chunks(len(self), self.n_filters):
            digests.update(
                hashlib.blake2b(row.data, digest_size=32).digest() for row in np.ascontiguousarray(self.bits[rows])
            )
            _storage.forget_pages(self.bits)
        return len(digests)

    def hamming(self, other: PathSet | None = None) -> NDArray[np.int32]:
        """Number of filters in which two paths differ, for all pairs.

        Args:
            other: A path set with the same layers; this one if not given.

        Returns:
            Shape (N, M), in [0, F]. It takes 4 N M bytes: choose rows with ``subset`` first when that is too much.

        Raises:
            ValueError: If the layers differ.
        """
        other = self if other is None else other
        check_same_layers(self, other)
        distances = np.empty((len(self), len(other)), np.int32)
        for columns in row_chunks(len(other), self.n_filters):
            theirs = other.unpack(rows=columns)
            for rows in row_chunks(len(self), self.n_filters):
                distances[rows, columns] = hamming_block(self.unpack(rows=rows), theirs)
        return distances

    def diff(self, other: PathSet) -> PathDiff:
        """Which filters were switched on or off in ``other``, image by image.

        Args:
            other: A path set with the same layers and images, for instance of the same pictures with a part covered.
                Images are matched by id if their order differs.

        Raises:
            ValueError: If layers or ids differ.
        """
        check_same_layers(self, other)
        theirs = _matching_rows(self.ids, other.ids)
        on, off = np.zeros((2, self.n_filters), np.int64)
        n_changed = np.zeros(len(self), np.int64)
        for rows, before in self.chunks():
            after = other.unpack(rows=theirs[rows])
            on += _column_sums(after & ~before)
            off += _column_sums(before & ~after)
            n_changed[rows] = (before ^ after).sum(axis=1)
            _storage.forget_pages(other.bits)
        return PathDiff(self.layers, self.ids, on, off, n_changed)

    def knn_accuracy(self, k: int = 10, by: By = "labels", *, max_images: int = 10_000, seed: int = 0) -> float:
        """How well the k nearest other paths predict an image's class; a number for how far paths separate classes.

        Every image is left out in turn and classified by the majority of its k nearest others in Hamming distance.
        Paths tied at the k-th distance share the places left in equal parts; m classes tied for most votes count 1/m.
        So the result depends neither on the order of the images nor on chance.

        Beware of sets in which many paths are equal: leaving an image out takes a vote from its own class, so paths
        that say nothing about the class score below the share of the largest class, and 0 if all of them are equal and
        the classes equally large.

        Args:
            k: Number of neighbours, in [1, N - 1].
            by: What the classes are; see ``groups``.
            max_images: Use a random subset of this size, classes in proportion, if there are more.
            seed: Seed of that choice.

        Returns:
            Share of images classified correctly, in [0, 1].

        Raises:
            ValueError: If there are no labels, or not more than ``k`` images.
        """
        chosen = stratified_rows(self.groups(by), max_images, seed)
        n = len(chosen)
        if not 1 <= k < n:
            raise ValueError(f"knn_accuracy: k is {k}, wanted 1 to {n - 1} neighbours for {n} images")
        _, own_class, sizes = class_members(self.groups(by)[chosen])
        part = replace(self, margins=None).subset(chosen)
        one_hot = np.equal.outer(own_class, np.arange(len(sizes))).astype(np.float32)
        credit = 0.0
        for start in range(0, n, 1024):
            rows = np.arange(start, min(start + 1024, n))
            distances = part.subset(rows).hamming(part)
            distances[np.arange(len(rows)), rows] = np.iinfo(np.int32).max
            credit += float(vote_credit(distances, own_class[rows], one_hot, k).sum())
        return credit / n

    def summary(self) -> str:
        """A few lines: size, share of open filters, accuracy, gates close to switching."""
        lines = [
            f"Paths of {self.model_name or 'an unnamed model'}: {len(self)} images, {len(self.layers)} layers, "
            f"{self.n_filters} filters ({self.bits.shape[1]} bytes per image, {file_size(self.bits.size)})"
        ]
        if len(self):
            lines.append(f"open on average: {percent(self.rates().mean(), 1)} of the filters")
        if self.labels is not None:
            line = f"labels: {len(np.unique(self.labels))} classes"
            if len(self) and (self.preds >= 0).all():
                line += f"; predicted correctly: {percent((self.preds == self.labels).sum(), len(self))}"
            lines.append(line)
        if self.manifest.get("n_near_threshold") is not None:
            near, width = self.manifest["n_near_threshold"], self.manifest["near_threshold"]
            lines.append(f"gates within {width:g} of switching: {near} of {len(self) * self.n_filters}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Layers, sizes and manifest as plain data, without the arrays."""
        return {
            "n_images": len(self),
            "n_filters": self.n_filters,
            "has_labels": self.labels is not None,
            "has_margins": self.margins is not None,
            "layers": [asdict(layer) for layer in self.layers],
            "manifest": plain(dict(self.manifest)),
        }

    def save(self, directory: str | Path) -> Path:
        """Write the set as a directory of .npy files and a manifest.json.

        The files are written beside the target and renamed at the end: the directory is either complete or not there.

        Args:
            directory: Where to; replaced if it holds a path set and nothing else.

        Returns:
            The absolute directory.

        Raises:
            FileExistsError: If something else is there.
        """
        target = Path(directory).resolve()
        with _storage.staged_directory(target) as stage:
            for name in ("bits", "margins"):
                _storage.write_array(stage, name, getattr(self, name))
            self.write_rest(stage)
        return target

    def write_rest(self, directory: Path) -> None:
        """Write everything but bits and margins, the manifest last; for writers that stream those two."""
        for name in ("ids", "labels", "preds", "conf"):
            _storage.write_array(directory, name, getattr(self, name))
        _storage.write_manifest(directory, self.to_dict())

    @classmethod
    def load(cls, directory: str | Path, *, mmap: bool = True) -> PathSet:
        """A path set from disk. Nothing in the files is ever executed.

        Args:
            directory: A directory written by ``save`` or ``decouplify.record``.
            mmap: Map bits and margins read-only instead of reading them now.

        Raises:
            FileNotFoundError: If the directory holds no path set.
            ValueError: If a file is damaged or does not fit the others.
        """
        source = Path(directory)
        described = _storage.read_manifest(source)
        try:
            layers = tuple(LayerSpec(**layer) for layer in described["layers"])
            n_images, manifest = described["n_images"], described["manifest"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{source / _storage.MANIFEST} is incomplete ({error}); record the path set again"
            ) from error
        found = {
            name: _storage.read_array(source, name, mmap and name in ("bits", "margins")) for name in _storage.ARRAYS
        }
        promised = [name for name in ("labels", "margins") if described.get(f"has_{name}")]
        if missing := [name for name in ("bits", "ids", "preds", "conf", *promised) if found[name] is None]:
            raise ValueError(f"path set {source} lacks {', '.join(f'{name}.npy' for name in missing)}; copy it again")
        try:
            paths = cls(layers=layers, manifest=manifest, **found)  # type: ignore[arg-type]  # checked above
            if len(paths) != n_images:
                raise ValueError(f"bits has {len(paths)} rows, the manifest says {n_images}")
        except (TypeError, ValueError) as error:
            raise ValueError(f"path set {source} is damaged: {error}") from error
        return paths


def _column_sums(gates: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Open gates per column of at most 65,535 rows: chunks have fewer, and 16 bits are several times faster than 64."""
    assert len(gates) < 1 << 16
    return gates.view(np.uint8).sum(axis=0, dtype=np.uint16).astype(np.int64)


def _matching_rows(ids: NDArray[Any], other: NDArray[Any]) -> NDArray[np.intp]:
    """For each id its row in ``other``."""
    if np.array_equal(ids, other):
        return np.arange(len(ids))
    order = np.argsort(other, kind="stable")
    unique = len(np.unique(ids)) == len(ids) and len(np.unique(other)) == len(other)
    if ids.dtype.kind != other.dtype.kind or not unique or not np.array_equal(np.sort(ids), other[order]):
        n_common = len(np.intersect1d(ids, other)) if ids.dtype.kind == other.dtype.kind else 0
        raise ValueError(
            f"path sets must hold the same images, got {len(ids)} and {len(other)} ids with {n_common} in common; "
            "choose the common ones with subset, or give ids that differ for different images"
        )
    return order[np.searchsorted(other[order], ids)]


def check_same_layers(a: PathSet, b: PathSet) -> None:
    """Raise ``ValueError`` with the first difference unless both sets have the same layers."""
    if len(a.layers) != len(b.layers):
        raise ValueError(f"path sets must have the same layers, got {len(a.layers)} and {len(b.layers)} of them")
    for x, y in zip(a.layers, b.layers, strict=True):
        if (x.name, x.n_filters) != (y.name, y.n_filters):
            raise ValueError(
                "path sets must have the same layers, got "
                f"{x.name!r} with {x.n_filters} filters and {y.name!r} with {y.n_filters}"
            )
