"""Training in several processes under torchrun, and the numbers of a run as TensorBoard reads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from decouplify.train import tensorboard


@pytest.mark.parametrize("start", ["importance", "prediction"])
def test_two_processes_train_one_network(tmp_path: Path, start: str) -> None:
    script = Path(__file__).with_name("in_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(script), str(tmp_path), start], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # One process writes what there is to write.
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    state = torch.load(tmp_path / "run.state", weights_only=False)
    assert state["history"]["finished"]


def test_tensorboard_reads_every_number(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = tensorboard(tmp_path)
    log({"epoch": 1, "loss": 2.0, "macs": 0.9})
    log({"epoch": 2, "loss": 1.5, "macs": 0.7})
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 1.5)]
    assert [e.step for e in events.Scalars("macs")] == [1, 2]
    assert "epoch" not in events.Tags()["scalars"]
