"""What wrapping costs: seconds to wrap, and the training step of the wrapped network relative to the plain one.

Both networks take their steps in turn in one process; the figure is the median of the ratios of neighbouring steps.

$ python benchmarks/overhead.py --model resnet50 --batch-size 8 --steps 10
"""

from __future__ import annotations

import argparse
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
    parser.add_argument("--model", default="resnet50", help="a timm network")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plain, wrapped = timm.create_model(args.model).train(), timm.create_model(args.model).train()
    start = time.perf_counter()
    decouplify.wrap(wrapped, (3, args.size, args.size), verify=False)
    unverified = time.perf_counter() - start
    decouplify.unwrap(wrapped)
    start = time.perf_counter()
    decouplify.wrap(wrapped, (3, args.size, args.size))
    print(f"wrap {args.model}: {time.perf_counter() - start:.2f} s, {unverified:.2f} s with verify=False")

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
    print(
        f"training step, batch {args.batch_size}, {args.size} px, {args.threads} threads: plain {min(seconds):.2f} s "
        f"at best, wrapped / plain {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
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
