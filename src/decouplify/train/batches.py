"""Where batches come from: images in memory, or any loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Augment", "Batch", "Batches", "LoaderBatches", "TensorBatches", "batches_of"]

Augment = Callable[[Tensor], Tensor]
Batch = tuple[Tensor, Tensor | None]


class Batches(Protocol):
    """One pass after another over images and labels."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, epoch: int, *, augmented: bool = True) -> Iterator[Batch]:
        """The batches of one epoch: images (N, C, H, W), normalised, and labels (N,) or None, on the model's device.

        Args:
            epoch: Decides the order.
            augmented: False for images as evaluation meets them. What a loader changes in its images stays changed.
        """


@dataclass(frozen=True)
class TensorBatches:
    """Images that fit in memory, in an order that depends on seed and epoch alone, so that a run can be resumed.

    Under ``torchrun`` each process takes its share of every epoch.

    Attributes:
        images: Normalised images, shape (N, C, H, W).
        labels: Class indices, shape (N,), or None.
        batch_size: Images per batch; the last ones are spread over the others unless ``whole``.
        augment: Changes a batch of images at random; None: nothing.
        seed: Of the order.
        whole: Give batches of exactly ``batch_size`` and leave out the remaining images of an epoch.
    """

    images: Tensor
    labels: Tensor | None
    batch_size: int
    augment: Augment | None = None
    seed: int = 0
    whole: bool = False

    def __post_init__(self) -> None:
        n_labels = len(self.images) if self.labels is None else len(self.labels)
        if len(self.images) != n_labels or len(self.images) < 2:
            raise ValueError(
                f"training: {len(self.images)} images and {n_labels} labels given; equally many, at least 2, wanted"
            )
        if self.whole and self._n_own < self.batch_size:
            raise ValueError(
                f"training: {self._n_own} images are less than one batch of {self.batch_size}; lower batch_size"
            )

    @property
    def _n_own(self) -> int:
        return len(self.images) // _n_processes()

    def __len__(self) -> int:
        return max(1, self._n_own // self.batch_size)

    def epoch(self, epoch: int, *, augmented: bool = True) -> Iterator[Batch]:
        augment = self.augment if augmented else None
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
        own = order[_process() :: _n_processes()][: self._n_own].to(self.images.device)
        n_used = len(self) * self.batch_size if self.whole else len(own)
        for chosen in own[:n_used].tensor_split(len(self)):
            x = self.images[chosen]
            yield x if augment is None else augment(x), None if self.labels is None else self.labels[chosen]


@dataclass(frozen=True)
class LoaderBatches:
    """Any iterable of images or of (images, labels, ...), a ``DataLoader`` for instance, moved to a device.

    Attributes:
        loader: Iterated once per epoch; its ``sampler.set_epoch`` is called if it has one.
        device: Where batches go.
        labelled: Whether to take labels from it.
    """

    loader: Iterable[object]
    device: torch.device
    labelled: bool = True

    def __len__(self) -> int:
        try:
            return len(self.loader)  # type: ignore[arg-type]  # the error says what a loader without a length lacks
        except TypeError as error:
            raise ValueError(
                f"training: {type(self.loader).__name__} has no length, which the schedules need; wrap it in an object "
                "with __len__ that says how many batches an epoch has"
            ) from error

    def epoch(self, epoch: int, *, augmented: bool = True) -> Iterator[Batch]:
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        for batch in self.loader:
            parts = batch if isinstance(batch, tuple | list) else (batch,)
            if self.labelled and len(parts) < 2:
                raise ValueError("training: a batch without labels; give a loader of (images, labels)")
            x, y = parts[0], parts[1] if self.labelled else None
            yield x.to(self.device, non_blocking=True), None if y is None else y.to(self.device, non_blocking=True)


def batches_of(
    images: Tensor | Iterable[object],
    labels: Tensor | None,
    *,
    labelled: bool,
    batch_size: int,
    augment: Augment | None,
    seed: int,
    whole: bool,
    device: torch.device,
) -> Batches:
    """Batches of images in memory or of a loader, whichever is given."""
    if isinstance(images, Tensor):
        if labelled and labels is None:
            raise ValueError("training: images without labels given; hand over labels of shape (N,)")
        return TensorBatches(images, labels if labelled else None, batch_size, augment, seed, whole)
    if labels is not None or augment is not None:
        raise ValueError("training: a loader brings its own labels and augmentation; give neither beside it")
    return LoaderBatches(images, device, labelled)


def _process() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _n_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
