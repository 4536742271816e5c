"""``decouplify evaluate``: one line of numbers about a checkpoint."""

from __future__ import annotations

import torch

from decouplify._commands.app import app
from decouplify._commands.opening import device_of, open_checkpoint
from decouplify._commands.options import CheckpointFile, Data, Device, Json
from decouplify._commands.showing import emit, show_facts
from decouplify.reporting import Fact
from decouplify.score import score


@app.command(name="evaluate")
def evaluate_checkpoint(checkpoint: CheckpointFile, data: Data, device: Device = "auto", as_json: Json = False) -> None:
    """Judge a checkpoint, with or without gates, on the test part of a set, or on all of a set that has none."""
    opened = open_checkpoint(checkpoint, data, device_of(device))
    pixels, labels = opened.images.held_out
    where = next(opened.model.parameters()).device
    result = score(opened.model, opened.images.normalised(pixels).to(where), torch.from_numpy(labels).to(where))
    numbers = result.to_dict() | {"checkpoint": str(checkpoint), "data": data}
    if as_json:
        emit(numbers)
        return
    facts = [Fact(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in numbers.items()]
    show_facts(f"{opened.extra['model']} on {data}", facts)
