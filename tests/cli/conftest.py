"""A command-line runner, a small image set in a file, and one checkpoint that all tests read."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("timm")

from typer.testing import CliRunner, Result

from decouplify._commands import app

SPEC = "timm:test_resnet"


@dataclass(frozen=True)
class Trained:
    checkpoint: Path
    data: Path
    printed: dict[str, Any]
    stderr: str


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """Runs one command line; unless a test says otherwise, it must end with exit code 0."""

    def invoke(*args: object, exit_code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == exit_code, result.output
        return result

    return invoke


@pytest.fixture(scope="session")
def trained(run, tmp_path_factory) -> Trained:
    """A network trained for one epoch, and one with gates, on a hundred images of bars: upright, lying and crossed."""
    folder = tmp_path_factory.mktemp("trained")
    data, checkpoint = folder / "bars.npz", folder / "bars.safetensors"
    images, labels = bars(100)
    np.savez(data, images=images, labels=labels, class_names=["upright", "lying", "<both>"])
    options = ("--epochs", 1, "--decouple-epochs", 1, "--batch-size", 16, "--device", "cpu", "--json")
    result = run("train", SPEC, "--data", data, "--out", checkpoint, *options)
    return Trained(checkpoint, data, json.loads(result.stdout), result.stderr)


def bars(n: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 80, (n, size, size), dtype=np.uint8)
    labels = np.arange(n) % 3
    for image, label, start in zip(images, labels, rng.integers(4, size - 8, n), strict=True):
        if label in (0, 2):
            image[:, start : start + 4] = 255
        if label in (1, 2):
            image[start : start + 4] = 255
    return images, labels
