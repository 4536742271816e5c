"""A checkpoint is judged on images, with or without gates, by one call and by one command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import decouplify
from decouplify._commands import app
from decouplify.cifar import CLASSES, resnet20
from decouplify.macs import count_macs
from decouplify.score import score

CHECKPOINTS = Path(__file__).parents[1] / "examples" / "checkpoints"
KEYS = {"top1", "mac_reduction", "silent", "dynamic", "energetic", "distinct_paths", "path_knn", "n_images"}


def test_a_score_is_what_its_parts_say() -> None:
    torch.manual_seed(0)
    model = decouplify.load(resnet20(), CHECKPOINTS / "resnet20.safetensors").eval()
    images = torch.randn(12, 3, 32, 32)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    result = score(model, images, labels)
    assert result.n_images == 12
    assert result.top1 == pytest.approx(11 / 12)
    assert result.mac_reduction == pytest.approx(count_macs(model, images).reduction)
    assert result.silent + result.dynamic + result.energetic == pytest.approx(1.0)
    assert result.distinct_paths <= 12
    with pytest.raises(ValueError, match="12 images and 3 labels"):
        score(model, images, labels[:3])


@pytest.mark.parametrize("name", ["resnet20", "resnet56", "resnet56-dense"])
def test_the_command_judges_every_committed_checkpoint(name: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), np.uint8)
    for i, image in enumerate(pixels):
        folder = tmp_path / "images" / CLASSES[i % 10]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    command = ["evaluate", str(CHECKPOINTS / f"{name}.safetensors"), "--data", str(tmp_path / "images"), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    assert numbers.keys() >= KEYS
    assert numbers["n_images"] == 20  # all of a folder without parts of its own
    assert (numbers["dynamic"] is None) == (name == "resnet56-dense")
