"""What the filters of a small decoupled network stand for, on pictures whose concepts are known exactly.

Trains a small network to tell balls, boxes and kites apart, with and without a mark on them, whatever their colour;
decouples it; and asks which filters stand for which concept, how well several do together, and which switch off when
the mark is hidden. Prints tables and writes pictures. A minute and a half on one core.

$ python examples/concepts.py --out concepts
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from torch import Tensor, nn

import decouplify
from decouplify.concepts import (
    OBJECTS,
    ConceptImages,
    collect_thresholds,
    filter_cards,
    find_concept,
    interpretability,
    load_broden,
    occlude_concept,
    planted_concepts,
    representation_ability,
    write_mini_broden,
)
from decouplify.train import DecouplingRecipe, Recipe, decouple, evaluate, train_dense

SIZE = 40
QUANTILE = 0.02  # these concepts cover more of a picture than those of photographs do


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("concepts"), help="directory to write to")
    parser.add_argument("--images", type=int, default=1500, help="training images")
    parser.add_argument("--epochs", type=int, default=8, help="dense epochs; decoupling takes half as many more")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the numbers are the same on every machine, and these convolutions are too small to share

    train, test = planted_concepts(args.images, SIZE, seed=0), planted_concepts(300, SIZE, seed=1)
    (x, y), (test_x, test_y) = tensors(train), tensors(test)
    model = small_network(16, 32, 32, 48, 64)
    train_dense(model, x, y, Recipe(args.epochs, lr=0.05, batch_size=50))
    print(f"dense:     {100 * evaluate(model, test_x, test_y):.1f} %")

    decouplify.wrap(model, (3, SIZE, SIZE), input_norm=True)
    layers = [site.name for site in model.decoupling.plan.sites]
    # New gates are open, so this is still the dense network.
    before = interpretability(model, test, layers, quantile=QUANTILE, min_images=20)
    decouple(model, x, y, DecouplingRecipe(args.epochs * 3 // 2, batch_size=50, mutual_information=0.1, target="2.0x"))
    print(f"decoupled: {100 * evaluate(model, test_x, test_y):.1f} %\n")

    thresholds = collect_thresholds(model, test, layers, quantile=QUANTILE)
    scores = interpretability(model, test, layers, thresholds=thresholds, min_images=20)
    print(scores.summary(), "\n")
    scores.plot(before=before).figure.savefig(args.out / "scores.png", dpi=110)

    together = representation_ability(model, test, layers, thresholds=thresholds)
    print(together.summary(), "\n")
    together.save(args.out / "representation.png")

    hidden = occlude_concept(model, test, "spot", layers, thresholds=thresholds)
    print(hidden.summary(), "\n")
    hidden.save(args.out / "hidden.png")
    hidden.plot_examples().savefig(args.out / "hidden-examples.png", dpi=110)

    filter_cards(model, test, scores.ranking(4), thresholds=thresholds).save(args.out / "cards.png")

    # The same from files in BRODEN's format.
    folder = args.out / "mini-broden"
    broden = load_broden(folder if folder.exists() else write_mini_broden(folder, 60, SIZE), transform=test.transform)
    print(f"{broden!r}\n{interpretability(model, broden, layers, min_images=10)!r}")


def small_network(*widths: int) -> nn.Sequential:
    """Convolutions of the given widths, each with norm and activation, on a half and then a quarter of the picture."""
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    n_inputs = 3
    for i, width in enumerate(widths, start=1):
        blocks[f"conv{i}"] = nn.Conv2d(n_inputs, width, 3, stride=2 if i == 1 else 1, padding=1, bias=False)
        blocks[f"bn{i}"], blocks[f"relu{i}"] = nn.BatchNorm2d(width), nn.ReLU()
        if i == len(widths) - 2:
            blocks["pool"] = nn.MaxPool2d(2)
        n_inputs = width
    blocks["mean"], blocks["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    blocks["classifier"] = nn.Linear(n_inputs, 2 * len(OBJECTS))
    return nn.Sequential(blocks)


def tensors(images: ConceptImages) -> tuple[Tensor, Tensor]:
    """What the network reads, and the class of each picture: its object, and whether there is a mark on it."""
    objects = [find_concept(images, name).number for name in OBJECTS]
    marks = {find_concept(images, name).number for name in ("spot", "door")}
    numbers = [set(image.numbers) for image in images.images]
    y = [2 * next(i for i, n in enumerate(objects) if n in ns) + bool(ns & marks) for ns in numbers]
    return torch.stack([images.transform(image.pixels) for image in images.images]), torch.tensor(y)


if __name__ == "__main__":
    main()
