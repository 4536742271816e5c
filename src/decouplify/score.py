"""The numbers by which a decoupled network is judged, on images it has not seen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decouplify.decoupling import Decoupling
from decouplify.macs import count_macs
from decouplify.modes import eval_mode
from decouplify.paths import PathSet, record
from decouplify.plan import Plan

__all__ = ["Score", "score"]

_BATCH = 250


@dataclass(frozen=True)
class Score:
    """What a network does with labelled images.

    Attributes:
        n_images: Images looked at.
        top1: Share of them classified right, in [0, 1].
        mac_reduction: Dense MACs / mean executed MACs per image, controllers included; 1 without gates.
        silent: Share of filters open for none of the images; None without gates, as for the following.
        dynamic: Share open for some.
        energetic: Share open for all.
        distinct_paths: Number of different paths.
        path_knn: Leave-one-out accuracy of a 10-nearest-neighbour classifier that sees the path alone, in [0, 1].
    """

    n_images: int
    top1: float
    mac_reduction: float
    silent: float | None = None
    dynamic: float | None = None
    energetic: float | None = None
    distinct_paths: int | None = None
    path_knn: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All numbers by name."""
        return asdict(self)


def score(model: nn.Module, images: Tensor, labels: Tensor) -> Score:
    """Accuracy, executed MACs and what the paths say.

    Args:
        model: A classifier, wrapped or not; its modes are kept.
        images: Normalised images, shape (N, C, H, W), on the model's device; at least 2.
        labels: Class indices, shape (N,).

    Raises:
        ValueError: If images and labels do not fit each other.
    """
    if len(images) != len(labels) or len(images) < 2:
        raise ValueError(f"score: {len(images)} images and {len(labels)} labels given; equally many, at least 2, wanted")
    batches = list(zip(images.split(_BATCH), labels.split(_BATCH), strict=True))
    if not isinstance(getattr(model, "decoupling", None), Decoupling):
        return Score(len(images), _top1(model, batches), 1.0)
    paths = record(model, batches, progress=False)
    assert paths.preds is not None and paths.labels is not None
    states = paths.filter_states()
    shares = {name: n / states.n_filters for name, n in states.totals.items()}
    return Score(
        n_images=len(images),
        top1=float((paths.preds == paths.labels).mean()),
        mac_reduction=_reduction(model, paths),
        silent=shares["silent"],
        dynamic=shares["dynamic"],
        energetic=shares["energetic"],
        distinct_paths=paths.distinct(),
        path_knn=paths.knn_accuracy(min(10, len(images) - 1)),
    )
