"""Every figure that explains a network from its paths, each by one call, on a small network for handwritten digits.

Trains the network, decouples it several times with other loss weights, and writes pictures, tables as text, and a page.
About two minutes on one core; with `--checkpoint` and `--data` it explains a network of yours and trains nothing.

$ python examples/explain.py --out explained
$ python examples/explain.py --checkpoint examples/checkpoints/resnet56.safetensors --data cifar10.bin \
      --original examples/checkpoints/resnet56-dense.safetensors --classes 3 5 --out explained
"""

from __future__ import annotations

import argparse
import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import decouplify
from decouplify.checkpoint import read_record
from decouplify.data import ImageSet, load_images
from decouplify.paths import (
    BeforeAfter,
    PathMap,
    Sweep,
    before_after,
    class_information,
    contrast,
    counterfactual,
    decision_tree,
    gate_effect,
    path_map,
    sweep,
)
from decouplify.plan import Plan
from decouplify.registry import rebuild_model
from decouplify.train import DecouplingRecipe, Recipe, decouple, train_dense

WEIGHTS = (0.01, 0.1, 0.3)  # of the mutual-information loss; the middle one is explained


@dataclass(frozen=True)
class Subject:
    """What is explained: a wrapped network, the images, and, where it was trained here, what it was before."""

    model: nn.Module
    images: ImageSet
    original: nn.Module | None = None
    others: tuple[tuple[dict[str, Any], nn.Module], ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("explained"), help="directory for what is written")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint written by `decouplify train`")
    parser.add_argument("--original", type=Path, help="safetensors file of the same network without gates")
    parser.add_argument("--data", default="digits", help="images, as `decouplify train` reads them")
    parser.add_argument("--classes", type=int, nargs=2, default=(3, 8), help="why the first and not the second")
    parser.add_argument("--no-report", action="store_true", help="pictures only")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    subject = opened(args.checkpoint, args.original, args.data) if args.checkpoint else trained()
    paths = decouplify.record(subject.model, subject.images.loader("test"))
    for name, result in results(subject, paths, *args.classes):
        print(f"\n== {name} ==\n{result.summary()}")
        save(result, args.out / f"{name}.png", subject.images.class_names)
    if args.no_report:
        return
    page = decouplify.report(
        subject.model,
        subject.images.loader("test"),
        args.out / "report.html",
        class_names=subject.images.class_names,
        mean=subject.images.mean,
        std=subject.images.std,
    )
    print(f"\nwritten: {page}")


def results(subject: Subject, paths: decouplify.PathSet, a: int, b: int) -> Iterator[tuple[str, Any]]:
    """Each result by name: all of them print, plot and save alike."""
    names, loader = subject.images.class_names, subject.images.loader("test")
    pixels, labels = subject.images.tensors("test")
    yield "filter_states", paths.filter_states()
    yield "activation_histogram", paths.activation_histogram()
    yield "path_map", path_map(paths)
    yield "class_information", class_information(paths)
    yield "decision_tree", decision_tree(paths, class_names=names)
    found = contrast(paths, a, b, class_names=names)
    yield "contrast", found
    shown = pixels[labels == a]
    yield "counterfactual", counterfactual(subject.model, shown, found)
    if telling := found.filters(1):
        site, index, difference = telling[0]
        switch = {"off": [index]} if difference > 0 else {"on": [index]}
        yield "gate_effect", gate_effect(subject.model, shown, site, **switch, class_names=names)
    covered = shown.clone()
    covered[..., shown.shape[-1] // 2 :] = shown.amin()
    yield "diff", decouplify.record(subject.model, [shown]).diff(decouplify.record(subject.model, [covered]))
    if subject.original is not None:
        yield "before_after", before_after(subject.original, subject.model, loader)
    if subject.others:
        yield "sweep", sweep(subject.others, loader)


def save(result: Any, file: Path, class_names: Sequence[str]) -> None:
    """Draw a result; maps want the names of the classes, and two results have a second picture."""
    result.save(file, **({"class_names": class_names} if isinstance(result, PathMap) else {}))
    files = [file]
    if isinstance(result, BeforeAfter):
        files.append(file.with_name("maps.png"))
        result.plot_maps(class_names)[0].figure.savefig(files[-1], dpi=100, bbox_inches="tight")
    if isinstance(result, Sweep):
        files.append(result.save(file.with_name("sweep_lines.png"), over="mutual information"))
    for drawn in files:  # a quarter of the bytes, and no eye sees it
        with Image.open(drawn) as picture:
            small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        small.save(drawn, optimize=True)


def trained() -> Subject:
    """The digits, and a small network decoupled with several weights."""
    images = load_images("digits", size=8)
    torch.manual_seed(0)
    dense = network()
    train_dense(dense, *images.tensors("train"), Recipe(5, batch_size=64))
    runs = tuple(({"mutual information": weight}, decoupled(dense, images, weight)) for weight in WEIGHTS)
    return Subject(runs[1][1], images, dense, runs)


def network() -> nn.Sequential:
    widths = (1, 8, 16, 24, 32, 32)
    blocks = OrderedDict()
    for number, (n_inputs, n_filters) in enumerate(pairwise(widths), 1):
        blocks[f"conv{number}"] = nn.Conv2d(n_inputs, n_filters, 3, padding=1, bias=False)
        blocks[f"norm{number}"] = nn.BatchNorm2d(n_filters)
        blocks[f"relu{number}"] = nn.ReLU()
        if number == 3:
            blocks["pool"] = nn.MaxPool2d(2)
    ends = {"average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classes": nn.Linear(widths[-1], 10)}
    return nn.Sequential(OrderedDict(blocks | ends))


def decoupled(dense: nn.Module, images: ImageSet, weight: float) -> nn.Module:
    model = decouplify.wrap(copy.deepcopy(dense), images.image_size, input_norm=True)
    recipe = DecouplingRecipe(10, 0.05, 64, mutual_information=weight, target="1.5x")
    decouple(model, *images.tensors("train"), recipe)
    return model.eval()


def opened(checkpoint: Path, original: Path | None, data: str) -> Subject:
    """A network of the command line, the same without gates if there is a file of it, and images as both read them."""
    found = read_record(checkpoint)
    extra = found["extra"]
    model = decouplify.load(rebuild_model(extra), checkpoint).eval()
    channels, *size = Plan.from_dict(found["plan"]).input_size
    images = load_images(data, channels=channels, size=(size[0], size[1]))
    if "mean" in extra:
        images = images.normalised_as(extra["mean"], extra["std"])
    dense = None
    if original is not None:
        dense = rebuild_model(extra).eval()
        dense.load_state_dict(load_file(original))
    return Subject(model, images, dense)


if __name__ == "__main__":
    main()
