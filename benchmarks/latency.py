"""Time networks with gates against the fastest dense runtimes, and write down every number.

Each row is one network with one choice of gates: its sparse form, the same with all gates open, eager PyTorch,
torch.compile, ONNX Runtime and OpenVINO on the network without gates, and the static twin, all in one process, in
turns. Weights are random (with calibrated batch norms) unless a checkpoint is given; so are the gates, at a stated
cost, and every image has its own.

$ python benchmarks/latency.py --out docs/results/latency.jsonl --prepare        # exports and compiles, times nothing
$ python benchmarks/latency.py --out docs/results/latency.jsonl --cores 0,1      # resumes; one line per row
$ python benchmarks/latency.py --out docs/results/latency.jsonl --report docs/performance.md  # and latency-*.jsonl
$ python benchmarks/latency.py --out docs/results/latency.jsonl --checkpoint resnet56.safetensors --data cifar10.bin
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import machines
import torch
from torch import Tensor, nn

import decouplify
from decouplify.bench import RUNTIMES, Gates, Protocol, Result, benchmark, calibrate_norms, random_images
from decouplify.checkpoint import read_record
from decouplify.cifar import load_cifar10, resnet56
from decouplify.data import load_images
from decouplify.registry import build_model

ROOT = Path(__file__).resolve().parent.parent

#: Network by name: how to build it, and the size of its images.
MODELS = {
    "resnet18": ("torchvision:resnet18", 224),
    "resnet50": ("torchvision:resnet50", 224),
    "vgg16_bn": ("torchvision:vgg16_bn", 224),
    "resnet56": (resnet56, 32),
    "mobilenet_v2": ("torchvision:mobilenet_v2", 224),
    "tf_efficientnet_lite0": ("timm:tf_efficientnet_lite0", 224),
    "googlenet": ("torchvision:googlenet", 224),
    "densenet121": ("torchvision:densenet121", 224),
    "convnext_tiny": ("torchvision:convnext_tiny", 224),
}

#: The convolutions that write and read the expanded channels of inverted residual blocks; blocks that do not expand
#: are left out.
EXPANDED = {
    "mobilenet_v2": ("features.[2-9].conv.[01].0", "features.1[0-7].conv.[01].0"),
    "tf_efficientnet_lite0": ("blocks.[1-6].*.conv_pw", "blocks.[1-6].*.conv_dw"),
}

N_IMAGES = 8


@dataclass(frozen=True)
class Row:
    """One line of the results; its text identifies it."""

    model: str
    gates: Gates | None  # None: those that the network was trained with
    threads: int = 1
    batch: int = 1

    def __str__(self) -> str:
        gates = "trained" if self.gates is None else f"gates {self.gates}"
        return f"{self.model}, {gates}, {self.threads} thread{'s' * (self.threads > 1)}, batch {self.batch}"


def rows() -> Iterator[Row]:
    """What is measured: each network with open gates, then at the costs that the paper or a target names."""
    linear = {"convnext_tiny": True}
    for model in MODELS:
        yield Row(model, Gates(linear_as_conv=linear.get(model, False)))
    for model, reductions in {
        "resnet18": (2.03, 2.65),
        "vgg16_bn": (3.23,),
        "resnet50": (2.0,),
        "resnet56": (2.0,),
        "googlenet": (2.0,),
        "densenet121": (2.0,),
        "convnext_tiny": (2.0,),
    }.items():
        for reduction in reductions:
            yield Row(model, Gates(mac_reduction=reduction, linear_as_conv=linear.get(model, False)))
    for model, only in EXPANDED.items():
        yield Row(model, Gates(keep=0.5, only=only))
    for model, reduction in {"resnet18": 2.03, "vgg16_bn": 3.23}.items():
        yield Row(model, Gates(), threads=2)
        yield Row(model, Gates(mac_reduction=reduction), threads=2)
    yield Row("resnet18", Gates(), batch=8)
    yield Row("resnet18", Gates(mac_reduction=2.03), batch=8)


def main() -> None:
    args = parse_arguments()
    if args.report:
        import memory
        import scaling

        others = [line for path in machines.other_files(args.out) for line in other_machine(dict(latest(path)))]
        args.report.write_text(page(latest(args.out), [*others, *scaling.section(), *memory.section()]))
        return
    if args.checkpoint:
        measure(args, Row(args.checkpoint.stem, None), *trained(args.checkpoint, args.data))
        return
    finished = set() if args.again or args.prepare else {key for key, _ in latest(args.out)}
    wanted = [row for row in rows() if fnmatch.fnmatch(str(row), args.only) and str(row) not in finished]
    runnable = [row for row in wanted if row.threads <= len(args.cores)]
    print(f"{len(runnable)} rows to measure, {len(wanted) - len(runnable)} more need as many --cores as threads")
    start = time.monotonic()
    for i, row in enumerate(runnable):
        if time.monotonic() - start > args.budget:
            print(f"{len(runnable) - i} rows left; run again to go on")
            break
        model, size = network(row.model)
        measure(args, row, model, size=size)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per row; finished rows are skipped")
    parser.add_argument("--only", default="*", help="glob of rows, such as 'resnet18*batch 1'")
    parser.add_argument("--again", action="store_true", help="measure rows again that are there; the last line counts")
    parser.add_argument("--cores", type=core_list, default=available_cores(), help="cores to stay on, such as 0,1")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=40.0, help="start no round of a row after this time")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no row after so many seconds")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="which dense runtimes")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "latency", help="where exported networks stay")
    parser.add_argument("--prepare", action="store_true", help="fill the caches, measure nothing")
    parser.add_argument("--checkpoint", type=Path, help="a trained network instead of the table of rows")
    parser.add_argument("--data", help="images for it: CIFAR-10 for resnet56, else as for decouplify record")
    parser.add_argument("--report", type=Path, help="write the page instead of measuring anything")
    return parser.parse_args()


def available_cores() -> tuple[int, ...]:
    """The cores that this process may run on; a row takes as many of them as it has threads."""
    known = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return tuple(sorted(known))


def core_list(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network with random weights and the norms that noise gives it, and the size of its images."""
    torch.manual_seed(0)
    source, side = MODELS[name]
    model = build_model(source) if isinstance(source, str) else source()
    size = (3, side, side)
    calibrate_norms(model.eval(), random_images(N_IMAGES, size))
    return model, size


def trained(checkpoint: Path, data: str) -> tuple[nn.Module, Tensor]:
    """A decoupled network from a file, and images of the kind it was trained on."""
    extra = read_record(checkpoint)["extra"]
    if extra["model"] in MODELS:
        model = decouplify.load(network(extra["model"])[0], checkpoint)
        return model, load_cifar10(data).test_images[:N_IMAGES]
    model = decouplify.load(build_model(extra["model"], **extra.get("model_kwargs", {})), checkpoint)
    return model, load_images(data).normalised_as(extra["mean"], extra["std"]).tensors("test")[0][:N_IMAGES]


def measure(
    args: argparse.Namespace,
    row: Row,
    model: nn.Module,
    images: Tensor | None = None,
    size: tuple[int, ...] | None = None,
) -> None:
    cores, runtimes = args.cores[: row.threads], tuple(args.runtimes.split(","))
    protocol = Protocol(row.threads, cores, row.batch, args.rounds, args.seconds, runtimes)
    if args.prepare:
        protocol = replace(protocol, rounds=3, seconds=0.0, cores=None)
    gates = row.gates or Gates()
    result = benchmark(
        model, images, name=row.model, input_size=size, gates=gates, protocol=protocol, folder=args.cache
    )
    print(f"{result}\n", flush=True)
    if not args.prepare:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(json.dumps({"key": str(row), "date": time.strftime("%Y-%m-%d"), **result.to_dict()}) + "\n")
    torch.compiler.reset()  # the compiled networks of this row would stay alive through the next
    gc.collect()


def latest(path: Path) -> list[tuple[str, Result]]:
    """The last result of each row, in the order in which rows first appeared."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return list({line["key"]: Result.from_dict(line) for line in lines}.items())


# The page -------------------------------------------------------------------------------------------------------------

PREAMBLE = """# Performance

How fast networks with gates are on a CPU, in float32, beside the fastest dense runtimes on the same network without
gates. Made by `python benchmarks/latency.py --out docs/results/latency.jsonl --report docs/performance.md`;
`decouplify bench MODEL` does the same for a network of yours.

- Machine: {machines}.
- Dense runtimes: {versions}.
- Sparse form: {backends}.
- One process, pinned to its cores. All contenders run once per round, in rotating order, after two rounds of warm-up.
  Times are wall-clock medians over rounds; a speedup is the median of the ratios within each round, with their 20th and
  80th percentile. With two threads on two cores the ranges are wide: threads that have just finished one contender's
  work go on waiting actively for a while, and take time from the next.
- Every contender's output is compared with PyTorch's in the same run, before anything is timed.
- Weights are random unless the row says trained. Gates are drawn at random, for each filter and image by itself, with
  one probability for all; where a MAC reduction is asked for, bisection finds the probability. The controllers are
  solved to decide exactly these gates; they run and are counted as trained ones are.
- *MACs*: dense multiply-accumulates / mean executed ones, controllers included. *Ratio*: speedup / MAC reduction; 1
  means that saved work became saved time in full. *Own*: speedup over the same engine with all gates open, which leaves
  out what the engine gains on dense networks.
- *Static twin*: the same architecture with fewer filters in every layer, so many that it costs the MACs of the gated
  network, in the fastest dense runtime. That is what uniform pruning would give; it says nothing about accuracy.
"""


def page(found: Iterable[tuple[str, Result]], more: Iterable[str] = ()) -> str:
    """The performance page, with more lines before the single measurements."""
    results = dict(found)
    if not results:
        raise SystemExit("no results to report; measure something first")
    todo = [str(row) for row in rows() if str(row) not in results]
    return "\n".join(
        [
            preamble(results.values()),
            *summary(results),
            *more,
            *details(results),
            *left(todo),
        ]
    )


def other_machine(results: dict[str, Result]) -> list[str]:
    """The summary of a machine that the page is not about."""
    return [f"## {machines_of(results.values())}", "", "The same on another machine.", "", *summary(results)]


def machines_of(results: Iterable[Result]) -> str:
    return "; ".join(sorted({machines.name_of(r.machine) for r in results}))


def preamble(results: Iterable[Result]) -> str:
    results = list(results)
    versions = sorted({t.version for r in results for t in r.timings if t.name in RUNTIMES})
    backends = sorted({r.backend for r in results})
    return PREAMBLE.format(machines=machines_of(results), versions="; ".join(versions), backends="; ".join(backends))


def summary(results: dict[str, Result]) -> list[str]:
    head = "| network | gates | threads | batch | MACs | fastest dense, ms | ours, ms | speedup | ratio | own | twin |"
    return [head, "| --- " * 11 + "|", *(summary_row(r) for r in results.values()), ""]


def summary_row(r: Result) -> str:
    ours, best = r.timing("decouplify"), r.timing(r.fastest) if r.fastest else None
    assert ours is not None
    cells = [
        r.model,
        plain(r.gates),
        str(r.threads),
        str(r.batch),
        f"{r.mac_reduction:.2f}x",
        "missing" if best is None else f"{best.wall_ms.median:.2f} ({r.fastest})",
        f"{ours.wall_ms.median:.2f}",
        "-" if r.speedup is None else f"{r.speedup.median:.2f} ({r.speedup.p20:.2f} to {r.speedup.p80:.2f})",
        "-" if r.ratio is None else f"{r.ratio:.2f}",
        "-" if r.speedup_own is None else f"{r.speedup_own.median:.2f}",
        "-" if r.twin is None else f"{r.twin.speedup.median:.2f} ({100 * r.twin.width:.0f} % of filters)",
    ]
    return f"| {' | '.join(cells)} |"


def plain(text: str) -> str:
    """Text that Markdown leaves alone: the names of layers may hold asterisks."""
    return text.replace("*", r"\*")


def details(results: dict[str, Result]) -> list[str]:
    lines = ["## Every measurement", ""]
    for key, r in results.items():
        lines += [
            f"### {plain(key)}",
            "",
            f"{r.rounds} rounds, {r.n_paths} paths, {r.dense_macs / 1e6:.1f} M MACs dense, controllers "
            f"{r.controller_macs / 1e6:.2f} M; load average {r.machine.load} at the end.",
            "",
            "| | median, ms | p20 | p80 | p99 | CPU time, ms | relative error | same top-1 |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for t in r.timings:
            times = (t.wall_ms.median, t.wall_ms.p20, t.wall_ms.p80, t.wall_ms.p99, t.cpu_ms.median)
            cells = [t.name, *(f"{x:.2f}" for x in times), f"{t.error:.0e}", f"{100 * t.agreement:.0f} %"]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"| {name} | missing: {reason} |" + " |" * 6 for name, reason in r.missing.items()]
        lines.append("")
    return lines


def left(todo: list[str]) -> list[str]:
    return ["## Not measured yet", "", *(f"- {key}" for key in todo), ""] if todo else []


if __name__ == "__main__":
    main()
