"""Weights that make up for closed filters: least squares, layer by layer, on a recorded run."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import decouplify
from decouplify.aten import name_of
from decouplify.cifar import CifarResNet
from decouplify.errors import PlanError
from decouplify.trace import trace
from decouplify.train import DecouplingRecipe, Reconstruction, decouple
from decouplify.train.moments import Moments, fitted, relative_error, rescaled
from decouplify.train.recipe import Start
from decouplify.train.reconstruct import _columns, _layer_of
from decouplify.train.replay import Replay
from random_nets import BLOCKS, MixedBranches, NetSpec, Spec, build, net_specs
from toynets import SIZE, TOYS, ImageInPlace, random_gates, random_images, run

# Least squares --------------------------------------------------------------------------------------------------------


def samples(n: int = 200, groups: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x (g, c, n) and y (g, k, n) with a linear relation, noise and means, and weights (g, k, c) nearby."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 5, n, generator=generator) + 2
    weight = torch.randn(groups, 3, 5, generator=generator)
    y = weight @ x + 0.1 * torch.randn(groups, 3, n, generator=generator) - 1
    return x, y, (weight + torch.randn(groups, 3, 5, generator=generator)).double()


def test_a_small_ridge_is_least_squares_and_a_large_one_keeps_the_weights() -> None:
    x, y, weight = samples()
    for group in range(2):
        expected = torch.linalg.lstsq(x[group].double().T, y[group].double().T).solution.T
        torch.testing.assert_close(fitted(Moments.of(x, y), weight, 1e-9)[group], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fitted(Moments.of(x, y), weight, 1e9), weight, rtol=1e-6, atol=1e-6)


def test_in_between_it_minimises_the_sum_of_both() -> None:
    x, y, weight = samples(groups=1)
    moments, ridge = Moments.of(x, y), 0.3
    level = ridge * float(moments.xx.diagonal(dim1=1, dim2=2).mean())

    def objective(v: Tensor) -> Tensor:
        return (y.double() - v @ x.double()).square().sum() + level * (v - weight).square().sum()

    found = fitted(moments, weight, ridge).requires_grad_()
    gradient = torch.autograd.grad(objective(found), found)[0]
    assert float(gradient.abs().max()) < 1e-3 * float(objective(weight))


def test_inputs_that_are_always_zero_keep_their_weights() -> None:
    x, y, weight = samples()
    x[:, 1] = 0
    found = fitted(Moments.of(x, y), weight, 0.01)
    torch.testing.assert_close(found[:, :, 1], weight[:, :, 1])
    assert not torch.allclose(found[:, :, 0], weight[:, :, 0])
    x[:] = 0
    torch.testing.assert_close(fitted(Moments.of(x, y), weight, 0.01), weight)


def test_moments_are_sums_and_centred_ones_covariances() -> None:
    x, y, weight = samples()
    parts = Moments.of(x[..., :50], y[..., :50]) + Moments.of(x[..., 50:], y[..., 50:])
    centred = parts.centred()
    for group in range(2):
        both = torch.cat([x[group], y[group]]).double()
        covariance = 200 * torch.cov(both, correction=0)
        torch.testing.assert_close(centred.xx[group], covariance[:5, :5], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(centred.yx[group], covariance[5:, :5], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(centred.yy[group], covariance.diagonal()[5:], rtol=1e-4, atol=1e-3)
    error = (y.double() - weight @ x.double()).square().sum(2) / y.double().square().sum(2)
    assert relative_error(parts, weight) == pytest.approx(float(error.mean()), rel=1e-5)


def test_rescaled_filters_vary_as_much_as_they_should_within_a_factor_of_two() -> None:
    x, y, _ = samples()
    moments = Moments.of(x, y).centred()
    near = rescaled(moments, 0.7 * fitted(moments, torch.zeros(2, 3, 5).double(), 1e-6))
    torch.testing.assert_close((near @ x.double()).std(2), y.double().std(2), rtol=1e-3, atol=1e-3)
    weight = fitted(moments, torch.zeros(2, 3, 5).double(), 1e-6)
    torch.testing.assert_close(rescaled(moments, 0.1 * weight), 0.2 * weight)
    torch.testing.assert_close(rescaled(moments, torch.zeros_like(weight)), torch.zeros_like(weight))


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "valid"]),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    wanted=st.sampled_from([1.0, 9.0, 1000.0]),
)
def test_inputs_times_weights_are_outputs(
    kernel: tuple[int, int], stride: int, padding: int | str, dilation: int, groups: int, wanted: float
) -> None:
    stride = 1 if padding == "same" else stride
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, bias=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), conv)
    recorded = trace(net, (3, 9, 10))
    layer = _layer_of(recorded, [n for n in recorded.graph.nodes if n.op == "call_function"][1])
    assert layer is not None
    x = torch.randn(1, 4, 9, 10)
    found_x, found_y = _columns(layer, x, conv(x), conv.weight.shape[2:], wanted)
    weight = conv.weight.reshape(groups, 8 // groups, -1)
    torch.testing.assert_close(weight @ found_x, found_y, rtol=1e-4, atol=1e-5)
    n_positions = conv(x)[0, 0].numel()
    assert found_x.shape[2] == n_positions if wanted == 1000 else found_x.shape[2] >= min(wanted, n_positions)


# Replay ---------------------------------------------------------------------------------------------------------------


def replayed(model: nn.Module, images: Tensor, gates: dict[str, Tensor]) -> list[Tensor]:
    """What a replay that stops before each convolution returns in the end, if that is one value without a gate."""
    reconstruction = Reconstruction(model, images)
    recorded, ends = reconstruction._recorded, reconstruction._gated(gates)
    replay = Replay(recorded, recorded.tensors, images.split(1), ends)
    for conv in (node for node in recorded.graph.nodes if name_of(node) == "conv2d"):
        assert len(list(replay.values_before(conv))) == len(images)
    last = next(iter(reversed(recorded.graph.nodes))).args[0]
    if not isinstance(last, torch.fx.Node) or last in ends:
        return []
    return [replay.result(last, values) for values in replay.values_before(last)]


A_GATE_AT_TWO_ENDS = NetSpec(3, ((BLOCKS.index(MixedBranches), 4, Spec()),), "linear", 9, 0)


@given(net_specs, st.booleans())
@example(spec=A_GATE_AT_TWO_ENDS, keeps=True)
def test_it_returns_what_the_network_does(spec: NetSpec, keeps: bool) -> None:
    try:
        model = decouplify.wrap(build(spec), (3, spec.size, spec.size), verify=False)
    except PlanError:
        return
    images = random_images(4, (3, spec.size, spec.size))
    gates = random_gates(model, 4)
    ends = [end for gate in model.decoupling.plan.gates for end in gate.ends]
    assert len(ends) == len(set(ends))
    with pytest.MonkeyPatch.context() as patch:
        if not keeps:
            patch.setattr("decouplify.train.replay._MEMORY", 0)
        found = replayed(model, images.clone(), gates)
    if found:
        with model.decoupling.forced(gates):
            expected = torch.cat([run(model, images)[0]])
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", [0, 2**30])
def test_writing_in_place_changes_nothing_that_is_kept(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decouplify.train.replay._MEMORY", memory)
    model = decouplify.wrap(ImageInPlace().eval(), SIZE, verify=False)
    images, gates = random_images(4), random_gates(model, 4)
    given_images = images.clone()
    found = replayed(model, given_images, gates)
    assert torch.equal(given_images, images)
    with model.decoupling.forced(gates):
        torch.testing.assert_close(torch.cat(found), run(model, images)[0])


# Reconstruction -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = CifarResNet(2, n_classes=4, width=8)
    net(torch.randn(64, 3, 12, 12))  # statistics
    nn.init.normal_(net.linear.weight, 0, 0.5)
    return decouplify.wrap(net.eval(), (3, 12, 12), verify=False)


@pytest.fixture
def images() -> Tensor:
    return random_images(40, (3, 12, 12), seed=3)


@torch.no_grad()
def distance(model: nn.Module, images: Tensor, expected: Tensor, gates: dict[str, Tensor]) -> float:
    with model.decoupling.forced(gates):
        return float((model(images) - expected).norm() / expected.norm())


def test_a_filter_whose_twin_stays_is_made_up_for(model: nn.Module, images: Tensor) -> None:
    """Also with a norm's mean as the only place for a shift, and also where each image has its own gates."""
    block = model.layer2[1]
    for parameter in (
        block.conv1.weight,
        block.bn1.weight,
        block.bn1.bias,
        block.bn1.running_mean,
        block.bn1.running_var,
    ):
        parameter.data[3] = parameter.data[1]
    with torch.no_grad():
        expected = model(images)
    closed = {"layer2.1.conv1": (torch.arange(16) != 3).float().expand(40, -1)}
    assert distance(model, images, expected, closed) > 0.01
    Reconstruction(model, images)(closed)
    assert distance(model, images, expected, closed) < 2e-3


def test_what_is_left_comes_nearer_to_what_was(model: nn.Module, images: Tensor) -> None:
    unseen = random_images(40, (3, 12, 12), seed=4)
    with torch.no_grad():
        expected, expected_unseen = model(images), model(unseen)
    closed = {g.name: (torch.arange(g.n_filters) % 4 != 0).float() for g in model.decoupling.plan.gates}
    before, before_unseen = distance(model, images, expected, closed), distance(model, unseen, expected_unseen, closed)
    before_state = copy.deepcopy(model.state_dict())
    Reconstruction(model, images)(closed)
    assert distance(model, images, expected, closed) < 0.5 * before
    assert distance(model, unseen, expected_unseen, closed) < 0.8 * before_unseen
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before_state[k])}
    assert not any(name.startswith(("decoupling.", "conv1.")) for name in changed)
    assert {name.rsplit(".", 1)[1] for name in changed} == {"weight", "running_mean", "bias"}
    assert all(name.endswith(("running_mean", "weight")) or name == "linear.bias" for name in changed)
    assert not any(".bn" in name and name.endswith("weight") for name in changed)


def test_means_and_deviations_of_each_layer_are_those_of_before(model: nn.Module, images: Tensor) -> None:
    seen: list[Tensor] = []
    closed = {"layer1.1.conv1": (torch.arange(8) < 5).float(), "layer1.1.conv2": (torch.arange(8) > 1).float()}
    reconstruction = Reconstruction(model, images)
    model.layer2[0].bn1.register_forward_hook(lambda *args: seen.append(args[2].detach().transpose(0, 1).flatten(1)))
    with torch.no_grad():
        model(images)
        reconstruction(closed)
        with model.decoupling.forced(closed):
            model(images)
    before, after = seen
    torch.testing.assert_close(after.mean(1), before.mean(1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after.std(1), before.std(1), rtol=1e-3, atol=1e-3)


def test_open_gates_change_no_answer(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        expected = model(images)
    Reconstruction(model, images)({})
    assert distance(model, images, expected, {}) < 1e-3


class TwiceBehindAGate(nn.Sequential):
    """A gated convolution, then one that serves two places."""

    def __init__(self) -> None:
        twice = nn.Conv2d(8, 8, 3, padding=1)
        convs = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            twice,
            nn.ReLU(),
            twice,
        )
        super().__init__(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def test_a_convolution_that_serves_two_places_keeps_its_weights() -> None:
    model = decouplify.wrap(TwiceBehindAGate().eval(), SIZE, verify=False)
    before = copy.deepcopy(model.state_dict())
    Reconstruction(model, random_images(8))({"2": (torch.arange(8) > 3).float()})
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"9.weight", "9.bias"}


@pytest.mark.parametrize("name", sorted(set(TOYS) - {"WriteThroughView"}))
def test_networks_of_all_kinds_stay_finite(name: str) -> None:
    model = TOYS[name].wrapped().eval()
    images = random_images(8)
    Reconstruction(model, images)(random_gates(model, 8, 0.7))
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values() if t.is_floating_point())
    assert all(bool(out.isfinite().all()) for out in run(model, images))


def test_bad_arguments(model: nn.Module, images: Tensor) -> None:
    with pytest.raises(ValueError, match="not wrapped"):
        Reconstruction(CifarResNet(1), images)
    with pytest.raises(ValueError, match=r"\(3, 3, 12, 12\) given.*N >= 4"):
        Reconstruction(model, images[:3])
    with pytest.raises(KeyError, match="no gate is called 'nonsense'"):
        Reconstruction(model, images)({"nonsense": torch.ones(8)})
    writes = TOYS["WriteThroughView"].wrapped()
    with pytest.raises(ValueError, match="writes to a part of a value"):
        Reconstruction(writes, random_images(8))


@pytest.mark.parametrize(("start", "ratio"), [("importance", 0.6), ("prediction", 0.8)])
def test_a_run_starts_nearer_to_the_original(model: nn.Module, images: Tensor, start: Start, ratio: float) -> None:
    with torch.no_grad():
        expected = F.log_softmax(model(images), 1)
    found = {}
    for reconstruct in (False, True):
        student = copy.deepcopy(model)
        recipe = DecouplingRecipe(0, target="1.5x", start=start, reconstruct=reconstruct, norm_batches=2, batch_size=20)
        decouple(student, images, None, recipe)
        answers = F.log_softmax(run(student, images)[0], 1)
        found[reconstruct] = float(F.kl_div(answers, expected, reduction="batchmean", log_target=True))
    assert found[True] < ratio * found[False]
