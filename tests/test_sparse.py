"""The sparse form computes what the masked form does, and less."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import decouplify
from decouplify.errors import NonFiniteError, VerificationError
from decouplify.losses import DecouplingLoss
from decouplify.sparse import SparseModel, backend, count_executed_macs, native, tuning
from decouplify.sparse.ops import Exists, SparseConv2d, SparseLinear
from decouplify.sparse.verification import relative_error
from toynets import (
    N_CLASSES,
    SIZE,
    TOYS,
    leaves,
    random_gates,
    random_images,
    randomise_gates,
    randomise_statistics,
    run,
)

TOLERANCE = 1e-5


def masked_and_sparse(name: str, **options: Any) -> tuple[nn.Module, SparseModel]:
    model = randomise_gates(TOYS[name].wrapped(verify=False, reduction=1, **options)).eval()
    return model, decouplify.sparsify(model)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(relative_error(a, b) <= TOLERANCE for a, b in zip(found, expected, strict=True))


def set_bias(model: nn.Module, bias: float) -> nn.Module:
    """Controllers that decide the same for every image."""
    for controller in model.decoupling.controllers.values():
        nn.init.zeros_(controller.fc2.weight)
        nn.init.constant_(controller.fc2.bias, bias)
    return model


# Masked == sparse -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_masked_and_sparse_form_agree_layer_by_layer(name: str) -> None:
    model, fast = masked_and_sparse(name)
    report = decouplify.verify(model, fast, random_images(3))
    assert report.max_error <= TOLERANCE
    assert [layer.n_differing for layer in report.layers] == [0] * len(report.layers)
    assert report.n_gates == 3 * model.decoupling.plan.n_filters
    ends = {(end.module, gate.name) for gate in model.decoupling.plan.gates for end in gate.ends}
    assert {(layer.module, layer.gate) for layer in report.layers} == ends


@pytest.mark.parametrize("n_images", [1, 3])
@pytest.mark.parametrize("name", TOYS)
def test_a_batch_is_computed_image_by_image(name: str, n_images: int) -> None:
    model, fast = masked_and_sparse(name)
    images = random_images(n_images)
    expected = run(model, images)
    if n_images > 1:
        assert len(model.decoupling.path().unique(dim=0)) > 1, "all images have one path: nothing was tested"
    assert same(run(fast, images), expected)


@pytest.mark.parametrize("bias", [-3.0, 3.0])
@pytest.mark.parametrize("name", TOYS)
def test_the_forms_agree_with_all_gates_closed_and_with_all_open(name: str, bias: float) -> None:
    model = set_bias(TOYS[name].wrapped(verify=False), bias).eval()
    fast, images = decouplify.sparsify(model), random_images()
    expected = run(model, images)
    assert set(model.decoupling.path().flatten().tolist()) == {float(bias > 0)}
    assert same(run(fast, images), expected)
    assert decouplify.verify(model, fast, images).max_error <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in TOYS if name not in ("LateStage", "ZeroPaddedShortcut")])
def test_the_forms_agree_on_another_image_size(name: str) -> None:
    model, fast = masked_and_sparse(name)
    images = random_images(2, (3, 24, 20))
    assert same(run(fast, images), run(model, images))
    assert decouplify.verify(model, fast, images).max_error <= TOLERANCE


@pytest.mark.parametrize("name", TOYS)
def test_forced_gates_give_the_features_of_the_masked_form(name: str) -> None:
    model, fast = masked_and_sparse(name)
    image, gates = random_images(1), random_gates(model)
    with model.decoupling.forced(gates):
        expected = run(model, image)
    found = fast.run_observed(image.clone(), lambda name, value: None, forced=gates)
    assert same(leaves(found), expected)


@pytest.mark.parametrize("name", ["NormBeforeAdd", "DepthwiseChain", "ParallelBranches", "LinearOnMaps"])
def test_the_forms_agree_after_training(name: str) -> None:
    model = TOYS[name].wrapped().train()
    criterion, optimizer = DecouplingLoss(model), torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(4):
        images, labels = random_images(8, seed=seed), torch.arange(8) % N_CLASSES
        optimizer.zero_grad()
        (F.cross_entropy(model(images), labels) + criterion(labels)).backward()
        optimizer.step()
    assert decouplify.verify(model, decouplify.sparsify(model), random_images(3)).max_error <= TOLERANCE
    assert model.training


@pytest.mark.parametrize("name", ["Plain", "DepthwiseChain", "Grouped"])
def test_double_precision_agrees_to_its_own_rounding(name: str) -> None:
    model = randomise_gates(decouplify.wrap(TOYS[name].build().double(), SIZE)).eval()
    images = random_images().double()
    assert decouplify.verify(model, decouplify.sparsify(model), images, rtol=1e-12).output_error <= 1e-12


def test_differences_as_small_as_rounding_are_called_so() -> None:
    model = randomise_gates(decouplify.wrap(TOYS["Plain"].build(), SIZE)).eval()
    fast = decouplify.sparsify(model)
    with pytest.raises(VerificationError, match=r"can be rounding.* accept it with a larger rtol") as error:
        decouplify.verify(model, fast, random_images(), rtol=1e-12)
    assert 1e-12 < error.value.report.max_error < 1e-5


def test_differences_of_a_short_precision_are_called_so() -> None:
    model = randomise_gates(decouplify.wrap(TOYS["Plain"].build().bfloat16(), SIZE)).eval()
    fast = decouplify.sparsify(model)
    with torch.no_grad():
        fast.graphs[0].get_parameter(next(name for name, _ in fast.graphs[0].named_parameters())).mul_(2)
    with pytest.raises(VerificationError, match=r"In torch.bfloat16 .* compare them in float32"):
        decouplify.verify(model, fast, random_images(2).bfloat16())


def test_models_on_maps_keep_the_structure_of_their_output() -> None:
    for name in ("TwoOutputs", "DictOutput"):
        model, fast = masked_and_sparse(name)
        images = random_images(3)
        found, expected = fast(images), model(images)
        assert torch.utils._pytree.tree_structure(found) == torch.utils._pytree.tree_structure(expected)


@pytest.mark.parametrize("name", ["Plain", "SharedRelu", "DepthwiseChain", "ParallelBranches", "LayerNormPermuted"])
def test_undefined_images_give_undefined_answers_in_both_forms_and_not_closed_gates(name: str) -> None:
    model, fast = masked_and_sparse(name)
    images = torch.full((1, *SIZE), math.nan)
    assert run(model, images)[0].isnan().all()
    assert run(fast, images)[0].isnan().all()


# Less work ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_fewer_open_gates_never_execute_more(name: str) -> None:
    model, fast = masked_and_sparse(name)
    gates, image = random_gates(model), random_images(1)
    n_macs = []
    for factor in (0.0, 1.0):
        with count_executed_macs() as counts:
            fast.run_observed(image.clone(), lambda name, value: None, {g: z * factor for g, z in gates.items()})
        n_macs.append(sum(counts))
    assert n_macs[0] < n_macs[1] < model.decoupling.plan.n_macs + model.decoupling.costs.n_controllers


def test_counting_ends_with_its_context_and_nests() -> None:
    _, fast = masked_and_sparse("Plain")
    with count_executed_macs() as outer:
        fast(random_images(1))
        once = sum(outer)
        with count_executed_macs() as inner:
            fast(random_images(1))
    fast(random_images(1))
    assert sum(outer) == once
    assert sum(inner) == once > 0


# A snapshot -----------------------------------------------------------------------------------------------------------


def test_training_the_model_does_not_reach_the_sparse_form() -> None:
    model, fast = masked_and_sparse("NormBeforeAdd")
    images = random_images()
    before = run(fast, images)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand_like(tensor.float()) + 1)
    assert all(torch.equal(a, b) for a, b in zip(before, run(fast, images), strict=True))
    other_size = random_images(1, (3, 24, 24))
    assert not same(run(fast, other_size), run(model, other_size))


def test_sparsify_leaves_the_model_wrapped_and_in_its_mode() -> None:
    model = TOYS["SharedRelu"].wrapped().train()
    keys, state = list(model.state_dict()), copy.deepcopy(model.state_dict())
    fast = decouplify.sparsify(model)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in keys)
    assert model.training
    assert not any(tensor.requires_grad for tensor in fast.state_dict(keep_vars=True).values())
    assert model(random_images(4)).requires_grad


def test_a_copy_of_the_sparse_form_computes_the_same() -> None:
    _, fast = masked_and_sparse("DepthwiseChain")
    images = random_images()
    assert all(torch.equal(a, b) for a, b in zip(run(copy.deepcopy(fast), images), run(fast, images), strict=True))


def test_the_images_stay_as_they_are() -> None:
    model, fast = masked_and_sparse("NormBeforeAdd")
    images = random_images()
    fast(images)
    decouplify.verify(model, fast, images)
    assert torch.equal(images, random_images())


def test_printing_names_backend_gates_and_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.CACHE_VARIABLE, "")
    # The first way is the fastest.
    monkeypatch.setattr(
        tuning, "_measure", lambda _, group: {c.key: {way: float(i) for i, way in enumerate(c.ways)} for c in group}
    )
    model, _ = masked_and_sparse("SharedRelu")
    fast = decouplify.sparsify(model, mode="exact")
    assert repr(fast) == (
        "SparseModel of SharedRelu for (3, 16, 16) images, mode 'exact'\n"
        f"  backend: {backend()}\n"
        "  gates: 2, filters: 16\n"
        "  sparse operators: 3 SparseConv2d, 1 SparseLinear\n"
    ) + (
        "  engine: 9 steps in 1 calls\n"
        "  convolutions: 3 direct\n"
        "  controllers: 2 run, 0 gates always open\n"
        "  run by torch: nothing"
        if native.engine()
        else "  as recorded: 1 add, 1 relu_, 1 mean"
    )


# Verification ---------------------------------------------------------------------------------------------------------


def test_a_model_changed_after_sparsify_is_told_from_its_sparse_form() -> None:
    model, fast = masked_and_sparse("Plain")
    images = random_images(3)
    with torch.no_grad():
        model.b[0].weight *= 1.1
    with pytest.raises(
        VerificationError, match=r"differs from the masked form in 1 of 2 layers, first in 'b.2'"
    ) as error:
        decouplify.verify(model, fast, images)
    assert [layer.error > TOLERANCE for layer in error.value.report.layers] == [False, True]
    with torch.no_grad():
        model.decoupling.controllers["a__0"].fc2.bias += 10
    with pytest.raises(
        VerificationError, match=r"gates of 'a.0' differ although their logits are up to [0-9.]+ away from"
    ):
        decouplify.verify(model, fast, images)


def test_only_the_last_layer_changed_shows_in_the_output() -> None:
    model, fast = masked_and_sparse("Plain")
    with torch.no_grad():
        model.fc.bias += 1
    with pytest.raises(VerificationError, match="in 0 of 2 layers, first in the output by") as error:
        decouplify.verify(model, fast, random_images(3))
    assert error.value.report.output_error > TOLERANCE


def test_nan_in_the_sparse_form_is_not_taken_for_agreement() -> None:
    model, fast = masked_and_sparse("Plain")
    model.eval()
    (linear,) = (m for m in fast.modules() if isinstance(m, SparseLinear))
    linear.bias.fill_(math.nan)
    with pytest.raises(VerificationError, match="the output by inf"):
        decouplify.verify(model, fast, random_images())


def test_gates_near_the_threshold_may_fall_on_either_side() -> None:
    model = set_bias(TOYS["Plain"].wrapped(), 1e-6)
    fast = decouplify.sparsify(model)
    set_bias(model, -1e-6)
    report = decouplify.verify(model, fast, random_images(2))
    assert report.n_near == 2 * 8 + 2 * 8
    assert report.max_error <= TOLERANCE


def test_a_report_prints_what_was_compared() -> None:
    model, fast = masked_and_sparse("Plain")
    text = str(decouplify.verify(model, fast, random_images(2)))
    assert text.startswith("2 images: output error ")
    assert text.endswith("0 of 32 gates differ, 0 of them within 0.0001 of the threshold")


def test_verification_keeps_every_modules_mode() -> None:
    model = TOYS["Plain"].wrapped().train()
    model.a.eval()
    decouplify.verify(model, decouplify.sparsify(model), random_images())
    assert [m.training for m in (model, model.a, model.a[1], model.b)] == [True, False, False, True]


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.1, 0.0], [0.0, 0.0], math.inf),
        ([math.nan, 0.0], [1.0, 0.0], math.inf),
        ([1.0, 0.0], [math.nan, 0.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_errors_are_relative_to_the_largest_magnitude(found: list[float], expected: list[float], error: float) -> None:
    assert relative_error(torch.tensor(found), torch.tensor(expected)) == error


# Mistakes -------------------------------------------------------------------------------------------------------------


def test_images_must_be_a_batch() -> None:
    _, fast = masked_and_sparse("Plain")
    with pytest.raises(ValueError, match=r"images of shape \(3, 16, 16\) given; \(N, C, H, W\) with N >= 1 wanted"):
        fast(random_images(1)[0])
    with pytest.raises(ValueError, match=r"images of shape \(0, 3, 16, 16\) given"):
        fast(random_images(0))
    with pytest.raises(ValueError, match="SparseModel runs on the CPU; the images are on meta"):
        fast(random_images(1).to("meta"))


def test_verification_needs_finite_images_and_at_least_one() -> None:
    model, fast = masked_and_sparse("Plain")
    images = random_images(2)
    images[0, 0, 0, :2] = math.inf
    with pytest.raises(NonFiniteError, match="verify: 2 values of the images are NaN or infinite"):
        decouplify.verify(model, fast, images)
    with pytest.raises(ValueError, match="verify: no images given"):
        decouplify.verify(model, fast, random_images(0))


def test_an_unwrapped_model_has_no_sparse_form() -> None:
    with pytest.raises(ValueError, match="sparsify: Plain is not wrapped"):
        decouplify.sparsify(TOYS["Plain"].build())


def test_a_number_for_the_whole_batch_cannot_be_joined() -> None:
    class Scalar(TOYS["Plain"].build):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return logits, logits.mean()

    fast = decouplify.sparsify(decouplify.wrap(Scalar(), SIZE))
    with pytest.raises(ValueError, match="a number for the whole batch; give it one image at a time"):
        fast(random_images(2))
    assert fast(random_images(1))[1].dim() == 0


def test_a_size_on_which_other_convolutions_run_is_refused() -> None:
    class TwoScales(TOYS["Plain"].build):
        def body(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) if y.shape[2] > 8 else y

    model = decouplify.wrap(TwoScales(), (3, 32, 32))
    fast = decouplify.sparsify(model)
    with pytest.raises(ValueError, match=r"on images of size \(3, 16, 16\) the model runs other convolutions than on"):
        fast(random_images(1))


# Single operators against dense ones ----------------------------------------------------------------------------------


@given(data=st.data(), seed=st.integers(0, 2**16))
def test_a_sparse_convolution_is_the_dense_one_on_masked_channels(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    groups = data.draw(st.sampled_from([1, 2, 4]))
    n_inputs, n_filters = 4, data.draw(st.sampled_from([4, 8]))
    kernel, stride = data.draw(st.sampled_from([(1, 1), (3, 3), (5, 3)])), data.draw(st.sampled_from([[1, 1], [2, 1]]))
    padding = data.draw(st.sampled_from([[0, 0], [1, 1], "valid"] + (["same"] if stride == [1, 1] else [])))
    weight = torch.randn(n_filters, n_inputs // groups, *kernel, dtype=torch.float64)
    bias, x = torch.randn(n_filters, dtype=torch.float64), torch.randn(1, n_inputs, 5, 6, dtype=torch.float64)
    gate = data.draw(st.none() | st.lists(st.sampled_from([0.0, 1.0]), min_size=n_filters, max_size=n_filters))
    exists = data.draw(st.none() | st.lists(st.booleans(), min_size=n_inputs, max_size=n_inputs))
    if exists is not None:
        x = x * torch.tensor(exists)[:, None, None]
    expected = F.conv2d(x, weight, bias, stride, padding, 1, groups).sigmoid()
    if gate is not None:
        expected = expected * torch.tensor(gate)[:, None, None]
    layer = SparseConv2d(weight, bias, stride, padding, [1, 1], groups, torch.sigmoid)
    with count_executed_macs() as counts:
        found = layer(x, gate and torch.tensor(gate), exists if exists is None else torch.tensor(exists))
    assert torch.allclose(found, expected, atol=1e-12)
    n_open, per_group = gate or [1.0] * n_filters, n_filters // groups
    n_read = [sum(n_open[g * per_group : (g + 1) * per_group]) for g in range(groups)]
    n_alive = [sum((exists or [True] * 4)[g * 4 // groups : (g + 1) * 4 // groups]) for g in range(groups)]
    pairs = sum(a * b for a, b in zip(n_read, n_alive, strict=True))
    assert sum(counts) == pairs * kernel[0] * kernel[1] * expected.shape[2] * expected.shape[3]


@given(
    gate=st.none() | st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3),
    exists=st.none() | st.lists(st.booleans(), min_size=4, max_size=4),
    positions=st.sampled_from([(), (2, 3)]),
)
def test_a_sparse_linear_layer_is_the_dense_one_on_masked_features(
    gate: list[float] | None, exists: list[bool] | None, positions: tuple[int, ...]
) -> None:
    weight, bias = torch.randn(3, 4), torch.randn(3)
    x = torch.randn(1, *positions, 4) * (1 if exists is None else torch.tensor(exists))
    expected = F.linear(x, weight, bias).relu() * (1 if gate is None else torch.tensor(gate))
    layer = SparseLinear(weight, bias, torch.relu)
    with count_executed_macs() as counts:
        found = layer(x, gate and torch.tensor(gate), exists if exists is None else torch.tensor(exists))
    assert torch.allclose(found, expected, atol=1e-5)
    assert sum(counts) == sum(gate or [1] * 3) * sum(exists or [1] * 4) * math.prod(positions)


def test_a_channel_exists_if_one_gate_of_its_set_is_open_or_undefined() -> None:
    exists = Exists(torch.tensor([[0, 1], [1, 3], [3, 3], [4, 3], [2, 3]]))  # 3 is always closed, 4 always open
    assert exists(torch.tensor([0.0, 1.0]), torch.tensor([0.0])).tolist() == [True, True, False, True, False]
    assert exists(torch.tensor([1.0, 0.0]), torch.tensor([math.nan])).tolist() == [True, False, False, True, True]


def test_a_weight_is_there_once_however_many_sizes_run() -> None:
    """Folding norms into copies of the weights would need their memory twice."""
    model = randomise_statistics(TOYS["Plain"].wrapped()).eval()
    fast = decouplify.sparsify(model)
    decouplify.verify(model, fast, random_images(2))
    sources = {p.data_ptr() for p in fast._source[0].parameters()}
    for size in (SIZE, (3, 24, 20)):
        images = torch.randn(2, *size)
        assert relative_error(fast(images), model(images).detach()) <= TOLERANCE
        convolutions = [m for m in fast.lowered_for(size).module.modules() if isinstance(m, SparseConv2d)]
        assert len(convolutions) == 3
        assert all(m.weight.data_ptr() in sources for m in convolutions)
