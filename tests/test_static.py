"""What no recorded path opens is removed, what all leave open is not decided; for these paths nothing changes."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decouplify
from decouplify.errors import VerificationError
from decouplify.paths import PathSet
from decouplify.sparse import SparseModel, count_executed_macs, native, profit
from decouplify.sparse.native import StepKind
from decouplify.sparse.ops import Controller, SparseConv2d, SparseLinear
from decouplify.sparse.profit import GateProfit, measure_profits
from toynets import SIZE, TOYS, Classifier, conv_bn_relu, random_images, randomise_gates, randomise_statistics, run

IMAGES = random_images(4)
needs_engine = pytest.mark.skipif(native.engine() is None, reason="no compiled engine")


def habitual(name: str, *, open_gate: bool = True) -> nn.Module:
    """A quarter of the filters silent, a quarter always open; one gate always open altogether."""
    model = randomise_gates(TOYS[name].wrapped(8, verify=False, reduction=1)).eval()
    controllers = list(model.decoupling.controllers.values())
    for controller in controllers:
        controller.fc2.bias.data[0::4] = -1e6
        controller.fc2.bias.data[1::4] = 1e6
    if open_gate:
        controllers[-1].fc2.bias.data[:] = 1e6
    return model


def paths_of(model: nn.Module, images: Tensor = IMAGES) -> PathSet:
    run(model, images)
    return PathSet.from_gates({name: z.numpy() for name, z in model.decoupling.gates().items()})


def sizes(fast: SparseModel, kind: Any = (SparseConv2d, SparseLinear)) -> int:
    graph = fast.lowered_for(fast.plan.input_size).module
    return sum(b.numel() for m in graph.modules() if isinstance(m, kind) for b in m.buffers())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", TOYS)
def test_nothing_changes_for_the_recorded_paths(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "reference":
        monkeypatch.setattr(native, "engine", lambda: None)
    elif native.engine() is None:
        pytest.skip("no compiled engine")
    model = habitual(name)
    fast = decouplify.sparsify(model, paths=paths_of(model))
    report = decouplify.verify(model, fast, IMAGES)
    assert report.max_error <= 1e-5
    assert report.n_gates == len(IMAGES) * model.decoupling.plan.n_filters
    for found, expected in zip(run(fast, IMAGES), run(model, IMAGES), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Plain", "SharedRelu", "DepthwiseChain", "DenseConcat"])
def test_silent_filters_leave_their_weights_and_those_of_their_readers(name: str) -> None:
    model = habitual(name)
    before, after = decouplify.sparsify(model), decouplify.sparsify(model, paths=paths_of(model))
    assert sizes(after) < sizes(before)
    assert sum(m.controller.fc2.bias.numel() for m in after.modules() if isinstance(m, Controller)) < sum(
        m.controller.fc2.bias.numel() for m in before.modules() if isinstance(m, Controller)
    )


def test_a_gate_that_is_always_open_loses_its_controller_and_the_network_its_cost() -> None:
    model = habitual("Plain")
    before, after = decouplify.sparsify(model), decouplify.sparsify(model, paths=paths_of(model))
    assert sum(isinstance(m, Controller) for m in before.modules()) == 2
    assert sum(isinstance(m, Controller) for m in after.modules()) == 1
    costs = []
    for fast in (before, after):
        with count_executed_macs() as counts:
            fast.run_observed(IMAGES[:1], lambda name, value: None)
        costs.append(sum(counts))
    last = model.decoupling.controllers["b__0"]
    assert costs[0] - costs[1] >= last.fc1.weight.numel() + last.fc2.weight.numel()
    assert "1 of 2 controllers dropped" in repr(after)
    assert "assumes" not in repr(before)


def test_a_filter_of_a_sum_stays_while_the_other_operand_needs_its_channel() -> None:
    model = habitual("SharedRelu")  # a residual block: the stem writes all channels of the sum
    fast = decouplify.sparsify(model, paths=paths_of(model))
    kept = fast._assumptions[fast.plan.input_size].kept
    assert len(kept["conv1"]) < 8
    assert len(kept["conv2"]) == 8


class Excited(Classifier):
    """Squeeze-excite, whose ungated layers write one factor per channel."""

    def __init__(self) -> None:
        super().__init__(8)
        self.a, self.b = conv_bn_relu(8, 8), conv_bn_relu(8, 8)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid())


def test_factors_of_silent_filters_leave_with_them() -> None:
    model = randomise_gates(decouplify.wrap(randomise_statistics(Excited()), SIZE, verify=False, reduction=1)).eval()
    model.decoupling.controllers["a__0"].fc2.bias.data[:3] = -1e6
    fast = decouplify.sparsify(model, paths=paths_of(model))
    graph = fast.lowered_for(fast.plan.input_size).module
    assert graph.get_submodule("squeeze").weight.shape[:2] == (2, 5)
    assert graph.get_submodule("excite").weight.shape[:2] == (5, 2)
    assert decouplify.verify(model, fast, IMAGES).max_error <= 1e-5


def test_filters_that_feed_a_norm_stay() -> None:
    """A norm makes something of nothing: its shift must still arrive."""
    model = habitual("PreActivation", open_gate=False)
    fast = decouplify.sparsify(model, paths=paths_of(model))
    assert decouplify.verify(model, fast, IMAGES).max_error <= 1e-5


def test_a_layer_that_is_silent_altogether_keeps_two_filters() -> None:
    model = habitual("DepthwiseChain", open_gate=False)
    for controller in model.decoupling.controllers.values():
        controller.fc2.bias.data[:] = -1e6
    fast = decouplify.sparsify(model, paths=paths_of(model))
    assert min(len(kept) for kept in fast._assumptions[fast.plan.input_size].kept.values()) == 2
    assert decouplify.verify(model, fast, IMAGES).max_error <= 1e-5


def test_a_path_outside_the_set_is_computed_as_if_it_were_inside_and_verify_says_so() -> None:
    model = habitual("Plain")
    fast = decouplify.sparsify(model, paths=paths_of(model))
    other = copy.deepcopy(model)
    other.decoupling.controllers["a__0"].fc2.bias.data[0::4] = 1e6  # opens what was silent
    with pytest.raises(VerificationError, match="take paths that sparsify"):
        decouplify.verify(other, fast, IMAGES)
    assert torch.allclose(run(fast, IMAGES)[0], run(model, IMAGES)[0], atol=1e-5)


def test_static_forms_can_be_copied_and_take_other_sizes() -> None:
    model = habitual("Plain")
    images = random_images(4, (3, 24, 20))
    paths = PathSet.from_gates(
        {
            layer.name: np.concatenate([p.unpack(layer.name) for p in (paths_of(model), paths_of(model, images))])
            for layer in paths_of(model).layers
        }
    )
    fast = copy.deepcopy(decouplify.sparsify(model, paths=paths))
    for batch in (IMAGES, images):
        assert torch.allclose(run(fast, batch)[0], run(model, batch)[0], atol=1e-5)
    assert len(fast._assumptions) == 2


def test_normalised_controllers_are_narrowed_as_well() -> None:
    model = randomise_gates(TOYS["Plain"].wrapped(8, verify=False, reduction=1, input_norm=True)).eval()
    for controller in model.decoupling.controllers.values():
        controller.fc2.bias.data[0::4] = -1e6
    fast = decouplify.sparsify(model, paths=paths_of(model))
    assert decouplify.verify(model, fast, IMAGES).max_error <= 1e-5


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"a.0": np.ones((2, 8))}, "1 layers, the model has 2 gates, and they differ first at 'b.0'"),
        ({"a.0": np.ones((2, 8)), "b.0": np.ones((2, 4))}, "differ first at 'b.0'"),
        ({"a.0": np.ones((0, 8)), "b.0": np.ones((0, 8))}, "has no images"),
    ],
)
def test_paths_of_another_model_are_refused(gates: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decouplify.sparsify(habitual("Plain"), paths=PathSet.from_gates(gates))


@needs_engine
@pytest.mark.parametrize("name", ["Plain", "SharedRelu", "DepthwiseChain", "DenseConcat", "SqueezeExcite"])
def test_gates_that_do_not_pay_are_left_open_and_the_rest_is_as_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = habitual(name, open_gate=False)
    gates = [gate.name for gate in model.decoupling.plan.gates]
    costly = gates[::2]
    monkeypatch.setattr(
        "decouplify.sparse.model.measure_profits",
        lambda program, path, names: [GateProfit(g, 2e-5, 1e-5 if g in costly else 3e-5) for g in names.values()],
    )
    fast = decouplify.sparsify(model, paths=paths_of(model), drop_costly=True)
    assert set(fast.left_open) == set(costly)
    assert f"left open, as deciding takes longer than it saves: {costly[0]} (20 us for 10 us)" in repr(fast)
    assert decouplify.verify(model, fast, IMAGES).max_error <= 1e-5
    with model.decoupling.forced(fast.left_open):
        expected = run(model, IMAGES)
    for found, wanted in zip(run(fast, IMAGES), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)
    again = copy.deepcopy(fast)
    assert set(again.left_open) == set(costly)


@needs_engine
def test_the_profit_of_a_gate_is_measured() -> None:
    """A large layer that closes nearly everything pays; a gate that nobody needs to decide is not measured."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *conv_bn_relu(3, 8), *conv_bn_relu(8, 128), *conv_bn_relu(128, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 5),
    )  # fmt: skip
    size = (3, 48, 48)
    model = decouplify.wrap(net.eval(), size, verify=False)
    large, last = model.decoupling.controllers.values()
    large.fc2.weight.data.zero_()
    large.fc2.bias.data = torch.where(torch.arange(128) < 8, 1.0, -1.0)
    last.fc2.bias.data[:] = 5.0
    images = torch.randn(3, *size)
    paths = paths_of(model, images)
    fast = decouplify.sparsify(model)
    names = {node: name for name, node in fast.lowered_for(size).gates.items()}
    path = {name: z[0] for name, z in model.decoupling.gates().items()}
    profits = measure_profits(fast.program_for(size), path, names)
    assert [profit.gate for profit in profits] == [model.decoupling.plan.gates[0].name]
    assert profits[0].saved > profits[0].cost > 0
    assert decouplify.sparsify(model, paths=paths, drop_costly=True).left_open == {}


def test_a_machine_that_slows_down_makes_no_gate_look_worth_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the ninth run on everything takes three times as long; gates cost 1 and save 0.5 throughout."""
    steps = [
        SimpleNamespace(kind=kind, node=SimpleNamespace(name=name))
        for kind, name in ((StepKind.CONTROL, "a"), (StepKind.CONVOLUTION, "x"), (StepKind.CONTROL, "b"),
                           (StepKind.CONVOLUTION, "y"))
    ]  # fmt: skip
    n_runs = 0

    def timed(program: object, workspace: object, gates: dict[str, torch.Tensor]) -> list[profit._Timed]:
        nonlocal n_runs
        n_runs += 1
        slow = 3.0 if n_runs >= 9 else 1.0
        n_open = [int(gates[name].sum()) for name in ("a", "b")]
        times = [(1.0, 7), (10 + 0.5 * n_open[0], n_open[0]), (1.0, 7), (10 + 0.5 * n_open[1], n_open[1])]
        return [profit._Timed(slow * seconds, n_macs) for seconds, n_macs in times]

    monkeypatch.setattr(profit, "_timed", timed)
    program = SimpleNamespace(steps=steps, workspace=contextlib.nullcontext)
    closed = {"gate a": torch.zeros(1), "gate b": torch.zeros(1)}
    profits = measure_profits(program, closed, {"a": "gate a", "b": "gate b"})  # type: ignore[arg-type]
    assert [found.gate for found in profits] == ["gate a", "gate b"]
    assert all(found.saved == 0.5 * found.cost for found in profits)


def test_gates_are_not_judged_without_paths() -> None:
    with pytest.raises(ValueError, match="drop_costly=True needs paths"):
        decouplify.sparsify(habitual("Plain"), drop_costly=True)
