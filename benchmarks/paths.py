"""What recording and analysing paths costs.

Three parts, each by name: `record` compares recording with a plain evaluation pass of the same wrapped network, passes
in turn, median of the ratios of processor time; `analyse` reads 50,000 paths of 4,224 filters from disk; `map` draws
10,000 of them.

$ python benchmarks/paths.py record analyse map --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import decouplify
from decouplify.paths import PathSet, class_information, path_map
from decouplify.registry import build_model

# VGG-16 with all convolutions but the first: 12 layers, 4,160 filters; one of 64 more makes the paper's 4,224.
LAYERS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
N_CLASSES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["record", "analyse", "map"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", default="timm:resnet18", help="record: timm:, torchvision: or cifar:NAME")
    parser.add_argument("--size", type=int, default=128, help="record: height and width of the images")
    parser.add_argument("--batch-size", type=int, default=32, help="record: images at a time")
    parser.add_argument("--rounds", type=int, default=7, help="record: pairs of passes")
    parser.add_argument("--n-paths", type=int, default=50_000, help="analyse: number of paths")
    parser.add_argument("--n-map", type=int, default=10_000, help="map: number of paths")
    parser.add_argument("--method", default="opentsne", choices=["tsne", "opentsne", "pca"], help="map: see path_map")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if "record" in args.parts:
        time_recording(args.model, args.size, args.batch_size, args.rounds)
    if "analyse" in args.parts:
        time_analyses(args.n_paths)
    if "map" in args.parts:
        time_map(args.n_map, args.method)


def time_recording(name: str, size: int, batch_size: int, rounds: int) -> None:
    model = decouplify.wrap(build_model(name), (3, size, size), verify=False).eval()
    for controller in model.decoupling.controllers.values():
        nn.init.normal_(controller.fc2.weight)
    batches = [(torch.randn(batch_size, 3, size, size), torch.randint(10, (batch_size,))) for _ in range(4)]
    evaluate(model, batches)
    decouplify.record(model, batches)
    ratios = []
    for number in range(rounds):
        # Which goes first changes, as the second finds warmer caches and a hotter core.
        both: list[Callable[[], Any]] = [
            lambda: evaluate(model, batches),
            lambda: decouplify.record(model, batches, progress=False),
        ]
        order = (0, 1) if number % 2 == 0 else (1, 0)
        seconds = {which: seconds_of(both[which], time.process_time) for which in order}
        ratios.append(seconds[1] / seconds[0])
    pass_of = f"record, {name} at {size}x{size}, batch {batch_size}, {torch.get_num_threads()} threads"
    print(
        f"{pass_of}: {statistics.median(ratios):.3f} times an evaluation "
        f"pass (from {min(ratios):.3f} to {max(ratios):.3f} in {rounds} pairs)"
    )


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Top-1 accuracy, as any training script computes it."""
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def time_analyses(n_paths: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = PathSet.load(random_paths(n_paths).save(Path(folder) / "set"))
        states = seconds_of(paths.filter_states)
        histogram = seconds_of(lambda: paths.activation_histogram(None))
        information = seconds_of(lambda: class_information(paths))
    print(
        f"{n_paths} paths of {sum(LAYERS)} filters: states {states:.2f} s, histogram of all layers {histogram:.2f} s, "
        f"information about {N_CLASSES} classes {information:.2f} s"
    )


def time_map(n_paths: int, method: str) -> None:
    paths = random_paths(n_paths)
    start = time.perf_counter()
    drawn = path_map(paths, method, max_images=n_paths)
    print(f"map of {n_paths} paths of {sum(LAYERS)} filters, {method}: {time.perf_counter() - start:.1f} s; {drawn!r}")


def random_paths(n: int) -> PathSet:
    """Paths with what real ones have: rates of all sizes, classes with habits of their own, and noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, N_CLASSES, n)
    gates = {}
    for depth, k in enumerate(LAYERS):
        habits = rng.random((N_CLASSES, k)) < rng.beta(0.5, 0.5, k)
        flip = 0.4 - 0.025 * depth
        gates[f"conv{depth}"] = habits[labels] ^ (rng.random((n, k), dtype=np.float32) < flip)
    return PathSet.from_gates(gates, labels=labels)


def seconds_of(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    call()
    return clock() - start


if __name__ == "__main__":
    main()
