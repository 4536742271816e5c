"""Laws that hold for any network: nothing changes while gates are open, and both forms agree while they are not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import decouplify
from decouplify.errors import PlanError
from decouplify.sparse import count_executed_macs
from random_nets import BLOCKS, MixedBranches, NetSpec, NormOfGated, Plain, RandomNet, Residual, Spec, build, net_specs

options = {"linear_as_conv": True}
HALVED = (BLOCKS.index(Plain), 1, Spec(kernel=1, stride=2, act="gelu"))
SINGLE_POSITION = (
    HALVED,
    HALVED,
    (BLOCKS.index(Plain), 2, Spec(kernel=1, norm="ln", act="gelu")),
    (BLOCKS.index(NormOfGated), 1, HALVED[2]),
)


def images_for(spec: NetSpec, n: int = 2) -> Tensor:
    return torch.randn(n, 3, spec.size, spec.size, generator=torch.Generator().manual_seed(spec.seed))


def outputs(net: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return pytree.tree_leaves(net(images))


def wrapped(spec: NetSpec) -> RandomNet:
    net = build(spec)
    assume(decouplify.inspect(net, (3, spec.size, spec.size), **options).sites)
    return decouplify.wrap(net, (3, spec.size, spec.size), **options)


def randomise_gates(net: nn.Module, seed: int) -> None:
    """Controllers whose decisions vary from image to image, far enough from the threshold."""
    generator = torch.Generator().manual_seed(seed)
    for controller in net.decoupling.controllers.values():
        with torch.no_grad():
            controller.fc2.weight.copy_(torch.randn(controller.fc2.weight.shape, generator=generator))
            controller.fc2.bias.copy_(torch.randn(controller.fc2.bias.shape, generator=generator))


def state_of(net: nn.Module) -> tuple[object, ...]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in net.modules()]
    return (list(net.state_dict()), hooks, [type(m).__name__ for m in net.modules()])


@given(net_specs)
@example(NetSpec(1, SINGLE_POSITION, "linear", 7, 176))  # strides of a map with one position fit two memory layouts
def test_open_gates_change_no_bit_and_unwrapping_gives_the_original(spec: NetSpec) -> None:
    net = build(spec)
    images = images_for(spec)
    before, state, weights = outputs(net, images), state_of(net), copy.deepcopy(net.state_dict())
    wrapped_net = wrapped(spec)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(wrapped_net, images), strict=True))
    assert [k for k in wrapped_net.state_dict() if not k.startswith("decoupling.")] == list(weights)
    decouplify.unwrap(wrapped_net)
    assert state_of(wrapped_net) == state
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(wrapped_net, images), strict=True))
    assert all(torch.equal(weights[k], v) for k, v in wrapped_net.state_dict().items())


@given(net_specs)
@example(NetSpec(3, ((BLOCKS.index(Residual), 5, Spec(bias=True, stride=2)),), "linear", 9, 0))  # padded shortcut
@example(NetSpec(3, ((BLOCKS.index(MixedBranches), 4, Spec()),), "linear", 9, 0))  # a gate at two ends
def test_masked_and_sparse_form_agree_and_cost_what_was_counted(spec: NetSpec) -> None:
    net = wrapped(spec).double()
    randomise_gates(net, spec.seed)
    images = images_for(spec).double()
    fast = decouplify.sparsify(net)
    report = decouplify.verify(net, fast, images, rtol=1e-9)
    assert report.n_images == 2
    with count_executed_macs() as executed:
        fast(images)
    assert sum(executed) == int(decouplify.count_macs(net, images).executed.sum())


ONE_CHANNEL = Spec(kernel=1, stride=1, dilation=1, bias=False, norm="bn", act="gelu")
# Behind closed gates, the sum of a depthwise and a full convolution that do not exist is the sigmoid of zero.
SUM_OF_NOTHING = NetSpec(
    1,
    ((0, 1, ONE_CHANNEL), (0, 1, ONE_CHANNEL), (BLOCKS.index(MixedBranches), 3, replace(ONE_CHANNEL, act="sigmoid"))),
    "linear",
    7,
    0,
)


@given(net_specs)
@example(SUM_OF_NOTHING)
def test_the_engine_agrees_with_the_masked_form(spec: NetSpec) -> None:
    net = wrapped(spec)
    randomise_gates(net, spec.seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decouplify.sparse.model.choose_algorithms", lambda program, exact: None)  # measures for seconds
        decouplify.verify(net, decouplify.sparsify(net), images_for(spec), rtol=1e-4)


@given(net_specs)
def test_closed_gates_leave_zeros_where_the_flow_predicts_them(spec: NetSpec) -> None:
    # wrap(verify=True) closes random gates and raises where a predicted zero is not one; the rest is for the oracle.
    net = wrapped(spec)
    closed = {gate.name: torch.zeros(gate.n_filters) for gate in net.decoupling.plan.gates}
    seen: list[float] = []
    with net.decoupling.observed(lambda gate, end, y: seen.append(float(y.abs().max()))), net.decoupling.forced(closed):
        outputs(net, images_for(spec))
    assert seen
    assert max(seen) == 0.0


@given(net_specs)
def test_the_plan_is_deterministic_and_survives_json(spec: NetSpec) -> None:
    import json

    plans = [decouplify.inspect(build(spec), (3, spec.size, spec.size), **options) for _ in range(2)]
    assert plans[0] == plans[1]
    assert decouplify.Plan.from_dict(json.loads(json.dumps(plans[0].to_dict()))) == plans[0]


@given(spec=net_specs)
def test_a_checkpoint_brings_everything_back(spec: NetSpec, tmp_path_factory: pytest.TempPathFactory) -> None:
    net = wrapped(spec)
    randomise_gates(net, spec.seed)
    path = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    decouplify.save(net, path)
    other = RandomNet(spec).eval()
    decouplify.load(other, path)
    images = images_for(spec)
    assert all(torch.equal(a, b) for a, b in zip(outputs(net, images), outputs(other, images), strict=True))
    assert other.decoupling.plan == net.decoupling.plan


@given(net_specs)
def test_a_refused_wrap_changes_nothing(spec: NetSpec) -> None:
    net = build(spec)
    before, images = state_of(net), images_for(spec)
    expected = outputs(net, images)
    with pytest.raises(PlanError, match="matches no convolution"):
        decouplify.wrap(net, (3, spec.size, spec.size), only="no.such.*")
    with pytest.raises(ValueError, match="does not run on one image"):
        decouplify.wrap(net, (4, spec.size, spec.size))
    assert state_of(net) == before
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(net, images), strict=True))


@given(net_specs)
def test_training_with_open_gates_gives_the_original_gradients(spec: NetSpec) -> None:
    net, other = build(spec).double(), wrapped(spec).double()
    images = images_for(spec, 4).double()
    everything_open = {gate.name: torch.ones(gate.n_filters) for gate in other.decoupling.plan.gates}
    with other.decoupling.forced(everything_open):
        for network in (net, other):
            network.train()
            sum(leaf.sum() for leaf in pytree.tree_leaves(network(images))).backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    for name, parameter in other.named_parameters():
        if not name.startswith("decoupling."):
            expected = gradients[name]
            assert (parameter.grad is None) == (expected is None)
            # Not bitwise: multiplying by one may change the memory layout, and with it the order of sums.
            assert expected is None or torch.allclose(parameter.grad, expected, rtol=1e-8, atol=1e-10), name
