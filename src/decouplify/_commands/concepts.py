"""``decouplify concepts``: what single filters stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import decouplify
from decouplify._commands.app import app
from decouplify._commands.opening import device_of
from decouplify._commands.options import CheckpointFile, Device, Json
from decouplify._commands.showing import emit
from decouplify.checkpoint import read_record
from decouplify.concepts import Broden, MaskFolder, Scaled, interpretability, load_broden, load_voc
from decouplify.data import Normalise
from decouplify.plan import Plan
from decouplify.registry import rebuild_model


@app.command()
def concepts(
    checkpoint: CheckpointFile,
    data: Annotated[Path, typer.Option(help="A BRODEN or PASCAL VOC directory.", show_default=False)],
    layer: Annotated[
        list[str] | None, typer.Option(help="A gated convolution; may be repeated. By default one per resolution.")
    ] = None,
    max_images: Annotated[int, typer.Option(help="Use a random subset of this size.")] = 5000,
    min_images: Annotated[int, typer.Option(help="Images a concept must be in.")] = 50,
    quantile: Annotated[float, typer.Option(help="Share of the places where a filter counts as active.")] = 0.005,
    out: Annotated[Path | None, typer.Option(help="Write numbers (.json) or the picture (.png, ...).")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score how well single filters stand for labelled concepts."""
    found = read_record(checkpoint)
    model = decouplify.load(rebuild_model(found["extra"]), checkpoint).to(device_of(device))
    size = Plan.from_dict(found["plan"]).input_size
    labelled = _read_concepts(data, _transform(size, found["extra"]))
    scores = interpretability(model, labelled, layer, quantile=quantile, max_images=max_images, min_images=min_images)
    if out is not None:
        scores.save(out)
    if as_json:
        emit({"checkpoint": str(checkpoint), "data": str(data), **scores.to_dict()})
        return
    typer.echo(f"{labelled!r}\n{scores.summary()}")


def _transform(size: tuple[int, ...], extra: Mapping[str, Any]) -> Scaled:
    """What the network was trained to read, as far as the checkpoint says."""
    channels, height, width = size
    if "mean" not in extra or "std" not in extra:
        return Scaled((channels, height, width))
    return Scaled((channels, height, width), Normalise(tuple(extra["mean"]), tuple(extra["std"])))


def _read_concepts(data: Path, transform: Scaled) -> Broden | MaskFolder:
    if (data / "index.csv").is_file():
        return load_broden(data, transform=transform)
    if (data / "ImageSets").is_dir():
        return load_voc(data, transform=transform)
    raise FileNotFoundError(
        f"{data} has neither index.csv (BRODEN, such as broden1_224) nor ImageSets/ (PASCAL VOC, such as VOC2012)"
    )
