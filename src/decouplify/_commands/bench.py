"""``decouplify bench``: gates against dense runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from decouplify._commands.app import app
from decouplify._commands.opening import N_TIMED, open_checkpoint
from decouplify._commands.options import Json, Linear, Only, parse_size
from decouplify._commands.showing import emit, show
from decouplify.bench import RUNTIMES, Gates, Protocol, benchmark, calibrate_norms, random_images
from decouplify.registry import build_model
from decouplify.trace import default_input_size


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME, or a checkpoint.", show_default=False)
    ],
    keep: Annotated[float | None, typer.Option(help="Random gates: the probability of each to be open.")] = None,
    mac_reduction: Annotated[float | None, typer.Option(help="Random gates that save this factor of MACs.")] = None,
    only: Only = None,
    linear_as_conv: Linear = False,
    data: Annotated[str | None, typer.Option(help="Images to run a checkpoint on, as for record.")] = None,
    input_size: Annotated[str | None, typer.Option(metavar="C,H,W", help="Size of one image.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every runtime.")] = 1,
    cores: Annotated[str | None, typer.Option(metavar="I,J", help="Cores to stay on, one per thread.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    rounds: Annotated[int, typer.Option(min=3, help="How often each contender runs.")] = Protocol.rounds,
    seconds: Annotated[float, typer.Option(min=0.0, help="Start no round after this time.")] = Protocol.seconds,
    runtime: Annotated[
        list[str] | None, typer.Option(help=f"Dense runtimes, of {', '.join(RUNTIMES)}; all by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time a network with gates against the fastest dense runtimes on this CPU.

    A network of a registry has random weights, and without --keep or --mac-reduction gates that are all open.
    """
    gates = Gates(keep, mac_reduction, tuple(only or ()), linear_as_conv)
    pinned = None if cores is None else _parse_cores(cores)
    protocol = Protocol(threads, pinned, batch, rounds, seconds, tuple(runtime or RUNTIMES))
    if Path(model).is_file():
        if not gates.are_open:
            raise ValueError(f"{model} has gates of its own; --keep and --mac-reduction are for networks without")
        if input_size is not None:
            raise ValueError(f"--input-size {input_size}: {model} runs on the images of --data, as large as they are")
        network, images = _trained_network(Path(model), data)
        size = None
    else:
        if Path(model).suffix == ".safetensors":
            raise FileNotFoundError(f"no checkpoint at {model}")
        if data is not None:
            raise ValueError(f"--data {data}: {model} runs on random images; give their size with --input-size")
        network, images = build_model(model).eval(), None
        size = default_input_size(network) if input_size is None else parse_size(input_size)
        calibrate_norms(network, random_images(8, size))
    result = benchmark(network, images, name=model, input_size=size, gates=gates, protocol=protocol)
    if as_json:
        emit(result.to_dict())
        return
    show(str(result))


def _parse_cores(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--cores {text}: wanted numbers of cores, for instance 0,1") from None


def _trained_network(checkpoint: Path, data: str | None) -> tuple[nn.Module, Tensor]:
    if data is None:
        raise ValueError(f"{checkpoint}: its gates depend on the images; give some with --data")
    opened = open_checkpoint(checkpoint, data, torch.device("cpu"))
    return opened.model, opened.images.tensors("test")[0][:N_TIMED]
