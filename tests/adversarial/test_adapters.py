"""Attacks of other libraries behind our protocol. Each library is optional."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from decouplify.adversarial import PGD, ArtAttack, FoolboxAttack, TorchattacksAttack, craft, soft_gates

EPS, STEP, N_STEPS = 6 / 255, 1.5 / 255, 20  # far from all images give way, and from none


@pytest.fixture
def art():
    pytest.importorskip("art")
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    def make(targeted: bool = False) -> ArtAttack:
        settings = {"eps": EPS, "eps_step": STEP, "max_iter": N_STEPS, "num_random_init": 1, "verbose": False}
        return ArtAttack(
            lambda classifier: ProjectedGradientDescentPyTorch(classifier, targeted=targeted, **settings), targeted
        )

    return make


@pytest.fixture
def torchattacks():
    library = pytest.importorskip("torchattacks")
    return lambda targeted=False: TorchattacksAttack(lambda m: library.PGD(m, EPS, STEP, N_STEPS), targeted)


@pytest.fixture
def foolbox():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports SciPy by names that SciPy is about to drop
        library = pytest.importorskip("foolbox")
    attack = library.attacks.LinfPGD(abs_stepsize=STEP, steps=N_STEPS)
    return lambda targeted=False: FoolboxAttack(attack, EPS, targeted)


def success(attack, trained) -> float:
    return float(craft(attack, trained.pixel, trained.images, trained.labels).success.float().mean())


@pytest.mark.parametrize("library", ["art", "torchattacks", "foolbox"])
@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_has_the_success_of_ours_with_equal_settings(trained, request, library, targeted) -> None:
    theirs = request.getfixturevalue(library)(targeted)
    ours = success(PGD(EPS, STEP, N_STEPS, targeted=targeted), trained)
    assert 0.1 < ours < 0.95  # where all or nothing succeeds, nothing is compared
    assert success(theirs, trained) == pytest.approx(ours, abs=0.04)


@pytest.mark.parametrize("library", ["art", "torchattacks", "foolbox"])
def test_attacks_stay_in_the_ball_and_leave_the_model_alone(trained, request, library) -> None:
    attack = request.getfixturevalue(library)()
    x, y = trained.images[:6], trained.labels[:6]
    model, weight = trained.pixel, trained.pixel.module.fc.weight
    model.module.body.train()
    weight.grad = torch.ones_like(weight)
    try:
        attacked = attack(model, x, y)
        assert attacked.device == x.device
        assert attacked.dtype == x.dtype
        assert 0.5 * EPS < (attacked - x).abs().max() <= EPS + 1e-6
        assert (attacked >= 0).all()
        assert (attacked <= 1).all()
        assert model.module.body.training
        assert weight.requires_grad
        assert torch.equal(weight.grad, torch.ones_like(weight))
    finally:
        model.eval()
        weight.grad = None


def test_other_libraries_get_gate_aware_gradients(trained, torchattacks) -> None:
    x, y = trained.images[:20], trained.labels[:20]
    plain = craft(torchattacks(), trained.pixel, x, y)
    with soft_gates(trained.pixel):
        aware = craft(torchattacks(), trained.pixel, x, y)
    assert not torch.equal(plain.images, aware.images)
    assert plain.name == "torchattacks"


def test_a_missing_library_is_named(trained, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "art.estimators.classification", None)
    with pytest.raises(ImportError, match=r"ArtAttack needs art; install it with: pip install \"decouplify\[attacks\]"):
        ArtAttack(lambda classifier: None)(trained.pixel, trained.images[:1], trained.labels[:1])
