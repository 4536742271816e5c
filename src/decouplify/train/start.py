"""Where gates and weights are when training begins, if not where ``wrap`` has put them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decouplify.train.batches import Batch, Batches, TensorBatches
from decouplify.train.finish import calibrate
from decouplify.train.importance import close_in_rounds, importance
from decouplify.train.prediction import predict_worth
from decouplify.train.recipe import DecouplingRecipe
from decouplify.train.reconstruct import Reconstruction

__all__ = ["begin"]

_N_VIEWS = 4  # of each image, to predict from: as it is, and augmented
_N_CALIBRATED = 16  # batches
_FARTHEST = 4.0  # logits by which thresholds of predictions move: closed gates change what later controllers see
_N_RECONSTRUCTED = 512  # images that weights are fitted to


def begin(model: nn.Module, batches: Batches, recipe: DecouplingRecipe, target_macs: float | None) -> None:
    """Let gates begin closed where the recipe says so, and fit the weights to what is left.

    Args:
        model: A wrapped model whose controllers are new.
        batches: What it will be trained on.
        recipe: See ``start``, ``start_rounds``, ``reconstruct`` and ``image_reduction`` there.
        target_macs: Share of the dense MACs that shall be executed.

    Raises:
        ValueError: If the recipe has gates begin closed and there is no target.
    """
    if recipe.start == "open":
        return
    if target_macs is None:
        raise ValueError(
            f"decouple: start={recipe.start!r} needs a target in MACs; target={recipe.target!r} given, '2.0x' for "
            "instance wanted"
        )
    if recipe.start == "importance":
        _close(model, batches, recipe, target_macs)
        return
    closed: dict[str, Tensor] = {}
    left_for_all = target_macs * recipe.image_reduction
    if recipe.reconstruct and left_for_all < 1:
        closed = _close(model, batches, recipe, left_for_all)
    _predict(model, batches, recipe.norm_batches, target_macs, closed)


def _close(model: nn.Module, batches: Batches, recipe: DecouplingRecipe, target_macs: float) -> dict[str, Tensor]:
    """Close filters for all images, as many as meet the target, and fit the weights to what is left if asked to."""
    n = recipe.norm_batches
    closed = close_in_rounds(model, lambda: islice(batches.epoch(0), n), target_macs, recipe.start_rounds)
    if recipe.reconstruct:
        images = torch.cat(_as_they_are(batches, math.ceil(_N_RECONSTRUCTED / recipe.batch_size)))[:_N_RECONSTRUCTED]
        Reconstruction(model, images)({name: (~mask).float() for name, mask in closed.items()})
    return closed


def _predict(model: nn.Module, batches: Batches, n: int, target_macs: float, closed: dict[str, Tensor]) -> None:
    """Of the filters that are left, close for each image those that matter least for it."""
    important = importance(model, islice(batches.epoch(0, augmented=False), n), closed=closed)
    predict_worth(model, _views(batches, n), important, target_macs, closed)
    images, together = _as_they_are(batches, min(n, _N_CALIBRATED)), dist.is_initialized()
    calibrate(model, images, target_macs, _FARTHEST, across_processes=together)


def _views(batches: Batches, n: int) -> Iterator[Iterator[Batch]]:
    """Passes over the first so many batches, with the same images in the same order."""
    yield islice(batches.epoch(0, augmented=False), n)
    if isinstance(batches, TensorBatches) and batches.augment is not None:  # a loader may shuffle at each pass
        yield from (islice(batches.epoch(0), n) for _ in range(_N_VIEWS - 1))


def _as_they_are(batches: Batches, n: int) -> list[Tensor]:
    return [x for x, _ in islice(batches.epoch(0, augmented=False), n)]
