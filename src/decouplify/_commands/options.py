"""Arguments and options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "CheckpointFile",
    "Data",
    "Device",
    "Exclude",
    "Json",
    "Linear",
    "Model",
    "Only",
    "Part",
    "Split",
    "parse_size",
]


class Split(StrEnum):
    train = "train"
    test = "test"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME or cifar:NAME.", show_default=False)
]
CheckpointFile = Annotated[Path, typer.Argument(help="A file written by train.", show_default=False)]
Data = Annotated[
    str,
    typer.Option(
        help='"digits", an .npz or .bin file, or a directory with a folder of pictures per class.', show_default=False
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; auto: a GPU if there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Linear = Annotated[bool, typer.Option("--linear-as-conv", help="Also gate linear layers on (N, H, W, C) maps.")]
Only = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Gate these only; may be repeated.")]
Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave these; may be repeated.")]
Part = Annotated[Split, typer.Option(help="Which part of the images.")]


def parse_size(text: str) -> tuple[int, ...]:
    try:
        size = tuple(int(part) for part in text.split(","))
    except ValueError:
        size = ()
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"--input-size {text}: wanted three positive integers C,H,W, for instance 3,224,224")
    return size
