"""What a second thread gains and what a batch costs, for the sparse form by itself.

The same images run with one thread, with two, and as one batch, in turns in one process in which nothing else runs:
threads of other runtimes that wait actively would take a core. Gates and weights are those of ``latency.py``.

$ python benchmarks/scaling.py        # writes docs/results/scaling.jsonl, which latency.py --report shows
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machines
import torch
from torch import Tensor

import decouplify
from decouplify.bench.masks import max_paths, random_images, random_path, steer
from decouplify.sparse import SparseModel

ROWS = (("resnet18", None), ("resnet18", 2.03), ("vgg16_bn", None), ("vgg16_bn", 3.23), ("resnet56", 2.0))
N_IMAGES = 8
RESULTS = Path("docs/results/scaling.jsonl")
TEXT = (
    "The sparse form by itself, without other runtimes in the process, in milliseconds per image (medians; gains are",
    "medians of the ratios within each round, with their 20th and 80th percentile): `python benchmarks/scaling.py`. A",
    f"batch is {N_IMAGES} images at most, on one thread.",
)
CORES = tuple(sorted(os.sched_getaffinity(0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    rows = []
    for name, reduction in ROWS:
        rows.append(measure(name, reduction, args.rounds))
        print(json.dumps(rows[-1]), flush=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(name: str, reduction: float | None, n_rounds: int) -> dict[str, Any]:
    """Milliseconds per image of one network, and the medians of the ratios within each round."""
    fast, images = gated(name, reduction)
    ways: dict[str, Callable[[], float]] = {
        "1 thread": lambda: seconds(fast, images.split(1), 1),
        "2 threads": lambda: seconds(fast, images.split(1), 2),
        "batch": lambda: seconds(fast, [images], 1),
    }
    rounds: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(n_rounds + 2):
        for way, run in ways.items():
            if i >= 2:  # the first rounds tune and allocate
                rounds[way].append(run())
            else:
                run()
    alone = rounds["1 thread"]
    return {
        "network": name,
        "mac_reduction": reduction,
        "ms_per_image": {way: spread([1e3 * t / len(images) for t in times]) for way, times in rounds.items()},
        "two_threads": spread([one / two for one, two in zip(alone, rounds["2 threads"], strict=True)]),
        "batch": spread([one / batch for one, batch in zip(alone, rounds["batch"], strict=True)]),
        "n_rounds": n_rounds,
        "batch_size": len(images),
        "machine": machines.here(),
    }


def gated(name: str, reduction: float | None) -> tuple[SparseModel, Tensor]:
    """A network's sparse form, and images for which random gates save that much (None: all gates are open)."""
    from latency import network  # which shows this module's results

    model, size = network(name)
    decouplify.wrap(model, size, verify=False)
    decoupling = decouplify.decoupling.decoupling_of(model)
    n_images = min(N_IMAGES, max_paths(decoupling.plan))
    images = random_images(n_images, size)
    if reduction is None:
        path = torch.ones(n_images, decoupling.plan.n_filters)
    else:
        path = random_path(decoupling.plan, decoupling.costs, n_images, mac_reduction=reduction)
    steer(model, images, path)
    return decouplify.sparsify(model), images


def seconds(fast: SparseModel, batches: Any, n_threads: int) -> float:
    """Wall-clock seconds of all batches, on as many cores as threads."""
    torch.set_num_threads(n_threads)
    os.sched_setaffinity(0, CORES[:n_threads])
    start = time.perf_counter()
    for batch in batches:
        fast(batch)
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5)
    return {
        "median": round(statistics.median(values), 3),
        "p20": round(cuts[0], 3),
        "p80": round(cuts[3], 3),
    }


def section(path: Path = RESULTS) -> list[str]:
    """The tables for the performance page."""
    head = "| network | gates | 1 thread | 2 threads | in a batch | gain of 2 threads | gain of a batch |"
    return ["## Threads and batches", "", *TEXT, "", *machines.tables(path, head, cells)]


def cells(row: dict[str, Any]) -> list[str]:
    gates = "all open" if row["mac_reduction"] is None else f"random, {row['mac_reduction']:.2f}x"
    times = [f"{row['ms_per_image'][way]['median']:.2f}" for way in ("1 thread", "2 threads", "batch")]
    gains = [
        f"{gain['median']:.2f} ({gain['p20']:.2f} to {gain['p80']:.2f})" for gain in (row["two_threads"], row["batch"])
    ]
    return [row["network"], gates, *times, *gains]


if __name__ == "__main__":
    main()
