from __future__ import annotations

import io
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from decouplify.data import Normalise, load_images, stratified_split


@pytest.fixture
def save(tmp_path):
    """Writes an .npz file of ten 6 x 5 images in two classes, with some arrays replaced or left out (None)."""

    def write(**changes):
        arrays = {"images": np.arange(300, dtype=np.uint16).astype(np.uint8).reshape(10, 6, 5)}
        arrays["labels"] = np.array([3, 7] * 5)
        arrays.update(changes)
        path = tmp_path / "set.npz"
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
        return path

    return write


@pytest.fixture
def folders(tmp_path):
    """Writes pictures: ``folders({"train/cat": [(8, 6), ...]})`` with sizes (width, height)."""

    def write(tree, mode="RGB"):
        for n, (name, sizes) in enumerate(tree.items()):
            folder = tmp_path / "pictures" / name
            folder.mkdir(parents=True)
            for i, size in enumerate(sizes):
                color = (50 * n + i,) * (3 if mode == "RGB" else 1)
                Image.new(mode, size, color if mode == "RGB" else color[0]).save(folder / f"{i}.png")
        return tmp_path / "pictures"

    return write


# digits


def test_digits_have_a_fixed_split_with_classes_in_proportion():
    digits = load_images("digits")
    assert digits.image_size == (1, 32, 32)
    assert digits.class_names == tuple("0123456789")
    assert (len(digits.train_images), len(digits.test_images)) == (1297, 500)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_labels.dtype == np.int64
    share = np.bincount(digits.test_labels) / 500 - np.bincount(digits.train_labels) / 1297
    assert np.abs(share).max() < 2e-3
    again = load_images("digits")
    assert (again.test_images == digits.test_images).all()
    assert (load_images("digits", seed=1).test_labels != digits.test_labels).any()
    assert repr(digits) == "ImageSet(digits: 1297 + 500 images (1, 32, 32), 10 classes)"


def test_digits_keep_their_brightness_when_scaled():
    from sklearn.datasets import load_digits

    original = load_digits().images.mean() / 16
    scaled = load_images("digits")
    pixels = np.concatenate([scaled.train_images, scaled.test_images])
    assert pixels.max() == 255
    assert pixels.mean() / 255 == pytest.approx(original, rel=0.03)
    colour = load_images("digits", channels=3, size=8)
    assert colour.image_size == (3, 8, 8)
    assert (colour.test_images[..., 0] == colour.test_images[..., 2]).all()


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'"decouplify\[analysis\]"'):
        load_images("digits")


# tensors, loader, statistics


def test_the_loader_gives_the_tensors_in_order_with_ids(save):
    images = load_images(save())
    tensors, labels = images.tensors("train")
    batches = list(images.loader("train", batch_size=3))
    assert tensors.dtype == torch.float32
    assert tensors.shape == (8, 1, 6, 5)
    assert torch.equal(torch.cat([x for x, _, _ in batches]), tensors)
    assert torch.equal(torch.cat([y for _, y, _ in batches]), labels)
    assert torch.cat([i for _, _, i in batches]).tolist() == list(range(8))
    shuffled = torch.cat([i for _, _, i in images.loader("train", shuffle=True)])
    assert shuffled.tolist() != list(range(8))
    assert sorted(shuffled.tolist()) == list(range(8))


def test_training_images_are_normalised_to_mean_0_and_deviation_1(save):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (700, 4, 4, 3), dtype=np.uint8)
    pixels[..., 1] //= 3
    pixels[..., 2] = 9  # a constant channel must not divide by zero
    images = load_images(save(images=pixels, labels=np.arange(700) % 2))
    tensors, _ = images.tensors("train")
    assert tensors.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert tensors.std((0, 2, 3)).tolist() == pytest.approx([1, 1, 0], abs=1e-3)
    as_float = images.train_images.astype(np.float64) / 255
    assert images.mean == pytest.approx(as_float.mean((0, 1, 2)))
    assert images.std == pytest.approx([*as_float.std((0, 1, 2))[:2], 1])


def test_statistics_of_another_set_can_be_used(save):
    images = load_images(save()).normalised_as([0.5], [0.25])
    assert torch.equal(images.tensors("test")[0], Normalise((0.5,), (0.25,))(images.test_images))
    for mean, std in (([0.5, 0.5], [1, 1]), ([0.5], [0.0])):
        with pytest.raises(ValueError, match="do not fit images of 1 channels"):
            images.normalised_as(mean, std)
    with pytest.raises(ValueError, match="split is 'val'"):
        images.tensors("val")


# splitting


@given(st.lists(st.integers(1, 15), min_size=1, max_size=6).filter(lambda sizes: max(sizes) > 1), st.data())
def test_a_split_is_a_partition_in_proportion_that_leaves_every_class_for_training(sizes, data):
    n, seed = sum(sizes), data.draw(st.integers(0, 3))
    n_test = data.draw(st.integers(1, n - len(sizes)))
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    train, test = stratified_split(labels, n_test, seed)
    assert len(test) == n_test
    assert sorted([*train, *test]) == list(range(n))
    chosen = np.bincount(labels[test], minlength=len(sizes))
    assert (chosen < sizes).all()
    exact = np.array(sizes) * n_test / n
    if (exact + 1 <= np.array(sizes) - 1).all():
        assert (np.abs(chosen - exact) < 1).all()
    assert (stratified_split(labels, n_test, seed)[1] == test).all()


def test_a_set_too_small_to_split_is_refused():
    with pytest.raises(ValueError, match="2 images of 2 classes cannot be split with 1 for testing"):
        stratified_split(np.array([0, 1]), 1)


# .npz


def test_labels_of_a_file_become_indices_with_names(save):
    images = load_images(save())
    assert images.class_names == ("3", "7")
    assert set(images.train_labels.tolist()) == {0, 1}
    assert (len(images.train_images), len(images.test_images)) == (8, 2)
    named = load_images(save(class_names=np.array(["cat", "dog"])))
    assert named.class_names == ("cat", "dog")


def test_a_test_part_of_a_file_is_kept(save):
    test = np.full((3, 6, 5), 9, np.uint8)
    images = load_images(save(test_images=test, test_labels=np.array([7, 7, 3])), channels=3, size=(4, 2))
    assert images.image_size == (3, 4, 2)
    assert (images.test_images == 9).all()
    assert images.test_labels.tolist() == [1, 1, 0]
    assert len(images.train_images) == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "has no labels, only images"),
        ({"images": np.zeros((10, 6, 5))}, "images is float64, wanted uint8"),
        ({"images": np.zeros((10, 3, 6, 5), np.uint8)}, r"images has shape .*; transpose \(N, C, H, W\) with"),
        ({"images": np.zeros((10, 6), np.uint8)}, r"images has shape \(10, 6\), wanted"),
        ({"images": np.zeros((0, 6, 5), np.uint8), "labels": np.zeros(0, int)}, r"images has shape \(0, 6, 5, 1\)"),
        ({"labels": np.zeros(9, int)}, r"labels is int64 of shape \(9,\), wanted an integer for each of 10 images"),
        ({"labels": np.zeros(10)}, r"labels is float64 of shape \(10,\), wanted an integer"),
        ({"test_images": np.zeros((2, 6, 5), np.uint8)}, "has no test_labels"),
        (
            {"test_images": np.zeros((2, 6, 5), np.uint8), "test_labels": np.array([3, 4])},
            "test_labels has classes without a training image: 4",
        ),
        (
            {"test_images": np.zeros((2, 6, 6), np.uint8), "test_labels": np.array([3, 7])},
            r"images are \(6, 5, 1\) and test_images \(6, 6, 1\), wanted equal sizes",
        ),
        ({"class_names": np.array(["cat"])}, r"class_names has shape \(1,\), wanted one name for each of 2 classes"),
    ],
)
def test_wrong_arrays_are_refused_with_what_was_wanted(save, changes, message):
    with pytest.raises(ValueError, match=message):
        load_images(save(**changes))


def test_files_with_code_in_them_and_damaged_files_are_refused(tmp_path, save):
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz file of plain arrays"):
        load_images(save(labels=np.array([{}] * 10, dtype=object)))
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(b"PK not a zip file")
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz file"):
        load_images(damaged)
    with zipfile.ZipFile(damaged, "w") as file:
        file.writestr("images.npy", io.BytesIO(b"short").getvalue())
    with pytest.raises(ValueError, match=r"damaged\.npz"):
        load_images(damaged)


def test_colour_is_not_silently_thrown_away(save):
    path = save(images=np.zeros((10, 6, 5, 3), np.uint8))
    with pytest.raises(ValueError, match="holds colour images and 1 channel was asked for"):
        load_images(path, channels=1)


# directories


def test_a_folder_per_class(folders):
    images = load_images(folders({"cat": [(8, 6)] * 5, "dog": [(8, 6)] * 5}))
    assert images.class_names == ("cat", "dog")
    assert images.image_size == (3, 6, 8)
    assert (len(images.train_images), len(images.test_images)) == (8, 2)
    assert images.test_labels.tolist() == [0, 1]
    # The colour says which folder a picture came from.
    assert (images.train_images[:, 0, 0, 0] // 50 == images.train_labels).all()


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folders_for_training_and_testing(folders, held_out):
    tree = {"train/cat": [(8, 8)] * 3, "train/dog": [(8, 8)] * 2, f"{held_out}/dog": [(8, 8)]}
    images = load_images(folders(tree), channels=1)
    assert images.class_names == ("cat", "dog")
    assert images.train_labels.tolist() == [0, 0, 0, 1, 1]
    assert images.test_labels.tolist() == [1]
    assert images.image_size == (1, 8, 8)
    assert (images.test_images == 100).all()


def test_pictures_of_different_sizes_need_a_size(folders):
    path = folders({"cat": [(8, 6), (9, 6)], "dog": [(8, 6)] * 3})
    with pytest.raises(ValueError, match="have different sizes: 8 x 6, 9 x 6; say which"):
        load_images(path)
    assert load_images(path, size=5).image_size == (3, 5, 5)


def test_pictures_are_cropped_and_not_distorted(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture = np.zeros((10, 30, 3), np.uint8)
        picture[:, 10:20] = 255  # the middle third is square and white
        for i in range(3):
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")
    assert (load_images(tmp_path, size=10).train_images == 255).all()


def test_a_class_may_be_called_train(folders):
    images = load_images(folders({"bus": [(4, 4)] * 4, "train": [(4, 4)] * 4}))
    assert images.class_names == ("bus", "train")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"cat": [(4, 4)], "dog": []}, r"class folder .*dog has no pictures"),
        ({"train/cat": [(4, 4)]}, "has train/, wanted train/ and one of test/ and val/"),
        ({"test/cat": [(4, 4)]}, "has test/, wanted train/ and"),
        ({"train/cat": [(4, 4)], "test/dog": [(4, 4)]}, "has classes that train/ has not: dog"),
        ({"train/cat": [(4, 4)], "test/cat": [(5, 4)]}, "pictures in train/ and test/ have different sizes"),
    ],
)
def test_wrong_directories_are_refused_with_what_was_wanted(folders, tree, message):
    with pytest.raises(ValueError, match=message):
        load_images(folders(tree))


def test_an_unreadable_picture_is_named(folders):
    path = folders({"cat": [(4, 4)] * 3, "dog": [(4, 4)] * 3})
    (path / "dog" / "1.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"1\.png cannot be read as a picture"):
        load_images(path)


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r'no data at digit: wanted "digits", an \.npz or \.bin file, or a directory'
    ):
        load_images("digit")
    (tmp_path / "labels.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"labels\.csv is no data set"):
        load_images(tmp_path / "labels.csv")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="has no folders, wanted one per class"):
        load_images(empty)
    with pytest.raises(ValueError, match="channels is 2, wanted 1 or 3"):
        load_images("digits", channels=2)
    with pytest.raises(ValueError, match="size is 0, wanted at least 1 pixel"):
        load_images("digits", size=0)
