"""CIFAR-10 from torchvision's download or from one file of JPEG bodies, normalised, with the usual augmentation."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from decouplify._optional import import_optional

__all__ = ["CLASSES", "MEAN", "STD", "Cifar10", "crop_and_flip", "load_cifar10", "normalise", "read_c10j1"]

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Cifar10:
    """Normalised images (N, 3, 32, 32) and labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_cifar10(source: str) -> Cifar10:
    """CIFAR-10 from a directory (torchvision's format, downloaded if absent) or a ``.bin`` file in C10J1 format."""
    arrays = read_c10j1(source) if source.endswith(".bin") else _from_torchvision(source)
    train_images, train_labels, test_images, test_labels = arrays
    return Cifar10(
        normalise(train_images), torch.from_numpy(train_labels), normalise(test_images), torch.from_numpy(test_labels)
    )


def normalise(images: Pixels) -> Tensor:
    """uint8 (N, 32, 32, 3) to float32 (N, 3, 32, 32) with ImageNet's mean and deviation, as public weights expect."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255)
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def crop_and_flip(images: Tensor, reach: int = 4) -> Tensor:
    """Shift each image (N, C, H, W) by up to so many pixels, with zeros beyond its edges, and mirror half of them."""
    n, _, height, width = images.shape
    padded = F.pad(images, (reach, reach, reach, reach))
    top, left = torch.randint(0, 2 * reach + 1, (2, n, 1, 1), device=images.device)
    rows = top + torch.arange(height, device=images.device).view(1, -1, 1)
    columns = left + torch.arange(width, device=images.device).view(1, 1, -1)
    mirrored = torch.rand(n, 1, 1, device=images.device) < 0.5
    columns = torch.where(mirrored, columns.flip(2), columns)
    index = torch.arange(n, device=images.device).view(-1, 1, 1)
    return padded[index, :, rows, columns].permute(0, 3, 1, 2)


def _from_torchvision(directory: str) -> tuple[Pixels, Labels, Pixels, Labels]:
    datasets = import_optional("torchvision.datasets", "downloading CIFAR-10", extra="zoo")
    train, test = (datasets.CIFAR10(directory, train=is_train, download=True) for is_train in (True, False))
    return train.data, np.array(train.targets), test.data, np.array(test.targets)


def read_c10j1(path: str | Path) -> tuple[Pixels, Labels, Pixels, Labels]:
    """Pixels (N, 32, 32, 3) and labels (N,) for training and for test, out of a C10J1 file of JPEG bodies.

    Layout, little endian: ``C10J1`` and a newline; u32 length of the JPEG header that all images share, and the header;
    u32 number of training and of test images; a u8 label per image; a u16 length per image; the JPEG bodies.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a C10J1 file, or not a whole one.
    """
    raw = Path(path).read_bytes()
    if not raw.startswith(b"C10J1\n"):
        raise ValueError(f"{path} is not a C10J1 file: it starts with {raw[:6]!r}")
    try:
        header, n_train, labels, bodies = _parse(raw)
    except (struct.error, ValueError, IndexError) as error:
        raise ValueError(f"{path} ends early or is damaged ({error}); fetch it again") from error
    images = _decode(header, bodies)
    return images[:n_train], labels[:n_train], images[n_train:], labels[n_train:]


def _parse(raw: bytes) -> tuple[bytes, int, Labels, list[bytes]]:
    """The shared header, the number of training images, and of all images the labels and JPEG bodies."""
    (n_header,) = struct.unpack_from("<I", raw, 6)
    n_train, n_test = struct.unpack_from("<II", raw, 10 + n_header)
    at, n = 18 + n_header, n_train + n_test
    labels = np.frombuffer(raw, np.uint8, n, at).astype(np.int64)
    lengths = np.frombuffer(raw, "<u2", n, at + n).astype(np.int64)
    ends = at + 3 * n + lengths.cumsum()
    if n and ends[-1] > len(raw):
        raise ValueError(f"{ends[-1]} bytes promised, {len(raw)} there")
    bodies = [raw[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return raw[10 : 10 + n_header], n_train, labels, bodies


def _decode(header: bytes, bodies: list[bytes]) -> Pixels:
    image = import_optional("PIL.Image", "reading JPEGs", extra="zoo")
    images = np.empty((len(bodies), 32, 32, 3), np.uint8)
    for i, body in enumerate(bodies):
        images[i] = np.asarray(image.open(io.BytesIO(header + body)).convert("RGB"))
    return images
