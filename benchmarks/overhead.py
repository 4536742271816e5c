"""What wrapping costs: seconds to wrap, and the training step of the wrapped network relative to the plain one.

Both networks take their steps in turn in one process; the figure is the median of the ratios of neighbouring steps.

$ python benchmarks/overhead.py --model resnet50 --batch-size 8 --steps 10
$ python benchmarks/overhead.py --model resnet50 regnety_2560 --steps 0    # only the seconds to wrap
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import timm
import torch
import torch.nn.functional as F
from torch import nn

import decouplify
from decouplify.losses import DecouplingLoss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["resnet50"], help="timm networks")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.model:
        model = timm.create_model(name).train()
        plain = copy.deepcopy(model) if args.steps else None
        print(f"wrap {name}: {seconds_to_wrap(model, args.size)}")
        if plain is not None:
            print(f"training step, {args.threads} threads: {steps(plain, model, args)}")


def seconds_to_wrap(model: nn.Module, size: int) -> str:
    """Wraps the network without verification, as a first call does, and leaves it wrapped with verification."""
    found = []
    for verify in (False, True):
        if found:
            decouplify.unwrap(model)
        start, cpu_start = time.perf_counter(), time.process_time()
        decouplify.wrap(model, (3, size, size), verify=verify)
        found.append((time.perf_counter() - start, time.process_time() - cpu_start))
    (unverified, unverified_cpu), (verified, verified_cpu) = found
    return (
        f"{verified:.2f} s ({verified_cpu:.2f} s of processor time), "
        f"{unverified:.2f} s ({unverified_cpu:.2f} s) with verify=False"
    )


def steps(plain: nn.Module, wrapped: nn.Module, args: argparse.Namespace) -> str:
    images = torch.randn(args.batch_size, 3, args.size, args.size)
    labels = torch.randint(1000, (args.batch_size,))
    criterion = DecouplingLoss(wrapped, target="2.0x")
    ratios, seconds = [], []
    for i in range(args.steps + 2):
        ours = step(wrapped, images, labels, criterion)
        theirs = step(plain, images, labels, None)
        if i >= 2:  # the first steps allocate
            ratios.append(ours / theirs)
            seconds.append(theirs)
    return (
        f"batch {args.batch_size}, {args.size} px: plain {min(seconds):.2f} s at best, "
        f"wrapped / plain {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
    )


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, criterion: DecouplingLoss | None) -> float:
    start = time.perf_counter()
    loss = F.cross_entropy(model(images), labels)
    if criterion is not None:
        loss = loss + criterion(labels)
    model.zero_grad(set_to_none=True)
    loss.backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
