"""Bad input gets an error that says where, what was given, what was wanted and what to do; nothing is half-changed."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import decouplify
from decouplify.errors import NonFiniteError, PlanError, TraceError
from decouplify.losses import DecouplingLoss

SIZE = (3, 32, 32)


def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4)


def state_of(model: nn.Module) -> object:
    return (
        list(model.state_dict()),
        [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()],
        sorted(vars(model)),
    )


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (3, 2, 2), "runs no convolution"),
        (nn.Sequential(nn.Linear(12, 3)), None, "has no convolution .*nothing to gate"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()),
            SIZE,
            r"no convolution of Sequential can be gated:\n.*first conv",
        ),
    ],
)
def test_a_model_with_nothing_to_gate_is_refused(model: nn.Module, size: tuple[int, ...] | None, message: str) -> None:
    before = state_of(model)
    with pytest.raises(PlanError, match=f"(?s){message}"):
        decouplify.wrap(model, size)
    assert state_of(model) == before


def test_a_size_that_cannot_run_names_the_size_and_the_remedy() -> None:
    model = network()
    before = state_of(model)
    with pytest.raises(
        TraceError, match=r"ResNet does not run on one image of size \(1, 32, 32\).*input_size=\(channels"
    ):
        decouplify.wrap(model, (1, 32, 32))
    assert state_of(model) == before


def test_wrapping_twice_points_to_unwrap() -> None:
    model = decouplify.wrap(network(), SIZE)
    before = state_of(model)
    with pytest.raises(PlanError, match=r"wrapped already; decouplify.unwrap"):
        decouplify.wrap(model, SIZE)
    with pytest.raises(PlanError, match="wrapped already"):
        decouplify.wrap(nn.Sequential(model), SIZE)
    assert state_of(model) == before


def test_unwrapping_what_is_not_wrapped_is_an_error() -> None:
    with pytest.raises(ValueError, match="unwrap: ResNet is not wrapped"):
        decouplify.unwrap(network())


def test_a_frozen_model_is_refused_unless_that_is_meant() -> None:
    model = network().requires_grad_(False)
    before = state_of(model)
    with pytest.raises(PlanError, match=r"parameters of ResNet are frozen .*requires_grad_\(True\), or pass frozen_ok"):
        decouplify.wrap(model, SIZE)
    assert state_of(model) == before
    decouplify.wrap(model, SIZE, frozen_ok=True)
    model.train()
    criterion = DecouplingLoss(model)
    model(torch.randn(4, *SIZE))
    criterion(torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("decoupling."))
    assert model.decoupling.controllers["layer1__0__conv1"].fc2.bias.grad.abs().sum() > 0


def test_a_taken_attribute_is_not_overwritten() -> None:
    model = network()
    model.decoupling = "mine"
    with pytest.raises(PlanError, match="attribute 'decoupling' of its own"):
        decouplify.wrap(model, SIZE)
    assert model.decoupling == "mine"


def test_images_that_are_not_finite_are_refused_everywhere() -> None:
    model = decouplify.wrap(network(), SIZE).eval()
    images, labels = torch.randn(4, *SIZE), torch.tensor([0, 1, 2, 3])
    images[1, 0, 0, :2] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(NonFiniteError, match="count_macs: 2 values of the images are NaN or infinite"):
        decouplify.count_macs(model, images)
    with pytest.raises(NonFiniteError, match="verify: 2 values"):
        decouplify.verify(model, decouplify.sparsify(model), images)
    with pytest.raises(NonFiniteError, match="batch 0"):
        decouplify.record(model, [(images, labels)], progress=False)
    model.train()
    criterion = DecouplingLoss(model)
    model(images)
    with pytest.raises(NonFiniteError, match=r"the gates of .* are not finite.*Look for NaN"):
        criterion(labels)


def test_nan_images_give_nan_answers_and_not_closed_gates() -> None:
    model = decouplify.wrap(network(), SIZE).eval()
    with torch.no_grad():
        assert model(torch.full((1, *SIZE), float("nan"))).isnan().all()


def test_another_image_size_is_counted_only_after_wrapping_for_it() -> None:
    model = decouplify.wrap(network(), SIZE)
    with pytest.raises(ValueError, match=r"size \(3, 64, 64\) given, the model was wrapped for \(3, 32, 32\)"):
        decouplify.count_macs(model, torch.randn(1, 3, 64, 64))


def test_the_sparse_form_refuses_what_is_no_batch_of_images() -> None:
    fast = decouplify.sparsify(decouplify.wrap(network(), SIZE))
    with pytest.raises(ValueError, match=r"images of shape \(3, 32, 32\) given; \(N, C, H, W\)"):
        fast(torch.randn(*SIZE))
    with pytest.raises(ValueError, match="N >= 1 wanted"):
        fast(torch.randn(0, *SIZE))


def test_what_needs_a_wrapped_model_says_so() -> None:
    for call in (decouplify.sparsify, DecouplingLoss, lambda m: decouplify.count_macs(m, torch.randn(1, *SIZE))):
        with pytest.raises(ValueError, match=r"ResNet is not wrapped; call decouplify.wrap\(model\) first"):
            call(network())


def test_control_flow_on_values_is_refused_with_its_module() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv1(x)
            return self.conv2(x) if x.mean() > 0 else x

    with pytest.raises(TraceError, match=r"reads values of the features .*Wrap a part"):
        decouplify.inspect(Picky(), SIZE)
