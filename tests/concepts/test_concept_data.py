"""Readers return what is on disk, and say which file and line is wrong where something is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from decouplify.concepts import (
    Concept,
    ConceptImage,
    ConceptImages,
    Scaled,
    find_concept,
    load_broden,
    load_coco,
    load_masks,
    load_voc,
    planted_concepts,
    write_mini_broden,
)
from decouplify.concepts.broden import decode_labels
from decouplify.concepts.data import resize_nearest
from decouplify.data import Normalise


@pytest.fixture
def broden(tmp_path: Path) -> Path:
    return write_mini_broden(tmp_path / "broden", 20, 32)


def edit(path: Path, change: Callable[[str], str]) -> None:
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before


# BRODEN ---------------------------------------------------------------------------------------------------------------


def test_broden_returns_what_was_drawn(broden: Path) -> None:
    found, drawn = load_broden(broden), planted_concepts(20, 32)
    rows = [i for i in range(20) if i % 10 != 9]
    assert (len(found), found.n_dropped, found.concepts) == (18, 2, drawn.concepts)
    for image, i in zip(found, rows, strict=True):
        expected = drawn[i]
        assert np.array_equal(image.pixels, expected.pixels)
        annotated = {"color", "object", "part", "scene", "texture"} - ({"part"} if i % 10 == 4 else set())
        labelled = {c.category for c in found.concepts if c.number in image.numbers}
        assert labelled <= image.categories <= annotated
        for concept in drawn.concepts:
            if concept.category in annotated:
                assert np.array_equal(image.mask(concept.number), expected.mask(concept.number)), concept
    numbers = {number for image in found for number in image.numbers}
    assert {256, 257, 300, 301, 514, 515} <= numbers  # beyond the first band
    assert any((image.masks > 0).sum(0).max() > 1 for image in found)  # several labels in one place


def test_labels_beyond_one_byte() -> None:
    picture = np.zeros((1, 3, 3), np.uint8)
    picture[0, 0] = (44, 1, 9)
    picture[0, 1] = (255, 255, 255)
    assert decode_labels(picture).tolist() == [[300, 65535, 0]]
    assert decode_labels(np.array([[7]], np.uint8)).tolist() == [[7]]


def test_broden_choices(broden: Path) -> None:
    assert len(load_broden(broden, split="train")) + len(load_broden(broden, split="val")) == 18
    parts = load_broden(broden, categories=["part"])
    assert {c.category for c in parts.concepts} == {"part"}
    assert all(image.numbers for image in parts)
    assert len(parts) + parts.n_dropped == 20
    assert "without any of them left out" in repr(parts)
    scenes = load_broden(broden, categories="scene")
    assert scenes[0].masks.shape == (0, 16, 16)
    assert scenes[0].mask(scenes[0].numbers[0]).all()
    with pytest.raises(ValueError, match=r"line 1: no category tone; there are color, object, part, scene, texture"):
        load_broden(broden, categories=["tone"])
    with pytest.raises(ValueError, match="no image labelled for part in test"):
        load_broden(broden, categories=["part"], split="test")


def test_a_label_of_several_categories_counts_for_the_one_it_covers_most_of(broden: Path) -> None:
    edit(broden / "label.csv", lambda t: t.replace("255,box,object(", "255,box,part(1);object("))
    edit(broden / "c_part.csv", lambda t: t + "3,255,box,1,0.001\n")
    assert find_concept(load_broden(broden), "box").category == "object"
    assert find_concept(load_broden(broden, categories=["part"]), "box").category == "part"
    (broden / "c_part.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"c_part\.csv does not exist"):
        load_broden(broden)


def test_columns_may_come_in_any_order(broden: Path) -> None:
    rows = [line.split(",") for line in (broden / "index.csv").read_text().splitlines()]
    (broden / "index.csv").write_text("".join(",".join(row[::-1]) + "\n" for row in rows))
    assert len(load_broden(broden)) == 18


FIRST = "synthetic/scene_0000"
BROKEN: dict[str, tuple[str, Callable[[str], str], type[Exception], str]] = {
    "a number that is none": (
        "index.csv", lambda t: t.replace("train,32,32,16,16", "train,32,32,x,16", 1), ValueError,
        r"index\.csv, line 2: sh is 'x', wanted an integer",
    ),
    "an entry that is neither": (
        "index.csv", lambda t: t.replace(f"{FIRST}_object.png", f"{FIRST}_object.gif", 1), ValueError,
        r"index\.csv, line 2: an entry of object is 'synthetic/scene_0000_object\.gif', wanted an integer",
    ),
    "a whole-image label nobody knows": (
        "index.csv", lambda t: re.sub(r"(\n(?:[^\n]*\n){2}[^\n]*),51[45],", r"\1,999,", t, count=1), ValueError,
        r"index\.csv, line 4: scene has the label 999, which label\.csv does not list",
    ),
    "a row too short": (
        "index.csv", lambda t: t.replace(",16,16,", ",16,", 1), ValueError,
        r"index\.csv, line 2: fewer cells than the 11 of the header",
    ),
    "a row too long": (
        "index.csv", lambda t: t.replace(",16,16,", ",16,16,16,", 1), ValueError,
        r"index\.csv, line 2: more cells than the 11 of the header",
    ),
    "a column that is missing": (
        "index.csv", lambda t: t.replace("image,split", "image,part of", 1), ValueError,
        r"index\.csv, line 1: no column split; found image, part of",
    ),
    "a category without count": (
        "label.csv", lambda t: t.replace("object(", "object", 1), ValueError,
        r"label\.csv, line 5: category is 'object\d+\)', wanted name\(count\)",
    ),
    "a label that is no number": (
        "label.csv", lambda t: t.replace("254,ball", "ball,ball"), ValueError,
        r"label\.csv, line 5: number is 'ball', wanted an integer",
    ),
    "two labels of one number": (
        "label.csv", lambda t: t.replace("255,box", "254,box"), ValueError,
        r"concepts 'ball' and 'box' share the number 254",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tables_are_refused_with_file_and_line(broden: Path, name: str) -> None:
    file, change, kind, message = BROKEN[name]
    edit(broden / file, change)
    with pytest.raises(kind, match=message):
        load_broden(broden)


@pytest.mark.parametrize("missing", [f"{FIRST}.png", f"{FIRST}_color.png"])
def test_missing_pictures_are_noticed_at_once(broden: Path, missing: str) -> None:
    (broden / "images" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(missing)} does not exist; .*index\.csv, line 2"):
        load_broden(broden)


@pytest.mark.parametrize("missing", ["index.csv", "label.csv"])
def test_missing_tables(broden: Path, missing: str) -> None:
    (broden / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(missing)} does not exist"):
        load_broden(broden)


def test_broken_label_pictures(broden: Path) -> None:
    data = load_broden(broden)
    path = broden / "images" / f"{FIRST}_color.png"
    Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"_color\.png \(.*index\.csv, line 2\) has the label 2313, which label\.csv"):
        data[0]
    Image.fromarray(np.zeros((15, 16, 3), np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"line 2\) has size \(15, 16\), the index says \(sh, sw\) = \(16, 16\)"):
        data[0]
    path.write_bytes(b"\x89PNG\r\n\x1a\n and nothing else")
    with pytest.raises(ValueError, match=r"_color\.png \(.*line 2\) is not a picture that can be read"):
        data[0]
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(path)
    with pytest.raises(ValueError, match="holds uint16 values"):
        data[0]


def test_the_writer_refuses_a_directory_in_use(broden: Path) -> None:
    with pytest.raises(FileExistsError, match="is not empty"):
        write_mini_broden(broden)
    with pytest.raises(ValueError, match="of size 15 asked for"):
        planted_concepts(3, 15)


# Folders of label pictures --------------------------------------------------------------------------------------------


def write_voc(root: Path) -> np.ndarray:
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    labels = np.zeros((30, 40), np.uint8)
    labels[:15, :20], labels[20:, 30:], labels[15] = 8, 20, 255
    picture = Image.fromarray(labels, mode=None).convert("L")
    palette = Image.fromarray(labels)
    palette.putpalette(list(range(256)) * 3)  # palette pictures, as VOC's are
    for name in ("a", "b"):
        Image.fromarray(np.full((30, 40, 3), 100, np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        (palette if name == "a" else picture).save(root / "SegmentationClass" / f"{name}.png")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("a\nb\n")
    return labels


def test_voc(tmp_path: Path) -> None:
    labels = write_voc(tmp_path)
    data = load_voc(tmp_path, size=None)
    expected = np.where(labels == 255, 0, labels)
    for i in range(2):
        assert np.array_equal(data[i].masks[0], expected)
    assert (len(data), data[0].name, data[0].numbers) == (2, "a.jpg", [8, 20])
    assert (find_concept(data, "cat").number, find_concept(data, 20).name) == (8, "tvmonitor")
    scaled = load_voc(tmp_path, size=64, mask_size=(15, 20))[0]
    assert scaled.pixels.shape == (64, 64, 3)
    assert np.array_equal(scaled.masks[0], resize_nearest(expected, (15, 20)))


def test_mask_folders_refuse_what_does_not_fit(tmp_path: Path) -> None:
    write_voc(tmp_path)
    images, masks = tmp_path / "JPEGImages", tmp_path / "SegmentationClass"
    assert len(load_masks(images, masks, {8: "cat", 20: "screen"})) == 2
    with pytest.raises(ValueError, match=r"a\.png has the class index 8; the classes given are \[1, 2\]"):
        load_masks(images, masks, ["cat", "dog"])[0]
    with pytest.raises(FileNotFoundError, match="JPEGImages has no picture 'c'"):
        load_masks(images, masks, ["cat"], ids=["a", "c"])
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        load_masks(images, tmp_path / "nowhere", ["cat"])
    with pytest.raises(FileNotFoundError, match=r"test\.txt does not exist"):
        load_voc(tmp_path, "test")
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(masks / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has 3 bands, wanted one class index per pixel"):
        load_voc(tmp_path)[0]


# COCO -----------------------------------------------------------------------------------------------------------------

# A disc and a corner of a 37 x 53 picture, and the first column, as pycocotools 2.0.11 compresses them.
COMPRESSED = r"0U1`8PO]H6K4M2N2N2O0O2O000O2O00000001N10001N101N2N2N3L5Jh96UF000000000000000000000"


def disc() -> np.ndarray:
    y, x = np.mgrid[:37, :53]
    mask = ((x - 20) ** 2 + (y - 15) ** 2 < 150) | ((x > 40) & (y > 25))
    mask[:, 0] = True
    return mask


def runs_of(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.flatten(order="F").astype(int), [0]])
    edges = np.flatnonzero(np.diff(flat))
    runs = np.diff([0, *edges, mask.size]).tolist()
    return runs if mask.size not in edges else runs[:-1]


def write_coco(root: Path, **changes: Any) -> Path:
    Image.fromarray(np.full((37, 53, 3), 100, np.uint8)).save(root / "a.jpg")
    document = {
        "images": [
            {"id": 5, "file_name": "a.jpg", "height": 37, "width": 53},
            {"id": 6, "file_name": "b.jpg", "height": 2, "width": 2},
        ],
        "categories": [{"id": 1, "name": "disc"}, {"id": 90, "name": "box"}, {"id": 4, "name": "strip"}],
        "annotations": [
            {"id": 11, "image_id": 5, "category_id": 1, "segmentation": {"size": [37, 53], "counts": COMPRESSED}},
            {"id": 12, "image_id": 5, "category_id": 90, "segmentation": [[10, 10, 30, 10, 30, 20, 10, 20]]},
            {"id": 13, "image_id": 5, "category_id": 4, "segmentation": {"counts": runs_of(disc())}},
        ],
    }
    document.update(changes)
    (root / "instances.json").write_text(json.dumps(document))
    return root / "instances.json"


def test_coco(tmp_path: Path) -> None:
    data = load_coco(write_coco(tmp_path), tmp_path, size=None)
    assert len(data) == 1  # the other image has no annotation
    image = data[0]
    assert np.array_equal(image.mask(1), disc())
    assert np.array_equal(image.mask(4), disc())
    box = np.zeros((37, 53), bool)
    box[10:21, 10:31] = True
    assert np.array_equal(image.mask(90), box)
    assert image.masks.shape[0] == 3  # all overlap
    scaled = load_coco(tmp_path / "instances.json", tmp_path, size=(64, 96), mask_size=16)[0]
    assert (scaled.pixels.shape, scaled.masks.shape) == ((64, 96, 3), (3, 16, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [{"image_id": 7, "category_id": 1, "segmentation": []}]}, r"annotations\[0\] names image 7"),
        (
            {"annotations": [{"image_id": 5, "category_id": 2, "segmentation": []}]},
            r"annotations\[0\] names category 2",
        ),
        ({"annotations": [{"image_id": 5, "category_id": 1}]}, r"annotations\[0\] has no segmentation"),
        ({"annotations": []}, "has no annotated image"),
        ({"images": None}, "has no list 'images'"),
        ({"categories": [{"id": 0, "name": "x"}]}, "concept 'x' has number 0"),
    ],
)
def test_broken_coco_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_coco(write_coco(tmp_path, **changes), tmp_path)


@pytest.mark.parametrize("segmentation", [{"counts": [3, 4]}, [[1, 2, 3, 4]], "none", {"counts": "0"}])
def test_broken_coco_segmentations(tmp_path: Path, segmentation: Any) -> None:
    annotation = {"id": 3, "image_id": 5, "category_id": 1, "segmentation": segmentation}
    data = load_coco(write_coco(tmp_path, annotations=[annotation]), tmp_path)
    with pytest.raises(ValueError, match=r"instances\.json, annotation 3: (the run lengths do not|segmentation is)"):
        data[0]


def test_coco_files_that_are_none(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jpg does not exist; .*image 5"):
        load_coco(path, tmp_path)
    path.write_text('{"images": [],\n "annotations": [}')
    with pytest.raises(ValueError, match=r"instances\.json, line 2: not JSON"):
        load_coco(path, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.json does not exist"):
        load_coco(tmp_path / "nothing.json", tmp_path)


# What all of them are -------------------------------------------------------------------------------------------------


def test_images_and_concepts_are_checked() -> None:
    pixels, masks = np.zeros((4, 4, 3), np.uint8), np.zeros((1, 2, 2), np.int64)
    with pytest.raises(ValueError, match=r"image 'x': pixels are float32 of shape \(4, 4, 3\), wanted uint8"):
        ConceptImage(pixels.astype(np.float32), masks, name="x")
    with pytest.raises(ValueError, match=r"image 'x': masks are int64 of shape \(2, 2\), wanted integers \(L, h, w\)"):
        ConceptImage(pixels, masks[0], name="x")
    with pytest.raises(ValueError, match="at least one concept"):
        ConceptImages((), [])


def test_concepts_are_found_by_name_and_number() -> None:
    concepts = (Concept(1, "sky", "object"), Concept(2, "wood", "object"), Concept(3, "wood", "material"))
    data = ConceptImages(concepts, [])
    assert find_concept(data, "sky") is find_concept(data, 1) is find_concept(data, concepts[0])
    with pytest.raises(ValueError, match=r"several concepts are called 'wood'; give one of the numbers 2 \(object\)"):
        find_concept(data, "wood")
    with pytest.raises(ValueError, match="no concept 'skye' among the 3 of the data set; did you mean 'sky'"):
        find_concept(data, "skye")


def test_nearest_scaling_keeps_the_middle() -> None:
    small = np.arange(6).reshape(2, 3)
    assert np.array_equal(resize_nearest(small, (4, 6)), small.repeat(2, 0).repeat(2, 1))
    assert np.array_equal(resize_nearest(small.repeat(3, 0).repeat(3, 1), (2, 3)), small)
    image = torch.arange(35.0).reshape(1, 1, 5, 7)
    exact = torch.nn.functional.interpolate(image, size=(9, 4), mode="nearest-exact")[0, 0]
    assert np.array_equal(resize_nearest(image[0, 0].numpy(), (9, 4)), exact.numpy())


def test_scaled_transforms_bring_images_to_the_networks_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    plain = Normalise((0.5,), (0.25,))
    assert torch.equal(Scaled((3, 40, 30), plain)(pixels), plain(pixels))
    grey = Scaled((1, 20, 15), plain)(pixels)
    assert grey.shape == (1, 20, 15)
    assert float(grey.mean()) == pytest.approx(float(plain(pixels).mean()), abs=0.02)
    assert torch.equal(Scaled((3, 8, 8), plain)(pixels[:, :, :1])[0], Scaled((1, 8, 8), plain)(pixels[:, :, :1])[0])
