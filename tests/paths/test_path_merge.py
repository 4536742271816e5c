"""Parts of a path set, one per process, put together; and what changed between two sets."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import decouplify
from decouplify.paths import PathSet, merge

SIZES = {"a": 5, "b": 16}


def assert_same(a: PathSet, b: PathSet) -> None:
    assert a.layers == b.layers
    for name in ("bits", "ids", "labels", "preds", "conf", "margins"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("on_disk", [False, True])
def test_parts_make_the_whole_again(make_paths, tmp_path, on_disk):
    whole = make_paths(30, SIZES, n_classes=3)
    whole = replace(whole, margins=np.random.default_rng(0).normal(size=(30, 21)).astype(np.float16))
    parts = [whole.subset(np.arange(rank, 30, 3)) for rank in range(3)]
    if on_disk:
        parts = [part.save(tmp_path / str(rank)) for rank, part in enumerate(parts)]
    merged = merge(parts, tmp_path / "whole" if on_disk else None)
    assert_same(merged, whole)
    assert isinstance(merged.bits, np.memmap) == on_disk
    assert merged.manifest["merged"] == {"n_parts": 3, "n_repeated": 0, "n_conflicts": 0}


def test_repeated_images_are_kept_once_and_conflicts_are_counted(make_paths):
    whole = make_paths(10, SIZES, n_classes=2, ids=[f"img{i}" for i in range(10)])
    again = PathSet.from_gates(
        {"a": ~whole.unpack("a", [7]), "b": whole.unpack("b", [7])}, ids=["img7"], labels=whole.labels[[7]]
    )
    merged = merge([whole.subset([3, 4, 5, 6, 7, 8, 9]), whole.subset([0, 1, 2, 3]), again])
    assert_same(merged, whole)
    assert merged.manifest["merged"] == {"n_parts": 3, "n_repeated": 2, "n_conflicts": 1}


def test_merge_refuses_parts_that_do_not_fit(make_paths):
    a = make_paths(4, {"a": 2}, n_classes=2)
    with pytest.raises(ValueError, match="merge: got no path set"):
        merge([])
    with pytest.raises(ValueError, match="got 'a' with 2 filters and 'a' with 3"):
        merge([a, make_paths(4, {"a": 3}, n_classes=2)])
    with pytest.raises(ValueError, match="only one of part 0 and part 1 has labels"):
        merge([a, make_paths(4, {"a": 2})])
    with pytest.raises(ValueError, match="part 1 has ids of type <U1, part 0 int64"):
        merge([a, make_paths(2, {"a": 2}, n_classes=2, ids=["x", "y"])])
    with pytest.raises(ValueError, match="part 1 was recorded with another plan"):
        merge([a, replace(a, manifest={"plan_sha256": "0"})])


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = decouplify.wrap(timm.create_model("test_resnet", num_classes=3), (3, 16, 16))
    for controller in model.decoupling.controllers.values():
        torch.nn.init.normal_(controller.fc2.weight)
    return model.eval()


def _images() -> TensorDataset:
    images = torch.randn(11, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, torch.arange(11) % 3)


def _record_in_process(rank: int, world_size: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size)
    images = _images()
    sampler = DistributedSampler(images, world_size, rank, shuffle=True)
    paths = decouplify.record(_network(), DataLoader(images, 2, sampler=sampler), out=f"{directory}/set")
    assert len(paths) == 11
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.ci_sample
def test_processes_write_one_path_set_together(tmp_path):
    torch.multiprocessing.spawn(_record_in_process, (2, str(tmp_path)), nprocs=2)
    together = PathSet.load(tmp_path / "set")
    alone = decouplify.record(_network(), DataLoader(_images(), 2))
    np.testing.assert_array_equal(together.ids, np.arange(11))
    np.testing.assert_array_equal(together.labels, alone.labels)
    # In pairs of other images a gate at its threshold may switch; these gates are far from it.
    assert (together.unpack() == alone.unpack()).mean() > 0.999
    assert together.manifest["merged"]["n_repeated"] == 1  # 12 places for 11 images
    assert not list(tmp_path.glob("*part*"))


def test_what_changed_is_counted_per_filter_and_per_image(make_paths):
    before, after = make_paths(50, SIZES, seed=1), make_paths(50, SIZES, seed=2)
    diff = before.diff(after)
    x, y = before.unpack(), after.unpack()
    np.testing.assert_array_equal(diff.turned_on, (y & ~x).sum(0))
    np.testing.assert_array_equal(diff.turned_off, (x & ~y).sum(0))
    np.testing.assert_array_equal(diff.n_changed, (x != y).sum(1))
    assert len(diff.summary().splitlines()) == 5
    assert json.loads(json.dumps(diff.to_dict(), allow_nan=False))["turned_on"] == diff.turned_on.tolist()
    assert len(diff.plot().patches) == 4


def test_images_are_matched_by_id(make_paths):
    before = make_paths(20, SIZES)
    shuffled = np.random.default_rng(0).permutation(20)
    assert before.diff(before.subset(shuffled)).n_changed.tolist() == [0] * 20
    with pytest.raises(ValueError, match="must hold the same images, got 20 and 19 ids with 19 in common"):
        before.diff(before.subset(np.arange(19)))


def test_filters_that_turn_off_in_every_image_are_named():
    before = PathSet.from_gates({"a": [[1, 1, 1]] * 4, "b": [[0, 1]] * 4})
    after = PathSet.from_gates({"a": [[1, 1, 0]] * 4, "b": [[0, 1], [0, 0], [0, 0], [0, 0]]})
    diff = before.diff(after)
    assert {name: filters.tolist() for name, filters in diff.filters("off").items()} == {"a": [2]}
    assert {name: filters.tolist() for name, filters in diff.filters("off", 0.75).items()} == {"a": [2], "b": [1]}
    assert diff.filters("on") == {}
    with pytest.raises(ValueError, match='wanted "on" or "off"'):
        diff.filters("sideways")


def test_results_are_saved_as_numbers_words_or_pictures(make_paths, tmp_path):
    diff = make_paths(5, SIZES, seed=1).diff(make_paths(5, SIZES, seed=2))
    assert json.loads(diff.save(tmp_path / "diff.json").read_text()) == diff.to_dict()
    assert diff.save(tmp_path / "diff.txt").read_text() == diff.summary() + "\n"
    assert diff.save(tmp_path / "diff.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"diff\.xyz given, wanted a name that ends in \.json, \.txt, \."):
        diff.save(tmp_path / "diff.xyz")
