"""Attacks: they stay where they may go, follow the published formulas, and leave the model alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from decouplify.adversarial import (
    BIM,
    FGSM,
    MIFGSM,
    PGD,
    AdaptiveAttack,
    CDRPAttack,
    GateAware,
    PixelModel,
    attack_named,
    craft,
    target_classes,
)

BALLS = [FGSM, BIM, PGD, MIFGSM, lambda eps: GateAware(PGD(eps)), lambda eps: PGD(eps, targeted=True)]
NAMES = ["fgsm", "bim", "pgd", "mifgsm", "gate-aware", "targeted"]


@pytest.fixture
def double(trained):
    """The trained network in double precision, for comparisons with formulas."""
    model = PixelModel(trained.pixel.module, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)).double().eval()
    yield model
    model.float()


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


@pytest.mark.parametrize("make", BALLS, ids=NAMES)
@pytest.mark.parametrize("eps", [1 / 255, 8 / 255, 0.3])
def test_attacks_stay_in_the_ball_and_in_range(trained, make, eps) -> None:
    images, labels = trained.images[:20], trained.labels[:20]
    images = torch.cat([images[:10], images[10:].gt(0.45).float()])  # half of them at the ends of the range
    attacked = make(eps)(trained.pixel, images, labels)
    assert attacked.shape == images.shape
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (attacked - images).abs().max() <= eps + 1e-6
    assert (attacked - images).abs().max() > min(0.5 * eps, 0.05)  # a test that doing nothing would pass tests nothing


@given(n_steps=st.integers(1, 12), step=st.floats(0.001, 0.05))
def test_the_cdrp_attack_goes_no_farther_than_its_steps(trained, n_steps: int, step: float) -> None:
    images, labels = trained.images[:6], trained.labels[:6]
    attacked = CDRPAttack(step, n_steps)(trained.pixel, images, target_classes(labels, 4))
    reach = n_steps * step * trained.pixel.std
    assert ((attacked - images).abs() <= reach + 1e-6).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    normal = trained.pixel.normalise
    low, high = (bound[:, None, None, None] for bound in normal(images).flatten(1).aminmax(dim=1))
    assert ((normal(attacked) >= low - 1e-4) & (normal(attacked) <= high + 1e-4)).all()


def test_fgsm_is_one_step_along_the_sign_of_the_gradient(trained, double) -> None:
    x, y = trained.images[:8].double(), trained.labels[:8]
    expected = (x + 0.02 * gradient(double, x, y).sign()).clamp(0, 1)
    torch.testing.assert_close(FGSM(0.02)(double, x, y), expected, rtol=0, atol=1e-12)


def test_bim_repeats_clipped_steps(trained, double) -> None:
    x, y = trained.images[:8].double(), trained.labels[:8]
    expected = x
    for _ in range(4):
        expected = expected + 0.01 * gradient(double, expected, y).sign()
        expected = torch.minimum(torch.maximum(expected, x - 0.025), x + 0.025).clamp(0, 1)
    torch.testing.assert_close(BIM(0.025, 0.01, 4)(double, x, y), expected, rtol=0, atol=1e-12)


def test_mifgsm_sums_gradients_of_norm_one(trained, double) -> None:
    x, y = trained.images[:8].double(), trained.labels[:8]
    eps, n_steps = 0.02, 5
    expected, velocity = x, torch.zeros_like(x)
    for _ in range(n_steps):
        g = gradient(double, expected, y)
        velocity = 1.0 * velocity + g / g.abs().sum((1, 2, 3), keepdim=True)
        expected = torch.clamp(expected + eps / n_steps * velocity.sign(), x - eps, x + eps).clamp(0, 1)
    torch.testing.assert_close(MIFGSM(eps, n_steps=n_steps)(double, x, y), expected, rtol=0, atol=1e-12)


def test_targeted_attacks_reach_their_classes_more_often_than_others(trained) -> None:
    targets = target_classes(trained.labels, 4)
    attacked = PGD(targeted=True)(trained.pixel, trained.images, targets)
    before, after = (trained.pixel(x).argmax(1) == targets for x in (trained.images, attacked))
    assert after.float().mean() > 0.6 > before.float().mean()


def test_stronger_attacks_have_more_success(trained) -> None:
    success = [
        craft(attack, trained.pixel, trained.images, trained.labels).success.float().mean().item()
        for attack in (FGSM(1 / 255), PGD(1 / 255), PGD(8 / 255))
    ]
    assert success == sorted(success)
    assert success[-1] > 0.8


@pytest.mark.parametrize("attack", [PGD(), CDRPAttack(), AdaptiveAttack(torch.full((4, 60), 0.5))])
def test_an_attack_leaves_the_model_as_it_was(trained, attack) -> None:
    model = trained.pixel
    model.module.body.train()
    weight = model.module.fc.weight
    weight.grad = torch.ones_like(weight)
    try:
        attack(model, trained.images[:4], trained.labels[:4])
        assert model.module.body.training
        assert not model.module.stem.training
        assert torch.equal(weight.grad, torch.ones_like(weight))
        assert weight.requires_grad
    finally:
        model.eval()
        weight.grad = None


def test_the_normalisation_belongs_to_the_model(trained) -> None:
    x = trained.images[:5]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.25, 0.2, 0.3)))
    assert torch.equal(trained.pixel(x), trained.pixel.module((x - mean) / std))
    assert set(trained.pixel.state_dict()) == {f"module.{name}" for name in trained.pixel.module.state_dict()}


def test_presets(trained) -> None:
    assert attack_named("pgd") == PGD(8 / 255, 2 / 255, 20)
    assert attack_named("pgd", 4 / 255) == PGD(4 / 255, 1 / 255, 20)
    assert attack_named("fgsm", 0.1).step == pytest.approx(0.1)
    assert attack_named("mifgsm").step == pytest.approx(0.8 / 255)
    assert [attack_named(name).name for name in ("bim", "cdrp")] == ["bim", "cdrp"]
    assert PGD(targeted=True).name == "pgd, targeted"


def test_targets_are_one_cycle_through_the_classes() -> None:
    target = target_classes(torch.arange(10), 10, seed=3)
    assert sorted(target.tolist()) == list(range(10))
    seen, c = set(), 0
    while c not in seen:
        seen.add(c)
        c = int(target[c])
    assert len(seen) == 10


def test_craft_counts_success_by_the_attacks_own_aim(trained) -> None:
    images, labels = trained.images[:40], trained.labels[:40]
    plain = craft(PGD(), trained.pixel, images, labels, batch_size=16)
    assert torch.equal(plain.success, plain.preds != labels)
    assert torch.equal(plain.preds, trained.pixel(plain.images).argmax(1))

    class AnywhereElse:
        """Is told where to go, and goes to the next class."""

        targeted = True

        def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
            return PGD(targeted=True)(model, images, (labels + 1) % 4)

    wrong = craft(AnywhereElse(), trained.pixel, images, labels, batch_size=16)
    assert wrong.name == "AnywhereElse"
    assert (wrong.preds != labels).any()
    assert torch.equal(wrong.success, wrong.preds == target_classes(labels, 4))
    assert not torch.equal(wrong.success, wrong.preds != labels)


def test_craft_is_repeatable_and_leaves_the_random_state_alone(trained) -> None:
    before = torch.get_rng_state()
    first, second, other = (
        craft(PGD(), trained.pixel, trained.images[:8], trained.labels[:8], seed=s).images for s in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_craft_takes_no_gradients_of_parameters_and_gives_them_back(trained) -> None:
    model = trained.pixel
    before = [parameter.requires_grad for parameter in model.parameters()]
    seen: list[bool] = []

    def broken(model, images, labels):
        seen.extend(parameter.requires_grad for parameter in model.parameters())
        raise RuntimeError("half-way")

    model.module.stem.requires_grad_(False)
    try:
        frozen = [parameter.requires_grad for parameter in model.parameters()]
        with pytest.raises(RuntimeError, match="half-way"):
            craft(broken, model, trained.images[:4], trained.labels[:4])
        assert seen
        assert not any(seen)
        assert [parameter.requires_grad for parameter in model.parameters()] == frozen != before
    finally:
        model.module.stem.requires_grad_(True)


def test_a_function_is_an_attack(trained) -> None:
    def brighten(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return (images + 0.1).clamp(0, 1)

    crafted = craft(brighten, trained.pixel, trained.images[:4], trained.labels[:4])
    assert crafted.name == "brighten"
    assert torch.equal(crafted.images, (trained.images[:4] + 0.1).clamp(0, 1))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda m, x, y: x + 2, "attack <lambda>: returned images: pixels from .* given, .* wanted"),
        (lambda m, x, y: x[:1], r"attack <lambda>: returned shape \(1, 3, 16, 16\), \(4, 3, 16, 16\) wanted"),
        (lambda m, x, y: x * torch.nan, "pixels from nan to nan given"),
    ],
)
def test_craft_refuses_what_is_no_image(trained, bad, message) -> None:
    with pytest.raises(ValueError, match=message):
        craft(bad, trained.pixel, trained.images[:4], trained.labels[:4])


def test_wrong_input_is_refused(trained) -> None:
    x, y = trained.images[:4], trained.labels[:4]
    with pytest.raises(ValueError, match=r"pgd: pixels from .* given, \[0, 1\] wanted; undo the normalisation"):
        PGD()(trained.pixel, trained.pixel.normalise(x), y)
    with pytest.raises(ValueError, match=r"pgd: labels of shape \(3,\) .* integers of shape \(4,\) wanted"):
        PGD()(trained.pixel, x, y[:3])
    with pytest.raises(ValueError, match="no attack is called 'cw'; there are fgsm, bim, pgd, mifgsm, cdrp"):
        attack_named("cw")
    with pytest.raises(ValueError, match="the cdrp attack has no ball"):
        attack_named("cdrp", 0.1)
    with pytest.raises(ValueError, match="eps and step must be positive"):
        PGD(eps=-1)
    with pytest.raises(ValueError, match=r"std .* above 0 wanted"):
        PixelModel(nn.Identity(), (0.5,), (0.0,))
    with pytest.raises(ValueError, match=r"rates of shape \(2, 3\) given, \(4, 60\) wanted"):
        AdaptiveAttack(torch.zeros(2, 3))(trained.pixel, x, y)
