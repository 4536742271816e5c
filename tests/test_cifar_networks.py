"""The CIFAR networks are those of the tables, and their images are read as they were written."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import decouplify
from decouplify.cifar import CLASSES, crop_and_flip, googlenet, load_cifar10, normalise, read_c10j1, resnet20, resnet56
from decouplify.cifar import vgg19 as vgg
from decouplify.data import load_images


@pytest.mark.parametrize(
    ("network", "n_parameters", "n_macs"),
    [(resnet20, 269_722, 40_551_040), (resnet56, 853_018, 125_485_696), (vgg, 20_035_018, 398_136_320)],
)
def test_sizes_are_those_of_the_tables(network: type, n_parameters: int, n_macs: int) -> None:
    model = network()
    assert sum(p.numel() for p in model.parameters()) == n_parameters
    assert decouplify.inspect(model, (3, 32, 32)).n_macs == n_macs


def test_googlenet_gates_all_but_its_first_convolution() -> None:
    plan = decouplify.inspect(googlenet(width=0.25), (3, 32, 32))
    assert len(plan.sites) == 63
    assert len(plan.refused) == 1


def write_c10j1(path: Path, pixels: np.ndarray, n_train: int) -> np.ndarray:
    """The format, written from its description; returns what a JPEG reader makes of the images."""
    files = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=75)
        files.append(buffer.getvalue())
    start = files[0].index(b"\xff\xda")  # start of scan, whose own header is part of what all images share
    n_header = start + 2 + struct.unpack(">H", files[0][start + 2 : start + 4])[0]
    bodies = [file[n_header:] for file in files]
    assert {file[:n_header] for file in files} == {files[0][:n_header]}
    labels = bytes(i % 10 for i in range(len(files)))
    sizes = struct.pack(f"<{len(bodies)}H", *map(len, bodies))
    head = b"C10J1\n" + struct.pack("<I", n_header) + files[0][:n_header]
    path.write_bytes(head + struct.pack("<II", n_train, len(files) - n_train) + labels + sizes + b"".join(bodies))
    return np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])


def test_a_file_of_jpeg_bodies_is_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (7, 32, 32, 3), np.uint8)
    expected = write_c10j1(tmp_path / "some.bin", pixels, 5)
    train_images, train_labels, test_images, test_labels = read_c10j1(tmp_path / "some.bin")
    assert np.array_equal(np.concatenate([train_images, test_images]), expected)
    assert train_labels.tolist() == [0, 1, 2, 3, 4]
    assert test_labels.tolist() == [5, 6]
    data = load_cifar10(str(tmp_path / "some.bin"))
    torch.testing.assert_close(data.test_images, normalise(test_images))
    assert load_images(tmp_path / "some.bin").class_names == CLASSES


def test_a_file_without_training_images_can_be_judged_on(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)
    for n_train in (0, 4):
        write_c10j1(tmp_path / "some.bin", pixels, n_train)
        images, labels = load_images(tmp_path / "some.bin").held_out
        assert images.shape == (4, 32, 32, 3)
        assert labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda raw: raw[:-40], "ends early or is damaged"), (lambda raw: b"PNG" + raw, "is not a C10J1 file")],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "some.bin"
    write_c10j1(path, np.zeros((3, 32, 32, 3), np.uint8), 2)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        read_c10j1(path)


def test_augmentation_moves_by_at_most_four_pixels() -> None:
    image = torch.zeros(64, 1, 16, 16)
    image[:, :, 8, 8] = 1
    moved = crop_and_flip(image)
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(64))
    rows = moved.amax((1, 3)).argmax(1)
    columns = moved.amax((1, 2)).argmax(1)
    assert 4 <= int(rows.min()) < int(rows.max()) <= 12
    assert 3 <= int(columns.min()) < int(columns.max()) <= 12
