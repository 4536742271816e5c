"""How much memory a sparse form takes, and whether it grows over thousands of images.

Each network runs in a process of its own. Counted is what the process holds at most, from the wrapped model, ready to
run, through making the sparse form to the last of the images, beyond what it held before, in multiples of the float32
weights and the dense activations of one image. Algorithms are measured, not read. Gates are open for the first half of
the images. For the second half they are random, in a form made anew: its row shows whether memory stays flat, and what
the C library keeps of the first one.

$ python benchmarks/memory.py                                  # writes docs/results/memory.jsonl
$ python benchmarks/memory.py --networks torchvision:resnet18 --images 5000
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path("docs/results/memory.jsonl")
NETWORKS = {
    "torchvision:resnet18": 1000,
    "torchvision:resnet50": 300,
    "torchvision:vgg16_bn": 100,
    "torchvision:mobilenet_v2": 5000,
    "timm:tf_efficientnet_lite0": 1000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--images", type=int, help="images per network (default: by its size)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.alone, args.images)))
        return
    with args.results.open("w", encoding="utf-8") as file:
        for name in args.networks:
            n = args.images or NETWORKS.get(name, 300)
            command = [sys.executable, __file__, "--alone", name, "--images", str(n)]
            row = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            file.write(row + "\n")
            print(row, flush=True)


def measure(name: str, n_images: int) -> dict[str, Any]:
    """The resident memory of one network's sparse form over many images, in MB."""
    os.environ["DECOUPLIFY_CACHE"] = ""

    import machines
    import torch
    from torch import nn

    import decouplify
    from decouplify.registry import build_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(name).eval()
    weights = sum(p.numel() for p in model.parameters()) * 4
    image = torch.randn(1, 3, 224, 224)
    activations = dense_activations(model, image)
    decouplify.wrap(model, verify=False)
    gc.collect()
    before = start_over()
    fast = decouplify.sparsify(model)
    seen: list[int] = []
    peaks: list[int] = []
    for i in range(n_images):
        if i == n_images // 2:
            for controller in model.decoupling.controllers.values():
                nn.init.normal_(controller.fc2.weight, 0, 2.0)
            del fast
            gc.collect()
            peaks.append(resident("VmHWM") - before)
            start_over()
            fast = decouplify.sparsify(model)
        fast(torch.randn(1, 3, 224, 224))
        if i % max(1, n_images // 20) == 0:
            seen.append(resident() - before)
    peaks.append(resident("VmHWM") - before)
    needed = weights + activations
    return {
        "network": name,
        "n_images": n_images,
        "weights_mb": round(weights / 1e6, 1),
        "activations_mb": round(activations / 1e6, 1),
        "peak_mb": round(peaks[0] / 1e6, 1),
        "multiple": round(peaks[0] / needed, 2),
        "multiple_of_second": round(peaks[1] / needed, 2),
        "growth_mb": round((seen[-1] - seen[len(seen) // 2 + 2]) / 1e6, 2),
        "over_time_mb": [round(x / 1e6, 1) for x in seen],
        "machine": machines.here(),
    }


def section(path: Path = RESULTS) -> list[str]:
    """The tables for the performance page."""
    import machines

    head = "| network | weights, MB | activations, MB | peak, MB | multiple | second form | images | growth, MB |"
    keys = (
        "network",
        "weights_mb",
        "activations_mb",
        "peak_mb",
        "multiple",
        "multiple_of_second",
        "n_images",
        "growth_mb",
    )
    return ["## Memory", "", *TEXT, "", *machines.tables(path, head, lambda row: [str(row[key]) for key in keys])]


TEXT = (
    "What a process holds at most while the sparse form of a wrapped network is made and at work, gates open, beyond",
    "what it held before, in multiples of the float32 weights and the dense activations of one image:",
    "`python benchmarks/memory.py`. *Second form*: after the first was deleted and another made, which shows what the",
    "C library keeps. *Growth*: over the last images.",
)


def dense_activations(model: Any, image: Any) -> int:
    """Bytes of what all layers without children return for one image."""
    import torch

    total = 0

    def add(module: Any, args: Any, output: Any) -> None:
        nonlocal total
        total += output.numel() * 4 if isinstance(output, torch.Tensor) else 0

    handles = [m.register_forward_hook(add) for m in model.modules() if not list(m.children())]
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return total


def resident(what: str = "VmRSS") -> int:
    """Resident memory of this process in bytes; "VmHWM" for the most it was."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return int(line.split()[1]) << 10


def start_over() -> int:
    """Resident memory in bytes, which counts as the most it was from now on."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


if __name__ == "__main__":
    main()
