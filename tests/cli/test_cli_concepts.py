from __future__ import annotations

import json

import pytest

from decouplify.concepts import write_mini_broden


@pytest.fixture(scope="module")
def broden(tmp_path_factory):
    return write_mini_broden(tmp_path_factory.mktemp("concepts") / "broden", 20, 48)


def test_scores_as_text_as_json_and_as_a_file(run, trained, broden, tmp_path):
    command = ("concepts", trained.checkpoint, "--data", broden, "--min-images", 3, "--device", "cpu")
    text = run(*command, "--out", tmp_path / "scores.json").stdout
    assert text.startswith("Broden(broden: 18 images, 12 concepts of color, object, part, scene, texture; 2 images")
    assert "Interpretability of ResNet" in text
    saved = json.loads((tmp_path / "scores.json").read_text())
    printed = json.loads(run(*command, "--json", "--layer", "layer1.0.conv1").stdout)
    assert printed["n_images"] == saved["n_images"] == 18
    assert [layer["name"] for layer in printed["layers"]] == ["layer1.0.conv1"]
    assert len(saved["layers"]) > 1
    assert all(0 <= best <= 1 for best in printed["layers"][0]["paper"]["best"])


def test_a_directory_that_is_neither(run, trained, tmp_path):
    result = run("concepts", trained.checkpoint, "--data", tmp_path, exit_code=2)
    assert "has neither index.csv (BRODEN, such as broden1_224) nor ImageSets/ (PASCAL VOC" in result.stderr
