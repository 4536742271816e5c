"""A checkpoint's network, and images as it reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import decouplify
from decouplify.checkpoint import read_record
from decouplify.data import ImageSet, load_images
from decouplify.errors import CheckpointError
from decouplify.plan import Plan
from decouplify.registry import rebuild_model

__all__ = ["N_TIMED", "Opened", "device_of", "open_checkpoint"]

N_TIMED = 20  # images, each with a path of its own


@dataclass(frozen=True)
class Opened:
    """A checkpoint's network and facts, and images as the network reads them."""

    model: nn.Module
    extra: Mapping[str, Any]
    images: ImageSet


def open_checkpoint(checkpoint: Path, data: str, device: torch.device) -> Opened:
    found = read_record(checkpoint)
    extra = found["extra"]
    model = decouplify.load(rebuild_model(extra), checkpoint).to(device).eval()
    channels, height, width = _input_size(found)
    images = load_images(data, channels=channels, size=(height, width))
    classes = tuple(extra.get("classes", images.class_names))
    if classes != images.class_names:
        raise CheckpointError(
            f"{checkpoint} was trained on {len(classes)} classes ({_some(classes)}), {data} has "
            f"{len(images.class_names)} ({_some(images.class_names)}); wanted the same classes in the same order"
        )
    if "mean" in extra and "std" in extra:
        images = images.normalised_as(extra["mean"], extra["std"])
    return Opened(model, extra, images)


def _input_size(found: Mapping[str, Any]) -> tuple[int, ...]:
    """Size of the images a checkpoint's network was made for: of its plan, or as recorded if it has no gates."""
    if found["plan"] is not None:
        return Plan.from_dict(found["plan"]).input_size
    size = found["extra"].get("input_size")
    if not isinstance(size, list) or len(size) != 3:
        raise CheckpointError(
            'the checkpoint has no gates and no "input_size": [C, H, W] in its extra facts; save it so'
        )
    return tuple(map(int, size))


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def device_of(name: str) -> torch.device:
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
