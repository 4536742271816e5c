"""Batches of images, labels and ids out of whatever a loader yields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import RandomSampler, SubsetRandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from decouplify.paths._checks import as_ids

_FORMS = "images, (images, labels) or (images, labels, ids)"
_REORDERING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


class Batch(NamedTuple):
    """One batch: where it was found, images (n, ...), labels (n,) int64 or ``None``, ids (n,) or ``None``."""

    where: str
    images: Tensor
    labels: NDArray[np.int64] | None
    ids: NDArray[Any] | None


def read_batches(loader: Iterable[Any], max_images: int | None) -> Iterator[Batch]:
    """Batches of at most ``max_images`` images in total, each checked; batches without images are passed over.

    Raises:
        TypeError: If the loader or a batch is none of the accepted forms.
        ValueError: If labels or ids do not fit the images, or only some batches have them.
    """
    _check_loader(loader)
    kinds: tuple[str, str] | None = None
    n_left = max_images
    for number, item in enumerate(loader):
        batch = _read_batch(item, f"record: batch {number} of the loader")
        if len(batch.images) == 0:
            continue
        found = (_kind(batch.labels), _kind(batch.ids))
        kinds = kinds or found
        if found != kinds:
            raise ValueError(
                f"{batch.where} has {found[0]} labels and {found[1]} ids, earlier ones had {kinds[0]} labels "
                f"and {kinds[1]} ids; every batch must have the same form"
            )
        if n_left is not None:
            batch = _first(batch, n_left)
            n_left -= len(batch.images)
        yield batch
        # Leaving now rather than at the next turn spares the loader a batch nobody reads.
        if n_left == 0:
            return


def reorders(loader: Iterable[Any]) -> bool:
    """Whether the loader is known not to yield the images of its data set in order."""
    samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
    return any(isinstance(sampler, _REORDERING) for sampler in samplers)


def sampled_ids(loader: Iterable[Any]) -> NDArray[np.int64] | None:
    """Indices into the data set, in the order in which a distributed sampler deals them to this process.

    Without them processes would all count from 0, and their paths could not be merged. Asking the sampler twice is
    safe: its order depends on the seed and the epoch only.
    """
    sampler = getattr(loader, "sampler", None)
    return np.array(list(sampler), np.int64) if isinstance(sampler, DistributedSampler) else None


def expected_images(loader: Iterable[Any], max_images: int | None) -> int | None:
    """How many images will come, as far as one can tell."""
    try:
        n_images = len(loader.dataset)  # type: ignore[attr-defined]  # most loaders have one, any iterable will do
    except (AttributeError, TypeError):
        return max_images
    sampler = getattr(loader, "sampler", None)
    n_images = len(sampler) if isinstance(sampler, DistributedSampler) else n_images
    return n_images if max_images is None else min(n_images, max_images)


def origin(loader: Iterable[Any]) -> dict[str, str | None]:
    """Name of the data set and repr of its transform, where they can be found out."""
    dataset: Any = getattr(loader, "dataset", None)
    while hasattr(dataset, "dataset"):  # torch.utils.data.Subset and its like
        dataset = dataset.dataset
    transform = getattr(dataset, "transform", None)
    return {
        "dataset": None if dataset is None else type(dataset).__name__,
        "transform": None if transform is None else repr(transform),
    }


def _check_loader(loader: Any) -> None:
    if isinstance(loader, Tensor | np.ndarray):
        raise TypeError(f"record: loader is one array of shape {tuple(loader.shape)}, wanted batches; pass [images]")
    if not isinstance(loader, Iterable) or isinstance(loader, Mapping):
        raise TypeError(f"record: loader is a {type(loader).__name__}, wanted an iterable of batches: {_FORMS}")


def _read_batch(item: Any, where: str) -> Batch:
    if isinstance(item, Tensor):
        item = (item,)
    if not isinstance(item, tuple | list) or not 1 <= len(item) <= 3:
        size = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
        raise TypeError(
            f"{where} is a {type(item).__name__}{size}, wanted {_FORMS}; "
            "pass a generator that picks them, for instance ((b['image'], b['label']) for b in loader)"
        )
    images, labels, ids = (*item, None, None)[:3]
    if not isinstance(images, Tensor) or images.ndim < 2:
        given = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else f"type {type(images).__name__}"
        raise TypeError(f"{where} has images of {given}, wanted a tensor with images along the first axis")
    n = len(images)
    return Batch(where, images, _read_labels(labels, n, where), _read_ids(ids, n, where))


def _first(batch: Batch, n: int) -> Batch:
    labels, ids = (None if part is None else part[:n] for part in (batch.labels, batch.ids))
    return Batch(batch.where, batch.images[:n], labels, ids)


def _read_labels(labels: Any, n: int, where: str) -> NDArray[np.int64] | None:
    if labels is None:
        return None
    try:
        given = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{where} has labels of type {type(labels).__name__}, wanted integers, shape ({n},)") from error
    shape = tuple(given.shape)
    if given.ndim == 2 and shape[1] > 1:
        raise ValueError(
            f"{where} has soft or one-hot labels of shape {shape}, wanted one integer per image, shape ({n},); "
            "record without mixup and label smoothing, or pass labels.argmax(1)"
        )
    if given.is_floating_point() or given.is_complex():
        raise ValueError(
            f"{where} has labels of type {given.dtype}, wanted integers; pass labels.long() if they are classes"
        )
    if shape != (n,):
        raise ValueError(f"{where} has labels of shape {shape} for {n} images, wanted ({n},)")
    return given.to("cpu", torch.int64).numpy()


def _read_ids(ids: Any, n: int, where: str) -> NDArray[Any] | None:
    if ids is None:
        return None
    try:
        given = as_ids(ids.cpu().numpy() if isinstance(ids, Tensor) else ids)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where}: {error}") from error
    if given.shape != (n,):
        raise ValueError(f"{where} has ids of shape {given.shape} for {n} images, wanted ({n},)")
    return given


def _kind(part: NDArray[Any] | None) -> str:
    return "no" if part is None else {"i": "integer", "U": "string"}[part.dtype.kind]
