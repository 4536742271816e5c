"""``decouplify detect``: attacked images, told by their paths."""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from decouplify import adversarial
from decouplify._commands.app import app
from decouplify._commands.opening import device_of, open_checkpoint
from decouplify._commands.options import CheckpointFile, Data, Device, Json, Part, Split
from decouplify._commands.showing import emit
from decouplify.adversarial import attack_named
from decouplify.paths._distance import stratified_rows


@app.command()
def detect(
    checkpoint: CheckpointFile,
    data: Data,
    attack: Annotated[str, typer.Option(help="fgsm, bim, pgd, mifgsm or cdrp.")] = "pgd",
    eps: Annotated[
        float | None, typer.Option(min=0.0, help="Radius of the attack for pixels in [0, 1]; 8/255 by default.")
    ] = None,
    per_class: Annotated[str, typer.Option(metavar="N,N,...", help="Training images per class.")] = "1,5,10",
    repeats: Annotated[int, typer.Option(min=1, help="Independent draws of them.")] = 5,
    max_images: Annotated[int, typer.Option(min=4, help="Use so many images, classes in proportion.")] = 1000,
    critical: Annotated[
        int, typer.Option(min=0, help="Images for critical data routing paths, which are slow; 0: leave these out.")
    ] = 200,
    adaptive: Annotated[bool, typer.Option(help="Run the adaptive attack, too.")] = True,
    split: Part = Split.test,
    seed: Annotated[int, typer.Option(help="Of attacks, draws and detectors.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Attack a checkpoint's network, and detect the attacked images from their paths, with controls and baselines."""
    chosen = attack_named(attack, eps)
    sizes = _parse_sizes(per_class)
    opened = open_checkpoint(checkpoint, data, device_of(device))
    pixels, labels = opened.images.pixels(split.value)
    rows = stratified_rows(labels, max_images, seed)
    result = adversarial.detect(
        adversarial.PixelModel(opened.model, opened.images.mean, opened.images.std),
        torch.from_numpy(pixels[rows]).movedim(-1, 1).float() / 255,
        torch.from_numpy(labels[rows]),
        chosen,
        adaptive_weight=adversarial.AdaptiveAttack.weight if adaptive else None,
        baselines=[name for name in adversarial.BASELINES if critical or name != "critical paths"],
        n_critical=critical,
        n_per_class=sizes,
        repeats=repeats,
        seed=seed,
        progress=None if as_json else lambda stage: typer.echo(stage, err=True),
    )
    if as_json:
        emit({"checkpoint": str(checkpoint), "data": data, "split": split.value, **result.to_dict()})
        return
    typer.echo(result.table())


def _parse_sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise ValueError(f"--per-class {text}: wanted positive integers, for instance 1,5,10")
    return sizes
