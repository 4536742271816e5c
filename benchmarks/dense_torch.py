"""Whether a dense convolution of torch is ever the better way for a layer of which half the filters are open.

Half of the channels are missing, too, where gates decide about them. The engine could leave such a layer to torch, at
the price of crossing over: a copy there and back, and the call.

$ OMP_NUM_THREADS=1 python benchmarks/dense_torch.py resnet18 resnet50 mobilenet_v2 convnext_tiny
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from latency import network
from torch import nn

import decouplify
from decouplify.sparse.drafts import Step
from decouplify.sparse.native import StepKind


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        print(compare(name), flush=True)


def compare(name: str) -> str:
    """Both times of all convolutions of a network, and how much would be won by taking the better one for each."""
    model, size = network(name)
    decouplify.wrap(model, size, verify=False, linear_as_conv=name.startswith("convnext"))
    for controller in model.decoupling.controllers.values():
        nn.init.normal_(controller.fc2.weight)  # an untrained one opens everything, and would not run
    program = decouplify.sparsify(model).program_for(size)
    assert program is not None, "no compiled engine"
    pairs = []
    for i, step in enumerate(program.steps):
        if step.kind is StepKind.CONVOLUTION or (step.kind is StepKind.WINDOW and step.weights):
            with program.prepared_for_timing(i) as run:
                pairs.append((shortest(run), shortest(dense(step))))
    ours, theirs = (sum(times) for times in zip(*pairs, strict=True))
    gains = [a - b for a, b in pairs if b < a]
    return (
        f"{name}: {len(pairs)} convolutions, engine {ours:.2f} ms, dense torch {theirs:.2f} ms; torch is faster in "
        f"{len(gains)}, by {max(gains, default=0.0):.3f} ms at most and {sum(gains):.2f} ms in all"
    )


def dense(step: Step) -> Callable[[], Any]:
    """The same convolution with everything in it."""
    assert step.input is not None
    assert step.input.size is not None
    weight, bias, sliding = step.weights["weight"], step.weights["bias"], step.sliding
    weight = weight if weight.dim() == 4 else weight[:, :, None, None]
    groups = step.groups if step.kind is StepKind.CONVOLUTION else step.input.channels
    x = torch.randn(1, step.input.channels, *step.input.size)

    @torch.inference_mode()
    def run() -> Any:
        return F.conv2d(x, weight, bias, sliding.stride, sliding.padding, sliding.dilation, groups)

    return run


def shortest(run: Callable[[], Any]) -> float:
    """Milliseconds, the least of seven after one to warm up."""
    run()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


if __name__ == "__main__":
    main()
