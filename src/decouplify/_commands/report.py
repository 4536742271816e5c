"""``decouplify report``: one page about a checkpoint."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import decouplify
from decouplify._commands.app import app
from decouplify._commands.opening import N_TIMED, device_of, open_checkpoint
from decouplify._commands.options import CheckpointFile, Data, Device, Json, Part, Split
from decouplify._commands.showing import emit, numbers_of, show
from decouplify.reporting import study, write_page
from decouplify.sparse import backend


@app.command()
def report(
    checkpoint: CheckpointFile,
    data: Data,
    out: Annotated[Path, typer.Option(help="The HTML file to write.", show_default=False)],
    split: Part = Split.test,
    timings: Annotated[
        bool, typer.Option("--timings", help="Also time one image at a time on the CPU, dense and sparse.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write one HTML page about a checkpoint: numbers, path map, decision tree, telling filters, work per image."""
    opened = open_checkpoint(checkpoint, data, device_of(device))
    images = opened.images
    found = study(
        opened.model,
        images.loader(split.value),
        class_names=images.class_names,
        mean=images.mean,
        std=images.std,
        max_images=None,
    )
    n_timed = min(N_TIMED, len(found.paths))
    measured = _time_forms(opened.model, images.tensors(split.value)[0][:n_timed]) if timings else {}
    written = write_page(
        found,
        out,
        title=f"{opened.extra['model']} on {Path(data).name}",
        timings=measured,
        timing_note=_how_timed(n_timed),
        facts=_known_facts(opened.extra, data, split),
    )
    if as_json:
        numbers = numbers_of(found.paths, found.macs)
        emit({"out": str(written), "data": data, "split": split.value, "timings_ms": measured, **numbers})
        return
    show(f"report: {written}")


def _known_facts(extra: Mapping[str, Any], data: str, split: Split) -> dict[str, str]:
    """The accuracy from before decoupling, where it was measured on these images."""
    dense = (extra.get("accuracy") or {}).get("dense")
    if dense is None or split is not Split.test or data != extra.get("data"):
        return {}
    return {"Accuracy before decoupling": f"{100 * dense:.1f} %"}


def _time_forms(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Median milliseconds for one image on the CPU, of the network without gates and of the sparse form, in turns."""
    dense = decouplify.unwrap(copy.deepcopy(model)).cpu().eval()
    forms = {"dense": dense, "sparse": decouplify.sparsify(model)}
    times: dict[str, list[float]] = {name: [] for name in forms}
    with torch.inference_mode():
        for image in torch.cat([images, images]):  # the first round warms up
            for name, form in forms.items():
                start = time.perf_counter()
                form(image[None])
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[len(images) :]) for name, values in times.items()}


def _how_timed(n: int) -> str:
    n_threads = torch.get_num_threads()
    threads = "1 thread" if n_threads == 1 else f"{n_threads} threads"
    return (
        f"median of {n} images, one at a time on the CPU, {threads}; dense: the network without gates in eager "
        f"PyTorch; sparse: {backend()}"
    )
