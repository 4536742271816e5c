"""The commands of the command line. Each reads its arguments, calls the library and prints what comes back."""

from __future__ import annotations

import copy
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from typer.core import TyperGroup

import decouplify
from decouplify import adversarial
from decouplify.adversarial import attack_named
from decouplify.bench import RUNTIMES, Gates, Protocol, benchmark, calibrate_norms, random_images
from decouplify.checkpoint import read_record
from decouplify.concepts import Broden, MaskFolder, Scaled, interpretability, load_broden, load_voc
from decouplify.data import ImageSet, Normalise, load_images
from decouplify.errors import CheckpointError
from decouplify.losses import parse_target
from decouplify.macs import MacCount
from decouplify.paths import FilterStates, PathSet, macs_of_paths
from decouplify.paths._distance import stratified_rows
from decouplify.paths._text import plain
from decouplify.plan import Plan
from decouplify.registry import build_model, model_kwargs, rebuild_model
from decouplify.reporting import Fact, headline_facts, study, write_page
from decouplify.score import score
from decouplify.sparse import backend
from decouplify.trace import default_input_size
from decouplify.train import DecouplingRecipe, Recipe, decouple, evaluate, train_dense

__all__ = ["app"]

_NEIGHBOURS = 10
_N_TIMED = 20  # images, each with a path of its own
_PIPED_WIDTH = 160  # columns where no terminal says how many it has


class _Split(StrEnum):
    train = "train"
    test = "test"


class _Group(TyperGroup):
    """Prints errors of the library in red instead of a traceback and exits with status 2."""

    def invoke(self, ctx: Any) -> Any:
        if ctx.params.get("debug"):
            return super().invoke(ctx)
        try:
            with _quiet_torch():
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # the first two are RuntimeErrors
            raise
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            first, _, rest = str(error).partition("\n")
            console = Console(stderr=True)
            console.print(Text(f"error: {first}", style="red"), soft_wrap=True)
            if rest:
                console.print(Text(rest), soft_wrap=True)
            raise typer.Exit(2) from error


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Torch logs a traceback of its own when a model does not run on an image size; our message says it in a line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


app = typer.Typer(
    name="decouplify", cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"decouplify {decouplify.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Convolutional networks that pick, for each image, the filters they need."""


_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME or cifar:NAME.", show_default=False)
]
_Checkpoint = Annotated[Path, typer.Argument(help="A file written by train.", show_default=False)]
_Data = Annotated[
    str,
    typer.Option(
        help='"digits", an .npz or .bin file, or a directory with a folder of pictures per class.', show_default=False
    ),
]
_Device = Annotated[str, typer.Option(help="cpu, cuda, ...; auto: a GPU if there is one.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
_Linear = Annotated[bool, typer.Option("--linear-as-conv", help="Also gate linear layers on (N, H, W, C) maps.")]
_Part = Annotated[_Split, typer.Option(help="Which part of the images.")]


# inspect --------------------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    model: _Model,
    input_size: Annotated[str | None, typer.Option(metavar="C,H,W", help="Size of one image.")] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Classes; by default the model's own.")] = None,
    linear_as_conv: _Linear = False,
    only: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Gate these only; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Leave these; may be repeated.")] = None,
    as_json: _Json = False,
) -> None:
    """Show which convolutions of a network would get a gate, and why the others not."""
    size = None if input_size is None else _parse_size(input_size)
    kwargs: dict[str, int] = {} if num_classes is None else {"num_classes": num_classes}
    if size is not None and size[0] != 3 and model.startswith("timm:"):
        kwargs["in_chans"] = size[0]
    plan = decouplify.inspect(
        build_model(model, **kwargs), size, linear_as_conv=linear_as_conv, only=only or (), exclude=exclude or ()
    )
    if as_json:
        _emit(plan.to_dict() | {"spec": model, "n_filters": plan.n_filters, "gated_share": plan.gated_share})
        return
    _print_plan(plan, model)


def _parse_size(text: str) -> tuple[int, ...]:
    try:
        size = tuple(int(part) for part in text.split(","))
    except ValueError:
        size = ()
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"--input-size {text}: wanted three positive integers C,H,W, for instance 3,224,224")
    return size


def _print_plan(plan: Plan, spec: str) -> None:
    sites = Table("site", "convolution", title=f"{spec} on {plan.input_size}", title_justify="left")
    sites.add_column("MACs, %", justify="right")
    sites.add_column("gate")
    sites.add_column("sits at", overflow="fold")
    for site in plan.sites:
        gate = "own" if site.gate == site.name else f"of {site.gate}"
        gate += "" if site.skips else ", computed anyway"
        sites.add_row(site.name, site.description, _share(site.n_macs, plan.n_macs), gate, site.end.module)
    if plan.sites:
        _print(sites)
    if plan.refused:
        refused = Table("left alone")
        refused.add_column("MACs, %", justify="right")
        refused.add_column("reason")
        for refusal in plan.refused:
            refused.add_row(refusal.name, _share(refusal.n_macs, plan.n_macs), refusal.reason)
        _print(refused)
    n_convs = len(plan.sites) + len(plan.refused)
    _print(
        f"{len(plan.sites)} of {n_convs} convolutions gated by {len(plan.gates)} controllers, {plan.n_filters} "
        f"filters, {100 * plan.gated_share:.1f} % of {plan.n_macs / 1e6:.1f} M MACs"
    )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.2f}"


# train ----------------------------------------------------------------------------------------------------------------


@app.command()
def train(
    model: _Model,
    data: _Data,
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
    linear_as_conv: _Linear = False,
    channels: Annotated[int | None, typer.Option(help="Channels of the images, 1 or 3.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width to bring images to.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and noise; the split stays the same.")] = 0,
    device: _Device = "auto",
    as_json: _Json = False,
) -> None:
    """Train a network on images, then its gates, and write a checkpoint."""
    where = _device(device)
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
    trained = _Training(network, images, as_json)
    trained.dense(recipe)
    decouplify.wrap(network, images.image_size, input_norm=input_norm, linear_as_conv=linear_as_conv)
    trained.gates(gates)
    paths = decouplify.record(network, images.loader("test"))
    numbers = _numbers(paths, macs_of_paths(network, paths))
    accuracy = {"dense": trained.dense_accuracy, "decoupled": numbers["accuracy"]}
    extra = _extra(model, kwargs, data, images) | {"seed": seed, "accuracy": accuracy, "macs": numbers["macs"]}
    extra["target"] = gates.target
    decouplify.save(network, out, extra)
    _note_missed_target(gates.target, numbers["macs"]["reduction"])
    if as_json:
        _emit({"out": str(out), **extra, "test": numbers, "history": trained.history})
        return
    before = Fact("Accuracy before decoupling", f"{100 * trained.dense_accuracy:.1f} %")
    _print_facts(f"{model} on {data}", [before, *headline_facts(paths, macs_of_paths(network, paths))])
    _print(f"checkpoint: {out}")


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


# evaluate -------------------------------------------------------------------------------------------------------------


@app.command(name="evaluate")
def evaluate_checkpoint(checkpoint: _Checkpoint, data: _Data, device: _Device = "auto", as_json: _Json = False) -> None:
    """Judge a checkpoint, with or without gates, on the test part of a set, or on all of a set that has none."""
    opened = _open(checkpoint, data, _device(device))
    pixels, labels = opened.images.held_out
    where = next(opened.model.parameters()).device
    result = score(opened.model, opened.images.normalised(pixels).to(where), torch.from_numpy(labels).to(where))
    numbers = result.to_dict() | {"checkpoint": str(checkpoint), "data": data}
    if as_json:
        _emit(numbers)
        return
    facts = [Fact(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in numbers.items()]
    _print_facts(f"{opened.extra['model']} on {data}", facts)


# record and report ----------------------------------------------------------------------------------------------------


@app.command()
def record(
    checkpoint: _Checkpoint,
    data: _Data,
    out: Annotated[Path, typer.Option(help="Directory for the path set.", show_default=False)],
    split: _Part = _Split.test,
    device: _Device = "auto",
    as_json: _Json = False,
) -> None:
    """Record the calculation path of every image and print what the paths say."""
    opened = _open(checkpoint, data, _device(device))
    paths = decouplify.record(opened.model, opened.images.loader(split.value), out=out)
    macs = macs_of_paths(opened.model, paths)
    if as_json:
        origin = {"checkpoint": str(checkpoint), "data": data, "split": split.value, "out": str(out)}
        _emit(origin | _numbers(paths, macs))
        return
    _print_states(paths.filter_states())
    _print_facts(f"{opened.extra['model']} on {data}, {split.value} images", headline_facts(paths, macs))
    _print(f"path set: {out}")


@app.command()
def report(
    checkpoint: _Checkpoint,
    data: _Data,
    out: Annotated[Path, typer.Option(help="The HTML file to write.", show_default=False)],
    split: _Part = _Split.test,
    timings: Annotated[
        bool, typer.Option("--timings", help="Also time one image at a time on the CPU, dense and sparse.")
    ] = False,
    device: _Device = "auto",
    as_json: _Json = False,
) -> None:
    """Write one HTML page about a checkpoint: numbers, path map, decision tree, telling filters, work per image."""
    opened = _open(checkpoint, data, _device(device))
    images = opened.images
    found = study(
        opened.model,
        images.loader(split.value),
        class_names=images.class_names,
        mean=images.mean,
        std=images.std,
        max_images=None,
    )
    n_timed = min(_N_TIMED, len(found.paths))
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
        numbers = _numbers(found.paths, found.macs)
        _emit({"out": str(written), "data": data, "split": split.value, "timings_ms": measured, **numbers})
        return
    _print(f"report: {written}")


@app.command()
def concepts(
    checkpoint: _Checkpoint,
    data: Annotated[Path, typer.Option(help="A BRODEN or PASCAL VOC directory.", show_default=False)],
    layer: Annotated[
        list[str] | None, typer.Option(help="A gated convolution; may be repeated. By default one per resolution.")
    ] = None,
    max_images: Annotated[int, typer.Option(help="Use a random subset of this size.")] = 5000,
    min_images: Annotated[int, typer.Option(help="Images a concept must be in.")] = 50,
    quantile: Annotated[float, typer.Option(help="Share of the places where a filter counts as active.")] = 0.005,
    out: Annotated[Path | None, typer.Option(help="Write numbers (.json) or the picture (.png, ...).")] = None,
    device: _Device = "auto",
    as_json: _Json = False,
) -> None:
    """Score how well single filters stand for labelled concepts."""
    found = read_record(checkpoint)
    model = decouplify.load(rebuild_model(found["extra"]), checkpoint).to(_device(device))
    size = Plan.from_dict(found["plan"]).input_size
    labelled = _read_concepts(data, _transform(size, found["extra"]))
    scores = interpretability(model, labelled, layer, quantile=quantile, max_images=max_images, min_images=min_images)
    if out is not None:
        scores.save(out)
    if as_json:
        _emit({"checkpoint": str(checkpoint), "data": str(data), **scores.to_dict()})
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


# bench ----------------------------------------------------------------------------------------------------------------


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME, or a checkpoint.", show_default=False)
    ],
    keep: Annotated[float | None, typer.Option(help="Random gates: the probability of each to be open.")] = None,
    mac_reduction: Annotated[float | None, typer.Option(help="Random gates that save this factor of MACs.")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Gate these only; may be repeated.")] = None,
    linear_as_conv: _Linear = False,
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
    as_json: _Json = False,
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
        size = default_input_size(network) if input_size is None else _parse_size(input_size)
        calibrate_norms(network, random_images(8, size))
    result = benchmark(network, images, name=model, input_size=size, gates=gates, protocol=protocol)
    if as_json:
        _emit(result.to_dict())
        return
    _print(str(result))


def _parse_cores(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--cores {text}: wanted numbers of cores, for instance 0,1") from None


def _trained_network(checkpoint: Path, data: str | None) -> tuple[nn.Module, Tensor]:
    if data is None:
        raise ValueError(f"{checkpoint}: its gates depend on the images; give some with --data")
    opened = _open(checkpoint, data, torch.device("cpu"))
    return opened.model, opened.images.tensors("test")[0][:_N_TIMED]


# detect ---------------------------------------------------------------------------------------------------------------


@app.command()
def detect(
    checkpoint: _Checkpoint,
    data: _Data,
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
    split: _Part = _Split.test,
    seed: Annotated[int, typer.Option(help="Of attacks, draws and detectors.")] = 0,
    device: _Device = "auto",
    as_json: _Json = False,
) -> None:
    """Attack a checkpoint's network, and detect the attacked images from their paths, with controls and baselines."""
    chosen = attack_named(attack, eps)
    sizes = _parse_sizes(per_class)
    opened = _open(checkpoint, data, _device(device))
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
        _emit({"checkpoint": str(checkpoint), "data": data, "split": split.value, **result.to_dict()})
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


# what record, report and bench share ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Opened:
    """A checkpoint's network and facts, and images as the network reads them."""

    model: nn.Module
    extra: Mapping[str, Any]
    images: ImageSet


def _open(checkpoint: Path, data: str, device: torch.device) -> _Opened:
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
    return _Opened(model, extra, images)


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


def _known_facts(extra: Mapping[str, Any], data: str, split: _Split) -> dict[str, str]:
    """The accuracy from before decoupling, where it was measured on these images."""
    dense = (extra.get("accuracy") or {}).get("dense")
    if dense is None or split is not _Split.test or data != extra.get("data"):
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


def _device(name: str) -> torch.device:
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def _numbers(paths: PathSet, macs: MacCount) -> dict[str, Any]:
    """What recorded paths say, as plain data."""
    states = paths.filter_states()
    assert paths.labels is not None
    k = min(_NEIGHBOURS, len(paths) - 1)
    executed = macs.executed.double()
    return {
        "n_images": len(paths),
        "accuracy": float((paths.preds == paths.labels).mean()),
        "macs": {
            "dense": macs.dense,
            "executed_mean": float(executed.mean()),
            "executed_min": int(macs.executed.min()),
            "executed_max": int(macs.executed.max()),
            "controllers": macs.controllers,
            "reduction": macs.reduction,
        },
        "filters": {"n_filters": states.n_filters, "keep_ratio": float(states.rate.mean()), **states.totals},
        "distinct_paths": paths.distinct(),
        "knn": {"k": k, "accuracy": paths.knn_accuracy(k) if k else None},
        "layers": [vars(layer) for layer in states.layers],
    }


def _print_states(states: FilterStates) -> None:
    table = Table("layer", title="Filter states", title_justify="left")
    for name in ("filters", "dynamic", "silent", "energetic"):
        table.add_column(name, justify="right")
    for layer in states.layers:
        counts = (layer.n_filters, layer.n_dynamic, layer.n_silent, layer.n_energetic)
        table.add_row(layer.name, *map(str, counts))
    _print(table)


def _print_facts(title: str, facts: list[Fact]) -> None:
    table = Table("", "", "", title=title, title_justify="left", show_header=False)
    for fact in facts:
        table.add_row(*fact)
    _print(table)


def _print(what: Table | str) -> None:
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    console.print(what, soft_wrap=isinstance(what, str))


def _emit(document: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(plain(dict(document)), indent=2))
