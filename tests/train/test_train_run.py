"""Runs are repeatable, resumable, and change only what they are asked to."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import decouplify
from decouplify.cifar import CifarResNet, crop_and_flip
from decouplify.errors import CheckpointError, NonFiniteError
from decouplify.train import (
    DecouplingRecipe,
    Recipe,
    decouple,
    distillation,
    evaluate,
    json_lines,
    objective,
    train_dense,
)

N = 48


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (N,), generator=generator)
    shades = torch.randn(4, 3, 1, 1, generator=generator)
    return shades[labels] + 0.3 * torch.randn(N, 3, 8, 8, generator=generator), labels


def wrapped(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = CifarResNet(1, n_classes=4, width=2)
    return decouplify.wrap(model, (3, 8, 8), **{"input_norm": True, **options})


def recipe(**changes: Any) -> DecouplingRecipe:
    return DecouplingRecipe(**{"epochs": 3, "batch_size": 16, "norm_batches": 3, **changes})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_equal_seeds_give_equal_networks(images: tuple[Tensor, Tensor]) -> None:
    a, b, c = wrapped(), wrapped(), wrapped()
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        decouple(model, *images, recipe(epochs=1, seed=seed), augment=crop_and_flip)
    assert same(a, b)
    assert not same(a, c)


def test_the_target_is_met_on_images_as_evaluation_meets_them(images: tuple[Tensor, Tensor]) -> None:
    """An augmentation may change how many gates open: neither steering nor thresholds shall look at its images."""
    model, n_augmented = wrapped(), 0

    def blackened(x: Tensor) -> Tensor:
        nonlocal n_augmented
        n_augmented += 1
        return torch.zeros_like(x)

    decouple(model, *images, recipe(epochs=2, norm_batches=1), augment=blackened)
    assert n_augmented == 2 * N // 16 + 1  # training, and the norms' statistics


def test_a_run_cut_after_each_epoch_ends_with_the_numbers_of_one_that_was_not(
    images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    whole, state = wrapped(), str(tmp_path / "run.state")
    expected = decouple(whole, *images, recipe(epochs=2), augment=crop_and_flip)
    for n_epochs in (1, 2):
        cut = wrapped()

        def stop(epoch: dict[str, Any], last: int = n_epochs) -> None:
            if epoch["epoch"] == last + 1:  # the state of the epoch before is on disk
                raise KeyboardInterrupt

        try:
            history = decouple(cut, *images, recipe(epochs=2), augment=crop_and_flip, state=state, progress=stop)
        except KeyboardInterrupt:
            continue
    assert history.finished
    assert same(cut, whole)
    assert [epoch["loss"] for epoch in history.epochs] == [epoch["loss"] for epoch in expected.epochs]


def test_a_run_out_of_time_says_so_and_a_finished_one_stays_finished(
    images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    state = str(tmp_path / "run.state")
    model = CifarResNet(1, n_classes=4, width=2)
    assert not train_dense(model, *images, Recipe(2, batch_size=16), state=state, stop_after_s=-1.0).finished
    assert train_dense(model, *images, Recipe(2, batch_size=16), state=state).finished
    trained = copy.deepcopy(model)
    again = train_dense(model, *images, Recipe(2, batch_size=16), state=state)
    assert again.finished
    assert len(again.epochs) == 2
    assert same(model, trained)


def test_the_state_of_another_run_is_refused(images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    state = str(tmp_path / "run.state")
    model = CifarResNet(1, n_classes=4, width=2)
    train_dense(model, *images, Recipe(1, batch_size=16), state=state)
    before = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match=r"belongs to another run[\s\S]*'lr': 0.05[\s\S]*'lr': 0.3"):
        train_dense(model, *images, Recipe(1, lr=0.3, batch_size=16), state=state)
    assert same(model, before)
    Path(state).write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="is not the state of a training run"):
        train_dense(model, *images, Recipe(1, batch_size=16), state=state)


def test_stopping_early_needs_a_file_to_go_on_from(images: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="stop_after_s without state"):
        train_dense(CifarResNet(1, n_classes=4, width=2), *images, Recipe(1), stop_after_s=1.0)


def test_accumulated_batches_give_the_step_of_one_large_batch(images: tuple[Tensor, Tensor]) -> None:
    images = (images[0][:32], images[1][:32])

    def trained(**changes: Any) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4))
        train_dense(model, *images, Recipe(1, **changes))
        return model

    large, small = trained(batch_size=32), trained(batch_size=16, accumulate=2)
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_without_labels_a_network_learns_from_what_it_was(images: tuple[Tensor, Tensor]) -> None:
    model = wrapped()
    with torch.no_grad():
        before = model.eval()(images[0]).argmax(1)
    network = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("decoupling.")}
    gates = [p.clone() for p in model.decoupling.controllers.parameters()]
    history = decouple(model, images[0], None, recipe(trained="gates", target="1.3x"))
    assert history.epochs[-1]["loss"] >= 0
    assert all(torch.equal(p, network[name]) for name, p in model.named_parameters() if name in network)
    assert any(not torch.equal(a, b) for a, b in zip(gates, model.decoupling.controllers.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert evaluate(model, images[0], before) > 0.5  # agreement with the network as it was


def test_gates_and_norms_leave_convolutions_alone(images: tuple[Tensor, Tensor]) -> None:
    model = wrapped()
    conv, norm = model.layer1[0].conv1.weight.clone(), model.layer1[0].bn1.weight.clone()
    decouple(model, *images, recipe(epochs=1, trained="gates and norms"))
    assert torch.equal(model.layer1[0].conv1.weight, conv)
    assert not torch.equal(model.layer1[0].bn1.weight, norm)


def test_neither_labels_nor_a_teacher_is_an_error(images: tuple[Tensor, Tensor]) -> None:
    model = wrapped()
    with pytest.raises(ValueError, match="neither labels nor a teacher"):
        decouple(model, images[0], None, recipe(), teacher=None)
    with pytest.raises(ValueError, match="teacher='somebody'"):
        decouple(model, *images, recipe(), teacher="somebody")


def test_a_loader_trains_as_tensors_do(images: tuple[Tensor, Tensor]) -> None:
    model = wrapped()
    loader = DataLoader(TensorDataset(*images), 16, shuffle=True)
    history = decouple(model, loader, None, recipe(epochs=1))
    assert history.finished
    with pytest.raises(ValueError, match="a loader brings its own labels"):
        decouple(model, loader, images[1], recipe(epochs=1))
    with pytest.raises(ValueError, match="has no length"):
        train_dense(CifarResNet(1, n_classes=4, width=2), (batch for batch in loader), None, Recipe(1, batch_size=16))


@pytest.mark.filterwarnings("ignore:training. this processor has no instructions")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains(images: tuple[Tensor, Tensor], precision: Any) -> None:
    model = wrapped()
    history = decouple(model, *images, recipe(epochs=1, precision=precision, channels_last=True))
    assert history.finished
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_it_says_where_half_precision_is_emulated(
    images: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, half = CifarResNet(1, n_classes=4, width=2), Recipe(1, batch_size=16, precision="bfloat16")
    monkeypatch.setattr(objective, "computes_in", lambda dtype: dtype == torch.float32)
    with pytest.warns(UserWarning, match=r"no instructions for precision='bfloat16'.* precision='float32'") as warned:
        train_dense(model, *images, half)
    assert warned[0].filename == __file__
    train_dense(model, *images, Recipe(1, batch_size=16))
    monkeypatch.setattr(objective, "computes_in", lambda dtype: True)
    train_dense(model, *images, half)


def test_a_loss_that_is_not_finite_stops_the_run(images: tuple[Tensor, Tensor]) -> None:
    broken = images[0].clone()
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="the loss of epoch 1 is nan"):
        train_dense(CifarResNet(1, n_classes=4, width=2), broken, images[1], Recipe(1, batch_size=16))


def test_clipped_gradients_take_no_larger_step(images: tuple[Tensor, Tensor]) -> None:
    def step(clip_norm: float) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        start = model[1].weight.detach().clone()
        train_dense(model, *images, Recipe(1, 1.0, N, 0.0, momentum=0.0, clip_norm=clip_norm, warmup_epochs=0.0))
        return float((model[1].weight.detach() - start).norm())

    assert step(0.01) <= 0.01 + 1e-6 < step(float("inf"))


def test_each_epoch_becomes_a_line_of_json(images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    history = decouple(wrapped(), *images, recipe(epochs=2), progress=json_lines(file))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == history.epochs
    assert {"epoch", "loss", "accuracy", "seconds", "keep_ratio", "macs", "measured"} == lines[0].keys()
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        json_lines(tmp_path / "nowhere" / "metrics.jsonl")


def test_distillation_is_the_scaled_divergence_and_zero_for_equal_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 3, generator=generator).unbind()
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    expected = 4 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(distillation(student, teacher, 2.0), expected)
    assert float(distillation(student, student, 2.0)) == pytest.approx(0.0, abs=1e-6)
