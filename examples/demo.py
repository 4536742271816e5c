"""The main job from end to end, on scikit-learn's handwritten digits and a small timm network.

Trains a dense network, decouples it, records the paths of held-out images, checks the sparse form against the masked
one, times both, and writes a table, pictures and a page. About two minutes on two cores.

$ python examples/demo.py --out demo
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import timm
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import decouplify
from decouplify.data import load_images
from decouplify.paths import path_map
from decouplify.train import DecouplingRecipe, Recipe, decouple, evaluate, train_dense

MODEL = "test_resnet"
COMPUTED_BY_REPORT = (
    "Test accuracy, decoupled",
    "MAC reduction",
    "Filters",
    "Distinct paths",
    "Class accuracy of paths",
)
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="directory to write to")
    parser.add_argument("--dense-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=20, help="epochs of decoupling")
    parser.add_argument("--target", default="2.0x", help="MAC reduction to aim at")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    torch.set_num_threads(1)  # maps this small gain nothing from more, and the numbers are the same on every machine
    digits = load_images("digits")
    (train_x, train_y), (test_x, test_y) = digits.tensors("train"), digits.tensors("test")
    model = timm.create_model(MODEL, num_classes=10, in_chans=1)

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("dense training", total=args.dense_epochs)
        recipe = Recipe(args.dense_epochs, batch_size=64)
        train_dense(model, train_x, train_y, recipe, progress=lambda _: bar.advance(task))
        dense_accuracy = evaluate(model, test_x, test_y)
        dense_ms = time_per_image(model, test_x)

        decouplify.wrap(model, digits.image_size, input_norm=True)
        console.print(str(model.decoupling.plan).splitlines()[0])
        task = bar.add_task("decoupling", total=args.epochs)
        recipe = DecouplingRecipe(args.epochs, batch_size=64, lr=0.05, target=args.target)
        decouple(model, train_x, train_y, recipe, progress=lambda _: bar.advance(task))

    fast = decouplify.sparsify(model)
    verified = decouplify.verify(model, fast, test_x[:50])
    paths = decouplify.record(model, digits.loader("test"), progress=False)
    macs = decouplify.count_macs(model, test_x)
    states = paths.filter_states()
    facts = {
        "Test accuracy, dense": f"{100 * dense_accuracy:.1f} %",
        "Test accuracy, decoupled": f"{100 * evaluate(model, test_x, test_y):.1f} %",
        "MAC reduction": f"{macs.reduction:.2f}x",
        "Filters": states.headline(),
        "Distinct paths": f"{paths.distinct()} of {len(paths)} images",
        "Class accuracy of paths": f"{100 * paths.knn_accuracy():.1f} % (10 nearest)",
        "CPU time per image, dense": f"{dense_ms:.2f} ms",
        "CPU time per image, sparse": f"{time_per_image(fast, test_x):.2f} ms ({decouplify.sparse.backend()})",
        "Sparse against masked form": str(verified),
    }
    write_results(args.out, model, paths, facts, digits)

    table = Table(title=f"{MODEL} on {len(test_y)} held-out digits", show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)
    console.print(f"Written to {args.out}/: index.html, path_map.png, filter_states.png, model.safetensors")


def time_per_image(model: torch.nn.Module, images: Tensor, n: int = 100) -> float:
    """Median milliseconds for one image at a time, after a warm-up."""
    model.eval()
    times = []
    with torch.no_grad():
        for image in images[: n + 10]:
            start = time.perf_counter()
            model(image[None])
            times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[10:])


def write_results(
    out: Path,
    model: torch.nn.Module,
    paths: decouplify.PathSet,
    facts: dict[str, str],
    digits: Any,
) -> None:
    extra = {"model": f"timm:{MODEL}", "model_kwargs": {"num_classes": 10, "in_chans": 1}, "data": "digits"}
    extra |= {"mean": list(digits.mean), "std": list(digits.std), "classes": list(digits.class_names)}
    decouplify.save(model, out / "model.safetensors", extra=extra)
    for name, result in (("path_map", path_map(paths)), ("filter_states", paths.filter_states())):
        axes = result.plot()
        axes.figure.savefig(out / f"{name}.png", dpi=120, bbox_inches="tight")
    page = decouplify.report(
        model,
        digits.loader("test"),
        out / "index.html",
        title="Calculation paths of handwritten digits",
        class_names=digits.class_names,
        mean=digits.mean,
        std=digits.std,
        facts={name: value for name, value in facts.items() if name not in COMPUTED_BY_REPORT},
        progress=False,
    )
    assert page.exists()


if __name__ == "__main__":
    main()
