"""The three losses, term by term against loops, and the one object that adds them to a training loop."""

from __future__ import annotations

import fnmatch
import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import decouplify
from decouplify.cifar import CifarResNet
from decouplify.errors import NonFiniteError
from decouplify.losses import DecouplingLoss, fit_head, kl_divergence, mutual_information, parameter_groups, sparsity
from toynets import N_CLASSES, TOYS, random_images, randomise_gates

N, K = 4, 6
LABELS = torch.tensor([0, 3, 1, 4])
SOFT_LABELS = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0.2] * 5])


def a_gate(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(N, K, generator=generator, dtype=torch.float64).requires_grad_(True)


def a_head() -> nn.Linear:
    return nn.Linear(K, N_CLASSES, dtype=torch.float64)


# The terms as loops ---------------------------------------------------------------------------------------------------


def cross_entropy_by_loop(z: list[list[float]], head: nn.Linear, attribute: Tensor) -> float:
    weight, bias, total = head.weight.tolist(), head.bias.tolist(), 0.0
    for image, row in enumerate(z):
        logits = [
            b + sum(w * gate for w, gate in zip(ws, row, strict=True)) for ws, b in zip(weight, bias, strict=True)
        ]
        log_sum = math.log(sum(math.exp(logit) for logit in logits))
        for value, logit in enumerate(logits):
            hard = float(attribute.dim() == 1 and attribute[image] == value)
            share = float(attribute[image, value]) if attribute.dim() == 2 else hard
            total -= share * (logit - log_sum)
    return total / len(z)


def kl_by_loop(z: list[list[float]], y: list[list[float]]) -> float:
    total = 0.0
    for gates, responses in zip(z, y, strict=True):
        open_, all_ = sum(gates), sum(responses) + len(responses) * 1e-6
        for gate, response in zip(gates, responses, strict=True):
            if gate > 0:
                total += gate / open_ * (math.log(gate / open_) - math.log((response + 1e-6) / all_))
    return total / len(z)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("attribute", [LABELS, SOFT_LABELS.double()])
def test_mutual_information_is_the_cross_entropy_of_the_head(attribute: Tensor, literal: bool) -> None:
    z, head = a_gate(), a_head()
    expected = cross_entropy_by_loop(z.tolist(), head, attribute)
    assert mutual_information(z, head, attribute, literal).item() == pytest.approx(expected)


def test_by_default_the_head_does_not_see_the_gradient_of_the_gates_term() -> None:
    z, head = a_gate(), a_head()
    mutual_information(z, head, LABELS).backward()
    assert head.weight.grad is None
    by_default, z.grad = z.grad, None
    mutual_information(z, head, LABELS, literal=True).backward()
    assert head.weight.grad.any()
    assert torch.equal(z.grad, by_default)


def test_fitting_the_head_adds_nothing_to_the_value_and_the_full_gradient_to_the_head() -> None:
    z, head, twin = a_gate(), a_head(), a_head()
    twin.load_state_dict(head.state_dict())
    term = fit_head(z, head, LABELS)
    assert term.item() == 0
    term.backward()
    F.cross_entropy(twin(z.detach()), LABELS).backward()
    assert z.grad is None
    assert torch.equal(head.weight.grad, twin.weight.grad)
    assert torch.equal(head.bias.grad, twin.bias.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_of_half_precision_works_on_the_gates_in_theirs(bias: bool) -> None:
    z, head = a_gate().detach().float(), nn.Linear(K, N_CLASSES, bias, dtype=torch.bfloat16)
    assert mutual_information(z, head, LABELS).dtype == torch.float32


@given(st.integers(0, 2**16))
def test_kl_is_that_of_the_two_normalised_vectors(seed: int) -> None:
    z, y = a_gate(seed).detach(), 3 * a_gate(seed + 1).detach()
    z[0] = (z[0] > 0.5).double()
    assert kl_divergence(z, y).item() == pytest.approx(kl_by_loop(z.tolist(), y.tolist()), abs=1e-5)


@pytest.mark.parametrize("literal", [False, True])
def test_closed_gates_leave_kl_finite_and_images_without_open_gates_add_nothing(literal: bool) -> None:
    z, y = a_gate().detach(), a_gate(1).detach()
    z[0, :3], z[1] = 0, 0
    z.requires_grad_(True)
    y.requires_grad_(True)
    loss = kl_divergence(z, y, literal)
    assert loss.item() == pytest.approx(kl_by_loop(z.tolist(), y.tolist()), abs=1e-5)
    loss.backward()
    assert y.grad.isfinite().all()
    assert not y.grad[1].any()
    if literal:
        assert z.grad.isfinite().all()
        assert (z.grad[0, :3] < 0).all()  # opening a filter that responds brings z closer to y
        assert not z.grad[1].any()


def test_kl_is_zero_for_proportional_vectors_and_finite_for_zeros() -> None:
    z = a_gate().detach()
    assert kl_divergence(z, 7 * z).item() == pytest.approx(0, abs=1e-4)
    assert kl_divergence(torch.zeros(N, K), torch.zeros(N, K)).item() == 0
    assert kl_divergence(torch.ones(N, K), torch.zeros(N, K)).item() == pytest.approx(0, abs=1e-5)


def test_kl_sends_its_gradient_into_the_responses_and_only_literally_into_the_gates() -> None:
    z, y = a_gate(0), a_gate(1)
    kl_divergence(z, y).backward()
    assert z.grad is None
    assert y.grad.any()
    kl_divergence(z, y, literal=True).backward()
    assert z.grad.any()


@pytest.mark.parametrize("keep_ratio", [0.0, 0.25, 0.9])
def test_sparsity_is_the_distance_of_the_mean_number_of_open_gates_from_its_target(keep_ratio: float) -> None:
    z = a_gate()
    mean = sum(sum(row) for row in z.tolist()) / N
    assert sparsity(z, keep_ratio).item() == pytest.approx(abs(mean - keep_ratio * K))
    assert sparsity(z, keep_ratio, literal=True).item() == pytest.approx(mean - keep_ratio * K)


def test_sparsity_pulls_towards_its_target_from_both_sides() -> None:
    z = a_gate()
    for keep_ratio, sign in ((0.0, 1), (1.0, -1)):
        (gradient,) = torch.autograd.grad(sparsity(z, keep_ratio), z)
        assert torch.allclose(gradient, torch.full_like(gradient, sign / N))
    (literally,) = torch.autograd.grad(sparsity(z, 1.0, literal=True), z)
    assert (literally > 0).all()


# The sum over gates ---------------------------------------------------------------------------------------------------


def wrapped(name: str = "NormBeforeAdd", **options: Any) -> nn.Module:
    return randomise_gates(TOYS[name].wrapped(**options)).train()


def head_of(model: nn.Module, gate: str) -> nn.Linear:
    return model.decoupling.heads[gate.replace(".", "__")]


def gates_of(model: nn.Module) -> dict[str, list[list[float]]]:
    return {name: z.tolist() for name, z in model.decoupling.gates().items()}


@pytest.mark.parametrize("name", ["NormBeforeAdd", "SharedRelu", "ParallelBranches", "LinearOnMaps"])
def test_the_value_is_the_weighted_sum_of_the_terms_of_all_gates(name: str) -> None:
    model = wrapped(name)
    criterion = DecouplingLoss(model, mutual_information=0.3, kl=0.2, sparsity=0.1, target=0.4, per_gate=True)
    model(random_images(N))
    gates, pooled = gates_of(model), dict(model.decoupling.last_forward().pooled)
    total = criterion(LABELS).item()
    mi = {g: cross_entropy_by_loop(z, head_of(model, g), LABELS) for g, z in gates.items()}
    kl = {g: kl_by_loop(gates[g], y.tolist()) for (g, _), y in pooled.items()}
    sparse = {g: abs(sum(map(sum, z)) / N - 0.4 * len(z[0])) for g, z in gates.items()}
    assert pooled.keys() == {(gate.name, end) for gate in model.decoupling.plan.gates for end in gate.ends}
    terms = criterion.terms
    for term, expected in ((terms.mutual_information, mi), (terms.kl, kl), (terms.sparsity, sparse)):
        assert term.item() == pytest.approx(sum(expected.values()), rel=1e-4)
        assert not term.requires_grad
    assert total == pytest.approx(
        0.3 * sum(mi.values()) + 0.2 * sum(kl.values()) + 0.1 * sum(sparse.values()), rel=1e-4
    )
    for term, expected in (("mutual_information", mi), ("kl", kl), ("sparsity", sparse)):
        assert {g: v.item() for g, v in terms.by_gate[term].items()} == pytest.approx(expected, rel=1e-4)
    n_open, n_gates = sum(sum(map(sum, z)) for z in gates.values()), sum(N * len(z[0]) for z in gates.values())
    assert terms.keep_ratio.item() == pytest.approx(n_open / n_gates)
    assert math.isnan(terms.macs.item())


class _Kernels(TorchDispatchMode):
    """Counts the operators that run."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", [None, "2.0x"])
def test_gates_of_one_width_are_judged_together(target: str | None) -> None:
    counts = []
    for n_blocks in (1, 3):
        model = decouplify.wrap(CifarResNet(n_blocks), (3, 32, 32), verify=False).train()
        criterion = DecouplingLoss(model, sparsity=0.0, target=target, check_finite=False)
        for _ in range(2):  # the first time what the cost model keeps is made
            model(torch.randn(N, 3, 32, 32))
            with _Kernels() as kernels:
                criterion(LABELS)
        counts.append((len(model.decoupling.plan.gates), kernels.n))
    (few, n_for_few), (many, n_for_many) = counts
    assert (n_for_many - n_for_few) / (many - few) < 12  # one by one it is 50 for each gate


def test_terms_are_listed_in_the_order_of_the_gates() -> None:
    model = decouplify.wrap(CifarResNet(2, inner=0.5), (3, 32, 32), verify=False).train()
    criterion = DecouplingLoss(model, per_gate=True)
    model(torch.randn(N, 3, 32, 32))
    criterion(LABELS)
    order = [gate.name for gate in model.decoupling.plan.gates]
    assert all(list(values) == order for values in criterion.terms.by_gate.values())


def test_a_gate_with_two_ends_sums_the_divergence_from_both() -> None:
    model = wrapped("DepthwiseChain")
    criterion = DecouplingLoss(model, per_gate=True)
    model(random_images(N))
    gates, pooled = gates_of(model), dict(model.decoupling.last_forward().pooled)
    criterion(LABELS)
    both = [kl_by_loop(gates["expand.0"], y.tolist()) for (gate, _), y in pooled.items() if gate == "expand.0"]
    assert len(both) == 2
    assert criterion.terms.by_gate["kl"]["expand.0"].item() == pytest.approx(sum(both), rel=1e-4)


def test_pooled_outputs_are_mean_magnitudes_before_gating() -> None:
    model = wrapped("NoNorm")
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, a, y, name=name: seen.__setitem__(name, y), prepend=True
        )
        for name in ("act", "conv2")
    ]
    DecouplingLoss(model)
    model(random_images(N))
    for (_, end), y in model.decoupling.last_forward().pooled.items():
        assert torch.allclose(y, seen[end.module].abs().mean((2, 3)), atol=1e-6)
    for handle in handles:
        handle.remove()


def test_without_the_kl_term_nothing_is_pooled() -> None:
    model = wrapped()
    DecouplingLoss(model, kl=0)
    model(random_images(N))
    assert model.decoupling.last_forward().pooled == {}


def test_terms_with_weight_zero_are_neither_computed_nor_need_labels() -> None:
    model = wrapped()
    criterion = DecouplingLoss(model, mutual_information=0, kl=0, sparsity=0.5)
    model(random_images(N))
    assert criterion().item() > 0
    assert (criterion.terms.mutual_information, criterion.terms.kl) == (0, 0)


def test_soft_labels_are_an_attribute_too() -> None:
    model = wrapped()
    criterion = DecouplingLoss(model, kl=0, sparsity=0)
    model(random_images(N))
    gates = gates_of(model)
    criterion(SOFT_LABELS)
    expected = sum(cross_entropy_by_loop(z, head_of(model, g), SOFT_LABELS) for g, z in gates.items())
    assert criterion.terms.mutual_information.item() == pytest.approx(expected, rel=1e-4)


def test_the_literal_form_is_the_formula_as_printed() -> None:
    model = wrapped()
    criterion = DecouplingLoss(model, mutual_information=0.3, kl=0.2, sparsity=0.1, literal=True)
    model(random_images(N))
    gates = model.decoupling.gates()
    pooled = dict(model.decoupling.last_forward().pooled)
    loss = criterion(LABELS)
    by_hand = sum(0.3 * F.cross_entropy(head_of(model, g)(z), LABELS) for g, z in gates.items())
    by_hand = by_hand + sum(0.2 * kl_divergence(gates[g], y, literal=True) for (g, _), y in pooled.items())
    by_hand = by_hand + sum(0.1 * z.sum(1).mean() for z in gates.values())
    parameters = list(model.decoupling.parameters())
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(by_hand, parameters), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-6)


# Gradients ------------------------------------------------------------------------------------------------------------


def test_heads_learn_at_the_full_rate_and_gates_at_lambda_times_the_frozen_heads() -> None:
    model = wrapped()
    criterion = DecouplingLoss(model, mutual_information=0.01, kl=0, sparsity=0)
    model(random_images(N))
    gates = model.decoupling.gates()
    for z in gates.values():
        z.retain_grad()
    criterion(LABELS).backward()
    for name, z in gates.items():
        head, frozen = head_of(model, name), z.detach().requires_grad_(True)
        loss = F.cross_entropy(head(frozen), LABELS)
        for_gate, for_head = torch.autograd.grad(loss, [frozen, head.weight])
        own = 0.01 * for_gate
        assert torch.allclose(head.weight.grad, for_head, atol=1e-7)
        # Gates of later layers depend on those of earlier ones, which therefore get more than their own term.
        if name == list(gates)[-1]:
            assert torch.allclose(z.grad, own, atol=1e-8)


def test_the_kl_term_reaches_features_and_no_last_gate() -> None:
    model = wrapped("Plain")
    criterion = DecouplingLoss(model, mutual_information=0, kl=1.0, sparsity=0)
    model(random_images(N))
    criterion().backward()
    assert model.b[0].weight.grad.any()
    assert not model.decoupling.controllers["b__0"].fc2.bias.grad.any()
    assert all(head.weight.grad is None for head in model.decoupling.heads.values())


@pytest.mark.parametrize("name", ["Plain", "SharedRelu", "DepthwiseChain", "ParallelBranches", "LinearOnMaps"])
def test_after_two_steps_all_four_tensors_of_every_controller_have_moved(name: str) -> None:
    model = TOYS[name].wrapped(width=16, reduction=1).train()
    criterion = DecouplingLoss(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        (F.cross_entropy(model(random_images(N)), LABELS) + criterion(LABELS)).backward()
        optimizer.step()
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    expected = {key for key, _ in model.named_parameters()}
    assert expected - moved == set()


@pytest.mark.parametrize("name", [name for name in TOYS if name not in ("TwoOutputs", "DictOutput")])
def test_closed_gates_get_a_gradient_from_the_task(name: str) -> None:
    """Also before a rectifier, where a plain zero would block it."""
    model = TOYS[name].wrapped(bias=-0.5).train()
    for controller in model.decoupling.controllers.values():
        nn.init.zeros_(controller.fc2.weight)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.abs_()  # else a filter may be dead, and then no gate matters
    model.decoupling.hard = True
    F.cross_entropy(model(random_images(32)), torch.arange(32) % N_CLASSES).backward()
    assert not any(z.any() for z in model.decoupling.gates().values())
    last = list(model.decoupling.controllers.values())[-1]
    assert last.fc2.bias.grad.any()


def test_the_same_seed_gives_the_same_run() -> None:
    def losses(seed: int) -> list[float]:
        torch.manual_seed(0)
        model = TOYS["SharedRelu"].wrapped().train()
        criterion, optimizer = DecouplingLoss(model), torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(seed)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(random_images(N)), LABELS) + criterion(LABELS)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_nothing_of_a_judged_forward_stays_alive() -> None:
    model = wrapped()
    criterion = DecouplingLoss(model, per_gate=True)
    model(random_images(N))
    forward = model.decoupling.last_forward()
    old = [weakref.ref(t) for t in (*forward.gates.values(), *forward.logits.values(), *forward.pooled.values())]
    del forward
    loss = criterion(LABELS)
    assert model.decoupling.gates() == {}
    loss.backward()
    del loss
    gc.collect()
    assert [reference() for reference in old] == [None] * len(old)
    assert criterion.terms is not None


# Targets --------------------------------------------------------------------------------------------------------------


def test_a_mapping_gives_each_gate_the_ratio_of_the_first_glob_that_fits() -> None:
    model = wrapped()
    ratios = {"expand*": 0.5, "*.0": 0.25}
    criterion = DecouplingLoss(model, mutual_information=0, kl=0, sparsity=1, target=ratios, per_gate=True)
    model(random_images(N))
    gates = gates_of(model)
    criterion()
    for name, z in gates.items():
        ratio = 0.5 if fnmatch.fnmatch(name, "expand*") else 0.25
        expected = abs(sum(map(sum, z)) / N - ratio * len(z[0]))
        assert criterion.terms.by_gate["sparsity"][name].item() == pytest.approx(expected, abs=1e-5)


def test_a_mac_target_measures_noise_free_gates_and_steers_the_noisy_ones() -> None:
    model = wrapped()
    costs = model.decoupling.costs
    criterion = DecouplingLoss(model, mutual_information=0, kl=0, target="4x", steering=3.0)
    model(random_images(N))
    path = model.decoupling.path().detach()
    hard = torch.cat([(g > 0).double() for g in model.decoupling.margins().values()], 1)
    share = costs.executed(hard).mean().item() / costs.n_dense
    gates = list(model.decoupling.gates().values())
    loss = criterion()
    assert criterion.terms.macs.item() == pytest.approx(share, rel=1e-5)
    assert loss.item() == pytest.approx(3.0 * abs(share / 0.25 - 1), rel=1e-5)
    leaf = path.double().requires_grad_(True)
    (expected,) = torch.autograd.grad(costs.executed(leaf).mean() / costs.n_dense, leaf)
    (gradient,) = torch.autograd.grad(loss, gates[-1])
    scale = 3.0 / 0.25
    assert torch.allclose(gradient.double(), scale * expected[:, -gates[-1].shape[1] :], atol=1e-5)


def test_the_target_scale_ramps_the_distance() -> None:
    model = wrapped()
    criterion = DecouplingLoss(model, mutual_information=0, kl=0, target="2x", steering=1.0)
    losses = []
    for scale in (0.0, 0.5, 1.0):
        criterion.target_scale = scale
        torch.manual_seed(0)
        model(random_images(N))
        loss, share = criterion().item(), criterion.terms.macs.item()
        losses.append(loss)
        assert loss == pytest.approx(abs(share / (1 - scale / 2) - 1), rel=1e-5)
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("2", r"target='2': a MAC reduction is written like \"2.0x\" and is at least \"1x\""),
        ("0.5x", "at least"),
        ("manyx", "target='manyx'"),
        ("nanx", "target='nanx'"),
        ("infx", "target='infx'"),
        (1.5, r"target=1.5: the keep ratio 1.5 is not in \[0, 1\]; for a MAC reduction give a string such as"),
        (-0.1, "is not in"),
        (float("nan"), "is not in"),
        ({"*": 0.5, "a.0": 2.0}, "the keep ratio 2.0 for 'a.0'"),
        ({"layer1*": 0.5}, r"target for 'layer1\*' matches no gate; the gates are a.0, b.0"),
    ],
)
def test_a_target_that_cannot_be_read_says_why(target: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DecouplingLoss(wrapped("Plain"), target=target)


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_an_unwrapped_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"DecouplingLoss: Plain is not wrapped; call decouplify.wrap\(model\) first"):
        DecouplingLoss(TOYS["Plain"].build())


@pytest.mark.parametrize("weight", ["mutual_information", "kl", "sparsity"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_weights_must_not_be_negative(weight: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"DecouplingLoss: {weight}={value} must be a number >= 0"):
        DecouplingLoss(wrapped("Plain"), **{weight: value})


def test_a_model_without_classes_needs_a_number_of_them() -> None:
    with pytest.raises(ValueError, match=r"does not output \(N, classes\).*wrap\(model, n_classes=...\)"):
        DecouplingLoss(wrapped("TwoOutputs"))
    DecouplingLoss(wrapped("TwoOutputs"), mutual_information=0)
    DecouplingLoss(wrapped("TwoOutputs", n_classes=2))


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (None, r"labels None given; a tensor \(N,\) or \(N, 5\) wanted"),
        ([0, 1, 2, 3], r"labels \[0, 1, 2, 3\] given"),
        (torch.zeros(3).long(), r"labels of shape \(3,\) given for a forward of 4 images; \(4,\) or \(4, 5\) wanted"),
        (torch.zeros(4, 1, 1).long(), r"labels of shape \(4, 1, 1\) given"),
        (torch.ones(4, 3) / 3, "soft labels for 3 classes, heads for 5"),
        (torch.zeros(4), r"labels \(N,\) must be integer class indices; cast them with labels.long\(\)"),
        (torch.tensor([0, 1, 2, 5]), "labels from 0 to 5 given, the heads know 0 to 4; for another attribute say wrap"),
        (torch.tensor([-1, 1, 2, 3]), "labels from -1 to 3 given"),
    ],
)
def test_labels_must_fit_forward_and_heads(labels: Any, match: str) -> None:
    model = wrapped("Plain")
    criterion = DecouplingLoss(model)
    model(random_images(N))
    with pytest.raises(ValueError, match=match):
        criterion(labels)


def test_every_forward_is_judged_once() -> None:
    model = wrapped("Plain")
    criterion = DecouplingLoss(model)
    with pytest.raises(RuntimeError, match=r"no forward to judge. Call model\(images\) before criterion\(labels\)"):
        criterion(LABELS)
    model(random_images(N))
    criterion(LABELS)
    with pytest.raises(RuntimeError, match="no forward to judge"):
        criterion(LABELS)


def test_a_forward_in_eval_mode_is_refused() -> None:
    model = wrapped("Plain")
    criterion = DecouplingLoss(model)
    model.eval()(random_images(N))
    with pytest.raises(RuntimeError, match=r"the model was in eval mode; call model.train\(\) before the forward"):
        criterion(LABELS)


def test_a_forward_of_a_part_is_refused() -> None:
    model = wrapped("Plain")
    criterion = DecouplingLoss(model)
    model.a(model.stem(random_images(N)))
    with pytest.raises(RuntimeError, match=r"did not reach 1 of 2 gates \(first: b.0\); run the whole model"):
        criterion(LABELS)


def test_a_forward_without_gradient_is_refused() -> None:
    model = wrapped("Plain")
    criterion = DecouplingLoss(model)
    with torch.no_grad():
        model(random_images(N))
    with pytest.raises(RuntimeError, match=r"no gate has a gradient\. The forward ran under no_grad"):
        criterion(LABELS)
    model.decoupling.requires_grad_(False)
    model.requires_grad_(False)
    model(random_images(N))
    with pytest.raises(RuntimeError, match=r"controllers are frozen; call model.decoupling.requires_grad_\(True\)"):
        criterion(LABELS)


def test_a_loss_that_is_not_finite_names_the_first_bad_gate() -> None:
    model = wrapped("Plain")
    images = random_images(N)
    images[0, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"the loss is not finite; the gates of a.0 are not finite\. Look for NaN"):
        step(model, images)
    model = wrapped("Plain")
    head_of(model, "b.0").weight.data.fill_(math.inf)
    with pytest.raises(NonFiniteError, match=r"first in mutual_information of b\.0"):
        step(model, random_images(N))
    assert math.isnan(step(model, images, check_finite=False).item())


def step(model: nn.Module, images: Tensor, **options: Any) -> Tensor:
    criterion = DecouplingLoss(model, **options)
    model(images)
    return criterion(LABELS)


# Optimiser groups -----------------------------------------------------------------------------------------------------


def test_parameter_groups_hold_every_trainable_parameter_once() -> None:
    model = wrapped()
    model.stem.requires_grad_(False)
    network, gates, heads = parameter_groups(model, lr=0.1, weight_decay=1e-4)
    assert {id(p) for p in gates["params"]} == {id(p) for p in model.decoupling.controllers.parameters()}
    assert {id(p) for p in heads["params"]} == {id(p) for p in model.decoupling.heads.parameters()}
    found = [id(p) for group in (network, gates, heads) for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}
    assert (network["lr"], network["weight_decay"], gates["weight_decay"]) == (0.1, 1e-4, 0)
    assert (gates["lr"], heads["lr"], heads["weight_decay"]) == (pytest.approx(1.0), 0.1, 0)
    torch.optim.SGD([network, gates, heads])


def test_gates_may_have_a_learning_rate_of_their_own() -> None:
    groups = parameter_groups(wrapped("Plain"), lr=0.1, gate_lr=0.3, head_lr=0.2)
    assert [group["lr"] for group in groups] == [0.1, 0.3, 0.2]


def test_a_target_in_macs_can_be_a_share() -> None:
    assert DecouplingLoss(wrapped("Plain"), target_macs=0.5).target_macs == 0.5
    with pytest.raises(ValueError, match="one of them wanted"):
        DecouplingLoss(wrapped("Plain"), target="2x", target_macs=0.5)
    with pytest.raises(ValueError, match=r"a share of the dense MACs in \(0, 1\]"):
        DecouplingLoss(wrapped("Plain"), target_macs=2.0)


def test_information_can_be_ramped() -> None:
    model = wrapped("Plain")
    criterion = DecouplingLoss(model, kl=0.0, sparsity=0.0)
    labels = torch.zeros(N, dtype=torch.long)
    losses = []
    for scale in (0.0, 0.5, 1.0):
        criterion.information_scale = scale
        torch.manual_seed(0)
        model(random_images(N))
        losses.append(criterion(labels).item())
    assert losses[0] == 0.0
    assert losses[1] == pytest.approx(losses[2] / 2)


def test_groups_of_an_unwrapped_model_are_refused() -> None:
    with pytest.raises(ValueError, match="parameter_groups: Plain is not wrapped"):
        parameter_groups(TOYS["Plain"].build(), lr=0.1)
