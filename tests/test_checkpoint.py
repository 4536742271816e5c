"""Files: everything comes back, and what does not fit changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import decouplify
from decouplify.checkpoint import read_record
from decouplify.errors import CheckpointError, PlanError
from toynets import SIZE, TOYS, Classifier, random_images, randomise_gates, randomise_statistics, run

OPTIONS = {"reduction": 2, "bias": 1.5, "input_norm": True, "only": ("a.*", "b.*"), "exclude": ("b.*",)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def saved(path: Path, name: str = "Plain", **options: Any) -> nn.Module:
    model = randomise_gates(TOYS[name].wrapped(**options))
    decouplify.save(model, path)
    return model.eval()


def bits(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed load must leave as it was."""
    return {
        "values": {key: tensor.tolist() for key, tensor in model.state_dict().items()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "modules": [name for name, _ in model.named_modules()],
        "modes": [m.training for m in model.modules()],
    }


def check_refused(model: nn.Module, path: Path, match: str, error: type[Exception] = CheckpointError) -> None:
    before = bits(model)
    with pytest.raises(error, match=match):
        decouplify.load(model, path)
    assert bits(model) == before


# There and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(name: str, path: Path) -> None:
    model, fresh = saved(path, name), TOYS[name].build()
    assert decouplify.load(fresh, path) is fresh
    assert list(fresh.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True))
    images = random_images(3)
    assert all(torch.equal(a, b) for a, b in zip(run(fresh.eval(), images), run(model, images), strict=True))
    assert torch.equal(fresh.decoupling.path(), model.decoupling.path())
    assert fresh.decoupling.plan == model.decoupling.plan


def test_options_and_classes_come_back(path: Path) -> None:
    model = saved(path, **OPTIONS, n_classes=3)
    fresh = decouplify.load(TOYS["Plain"].build(), path)
    assert fresh.decoupling.plan.options == model.decoupling.plan.options
    assert {name: getattr(fresh.decoupling.plan.options, name) for name in OPTIONS} == OPTIONS
    assert [head.out_features for head in fresh.decoupling.heads.values()] == [3]
    assert fresh.decoupling.n_classes == 3


def test_models_without_heads_come_back_without(path: Path) -> None:
    saved(path, "TwoOutputs")
    assert decouplify.load(TOYS["TwoOutputs"].build(), path).decoupling.n_classes is None


def test_a_frozen_model_loads_frozen(path: Path) -> None:
    saved(path)
    fresh = decouplify.load(TOYS["Plain"].build().requires_grad_(False), path)
    assert not fresh.fc.weight.requires_grad
    assert fresh.decoupling.controllers["a__0"].fc1.weight.requires_grad


def test_tied_weights_and_other_precisions_are_kept(path: Path) -> None:
    class Tied(TOYS["Plain"].build):
        def __init__(self) -> None:
            super().__init__()
            self.b[0].weight = self.a[0].weight

    model = randomise_statistics(Tied()).bfloat16()
    decouplify.save(decouplify.wrap(model, SIZE), path)
    fresh = decouplify.load(Tied().bfloat16(), path)
    assert fresh.b[0].weight is fresh.a[0].weight
    assert torch.equal(fresh.a[0].weight, model.a[0].weight)
    assert fresh.a[0].weight.dtype == torch.bfloat16


# The file -------------------------------------------------------------------------------------------------------------


def test_the_file_holds_plain_tensors_and_a_json_record(path: Path) -> None:
    model = saved(path)
    with safe_open(path, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    assert keys == set(model.state_dict())
    assert list(metadata) == ["decouplify"]
    record = json.loads(metadata["decouplify"])
    assert record.keys() == {"format", "decouplify", "torch", "n_classes", "plan", "extra"}
    assert record == read_record(path)
    assert (record["format"], record["decouplify"], record["extra"]) == (1, decouplify.__version__, {})
    assert b"pickle" not in path.read_bytes()


def test_further_facts_travel_along(path: Path) -> None:
    decouplify.save(TOYS["Plain"].wrapped(), path, extra={"accuracy": 0.5, "data": ["cifar10"]})
    assert read_record(path)["extra"] == {"accuracy": 0.5, "data": ["cifar10"]}


def test_saving_over_a_file_replaces_it_and_leaves_nothing_else(path: Path) -> None:
    saved(path)
    other = saved(path, "NoNorm")
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert decouplify.load(TOYS["NoNorm"].build(), path).decoupling.plan == other.decoupling.plan


def test_a_failed_save_keeps_the_old_file(path: Path) -> None:
    model = saved(path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        decouplify.save(model, path, extra={"model": object()})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_saving_is_all_or_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved(path)
    before = path.read_bytes()

    def fail(tensors: Any, name: str, **options: Any) -> None:
        Path(name).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("decouplify.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        decouplify.save(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_saving_into_no_directory_says_so(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no directory .*missing.*create it first"):
        decouplify.save(TOYS["Plain"].wrapped(), path.parent / "missing" / path.name)


# Files that do not fit ------------------------------------------------------------------------------------------------


def test_no_file_is_an_error(path: Path) -> None:
    check_refused(TOYS["Plain"].build(), path, "no checkpoint at .*model.safetensors", FileNotFoundError)
    check_refused(TOYS["Plain"].build(), path.parent, "no checkpoint at", FileNotFoundError)


def test_another_kind_of_file_is_refused(path: Path) -> None:
    path.write_bytes(b"PK not a safetensors file at all, but longer than a header")
    check_refused(TOYS["Plain"].build(), path, "is not a safetensors file: ")


def test_an_empty_file_is_refused(path: Path) -> None:
    path.touch()
    check_refused(TOYS["Plain"].build(), path, "is not a safetensors file: ")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(path: Path, share: float) -> None:
    saved(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    check_refused(TOYS["Plain"].build(), path, "is not a safetensors file: ")


def test_plain_weights_are_refused_with_advice(path: Path) -> None:
    save_file(TOYS["Plain"].build().state_dict(), path)
    check_refused(
        TOYS["Plain"].build(), path, "no record of a surgery.*load plain weights into the model before wrapping"
    )


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ("not JSON", "the record of the surgery cannot be read"),
        ('{"format": 1, "plan": {}}', r"the record of the surgery is incomplete \(KeyError: "),
        ('{"format": 1, "plan": {"gates": []}}', "the record of the surgery is incomplete"),
        ('{"format": 2, "decouplify": "9.0"}', "has format 2 of decouplify 9.0; this is .*, which reads format 1"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(path: Path, record: str, match: str) -> None:
    save_file({"x": torch.zeros(1)}, path, metadata={"decouplify": record})
    check_refused(TOYS["Plain"].build(), path, match)


def test_another_architecture_is_refused_by_its_gates(path: Path) -> None:
    saved(path)
    match = (
        r"was saved from Plain with 2 gates, FunctionalRelu has 2. Only in the file: \('a.0', 8, 8\), \('b.0', 8, 8\); "
        r"only in the model: \('a.conv', 8, 8\), \('b.conv', 8, 8\). Build the model that was saved."
    )
    check_refused(TOYS["FunctionalRelu"].build(), path, match)


def test_an_architecture_on_which_the_surgery_fails_is_refused(path: Path) -> None:
    saved(path, only="a.*")
    check_refused(
        TOYS["NoNorm"].build(), path, r"saved from Plain; the same surgery on NoNorm fails: only='a.\*' matches"
    )
    one_channel = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    check_refused(one_channel, path, "the same surgery on Sequential fails: Sequential does not run on one image")


def test_another_width_is_refused_by_its_gates(path: Path) -> None:
    saved(path)
    check_refused(
        TOYS["Plain"].build(4), path, r"Only in the file: \('a.0', 8, 8\).*only in the model: \('a.0', 4, 4\)"
    )


def test_another_number_of_classes_is_refused_by_its_tensors(path: Path) -> None:
    saved(path)
    fresh = TOYS["Plain"].build()
    fresh.fc = nn.Linear(8, 7)
    match = (
        r"does not fit the model. Missing in the file: nothing; not in the model: nothing; of another shape: "
        r"fc.bias \(5,\) instead of \(7,\), fc.weight \(5, 8\) instead of \(7, 8\). Build the model"
    )
    check_refused(fresh, path, match)


def test_missing_and_unknown_tensors_are_named(path: Path) -> None:
    class WithScale(Classifier):
        def __init__(self) -> None:
            super().__init__(8)
            plain = TOYS["Plain"].build()
            self.a, self.b, self.scale = plain.a, plain.b, nn.Parameter(torch.ones(1))

        def body(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * self.scale

    saved(path)
    check_refused(WithScale(), path, "Missing in the file: scale; not in the model: nothing; of another shape: nothing")
    decouplify.save(decouplify.wrap(WithScale(), SIZE), path)
    check_refused(TOYS["Plain"].build(), path, "Missing in the file: nothing; not in the model: scale")


def test_a_wrapped_model_is_refused_and_stays_wrapped(path: Path) -> None:
    model = saved(path)
    check_refused(model, path, "Plain is wrapped already; load into a fresh model of the saved architecture", PlanError)


def test_a_model_without_gates_comes_back_without_gates(path: Path) -> None:
    model, other = TOYS["Plain"].build(), TOYS["Plain"].build()
    decouplify.save(model, path, {"kind": "twin"})
    assert read_record(path)["plan"] is None
    assert decouplify.load(other, path) is other
    assert not hasattr(other, "decoupling")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(PlanError, match="has no gates and Plain is wrapped"):
        decouplify.load(TOYS["Plain"].wrapped(), path)


def test_half_precision_leaves_what_decides_about_gates_alone(path: Path) -> None:
    model = TOYS["Plain"].wrapped()
    decouplify.save(model, path, half=True)
    loaded = decouplify.load(TOYS["Plain"].build(), path)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype
        exact = name.startswith("decoupling.") or tensor.dim() < 2
        expected = model.state_dict()[name] if exact else model.state_dict()[name].half().float()
        assert torch.equal(tensor, expected), name
