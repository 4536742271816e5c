from __future__ import annotations

import json
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from decouplify.errors import NonFiniteError
from decouplify.paths import PathSet, RunningIdsWarning, record
from decouplify.paths._progress import progress_bar

LABELS = torch.arange(23) % 4


def loader_of(*tensors, batch_size=5, **options):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, **options)


@torch.no_grad()
def expected(toy, images):
    """Gates, margins, logits of all images at once, in evaluation mode."""
    flags = [module.training for module in toy.modules()]
    toy.eval()
    logits = toy(images)
    gates = torch.cat(list(toy.decoupling.gates().values()), dim=1)
    margins = torch.cat(list(toy.decoupling.margins().values()), dim=1)
    for module, flag in zip(toy.modules(), flags, strict=True):
        module.training = flag
    return gates, margins, logits


def test_paths_are_the_gates_of_the_model_in_evaluation_mode(toy, images):
    paths = record(toy, loader_of(images, LABELS))
    gates, _, logits = expected(toy, images)
    np.testing.assert_array_equal(paths.unpack(), gates.bool().numpy())
    np.testing.assert_array_equal(paths.labels, LABELS.numpy())
    np.testing.assert_array_equal(paths.ids, np.arange(23))
    np.testing.assert_array_equal(paths.preds, logits.argmax(1).numpy())
    np.testing.assert_allclose(paths.conf, logits.softmax(1).amax(1).numpy(), rtol=1e-5)
    assert [layer.name for layer in paths.layers] == ["conv1", "block.conv", "block.conv2"]
    assert 0 < paths.counts().sum() < gates.numel()
    assert paths.margins is None


@pytest.mark.parametrize("on_disk", [False, True])
def test_margins_are_kept_on_request(toy, images, tmp_path, on_disk):
    paths = record(toy, loader_of(images), margins=True, out=tmp_path / "set" if on_disk else None)
    _, margins, _ = expected(toy, images)
    assert paths.margins.dtype == np.float16
    np.testing.assert_allclose(paths.margins, margins.numpy(), rtol=2e-3, atol=1e-3)


def test_margins_too_large_for_float16_stay_finite(toy, images):
    with torch.no_grad():
        toy.decoupling.controllers[0].bias.fill_(1e6)
    paths = record(toy, loader_of(images), margins=True)
    assert (paths.margins[:, :5] == 65504).all()


def test_gates_close_to_switching_are_counted(toy, images):
    _, margins, _ = expected(toy, images)
    assert record(toy, [images]).manifest["n_near_threshold"] == (margins.abs() < 1e-4).sum()
    with torch.no_grad():
        for controller in toy.decoupling.controllers:
            controller.weight.zero_()
            controller.bias.fill_(-1)
        toy.decoupling.controllers[0].bias.copy_(torch.tensor([1.0, 9e-5, -9e-5, 2e-4, 0]))
    paths = record(toy, loader_of(images))
    assert paths.manifest["n_near_threshold"] == 3 * 23
    assert "gates within 0.0001 of switching: 69 of 690" in paths.summary()


def test_a_set_streamed_to_disk_equals_one_in_memory(toy, images, tmp_path):
    in_memory = record(toy, loader_of(images, LABELS))
    on_disk = record(toy, loader_of(images, LABELS), out=tmp_path / "runs" / "set")
    assert isinstance(on_disk.bits, np.memmap)
    for name in ("bits", "ids", "labels", "preds", "conf"):
        np.testing.assert_array_equal(getattr(on_disk, name), getattr(in_memory, name))
    assert on_disk.manifest == in_memory.manifest
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["set"]
    again = PathSet.load(tmp_path / "runs" / "set", mmap=False)
    np.testing.assert_array_equal(again.bits, in_memory.bits)


@pytest.mark.parametrize("on_disk", [False, True])
def test_training_flags_are_restored(toy, images, tmp_path, on_disk):
    toy.norm.eval()  # a frozen batch norm in a model that trains
    before = {name: module.training for name, module in toy.named_modules()}
    running_mean = toy.norm.running_mean.clone()
    record(toy, [images], out=tmp_path / "set" if on_disk else None)
    assert {name: module.training for name, module in toy.named_modules()} == before
    assert not toy.norm.training
    assert toy.dropout.training
    torch.testing.assert_close(toy.norm.running_mean, running_mean)
    assert torch.is_grad_enabled()


def test_training_flags_are_restored_after_an_error(toy, images):
    toy.norm.eval()

    def broken():
        yield images
        assert not toy.training
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        record(toy, broken())
    assert toy.training
    assert toy.dropout.training
    assert not toy.norm.training


def test_what_the_model_computes_can_still_be_trained_on(toy, images):
    # Tensors made under inference_mode could not take part in a later backward pass.
    record(toy, [images])
    assert not any(value.is_inference() for value in toy.decoupling.margins().values())


def test_an_interrupted_run_leaves_nothing(toy, images, tmp_path):
    def interrupted():
        yield images
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(toy, interrupted(), out=tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_the_older_set(toy, images, tmp_path):
    record(toy, [images[:4]], out=tmp_path / "set")
    with pytest.raises(NonFiniteError):
        record(toy, [images, images * float("nan")], out=tmp_path / "set")
    assert len(PathSet.load(tmp_path / "set")) == 4
    assert len(record(toy, [images], out=tmp_path / "set")) == 23


def test_a_foreign_directory_is_refused_before_the_model_runs(toy, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileExistsError, match="it holds files but no path set"):
        record(toy, [None], out=tmp_path)


@pytest.mark.parametrize("form", ["images", "tuple of one", "list of one", "labels of None"])
def test_batches_without_labels(toy, images, form):
    batches = {"images": images, "tuple of one": (images,), "list of one": [images], "labels of None": (images, None)}
    paths = record(toy, [batches[form]])
    assert paths.labels is None
    np.testing.assert_array_equal(paths.ids, np.arange(23))


def test_ids_come_from_the_loader(toy, images):
    numbers = torch.arange(23) * 10
    np.testing.assert_array_equal(record(toy, loader_of(images, LABELS, numbers)).ids, numbers.numpy())
    names = [f"{i}.jpg" for i in range(23)]
    paths = record(toy, [(images[:20], LABELS[:20], names[:20]), (images[20:], LABELS[20:], tuple(names[20:]))])
    assert paths.ids.tolist() == names


def test_labels_may_be_lists_or_arrays(toy, images):
    for labels in (LABELS.tolist(), LABELS.numpy(), LABELS.to(torch.int16)):
        np.testing.assert_array_equal(record(toy, [(images, labels)]).labels, LABELS.numpy())


@pytest.mark.parametrize("n", [1, 5, 7, 23, 40])
def test_max_images_cuts_the_run_short(toy, images, n):
    taken = []

    def batches():
        for start in range(0, 23, 5):
            taken.append(start)
            yield images[start : start + 5], LABELS[start : start + 5]

    whole = record(toy, [(images, LABELS)])
    paths = record(toy, batches(), max_images=n)
    assert len(paths) == min(n, 23)
    np.testing.assert_array_equal(paths.bits, whole.bits[:n])
    np.testing.assert_array_equal(paths.labels, whole.labels[:n])
    assert len(taken) == min(5, -(-n // 5))


def test_empty_batches_are_passed_over(toy, images):
    assert len(record(toy, [images[:0], images, images[:0]])) == 23


class Indexed(Dataset):
    def __init__(self, images):
        self.images = images
        self.transform = "Normalize(0.5)"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index % 4, index


def test_the_manifest_says_where_the_paths_come_from(toy, images):
    loader = DataLoader(Subset(Indexed(images), range(20)), batch_size=8, shuffle=True)
    paths = record(toy, loader)
    manifest = paths.manifest
    assert manifest["model"] == "toy"
    assert manifest["dataset"] == "Indexed"
    assert manifest["transform"] == "'Normalize(0.5)'"
    assert manifest["eval_mode"] is True
    assert manifest["autocast"] is False
    assert set(manifest["versions"]) == {"decouplify", "torch", "numpy", "python"}
    assert len(manifest["plan_sha256"]) == 64
    assert paths.to_dict()["n_images"] == 20
    assert json.loads(json.dumps(manifest)) == manifest
    # Shuffled, but with ids: every image can be found again.
    order = np.argsort(paths.ids)
    np.testing.assert_array_equal(paths.subset(order).bits, record(toy, [images[:20]]).bits)


def test_a_different_plan_has_a_different_hash(toy, images):
    first = record(toy, [images]).manifest["plan_sha256"]
    toy.decoupling.plan = type(toy.decoupling.plan)(model="other")
    assert record(toy, [images]).manifest["plan_sha256"] != first


@pytest.mark.parametrize("how", ["shuffle", "sampler", "batch_sampler"])
def test_shuffling_without_ids_warns(toy, images, how):
    dataset = TensorDataset(images, LABELS)
    sampler = RandomSampler(dataset)
    options = {
        "shuffle": {"shuffle": True},
        "sampler": {"sampler": sampler},
        "batch_sampler": {"batch_sampler": BatchSampler(sampler, 4, False)},
    }[how]
    with pytest.warns(RunningIdsWarning, match="ids are positions in this run and not in the data set") as caught:
        record(toy, DataLoader(dataset, **options))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(toy, DataLoader(dataset, batch_size=4))
        record(toy, loader_of(images, LABELS, LABELS, shuffle=True))


class Headless(nn.Module):
    """A wrapped model that returns something else than logits."""

    def __init__(self, toy, output):
        super().__init__()
        self.toy, self.output = toy, output
        self.decoupling = toy.decoupling

    def forward(self, images):
        self.toy(images)
        return self.output(images)


@pytest.mark.parametrize(
    "output",
    [
        lambda x: {"boxes": x},
        lambda x: x,
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.new_zeros(len(x), 1),
        lambda x: None,
    ],
)
def test_other_outputs_than_logits_leave_no_prediction(toy, images, output):
    paths = record(Headless(toy, output), [(images, LABELS)])
    assert (paths.preds == -1).all()
    assert np.isnan(paths.conf).all()
    assert "predicted" not in paths.summary()


def test_a_model_that_is_not_wrapped_is_refused(toy, images):
    with pytest.raises(TypeError, match=r"Linear is not a wrapped model.* no \.decoupling; call decouplify\.wrap"):
        record(nn.Linear(2, 2), [images])
    outer = nn.Module()
    outer.module = toy
    with pytest.raises(TypeError, match=r"Module is not a wrapped model.*pass its \.module"):
        record(outer, [images])


def test_an_empty_loader_is_refused(toy, images, tmp_path):
    for out in (None, tmp_path / "set"):
        with pytest.raises(ValueError, match="the loader yielded no images; a generator that was used before"):
            record(toy, [], out=out)
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_not_finite_are_refused(toy, images):
    bad = images.clone()
    bad[3, 0, 1, 1] = float("nan")
    bad[5] = float("inf")
    message = "batch 1 of the loader has 2 of 23 images with NaN or infinity, the first at position 3"
    with pytest.raises(NonFiniteError, match=message):
        record(toy, [images, bad])


def test_finite_images_whose_sum_is_not_are_recorded(toy, images):
    bright = images.clone()
    bright[0, 0] = torch.finfo(torch.float32).max
    toy.forward = lambda x, plain=toy.forward: plain(x.clamp(-3, 3))
    assert not torch.isfinite(bright.sum())
    assert len(record(toy, [bright])) == len(images)


def test_soft_gates_are_refused(toy, images):
    toy.decoupling.eval = lambda: None
    toy.decoupling.train = lambda mode=True: toy.decoupling  # keeps its gates soft in evaluation mode
    with pytest.raises(ValueError, match=r"gates of conv1, block\.conv, block\.conv2 are not exactly 0 or 1"):
        record(toy, [images])


def test_gates_that_do_not_fit_the_plan_are_refused(toy, images):
    gates = toy.decoupling.gates
    toy.decoupling.gates = lambda: {name: z for name, z in gates().items() if name != "block.conv"}
    with pytest.raises(ValueError, match=r"decoupling\.gates\(\) lacks block\.conv; the forward pass must run every"):
        record(toy, [images])
    toy.decoupling.gates = lambda: {name: z[:, :3] for name, z in gates().items()}
    with pytest.raises(ValueError, match=r"gates of 'conv1' have shape \(23, 3\), wanted \(23, 5\): images, filters"):
        record(toy, [images])


SOFT = torch.full((23, 4), 0.25)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (SOFT, ValueError, r"soft or one-hot labels of shape \(23, 4\).*or pass labels\.argmax\(1\)"),
        (LABELS.float(), ValueError, r"labels of type torch\.float32, wanted integers; pass labels\.long\(\)"),
        (LABELS[:5], ValueError, r"labels of shape \(5,\) for 23 images"),
        (LABELS[:, None], ValueError, r"labels of shape \(23, 1\) for 23 images, wanted \(23,\)"),
        (["cat"] * 23, TypeError, "labels of type list, wanted integers"),
    ],
)
def test_labels_that_are_not_classes_are_refused(toy, images, labels, error, message):
    with pytest.raises(error, match=message):
        record(toy, [(images, labels)])


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.rand(23), TypeError, "image ids have type float32, wanted integers or strings"),
        (torch.arange(4), ValueError, r"ids of shape \(4,\) for 23 images"),
    ],
)
def test_ids_that_identify_nothing_are_refused(toy, images, ids, error, message):
    with pytest.raises(error, match=message):
        record(toy, [(images, LABELS, ids)])


def test_loaders_of_another_form_are_refused(toy, images):
    with pytest.raises(TypeError, match=r"one array of shape \(23, 3, 4, 4\), wanted batches; pass \[images\]"):
        record(toy, images)
    with pytest.raises(TypeError, match="loader is a int, wanted an iterable of batches"):
        record(toy, 3)
    with pytest.raises(TypeError, match=r"batch 0 of the loader is a dict, wanted images, .*b\['image'\]"):
        record(toy, [{"image": images}])
    with pytest.raises(TypeError, match="batch 0 of the loader is a tuple of length 4"):
        record(toy, [(images, LABELS, LABELS, LABELS)])
    with pytest.raises(TypeError, match="batch 1 of the loader has images of type list"):
        record(toy, [images, [[images]]])
    with pytest.raises(ValueError, match="max_images is 0, wanted at least 1"):
        record(toy, [images], max_images=0)


def test_batches_of_different_forms_are_refused(toy, images):
    with pytest.raises(ValueError, match=r"batch 1 .* has no labels and no ids, earlier ones had integer labels"):
        record(toy, [(images, LABELS), images])
    with pytest.raises(ValueError, match="has no labels and string ids, earlier ones had no labels and integer ids"):
        record(toy, [(images, None, LABELS), (images, None, ["a"] * 23)])


def test_a_bar_is_shown_only_to_somebody(toy, images, capsys, monkeypatch):
    record(toy, [images])
    assert capsys.readouterr() == ("", "")
    pytest.importorskip("rich")
    record(toy, [images], progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    with progress_bar(None, "recording", 5) as advance:
        advance(5)
    assert capsys.readouterr().err == ""


def test_a_bar_without_rich_says_what_to_install(toy, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r'needs rich; install it with: pip install "decouplify\[cli\]"'):
        record(toy, [images], progress=True)
    record(toy, [images], progress=False)
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: False, write=print, flush=print))
    record(toy, [images])
