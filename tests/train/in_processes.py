"""What test_train_processes.py runs under torchrun: decouple a small network on images that all processes share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

import decouplify
from decouplify.cifar import CifarResNet
from decouplify.train import DecouplingRecipe, decouple, json_lines
from decouplify.train.recipe import Start


def main(directory: Path, start: Start) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = decouplify.wrap(CifarResNet(1, n_classes=4, width=4), (3, 8, 8), input_norm=True, verify=False)
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    recipe = DecouplingRecipe(
        2,
        batch_size=16,
        target="1.5x",
        start=start,
        reconstruct=True,
        norm_batches=2,
        features="layer*",
    )
    history = decouple(
        model,
        images,
        None,
        recipe,
        progress=json_lines(directory / "metrics.jsonl"),
        state=str(directory / "run.state"),
    )
    assert history.finished
    torch.save(model.state_dict(), directory / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), cast(Start, sys.argv[2]))
