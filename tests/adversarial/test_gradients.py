"""Gate-aware gradients, and the attack that uses them against the detector."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import decouplify
from decouplify.adversarial import PGD, AdaptiveAttack, GateAware, craft, observe, soft_gates
from decouplify.controller import straight_through
from toynets import TOYS


def gradient_of_path(model: nn.Module, x: Tensor) -> Tensor:
    """How the number of open gates depends on the images."""
    model(x)
    return torch.autograd.grad(model.module.decoupling.path().sum(), x)[0]


def test_outputs_do_not_change(trained) -> None:
    x = trained.images[:9]
    before = trained.pixel(x)
    with soft_gates(trained.pixel):
        inside = trained.pixel(x)
    assert torch.equal(before, inside)
    assert torch.equal(trained.pixel(x), before)


def test_gates_stay_exactly_binary_and_can_be_recorded(trained) -> None:
    batch = [trained.pixel.normalise(trained.images[:9])]
    plain = decouplify.record(trained.pixel.module, batch)
    with soft_gates(trained.pixel):
        assert (decouplify.record(trained.pixel.module, batch).bits == plain.bits).all()


def test_straight_through_values_are_not_rounded() -> None:
    g = torch.linspace(-30, 30, 100_001)
    assert torch.equal(straight_through(g, torch.sigmoid(g)), (g > 0).float())


@pytest.mark.parametrize("slope", [0.5, 1.0, 4.0])
def test_gates_have_the_gradient_of_the_sigmoid(trained, slope) -> None:
    gates = trained.pixel.module.decoupling
    x = trained.images[:9].clone().requires_grad_()
    assert (gradient_of_path(trained.pixel, x) == 0).all()  # without the context
    with soft_gates(trained.pixel, slope):
        trained.pixel(x)
        (found,) = torch.autograd.grad(gates.path().sum(), x, retain_graph=True)
        soft = sum(torch.sigmoid(slope * g).sum() for g in gates.margins().values())
        (expected,) = torch.autograd.grad(soft, x)
    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected)


def test_the_context_ends_after_an_error(trained) -> None:
    with pytest.raises(KeyError), soft_gates(trained.pixel):
        raise KeyError
    assert (gradient_of_path(trained.pixel, trained.images[:2].clone().requires_grad_()) == 0).all()


def test_closed_gates_before_a_relu_still_have_a_gradient() -> None:
    """A value of exactly zero would get none from the ReLU behind it, and the gate none from the value."""
    model = TOYS["UnreachableRelu"].wrapped(bias=-2.0).eval()
    gates = model.decoupling
    with soft_gates(model), gates.forced({"after.0": torch.ones(8)}):
        loss = model(torch.rand(2, 3, 16, 16)).square().sum()
        (gradient,) = torch.autograd.grad(loss, gates.margins()["conv"])
    assert (gates.gates()["conv"] == 0).all()
    assert gradient.abs().max() > 0


def test_wrong_input_is_refused(trained) -> None:
    with pytest.raises(ValueError, match="soft_gates: slope is 0, wanted above 0"), soft_gates(trained.pixel, 0):
        pass
    with pytest.raises(ValueError, match="soft_gates: Linear is not wrapped"), soft_gates(nn.Linear(1, 1)):
        pass


def test_gate_aware_attacks_see_another_gradient(trained) -> None:
    x, y = trained.images[:20], trained.labels[:20]
    plain, aware = (craft(attack, trained.pixel, x, y) for attack in (PGD(), GateAware(PGD())))
    assert aware.name == "gate-aware pgd"
    assert not torch.equal(plain.images, aware.images)
    assert aware.success.float().mean() > 0.7


def test_the_adaptive_attack_brings_paths_nearer_to_the_new_class(trained) -> None:
    clean = observe(trained.pixel, trained.images)
    rates = torch.stack([torch.from_numpy(clean.path[clean.preds == c].mean(0)) for c in range(4)])

    own = float((torch.from_numpy(clean.path) - rates[clean.preds]).square().mean())  # of clean images to their class

    def distance(weight: float) -> tuple[float, float]:
        crafted = craft(AdaptiveAttack(rates, weight), trained.pixel, trained.images, trained.labels)
        path = torch.from_numpy(observe(trained.pixel, crafted.images).path)
        to_class = (path - rates[crafted.preds]).square().mean(1)
        return float(to_class[crafted.success].mean()), float(crafted.success.float().mean())

    (plain, plain_success), (pulled, pulled_success) = distance(0.0), distance(100.0)
    assert plain_success > 0.8
    assert pulled_success > 0.6
    assert pulled - own < 0.9 * (plain - own)
