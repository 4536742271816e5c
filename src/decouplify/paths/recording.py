"""Run a wrapped model over images and keep the path of each."""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify._version import __version__
from decouplify.errors import NonFiniteError
from decouplify.modes import eval_mode
from decouplify.paths import _storage
from decouplify.paths._batches import Batch, expected_images, origin, read_batches, reorders, sampled_ids
from decouplify.paths._layout import LayerSpec, lay_out
from decouplify.paths._progress import progress_bar
from decouplify.paths.merging import merge
from decouplify.paths.pathset import PathSet

__all__ = ["RunningIdsWarning", "record"]

# A gate this close to its threshold may switch with the batch size or the device: sums are rounded differently there.
_NEAR = 1e-4
_FLOAT16_MAX = 65504.0


class RunningIdsWarning(UserWarning):
    """The loader shuffles and yields no ids, so ids of the path set are positions in this run, not in the data set.

    Labels and predictions are right all the same. To find an image again by its path, either turn shuffling off or let
    the data set return ``(image, label, index)``. Ignore the warning if no analysis goes back to single images.
    """


class Decoupling(Protocol):
    """What ``decouplify.wrap`` puts at ``model.decoupling``, as far as recording needs it."""

    @property
    def plan(self) -> Any: ...

    def gates(self) -> Mapping[str, Tensor]: ...
    def margins(self) -> Mapping[str, Tensor]: ...


class _Observation(NamedTuple):
    """One batch: packed gates (n, B), float16 margins (n, F) if asked, predictions and their confidence (n,)."""

    bits: NDArray[np.uint8]
    margins: NDArray[np.float16] | None
    preds: NDArray[np.int64]
    conf: NDArray[np.float32]
    n_near: int


def record(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    out: str | Path | None = None,
    margins: bool = False,
    max_images: int | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> PathSet:
    """The calculation path of every image a loader yields.

    The model runs in evaluation mode without gradients; the training flag of every module is restored afterwards, also
    after an error. Only gates and predictions are kept, never activations.

    Args:
        model: A model wrapped by ``decouplify.wrap``. It stays on its device.
        loader: Yields ``images``, ``(images, labels)`` or ``(images, labels, ids)``: images along the first axis,
            labels one integer per image (or ``None``), ids integers or strings. Without ids, images are counted from 0.
        out: Directory to stream bits and margins to, for sets that do not fit into memory; about 30 bytes per image
            stay in memory. It appears when the run is complete; a path set that was there before is replaced. In a
            distributed run (``torchrun``) all processes give the same directory, which all of them can reach: each
            writes a part beside it, and the first process merges the parts by image id.
        margins: Also keep the gate logits, 2 bytes per filter and image.
        max_images: Stop after this many images, in a distributed run of each process.
        device: Where to put the images; the device of the model's first parameter if not given.
        progress: Show a progress bar; if not given, only on a terminal and with rich installed.

    Returns:
        The paths, memory-mapped from ``out`` if given. In a distributed run those of all processes with ``out``, and
        those of this process without.

    Raises:
        TypeError: If the model is not wrapped, or the loader yields something else.
        ValueError: If there are no images, labels are not one integer per image, or gates are not exactly 0 or 1.
        NonFiniteError: If an image holds NaN or infinity.
        FileExistsError: If ``out`` holds something else than a path set.

    Warns:
        RunningIdsWarning: If the loader shuffles and yields no ids.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"record: max_images is {max_images}, wanted at least 1, or None for all")
    decoupling = find_decoupling(model)
    recorder = Recorder(
        model=model,
        decoupling=decoupling,
        layers=lay_out((gate.name, gate.n_filters) for gate in decoupling.plan.gates),
        loader=loader,
        device=device_of(model) if device is None else torch.device(device),
        margins=margins,
        max_images=max_images,
        progress=progress,
    )
    return recorder.in_memory() if out is None else recorder.to_disk(Path(out).resolve())


def _n_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass
class _Rows:
    """What is kept per image; bits and margins go to disk instead when there are files for them."""

    bits_file: _storage.GrowingNpy | None = None
    margins_file: _storage.GrowingNpy | None = None
    bits: list[NDArray[np.uint8]] = field(default_factory=list)
    margins: list[NDArray[np.float16]] = field(default_factory=list)
    ids: list[NDArray[Any]] = field(default_factory=list)
    labels: list[NDArray[np.int64]] = field(default_factory=list)
    preds: list[NDArray[np.int64]] = field(default_factory=list)
    conf: list[NDArray[np.float32]] = field(default_factory=list)
    n_images: int = 0
    n_near: int = 0

    def append(self, batch: Batch, seen: _Observation) -> None:
        n = len(seen.bits)
        running = np.arange(self.n_images, self.n_images + n, dtype=np.int64)
        self.ids.append(running if batch.ids is None else batch.ids)
        if batch.labels is not None:
            self.labels.append(batch.labels)
        self.preds.append(seen.preds)
        self.conf.append(seen.conf)
        (self.bits if self.bits_file is None else self.bits_file).append(seen.bits)
        if seen.margins is not None:
            (self.margins if self.margins_file is None else self.margins_file).append(seen.margins)
        self.n_images += n
        self.n_near += seen.n_near


@dataclass(frozen=True)
class Recorder:
    """One call of ``record``: its arguments, and the two places paths can go to.

    ``decoupling`` is whatever has gates after a forward of ``model``; ``notes`` are added to the manifest.
    """

    model: nn.Module
    decoupling: Decoupling
    layers: tuple[LayerSpec, ...]
    loader: Iterable[Any]
    device: torch.device
    margins: bool
    max_images: int | None
    progress: bool | None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def in_memory(self) -> PathSet:
        rows = _Rows()
        self.fill(rows)
        margins = np.concatenate(rows.margins) if self.margins else None
        return self.path_set(rows, np.concatenate(rows.bits), margins)

    def to_disk(self, target: Path) -> PathSet:
        return self._stream(target) if _n_processes() == 1 else self._to_shared_disk(target)

    def _to_shared_disk(self, target: Path) -> PathSet:
        """Every process writes a part; the first one merges them and clears up."""
        _storage.check_target(target)
        n_processes = _n_processes()
        parts = [target.with_name(f"{target.name}.part-{rank}-of-{n_processes}") for rank in range(n_processes)]
        self._stream(parts[dist.get_rank()])
        dist.barrier()
        if dist.get_rank() == 0:
            merge(parts, target)
            for part in parts:
                shutil.rmtree(part)
        dist.barrier()
        return PathSet.load(target)

    def _stream(self, target: Path) -> PathSet:
        n_bytes, n_filters = self.layers[-1].columns.stop, sum(layer.n_filters for layer in self.layers)
        with _storage.staged_directory(target) as stage:
            with ExitStack() as files:
                rows = _Rows(files.enter_context(_storage.GrowingNpy(stage / "bits.npy", np.uint8, n_bytes)))
                if self.margins:
                    margins_file = _storage.GrowingNpy(stage / "margins.npy", np.float16, n_filters)
                    rows.margins_file = files.enter_context(margins_file)
                self.fill(rows)
            self.finish(stage, rows)
        return PathSet.load(target)

    def finish(self, stage: Path, rows: _Rows) -> None:
        """Write everything but bits and margins, which are there already, and check that all of it fits together."""
        bits, margins = (_storage.read_array(stage, name, mmap=True) for name in ("bits", "margins"))
        assert bits is not None
        self.path_set(rows, bits, margins).write_rest(stage)

    def path_set(self, rows: _Rows, bits: NDArray[np.uint8], margins: NDArray[np.float16] | None) -> PathSet:
        manifest = _manifest(self.decoupling.plan, self.loader, self.device) | {
            "n_near_threshold": rows.n_near,
            **self.notes,
        }
        return PathSet(
            bits=bits,
            layers=self.layers,
            ids=np.concatenate(rows.ids),
            labels=np.concatenate(rows.labels) if rows.labels else None,
            preds=np.concatenate(rows.preds),
            conf=np.concatenate(rows.conf),
            margins=margins,
            manifest=manifest,
        )

    def fill(self, rows: _Rows) -> None:
        """Run the model over the loader.

        Gradients are switched off by ``no_grad``, not by ``inference_mode``: what a network caches in its forward pass
        would be inference tensors afterwards, and the next training step would fail on them.
        """
        n_expected = expected_images(self.loader, self.max_images)
        with eval_mode(self.model), torch.no_grad(), progress_bar(self.progress, "recording", n_expected) as advance:
            ids = sampled_ids(self.loader)
            for number, batch in enumerate(read_batches(self.loader, self.max_images)):
                if batch.ids is None and ids is not None:
                    batch = batch._replace(ids=ids[rows.n_images : rows.n_images + len(batch.images)])
                if number == 0 and batch.ids is None and reorders(self.loader):
                    warnings.warn(_SHUFFLED, RunningIdsWarning, stacklevel=4)
                rows.append(batch, self.observe(batch.images, batch.where))
                advance(len(batch.images))
        if rows.n_images == 0:
            raise ValueError("record: the loader yielded no images; a generator that was used before yields none")

    def observe(self, images: Tensor, where: str) -> _Observation:
        """Paths and predictions of one batch."""
        images = images.to(self.device, non_blocking=True)
        _check_finite(images, where)
        preds, conf = _classify(self.model(images), len(images))
        gates = _in_order(self.decoupling.gates(), "gates", self.layers, len(images), where)
        margins = torch.cat(_in_order(self.decoupling.margins(), "margins", self.layers, len(images), where), dim=1)
        n_near = int((margins.abs() < _NEAR).sum())
        kept = margins.clamp(-_FLOAT16_MAX, _FLOAT16_MAX).half().cpu().numpy() if self.margins else None
        return _Observation(_pack(gates, self.layers, where), kept, preds, conf, n_near)


def find_decoupling(model: nn.Module) -> Decoupling:
    """What ``wrap`` attached to the model.

    Raises:
        TypeError: If the model is not wrapped.
    """
    decoupling = getattr(model, "decoupling", None)
    if all(hasattr(decoupling, name) for name in ("plan", "gates", "margins")):
        return decoupling  # type: ignore[return-value]  # the three names were just looked up
    inner = getattr(model, "module", None)
    advice = "pass its .module" if hasattr(inner, "decoupling") else "call decouplify.wrap(model) first"
    raise TypeError(f"record: {type(model).__name__} is not a wrapped model, it has no .decoupling; {advice}")


_SHUFFLED = (
    "record: the loader shuffles and yields no ids, so ids are positions in this run and not in the data set; "
    "turn shuffling off or let the data set return (image, label, index)"
)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def _check_finite(images: Tensor, where: str) -> None:
    """Raise unless all values are finite.

    A sum with NaN or infinity in it is not finite, and takes a tenth of the time of looking at every value. Finite
    values whose sum is not are looked at one by one.
    """
    if images.dtype in (torch.float32, torch.float64) and torch.isfinite(images.sum()):
        return
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"{where} has {len(bad)} of {len(images)} images with NaN or infinity, the first at position {bad[0]}; "
            "check the files and the transform"
        )


def _classify(output: Any, n_images: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Predicted class and its softmax probability, -1 and NaN if the output is not (N, classes) logits."""
    is_logits = isinstance(output, Tensor) and output.ndim == 2 and output.is_floating_point()
    if not is_logits or len(output) != n_images or output.shape[1] < 2:
        return np.full(n_images, -1), np.full(n_images, np.nan, np.float32)
    conf, preds = output.float().softmax(dim=1).max(dim=1)
    return preds.cpu().numpy(), conf.cpu().numpy()


def _in_order(
    by_name: Mapping[str, Tensor], what: str, layers: Sequence[LayerSpec], n_images: int, where: str
) -> list[Tensor]:
    """One tensor (N, K) per layer, in the order of the layers."""
    if missing := [layer.name for layer in layers if layer.name not in by_name]:
        raise ValueError(
            f"{where}: model.decoupling.{what}() lacks {', '.join(missing)}; "
            "the forward pass must run every gated convolution"
        )
    for layer in layers:
        got, wanted = tuple(by_name[layer.name].shape), (n_images, layer.n_filters)
        if got != wanted:
            raise ValueError(f"{where}: {what} of {layer.name!r} have shape {got}, wanted {wanted}: images, filters")
    return [by_name[layer.name] for layer in layers]


def _pack(gates: Sequence[Tensor], layers: Sequence[LayerSpec], where: str) -> NDArray[np.uint8]:
    """Packed rows (N, B); padded and joined on the device, so that one batch costs one transfer."""
    path = torch.cat([F.pad(z, (0, -z.shape[1] % 8)) if z.shape[1] % 8 else z for z in gates], dim=1)
    if not ((path == 0) | (path == 1)).all():
        soft = [layer.name for layer, z in zip(layers, gates, strict=True) if not ((z == 0) | (z == 1)).all()]
        raise ValueError(
            f"{where}: gates of {', '.join(soft)} are not exactly 0 or 1; "
            "in evaluation mode a gate is 1 where its logit is positive and 0 elsewhere"
        )
    return np.packbits(path.to(torch.uint8).cpu().numpy(), axis=1, bitorder="little")


def _manifest(plan: Any, loader: Iterable[Any], device: torch.device) -> dict[str, Any]:
    described = json.dumps(plan.to_dict(), sort_keys=True, default=str)
    return {
        "model": plan.model,
        "plan_sha256": hashlib.sha256(described.encode()).hexdigest(),
        "versions": {
            "decouplify": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
        "eval_mode": True,
        "autocast": torch.is_autocast_enabled(device.type),
        "device": device.type,
        "near_threshold": _NEAR,
        **origin(loader),
    }
