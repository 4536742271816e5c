"""Checkpoints bring back the surgery and the weights, or say what does not fit and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import decouplify
from decouplify.checkpoint import read_record
from decouplify.errors import CheckpointError, PlanError

SIZE = (3, 32, 32)


def network(n_classes: int = 4, name: str = "test_resnet", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=n_classes).eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = decouplify.wrap(network(), SIZE, input_norm=True, reduction=2, exclude="layer4.*")
    for controller in model.decoupling.controllers.values():
        nn.init.normal_(controller.fc2.bias)
        nn.init.normal_(controller.fc2.weight)
    path = tmp_path / "model.safetensors"
    decouplify.save(model, path, extra={"top1": 0.5})
    return path


def test_a_loaded_model_gives_the_same_bits(checkpoint: Path) -> None:
    first, second = (decouplify.load(network(seed=seed), checkpoint).eval() for seed in (1, 2))
    images = torch.randn(3, *SIZE)
    assert torch.equal(first(images), second(images))
    assert torch.equal(first.decoupling.path(), second.decoupling.path())
    assert 0 < float(first.decoupling.path().detach().mean()) < 1
    options = first.decoupling.plan.options
    assert (options.input_norm, options.reduction, options.exclude) == (True, 2, ("layer4.*",))


def test_the_record_is_json_and_the_file_holds_nothing_but_tensors(checkpoint: Path) -> None:
    record = read_record(checkpoint)
    assert record["extra"] == {"top1": 0.5}
    assert record["n_classes"] == 4
    assert decouplify.Plan.from_dict(record["plan"]).model == "ResNet"
    with safe_open(str(checkpoint), "pt") as file:
        keys = set(file.keys())
    plain = set(network().state_dict())
    assert plain < keys
    assert all(key.startswith("decoupling.") for key in keys - plain)


def test_the_number_of_classes_of_the_heads_comes_back(tmp_path: Path) -> None:
    decouplify.save(decouplify.wrap(network(), SIZE, n_classes=11), tmp_path / "a.safetensors")
    assert decouplify.load(network(), tmp_path / "a.safetensors").decoupling.n_classes == 11


def test_saving_is_all_or_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoint.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        Path(str(args[1])).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("decouplify.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        decouplify.save(decouplify.wrap(network(), SIZE), checkpoint)
    assert checkpoint.read_bytes() == before
    assert [p.name for p in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_saving_into_no_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no directory .*create it first"):
        decouplify.save(decouplify.wrap(network(), SIZE), tmp_path / "missing" / "a.safetensors")


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _text(path: Path) -> None:
    path.write_text("not tensors")


def _plain_weights(path: Path) -> None:
    save_file(network().state_dict(), path)


def _future_format(path: Path) -> None:
    save_file(network().state_dict(), path, metadata={"decouplify": '{"format": 99, "decouplify": "9.0"}'})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncated, "is not a safetensors file"),
        (_text, "is not a safetensors file"),
        (_plain_weights, "no record of a surgery"),
        (_future_format, r"has format 99 of decouplify 9.0; this is .* reads format 1"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    checkpoint: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(checkpoint)
    check_refused(network(), checkpoint, CheckpointError, message)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    check_refused(network(), tmp_path / "no.safetensors", FileNotFoundError, "no checkpoint at .*no.safetensors")


def test_another_architecture_is_refused_with_the_gates_that_differ(checkpoint: Path) -> None:
    other = timm.create_model("resnet10t", num_classes=4).eval()
    check_refused(other, checkpoint, CheckpointError, "saved from ResNet with .* gates.*Only in the file.*only in the")


def test_another_number_of_classes_is_refused_with_the_tensors_that_differ(checkpoint: Path) -> None:
    check_refused(network(5), checkpoint, CheckpointError, r"of another shape: fc.bias \(4,\) instead of \(5,\)")


def test_a_wrapped_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(PlanError, match="is wrapped already"):
        decouplify.load(decouplify.wrap(network(), SIZE), checkpoint)


def check_refused(model: nn.Module, path: Path, error: type[Exception], message: str) -> None:
    """The error is raised and the model is what it was, to the bit."""
    images = torch.randn(2, *SIZE)
    with torch.no_grad():
        expected = model(images)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    with pytest.raises(error, match=message):
        decouplify.load(model, path)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()] == hooks
    with torch.no_grad():
        assert torch.equal(model(images), expected)
