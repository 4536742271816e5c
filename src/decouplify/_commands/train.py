"""``decouplify train``: a network from nothing, then its gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from torch import Tensor, nn

import decouplify
from decouplify._commands.app import app
from decouplify._commands.opening import device_of
from decouplify._commands.options import Data, Device, Exclude, Json, Linear, Model, Only
from decouplify._commands.showing import emit, numbers_of, show, show_facts
from decouplify.data import ImageSet, load_images
from decouplify.losses import parse_target
from decouplify.paths import macs_of_paths
from decouplify.registry import build_model, model_kwargs
from decouplify.reporting import Fact, headline_facts
from decouplify.train import DecouplingRecipe, Recipe, decouple, evaluate, train_dense


@app.command()
def train(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="The checkpoint to write, a .safetensors file.", show_default=False)],
    epochs: Annotated[int, typer.Option(min=0, help="Passes over the images before gates are added.")] = 20,
    decouple_epochs: Annotated[int, typer.Option(min=1, help="Passes with gates.")] = 20,
    target: Annotated[str, typer.Option(help='MAC reduction ("2.0x"), keep ratio ("0.5"), or "none".')] = "2.0x",
    lr: Annotated[float, typer.Option(help="Learning rate before gates are added.")] = Recipe.lr,
    decouple_lr: Annotated[float, typer.Option(help="Learning rate with gates.")] = DecouplingRecipe.lr,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step.")] = Recipe.batch_size,
    mutual_information: Annotated[
        float, typer.Option(help="Weight of paths telling classes.")
    ] = DecouplingRecipe.mutual_information,
    kl: Annotated[float, typer.Option(help="Weight of open filters responding.")] = DecouplingRecipe.kl,
    sparsity: Annotated[float, typer.Option(help="Weight of the target.")] = DecouplingRecipe.sparsity,
    input_norm: Annotated[
        bool, typer.Option("--input-norm", help="Normalise what controllers read: paths vary more.")
    ] = False,
    linear_as_conv: Linear = False,
    only: Only = None,
    exclude: Exclude = None,
    channels: Annotated[int | None, typer.Option(help="Channels of the images, 1 or 3.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width to bring images to.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and noise; the split stays the same.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a network on images, then its gates, and write a checkpoint."""
    where = device_of(device)
    recipe = Recipe(epochs, lr, batch_size, seed=seed)
    gates = DecouplingRecipe(
        decouple_epochs,
        decouple_lr,
        batch_size,
        seed=seed,
        mutual_information=mutual_information,
        kl=kl,
        sparsity=sparsity,
        target=_parse_target(target),
    )
    if not out.resolve().parent.is_dir():  # found out now rather than after the training
        raise FileNotFoundError(f"--out {out}: there is no directory {out.resolve().parent}")
    if channels is None and model.startswith("torchvision:"):
        channels = 3
    images = load_images(data, channels=channels, size=size)
    kwargs = model_kwargs(model, len(images.class_names), images.image_size[0])
    torch.manual_seed(seed)
    network = build_model(model, **kwargs).to(where)
    which: dict[str, Any] = {"only": only or (), "exclude": exclude or (), "linear_as_conv": linear_as_conv}
    decouplify.inspect(network, images.image_size, **which)  # raises now rather than after the dense training
    trained = _Training(network, images, as_json)
    trained.dense(recipe)
    decouplify.wrap(network, images.image_size, input_norm=input_norm, **which)
    trained.gates(gates)
    paths = decouplify.record(network, images.loader("test"))
    numbers = numbers_of(paths, macs_of_paths(network, paths))
    accuracy = {"dense": trained.dense_accuracy, "decoupled": numbers["accuracy"]}
    extra = _extra(model, kwargs, data, images) | {"seed": seed, "accuracy": accuracy, "macs": numbers["macs"]}
    extra["target"] = gates.target
    decouplify.save(network, out, extra)
    _note_missed_target(gates.target, numbers["macs"]["reduction"])
    if as_json:
        emit({"out": str(out), **extra, "test": numbers, "history": trained.history})
        return
    before = Fact("Accuracy before decoupling", f"{100 * trained.dense_accuracy:.1f} %")
    show_facts(f"{model} on {data}", [before, *headline_facts(paths, macs_of_paths(network, paths))])
    show(f"checkpoint: {out}")


def _parse_target(text: str) -> float | str | None:
    if text.lower() == "none":
        return None
    try:
        target: float | str = float(text)
    except ValueError:
        target = text
    parse_target(target)  # raises now rather than after the dense training
    return target


def _note_missed_target(target: Any, reduction: float) -> None:
    """Says on stderr what to change when the MACs are more than a tenth from a MAC target."""
    share, _ = parse_target(target)
    if share is None or 0.9 < reduction * share < 1.1:
        return
    advice = "train for more --decouple-epochs, or take more steps with a smaller --batch-size"
    Console(stderr=True).print(
        Text(f"note: {reduction:.2f}x instead of {target}: {advice}", style="yellow"), soft_wrap=True
    )


def _extra(model: str, kwargs: Mapping[str, int], data: str, images: ImageSet) -> dict[str, Any]:
    """What ``record`` and ``report`` need to rebuild the network and to read images as it did."""
    return {
        "model": model,
        "model_kwargs": dict(kwargs),
        "data": data,
        "mean": list(images.mean),
        "std": list(images.std),
        "classes": list(images.class_names),
    }


class _Training:
    """The two phases of ``train``, and what they leave behind."""

    def __init__(self, model: nn.Module, images: ImageSet, silent: bool) -> None:
        self.model, self.silent = model, silent
        self.device = next(model.parameters()).device
        self.train_part, self.test_part = self._part(images, "train"), self._part(images, "test")
        self.history: dict[str, list[dict[str, float]]] = {}
        self.dense_accuracy = float("nan")

    def _part(self, images: ImageSet, split: Any) -> tuple[Tensor, Tensor]:
        x, y = images.tensors(split)
        return x.to(self.device), y.to(self.device)

    def dense(self, recipe: Recipe) -> None:
        with _epochs("dense training", recipe.epochs, self.silent) as progress:
            self.history["dense"] = train_dense(self.model, *self.train_part, recipe, progress=progress).epochs
        self.dense_accuracy = evaluate(self.model, *self.test_part)

    def gates(self, recipe: DecouplingRecipe) -> None:
        with _epochs("decoupling", recipe.epochs, self.silent) as progress:
            self.history["decoupling"] = decouple(self.model, *self.train_part, recipe, progress=progress).epochs


@contextmanager
def _epochs(title: str, n_epochs: int, silent: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Shows each epoch on stderr: a bar on a terminal, else a line."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda epoch: None if silent else typer.echo(_epoch_line(title, epoch, n_epochs), err=True)
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=n_epochs)
        yield lambda epoch: bar.update(task, advance=1, description=_epoch_line(title, epoch, n_epochs))


def _epoch_line(title: str, epoch: Mapping[str, Any], n_epochs: int) -> str:
    line = f"{title} {epoch['epoch']}/{n_epochs}: loss {epoch['loss']:.3f}, accuracy {100 * epoch['accuracy']:.1f} %"
    return line + (f", open {100 * epoch['keep_ratio']:.0f} %" if "keep_ratio" in epoch else "")
