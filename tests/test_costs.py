"""Multiply-accumulates: counted from gates, by an obvious loop, by the sparse form, and by torch."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import decouplify
from decouplify import costs as cost_model
from decouplify.cifar import CifarResNet
from decouplify.costs import CostModel, channels_exist
from decouplify.flow import GateSet
from decouplify.sparse import count_executed_macs, native
from toynets import SIZE, TOYS, random_images, randomise_gates, run

SIZE_OF_CIFAR = (3, 32, 32)


def random_paths(model: nn.Module, n: int = 3) -> Tensor:
    return (torch.rand(n, model.decoupling.plan.n_filters) < 0.5).double()


def columns_of(model: nn.Module) -> dict[str, int]:
    starts, start = {}, 0
    for gate in model.decoupling.plan.gates:
        starts[gate.name] = start
        start += gate.n_filters
    return starts


def macs_by_loop(costs: CostModel, path: list[float], first_column: dict[str, int]) -> int:
    """Filter by filter, channel by channel."""
    total = costs.n_controllers
    for reader in costs.readers:
        filters_per_group = reader.n_outputs // reader.groups
        channels_per_group = reader.n_inputs // reader.groups
        for filter_ in range(reader.n_outputs):
            if reader.gate is not None and not path[first_column[reader.gate] + filter_]:
                continue
            group = filter_ // filters_per_group
            for channel in range(group * channels_per_group, (group + 1) * channels_per_group):
                if not is_known(reader.exists[channel], path) and not is_known(reader.constant[channel], path):
                    total += reader.n_positions
                elif is_known(reader.constant[channel], path):
                    total += 1  # into the bias
    return total


def is_known(gates: GateSet, path: list[float]) -> bool:
    return gates is not None and not any(path[column] for column in gates)


@pytest.mark.parametrize("name", TOYS)
def test_executed_macs_are_those_of_a_loop_over_open_filters_and_existing_channels(name: str) -> None:
    model = TOYS[name].wrapped(verify=False)
    costs, paths = model.decoupling.costs, random_paths(model)
    expected = [macs_by_loop(costs, path, columns_of(model)) for path in paths.tolist()]
    assert costs.executed(paths).tolist() == expected


@given(seed=st.integers(0, 2**16))
@settings(max_examples=10)
def test_channels_that_sums_of_gated_maps_hold_are_read_if_one_of_their_gates_is_open(seed: int) -> None:
    model = decouplify.wrap(CifarResNet(4, width=4), SIZE_OF_CIFAR, verify=False, exclude=["conv1"])
    torch.manual_seed(seed)
    costs = model.decoupling.costs
    sizes = {len(s) for reader in costs.readers for s in reader.exists if s is not None}
    assert len(sizes) > 4  # from one gate to those of all blocks before
    paths = (torch.rand(3, model.decoupling.plan.n_filters) < torch.tensor([[0.05], [0.2], [0.5]])).double()
    expected = [macs_by_loop(costs, path, columns_of(model)) for path in paths.tolist()]
    assert costs.executed(paths).tolist() == expected


def test_sets_that_are_looked_up_in_parts_give_the_same_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decouplify.wrap(CifarResNet(4, width=4), SIZE_OF_CIFAR, verify=False, exclude=["conv1"])
    paths = random_paths(model)
    whole = model.decoupling.costs.executed(paths)
    monkeypatch.setattr(cost_model, "_LARGEST", 50)  # a few sets at a time, and the last part smaller
    assert torch.equal(model.decoupling.costs.executed(paths), whole)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_counted_macs_are_those_that_the_sparse_form_executes(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "reference":
        monkeypatch.setattr(native, "engine", lambda: None)
    model = randomise_gates(TOYS[name].wrapped(verify=False))
    fast = decouplify.sparsify(model)
    counted = decouplify.count_macs(model, random_images(3))
    executed = []
    for image in random_images(3):
        with count_executed_macs() as counts:
            fast(image[None])
        executed.append(sum(counts))
    # The engine writes out a constant that a pool or a convolution with a border reads, for all that read it.
    writes_constants = name == "NormOfGated"
    if backend == "reference" or ("run by torch: nothing" in str(fast) and not writes_constants):
        assert counted.executed.tolist() == executed
    else:  # what comes back from torch has all of its channels, some of them zeros
        assert all(count <= done for count, done in zip(counted.executed.tolist(), executed, strict=True))
    assert counted.dense == model.decoupling.plan.n_macs


@pytest.mark.parametrize("name", [name for name in TOYS if name != "SqueezeExcite"])
def test_dense_macs_are_half_of_torchs_flops(name: str) -> None:
    model = TOYS[name].build().eval()
    assert decouplify.inspect(model, SIZE, **TOYS[name].options).n_macs == n_flops(model, random_images(1)) // 2


def test_what_does_not_depend_on_the_image_is_not_counted() -> None:
    model = TOYS["SqueezeExcite"].build().eval()
    embedding = 8 * 2 * 8  # filters, channels, positions
    plan = decouplify.inspect(model, SIZE)
    assert plan.n_macs + embedding == n_flops(model, random_images(1)) // 2


def n_flops(model: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        run(model, images)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", TOYS)
def test_with_all_gates_open_only_the_controllers_are_added(name: str) -> None:
    model = TOYS[name].wrapped(verify=False)
    costs = model.decoupling.costs
    zero = [sum(s == frozenset() for s in reader.exists) for reader in costs.readers]  # padding is never read
    never_read = sum(n * r.n_positions * r.n_outputs // r.groups for n, r in zip(zero, costs.readers, strict=True))
    all_open = torch.ones(1, model.decoupling.plan.n_filters, dtype=torch.float64)
    assert costs.executed(all_open).item() == costs.n_dense - never_read + costs.n_controllers


@pytest.mark.parametrize(("reduction", "hidden"), [(4, 2), (1, 8), (100, 1)])
def test_controllers_cost_their_two_matrices(reduction: int, hidden: int) -> None:
    model = TOYS["Plain"].wrapped(reduction=reduction)
    weights = [p for p in model.decoupling.controllers.parameters() if p.dim() == 2]
    expected = 2 * (8 * hidden + hidden * 8)
    assert (model.decoupling.costs.n_controllers, sum(w.numel() for w in weights)) == (expected, expected)


@given(st.data())
def test_a_channel_exists_unless_its_whole_set_is_closed(data: st.DataObject) -> None:
    n_gates = data.draw(st.integers(1, 5))
    path = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=n_gates, max_size=n_gates))
    sets = data.draw(st.lists(st.sets(st.integers(0, n_gates - 1), min_size=1), min_size=1, max_size=4))
    width = max(len(s) for s in sets)
    columns = torch.tensor([sorted(s) + [n_gates] * (width - len(s)) for s in sets])
    padded = torch.tensor([[*path, 0.0, 1.0]])
    assert channels_exist(padded, columns)[0].tolist() == [float(any(path[i] for i in s)) for s in sets]


@pytest.mark.parametrize("name", ["NormBeforeAdd", "Grouped", "DenseConcat", "ZeroPaddedShortcut"])
def test_the_gradient_is_what_opening_a_gate_would_add(name: str) -> None:
    """Executed MACs are affine in each gate by itself, so the derivative is the difference of its two states."""
    model = TOYS[name].wrapped(width=4)
    costs, path = model.decoupling.costs, random_paths(model, 1).requires_grad_(True)
    gradient = torch.autograd.grad(costs.executed(path).sum(), path)[0][0]
    for column in range(path.shape[1]):
        opened, closed = path.detach().clone(), path.detach().clone()
        opened[0, column], closed[0, column] = 1, 0
        assert gradient[column] == costs.executed(opened) - costs.executed(closed)


@pytest.mark.parametrize("name", ["Plain", "SharedRelu", "PreActivation"])
def test_counting_in_inference_mode_leaves_training_possible(name: str) -> None:
    model = TOYS[name].wrapped(verify=False)
    paths = random_paths(model)
    with torch.inference_mode():
        expected = model.decoupling.costs.executed(paths)
    found = model.decoupling.costs.executed(paths.requires_grad_())
    found.sum().backward()
    assert torch.equal(found, expected)


def test_copies_of_a_wrapped_model_share_its_costs_and_plan() -> None:
    model = TOYS["Plain"].wrapped(verify=False)
    other = copy.deepcopy(model).decoupling
    assert other.plan is model.decoupling.plan
    assert other.costs is model.decoupling.costs


def test_counting_no_images_gives_no_counts() -> None:
    model = TOYS["Plain"].wrapped()
    assert decouplify.count_macs(model, random_images(0)).executed.tolist() == []


def test_the_count_prints_its_reduction_and_keeps_the_modes() -> None:
    model = TOYS["Plain"].wrapped().train()
    model.a.eval()
    with model.decoupling.forced({"a.0": torch.zeros(8), "b.0": torch.ones(8)}):
        count = decouplify.count_macs(model, random_images(2))
    stem, fc, controllers = 8 * 8 * 8 * 3 * 9, 8 * 5, 2 * 2 * (8 + 8)
    assert count.executed.tolist() == 2 * [stem + fc + controllers]
    assert count.reduction == count.dense / (stem + fc + controllers)
    assert str(count).startswith("4.30x fewer MACs: 0.1 M dense, 0.0 M executed (mean of 2 images, 0.00 M of it in")
    assert [m.training for m in (model, model.a, model.b, model.decoupling)] == [True, False, True, True]


def test_dense_macs_of_resnet18_are_half_of_torchs_flops() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18").eval()
    plan = decouplify.inspect(model, (3, 224, 224))
    assert plan.n_macs == 1_814_073_344
    with torch.device("meta"):
        images = torch.zeros(1, 3, 224, 224)
    assert plan.n_macs == n_flops(model.to("meta"), images) // 2
