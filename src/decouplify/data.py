"""Small sets of labelled images that fit in memory, out of a file, a directory or scikit-learn.

The command line and the examples read their images here. A training loop of one's own needs none of it: the rest of the
library takes tensors and loaders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from decouplify._optional import import_optional
from decouplify.cifar import CLASSES, read_c10j1

__all__ = ["ImageSet", "Normalise", "Split", "load_images", "stratified_split"]

Split: TypeAlias = Literal["train", "test"]
Pixels: TypeAlias = NDArray[np.uint8]
Labels: TypeAlias = NDArray[np.int64]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
_DIGITS_SIZE, _N_DIGITS_TEST = 32, 500
_TEST_SHARE = 0.2
_CHUNK = 512  # images converted at a time: float copies of a whole set may not fit


@dataclass(frozen=True)
class Normalise:
    """Turns pixels into what a network reads: (pixel / 255 - mean) / std per channel.

    Attributes:
        mean: Per channel, for pixels scaled to [0, 1].
        std: Per channel, > 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Pixels) -> Tensor:
        """Float32 images (..., C, H, W) of pixels (..., H, W, C)."""
        scaled = torch.from_numpy(np.ascontiguousarray(pixels)).float() / 255
        return ((scaled - torch.tensor(self.mean)) / torch.tensor(self.std)).movedim(-1, -3).contiguous()


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Labelled images in memory, split in two.

    Attributes:
        train_images: Pixels, uint8, shape (N, H, W, C), C = 1 or 3.
        train_labels: Index into ``class_names`` per image, int64, shape (N,).
        test_images: As ``train_images``; the same H, W and C.
        test_labels: As ``train_labels``.
        class_names: Names of the classes.
        mean: Mean of the training pixels per channel, scaled to [0, 1].
        std: Their standard deviation per channel; 1 where all pixels are equal.
        name: Where the images come from.
        has_own_test: Whether the set came with its test part, or was split here.
    """

    train_images: Pixels
    train_labels: Labels
    test_images: Pixels
    test_labels: Labels
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str = ""
    has_own_test: bool = True

    def __repr__(self) -> str:
        sizes = f"{len(self.train_images)} + {len(self.test_images)} images {self.image_size}"
        return f"ImageSet({self.name or 'unnamed'}: {sizes}, {len(self.class_names)} classes)"

    @property
    def image_size(self) -> tuple[int, int, int]:
        """Size (C, H, W) of one image, as a network sees it."""
        height, width, channels = self.train_images.shape[1:]
        return channels, height, width

    @property
    def held_out(self) -> tuple[Pixels, Labels]:
        """What a network that was trained elsewhere is judged on: the set's own test part, or else all images."""
        if self.has_own_test and len(self.test_images):
            return self.test_images, self.test_labels
        images = np.concatenate([self.train_images, self.test_images])
        return images, np.concatenate([self.train_labels, self.test_labels])

    def pixels(self, split: Split = "test") -> tuple[Pixels, Labels]:
        """Images (N, H, W, C) and labels (N,) of one part.

        Raises:
            ValueError: If ``split`` is neither "train" nor "test".
        """
        if split not in ("train", "test"):
            raise ValueError(f'split is {split!r}, wanted "train" or "test"')
        if split == "train":
            return self.train_images, self.train_labels
        return self.test_images, self.test_labels

    def tensors(self, split: Split = "test") -> tuple[Tensor, Tensor]:
        """Normalised images, float32 (N, C, H, W), and labels, int64 (N,), of one part."""
        pixels, labels = self.pixels(split)
        return self.normalised(pixels), torch.from_numpy(labels)

    def normalised(self, pixels: Pixels) -> Tensor:
        """What a network reads, float32 (N, C, H, W), of pixels (N, H, W, C)."""
        normalise = Normalise(self.mean, self.std)
        images = torch.empty(len(pixels), *self.image_size)
        for start in range(0, len(pixels), _CHUNK):
            images[start : start + _CHUNK] = normalise(pixels[start : start + _CHUNK])
        return images

    def loader(self, split: Split = "test", batch_size: int = 256, shuffle: bool = False) -> DataLoader[Any]:
        """Batches of normalised images (n, C, H, W), labels (n,) and ids (n,), which are indices into the part."""
        pixels, labels = self.pixels(split)
        dataset = _LabelledImages(pixels, labels, Normalise(self.mean, self.std))
        return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)

    def normalised_as(self, mean: Sequence[float], std: Sequence[float]) -> ImageSet:
        """The same images for a network that was trained on others, with the statistics of those.

        Raises:
            ValueError: If there is not one number per channel, or a standard deviation is not positive.
        """
        n_channels = self.image_size[0]
        if not len(mean) == len(std) == n_channels or min(std) <= 0:
            raise ValueError(
                f"mean {tuple(mean)} and std {tuple(std)} do not fit images of {n_channels} channels: one number each, "
                "std above 0, wanted"
            )
        return replace(self, mean=tuple(map(float, mean)), std=tuple(map(float, std)))


class _LabelledImages(Dataset[tuple[Tensor, int, int]]):
    def __init__(self, pixels: Pixels, labels: Labels, transform: Normalise) -> None:
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.transform(self.pixels[index]), int(self.labels[index]), index


def load_images(
    spec: str | Path, *, channels: int | None = None, size: int | tuple[int, int] | None = None, seed: int = 0
) -> ImageSet:
    """Labelled images in memory.

    Args:
        spec: One of four. ``"digits"``: the 1,797 handwritten digits of scikit-learn, 500 of them for testing. An
            ``.npz`` file with arrays ``images`` (N, H, W) or (N, H, W, C), uint8, and ``labels`` (N,), integers;
            optionally ``test_images`` and ``test_labels``, and ``class_names`` in the order of the sorted labels. A
            directory with one folder of pictures per class, or with such folders in ``train/`` and in ``test/`` or
            ``val/``. A ``.bin`` file of CIFAR-10 images, see ``decouplify.cifar.read_c10j1``. Sets without a test part
            are split 80 to 20, classes in proportion.
        channels: 1 or 3; by default as stored, pictures in a directory 3.
        size: Height and width of the images, one number if they are equal. Pictures in a directory are scaled and
            cropped at the centre, arrays are scaled. By default digits get 32, and others keep their size.
        seed: Seed of the split; the same seed gives the same split on every machine.

    Raises:
        FileNotFoundError: If there is no such file or directory.
        ImportError: If a package that the set needs is not installed.
        ValueError: If the images or labels are not as described above.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels is {channels}, wanted 1 or 3")
    height_width = (size, size) if isinstance(size, int) else size
    if height_width is not None and min(height_width) < 1:
        raise ValueError(f"size is {size}, wanted at least 1 pixel")
    name, path = str(spec), Path(spec)
    if name == "digits":
        parts = _digits(height_width or (_DIGITS_SIZE, _DIGITS_SIZE), seed)
    elif path.is_dir():
        parts = _directory(path, channels or 3, height_width, seed)
    elif path.suffix == ".npz" and path.is_file():
        parts = _npz(path, height_width, seed)
    elif path.suffix == ".bin" and path.is_file():
        parts = _c10j1(path, height_width)
    elif path.exists():
        raise ValueError(
            f'{path} is no data set: wanted "digits", an .npz or .bin file, or a directory with a folder per class'
        )
    else:
        raise FileNotFoundError(f'no data at {name}: wanted "digits", an .npz or .bin file, or a directory')
    return _image_set(parts, name, channels)


@dataclass(frozen=True)
class _Parts:
    """What a reader finds, before statistics: pixels and labels of both parts."""

    train: tuple[Pixels, Labels]
    test: tuple[Pixels, Labels]
    class_names: tuple[str, ...]
    has_own_test: bool = True


def stratified_split(labels: Labels, n_test: int, seed: int = 0) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows for training and rows for testing, each sorted, classes in proportion.

    Every class keeps at least one image for training.

    Args:
        labels: Class of each image, shape (N,).
        n_test: Images for testing, in [1, N - number of classes].
        seed: Seed of the choice.

    Raises:
        ValueError: If ``n_test`` is out of range.
    """
    _, index, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if not 1 <= n_test <= len(labels) - len(sizes):
        raise ValueError(
            f"{len(labels)} images of {len(sizes)} classes cannot be split with {n_test} for testing: both parts need "
            "images, and training one of each class"
        )
    quotas = _proportional(sizes, n_test)
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(index == c))[:quota] for c, quota in enumerate(quotas)]
    is_test = np.zeros(len(labels), bool)
    is_test[np.concatenate(chosen)] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def _proportional(sizes: NDArray[np.intp], total: int) -> list[int]:
    """``total`` in proportion to ``sizes``, largest remainders first, always leaving one."""
    exact = sizes * (total / sizes.sum())
    quotas = np.floor(exact).astype(int)
    order = np.argsort(quotas - exact, kind="stable")
    while quotas.sum() < total:  # a second round only where classes were too small for their share
        for c in order:
            quotas[c] += quotas.sum() < total and quotas[c] < sizes[c] - 1
    return [int(quota) for quota in quotas]


# Readers --------------------------------------------------------------------------------------------------------------


def _digits(size: tuple[int, int], seed: int) -> _Parts:
    found = import_optional("sklearn.datasets", "the data set 'digits'").load_digits()
    # Stored as 8 x 8 pixels of 0 to 16.
    pixels = _resize((found.images[..., None] * (255 / 16)).round().astype(np.uint8), size)
    labels = found.target.astype(np.int64)
    train, test = stratified_split(labels, _N_DIGITS_TEST, seed)
    return _Parts((pixels[train], labels[train]), (pixels[test], labels[test]), tuple("0123456789"))


def _npz(path: Path, size: tuple[int, int] | None, seed: int) -> _Parts:
    arrays = _read_arrays(path)
    images, raw = _check_arrays(arrays, "", path)
    values = np.unique(raw)
    labels = np.searchsorted(values, raw)
    if "test_images" in arrays or "test_labels" in arrays:
        test_images, raw_test = _check_arrays(arrays, "test_", path)
        if unknown := sorted(set(raw_test.tolist()) - set(values.tolist())):
            raise ValueError(f"{path}: test_labels has classes without a training image: {_some(unknown)}")
        if images.shape[1:] != test_images.shape[1:]:
            raise ValueError(
                f"{path}: images are {images.shape[1:]} and test_images {test_images.shape[1:]}, wanted equal sizes"
            )
        train, test = (images, labels), (test_images, np.searchsorted(values, raw_test))
    else:
        rows = stratified_split(labels, max(1, round(_TEST_SHARE * len(labels))), seed)
        train, test = ((images[part], labels[part]) for part in rows)
    if size is not None:
        train, test = ((_resize(part[0], size), part[1]) for part in (train, test))
    return _Parts(train, test, _class_names(arrays, values, path), "test_images" in arrays)


def _c10j1(path: Path, size: tuple[int, int] | None) -> _Parts:
    train_images, train_labels, test_images, test_labels = read_c10j1(path)
    if not len(train_images) + len(test_images):
        raise ValueError(f"{path} holds no images")
    if size is not None and size != train_images.shape[1:3]:
        train_images, test_images = _resize(train_images, size), _resize(test_images, size)
    if not len(test_images):  # one part, whose images nobody says were trained on
        (train_images, train_labels), (test_images, test_labels) = (
            (test_images, test_labels),
            (train_images, train_labels),
        )
    return _Parts((train_images, train_labels), (test_images, test_labels), CLASSES)


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and NumPy each have errors of their own for a damaged file
        raise ValueError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from error


def _check_arrays(arrays: Mapping[str, NDArray[Any]], prefix: str, path: Path) -> tuple[Pixels, NDArray[Any]]:
    names = (f"{prefix}images", f"{prefix}labels")
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"{path} has no {' and no '.join(missing)}, only {_some(sorted(arrays))}")
    images, labels = (arrays[name] for name in names)
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: {names[0]} is {images.dtype}, wanted uint8 pixels from 0 to 255")
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        hint = "; transpose (N, C, H, W) with images.transpose(0, 2, 3, 1)" if images.shape[1:2] in ((1,), (3,)) else ""
        raise ValueError(
            f"{path}: {names[0]} has shape {images.shape}, wanted (N, H, W) or (N, H, W, C) with C = 1 or 3{hint}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: {names[1]} is {labels.dtype} of shape {labels.shape}, wanted an integer for each of "
            f"{len(images)} images"
        )
    return images, labels


def _class_names(arrays: Mapping[str, NDArray[Any]], values: NDArray[Any], path: Path) -> tuple[str, ...]:
    names = arrays.get("class_names", values)
    if names.shape != values.shape:
        raise ValueError(
            f"{path}: class_names has shape {names.shape}, wanted one name for each of {len(values)} classes"
        )
    return tuple(str(name) for name in names.tolist())


def _directory(root: Path, channels: int, size: tuple[int, int] | None, seed: int) -> _Parts:
    splits = {name: root / name for name in ("train", "test", "val") if _folders(root / name)}
    if not splits:
        classes = tuple(folder.name for folder in _folders(root))
        images, labels = _read_folders(root, classes, channels, size)
        rows = stratified_split(labels, max(1, round(_TEST_SHARE * len(labels))), seed)
        train, test = ((images[part], labels[part]) for part in rows)
        return _Parts(train, test, classes, has_own_test=False)
    if "train" not in splits or len(splits) < 2:
        raise ValueError(f"{root} has {' and '.join(splits)}/, wanted train/ and one of test/ and val/")
    classes = tuple(folder.name for folder in _folders(splits["train"]))
    held_out = splits.get("test", splits.get("val", root))
    if unknown := sorted({folder.name for folder in _folders(held_out)} - set(classes)):
        raise ValueError(f"{held_out} has classes that train/ has not: {_some(unknown)}")
    train = _read_folders(splits["train"], classes, channels, size)
    present = {folder.name for folder in _folders(held_out)}
    test = _read_folders(held_out, tuple(name if name in present else "" for name in classes), channels, size)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise ValueError(f"{root}: pictures in train/ and {held_out.name}/ have different sizes; say which with size")
    return _Parts(train, test, classes)


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _read_folders(
    root: Path, classes: Sequence[str], channels: int, size: tuple[int, int] | None
) -> tuple[Pixels, Labels]:
    """Pictures and labels of the class folders in ``root``; the empty name stands for a class without a folder."""
    if not any(classes):
        raise ValueError(f"{root} has no folders, wanted one per class with pictures in it")
    pictures, labels = [], []
    for label, name in enumerate(classes):
        files = _pictures(root / name) if name else []
        if name and not files:
            raise ValueError(f"class folder {root / name} has no pictures ({', '.join(sorted(_SUFFIXES))})")
        pictures += [_read_picture(file, channels, size) for file in files]
        labels += [label] * len(files)
        # At once, or a directory of large pictures of different sizes would be read in vain.
        sizes = {picture.shape[:2] for picture in pictures[-len(files) :] + pictures[:1]}
        if len(sizes) > 1:
            found = _some([f"{width} x {height}" for height, width in sorted(sizes)])
            raise ValueError(f"pictures in {root} have different sizes: {found}; say which to bring them to with size")
    return np.stack(pictures), np.array(labels, np.int64)


def _pictures(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES and not f.name.startswith("."))


def _read_picture(file: Path, channels: int, size: tuple[int, int] | None) -> Pixels:
    pil = import_optional("PIL.Image", "reading pictures", extra="zoo")
    try:
        with pil.open(file) as opened:
            picture = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as a picture: {error}") from error
    if size is not None:
        ops = import_optional("PIL.ImageOps", "reading pictures", extra="zoo")
        picture = ops.fit(picture, (size[1], size[0]), pil.Resampling.BICUBIC)
    return np.asarray(picture, np.uint8).reshape(picture.height, picture.width, channels)


# What all readers share -----------------------------------------------------------------------------------------------


def _image_set(parts: _Parts, name: str, channels: int | None) -> ImageSet:
    train, test = (_with_channels(part[0], channels, name) for part in (parts.train, parts.test))
    mean, std = _statistics(train if len(train) else test)
    own = parts.has_own_test
    return ImageSet(train, parts.train[1], test, parts.test[1], parts.class_names, mean, std, name, own)


def _with_channels(pixels: Pixels, channels: int | None, name: str) -> Pixels:
    if channels is None or pixels.shape[3] == channels:
        return pixels
    if channels == 1:
        raise ValueError(f"{name} holds colour images and 1 channel was asked for; convert them when writing the file")
    return np.repeat(pixels, channels, axis=3)


def _statistics(pixels: Pixels) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels scaled to [0, 1]."""
    sums = np.zeros((2, pixels.shape[3]))
    for start in range(0, len(pixels), _CHUNK):
        part = pixels[start : start + _CHUNK] / 255
        sums += np.stack([part.sum(axis=(0, 1, 2)), np.square(part).sum(axis=(0, 1, 2))])
    mean, square = sums / pixels[..., 0].size
    variance = square - mean**2
    std = np.sqrt(np.where(variance > 1e-8, variance, 1.0))
    return tuple(mean.tolist()), tuple(std.tolist())


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Bilinear, smoothed first where it shrinks."""
    resized = np.empty((len(pixels), *size, pixels.shape[3]), np.uint8)
    for start in range(0, len(pixels), _CHUNK):
        planes = torch.from_numpy(pixels[start : start + _CHUNK]).movedim(-1, 1).float()
        scaled = F.interpolate(planes, size, mode="bilinear", align_corners=False, antialias=True)
        resized[start : start + _CHUNK] = scaled.round().clamp(0, 255).byte().movedim(1, -1).numpy()
    return resized


def _some(items: Sequence[Any]) -> str:
    shown = ", ".join(str(item) for item in items[:5])
    return (shown or "nothing") + (f" and {len(items) - 5} more" if len(items) > 5 else "")
