from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from decouplify.paths import PathSet, _storage

COLUMNS = ("bits", "ids", "labels", "preds", "conf", "margins")


def assert_equal(a: PathSet, b: PathSet) -> None:
    assert a.layers == b.layers
    assert a.manifest == b.manifest
    for name in COLUMNS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.fixture
def paths(make_paths):
    ids = [f"img/{i}.jpg" for i in range(7)]
    conf = np.linspace(0, 1, 7)
    columns = {"ids": ids, "labels": [3] * 7, "preds": [1] * 7, "conf": conf, "manifest": {"model": "net"}}
    made = make_paths(7, {"a": 5, "b": 12}, **columns)
    margins = np.random.default_rng(0).normal(size=(7, 17)).astype(np.float16)
    return PathSet(**{**vars(made), "margins": margins})


@pytest.mark.parametrize("mmap", [True, False])
def test_load_gives_back_what_save_wrote(paths, tmp_path, mmap):
    target = paths.save(tmp_path / "new" / "set")
    assert target == tmp_path / "new" / "set"
    loaded = PathSet.load(target, mmap=mmap)
    assert_equal(loaded, paths)
    assert isinstance(loaded.bits, np.memmap) == mmap
    assert isinstance(loaded.margins, np.memmap) == mmap
    assert ("on disk" in repr(loaded)) == mmap
    np.testing.assert_array_equal(loaded.counts(), paths.counts())
    assert loaded.distinct() == paths.distinct()


def test_a_set_without_labels_margins_or_images_survives(make_paths, tmp_path):
    for n in (0, 3):
        paths = make_paths(n, {"a": 9})
        assert_equal(PathSet.load(paths.save(tmp_path / str(n))), paths)


def test_saving_leaves_nothing_else_behind(paths, tmp_path):
    paths.save(tmp_path / "set")
    paths.save(tmp_path / "set")
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    files = {entry.name for entry in (tmp_path / "set").iterdir()}
    assert files == {f"{name}.npy" for name in COLUMNS} | {"manifest.json"}


def test_a_mapped_set_can_replace_itself(paths, tmp_path):
    paths.save(tmp_path / "set")
    mapped = PathSet.load(tmp_path / "set")
    mapped.save(tmp_path / "set")
    assert_equal(PathSet.load(tmp_path / "set"), paths)
    assert_equal(mapped, paths)


def test_an_empty_directory_is_filled(paths, tmp_path):
    (tmp_path / "set").mkdir()
    assert_equal(PathSet.load(paths.save(tmp_path / "set")), paths)


def test_what_is_no_path_set_is_never_replaced(paths, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis: it holds files but no path set; give another directory"):
        paths.save(tmp_path / "thesis")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=r"it is a file; give another directory"):
        paths.save(tmp_path / "file")
    paths.save(tmp_path / "set")
    (tmp_path / "set" / "figure.png").write_text("")
    with pytest.raises(FileExistsError, match=r"it also holds other files \(figure\.png\)"):
        paths.save(tmp_path / "set")
    assert (tmp_path / "thesis" / "chapter.tex").exists()
    assert (tmp_path / "set" / "figure.png").exists()


def test_a_failed_save_leaves_the_old_set_whole(paths, make_paths, tmp_path, monkeypatch):
    old = make_paths(3, {"a": 4})
    old.save(tmp_path / "set")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(_storage, "write_manifest", fail)
    with pytest.raises(OSError, match="disk full"):
        paths.save(tmp_path / "set")
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    assert_equal(PathSet.load(tmp_path / "set"), old)


def test_if_the_last_renaming_fails_the_files_are_kept_and_named(paths, tmp_path, monkeypatch):
    write_manifest = _storage.write_manifest

    def write_and_lose_the_race(stage, content):
        write_manifest(stage, content)
        (tmp_path / "set").write_text("somebody was faster")

    monkeypatch.setattr(_storage, "write_manifest", write_and_lose_the_race)
    with pytest.raises(OSError, match="the finished path set was left in") as caught:
        paths.save(tmp_path / "set")
    stage = next(tmp_path.glob(".set.partial-*"))
    assert str(stage) in str(caught.value)
    assert_equal(PathSet.load(stage), paths)
    assert (tmp_path / "set").read_text() == "somebody was faster"


def test_if_the_last_renaming_fails_the_old_set_comes_back(paths, make_paths, tmp_path, monkeypatch):
    old = make_paths(3, {"a": 4})
    old.save(tmp_path / "set")
    rename = Path.replace

    def refuse_the_new(self, target):
        if ".partial-" in self.name:
            raise PermissionError("not today")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", refuse_the_new)
    with pytest.raises(OSError, match="not today; the finished path set was left in"):
        paths.save(tmp_path / "set")
    assert_equal(PathSet.load(tmp_path / "set"), old)
    assert_equal(PathSet.load(next(tmp_path.glob(".set.partial-*"))), paths)
    assert not list(tmp_path.glob(".set.old-*"))


def test_no_pickle_is_ever_loaded(paths, tmp_path):
    paths.save(tmp_path / "set")
    np.save(tmp_path / "set" / "ids.npy", np.array([{"code": 1}] * 7), allow_pickle=True)
    with pytest.raises(ValueError, match=r"ids\.npy cannot be read as an array"):
        PathSet.load(tmp_path / "set")


def test_damage_is_named(paths, tmp_path):
    target = paths.save(tmp_path / "set")
    manifest = json.loads((target / "manifest.json").read_text())

    def rewrite(**changes):
        (target / "manifest.json").write_text(json.dumps(manifest | changes))

    rewrite(n_images=8)
    with pytest.raises(ValueError, match="is damaged: bits has 7 rows, the manifest says 8"):
        PathSet.load(target)
    rewrite(format_version=99)
    with pytest.raises(ValueError, match="has format version 99, this decouplify reads 1; update decouplify"):
        PathSet.load(target)
    rewrite(layers=[{"name": "a"}])
    with pytest.raises(ValueError, match=r"manifest\.json is incomplete"):
        PathSet.load(target)
    rewrite(format="another")
    with pytest.raises(ValueError, match="does not describe a path set"):
        PathSet.load(target)
    rewrite()
    np.save(target / "preds.npy", np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"is damaged: PathSet: preds has shape \(3,\), wanted \(7,\)"):
        PathSet.load(target)
    (target / "preds.npy").unlink()
    (target / "labels.npy").unlink()
    with pytest.raises(ValueError, match=r"lacks preds\.npy, labels\.npy; copy it again"):
        PathSet.load(target)
    (target / "bits.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bits\.npy cannot be read as an array"):
        PathSet.load(target)
    with pytest.raises(FileNotFoundError, match=r"is not a path set: it has no manifest\.json"):
        PathSet.load(tmp_path)


def test_a_growing_file_equals_one_written_at_once(tmp_path):
    rows = np.arange(3000, dtype=np.float16).reshape(1000, 3)
    with _storage.GrowingNpy(tmp_path / "grown.npy", np.float16, 3) as file:
        for start in range(0, 1000, 7):
            file.append(rows[start : start + 7])
    np.save(tmp_path / "whole.npy", rows)
    assert (tmp_path / "grown.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
