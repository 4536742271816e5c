"""Gates that start closed are those whose filters the answers depend on least, per multiply-accumulate."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decouplify
from decouplify.cifar import CifarResNet
from decouplify.train import (
    DecouplingRecipe,
    close_in_rounds,
    close_least_important,
    decouple,
    executed_share,
    importance,
)

SIZE = (3, 8, 8)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = CifarResNet(1, n_classes=4, width=4).eval()
    nn.init.normal_(net.linear.weight, 0, 0.5)
    return decouplify.wrap(net, SIZE, verify=False, input_norm=True)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(32, *SIZE, generator=torch.Generator().manual_seed(1))


def flat(model: nn.Module, by_gate: dict[str, Tensor]) -> Tensor:
    return torch.cat([by_gate[gate.name] for gate in model.decoupling.plan.gates])


def test_it_is_the_divergence_to_second_order(model: nn.Module) -> None:
    """2 KL(p || p of gates moved by epsilon) / epsilon^2, for one image and every filter."""
    image, epsilon, gates = torch.randn(1, *SIZE), 0.05, model.decoupling.plan.gates
    found = importance(model, [(image.expand(2000, -1, -1, -1), None)], temperature=1.0)
    with torch.no_grad():
        p = F.log_softmax(model.double()(image.double()), 1)
        for gate in gates:
            for k in range(0, gate.n_filters, 3):
                divergence = 0.0
                for sign in (-1, 1):  # on both sides, which removes the third order
                    z = torch.ones(gate.n_filters).double()
                    z[k] += sign * epsilon
                    with model.decoupling.forced({gate.name: z}):
                        q = F.log_softmax(model(image.double()), 1)
                    divergence += float((p.exp() * (p - q)).sum()) / 2
                assert float(found[gate.name][k]) == pytest.approx(2 * divergence / epsilon**2, rel=0.3, abs=1e-5)


def test_a_filter_that_nobody_reads_is_worth_nothing(model: nn.Module, images: Tensor) -> None:
    block = model.layer2[0]
    block.conv2.weight.data[:, 1] = 0
    found = importance(model, [(images, None)])["layer2.0.conv1"]
    assert float(found[1]) == 0.0
    assert int((found > 0).sum()) == len(found) - 1


def test_as_few_filters_start_closed_as_meet_the_target(model: nn.Module, images: Tensor) -> None:
    important = importance(model, [(images, None)])
    values, costs = flat(model, important), model.decoupling.costs
    closed = flat(model, close_least_important(model, important, 0.6))
    with torch.no_grad():
        model(images)
    z = model.decoupling.path()
    # New controllers add a little that differs between images to the bias; most gates obey the bias alone.
    biases = torch.cat([c.fc2.bias for c in model.decoupling.controllers.values()])
    assert torch.equal(biases <= 0, closed)
    assert (z.float().mean(0) > 0.5).eq(biases > 0).float().mean() > 0.9
    start = (biases > 0).double()[None]
    assert float(costs.executed(start)) <= 0.6 * costs.n_dense
    last = biases.masked_fill(biases > 0, -9).argmax()
    start[0, last] = 1
    assert float(costs.executed(start)) > 0.6 * costs.n_dense
    assert float(values[biases <= 0].mean()) < float(values[biases > 0].mean())


def test_what_is_closed_already_counts_as_closed(model: nn.Module, images: Tensor) -> None:
    """Of two filters that do the same, one is worth little beside the other, and much without."""
    block = model.layer2[0]
    for parameter in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
        parameter.data[1] = parameter.data[0]
    block.conv2.weight.data[:, 1] = block.conv2.weight.data[:, 0]
    closed = {"layer2.0.conv1": torch.arange(8) == 0}

    def found(closed: dict[str, Tensor] | None = None) -> Tensor:
        torch.manual_seed(0)  # the same answers are drawn
        return importance(model, [(images, None)], closed=closed)["layer2.0.conv1"][1:]

    both, single = found(), found(closed)
    with torch.no_grad(), model.decoupling.forced({"layer2.0.conv1": (torch.arange(8) != 0).float()}):
        expected = model(images)
    block.conv2.weight.data[:, 0] = 0  # as good as closed
    with torch.no_grad(), model.decoupling.forced({"layer2.0.conv1": torch.ones(8)}):
        torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(single, found(), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(both, single, rtol=0.05)


def test_what_is_closed_stays_so_where_others_are_worth_nothing(model: nn.Module) -> None:
    gates = model.decoupling.plan.gates
    nothing = {gate.name: torch.zeros(gate.n_filters) for gate in gates}
    last = {gate.name: torch.arange(gate.n_filters) == gate.n_filters - 1 for gate in gates}
    closed = close_least_important(model, nothing, 0.7, last)
    assert bool(flat(model, closed)[flat(model, last)].all())


def test_rounds_leave_closed_what_is_closed_and_judge_the_others_without(
    model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Tensor]] = []
    judged_without: list[int] = []

    def counted(model: nn.Module, batches: object, **options: dict[str, Tensor]) -> dict[str, Tensor]:
        judged_without.append(int(sum(mask.sum() for mask in options["closed"].values())))
        return importance(model, batches, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sys.modules["decouplify.train.importance"], "importance", counted)

    def batches() -> list[tuple[Tensor, None]]:
        biases = {g.name: c.fc2.bias.clone() for g, c in zip(model.decoupling.plan.gates, controllers, strict=True)}
        asked.append(biases)
        return [(images, None)]

    controllers = list(model.decoupling.controllers.values())
    costs = model.decoupling.costs
    closed = flat(model, close_in_rounds(model, batches, 0.5, 3))
    first, second, third = (flat(model, biases) for biases in asked)
    last = torch.cat([c.fc2.bias for c in controllers])
    assert bool((first > 0).all())
    for before, after, share in ((first, second, 5 / 6), (second, third, 4 / 6), (third, last, 0.5)):
        assert torch.equal(after[before <= 0], before[before <= 0])
        assert float(costs.executed((after > 0).double()[None])) <= share * costs.n_dense
        assert int((after <= 0).sum()) > int((before <= 0).sum())
    assert torch.equal(last <= 0, closed)
    assert judged_without == [0, int((second <= 0).sum()), int((third <= 0).sum())]


@pytest.mark.parametrize("n_rounds", [1, 3])
def test_a_run_starts_there(model: nn.Module, images: Tensor, n_rounds: int) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    recipe = DecouplingRecipe(
        0, target="1.5x", start="importance", start_rounds=n_rounds, norm_batches=2, batch_size=16
    )
    decouple(model, images, None, recipe)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.endswith("fc2.bias")}
    assert executed_share(model, [images]) == pytest.approx(1 / 1.5, abs=0.08)


def test_frozen_norms_keep_their_statistics_and_controllers_get_theirs(model: nn.Module, images: Tensor) -> None:
    norm = model.layer1[0].bn1
    kept = (norm.running_mean.clone(), norm.running_var.clone())
    controller = next(iter(model.decoupling.controllers.values()))
    recipe = DecouplingRecipe(
        2, lr=1e-3, optimizer="adam", target="1.5x", start="importance", frozen_norms=True, batch_size=16
    )
    weights = controller.fc1.weight.detach().clone()
    decouple(model, images, None, recipe)
    assert torch.equal(norm.running_mean, kept[0])
    assert torch.equal(norm.running_var, kept[1])
    assert not torch.equal(norm.weight, torch.ones_like(norm.weight))  # learns all the same
    assert int(controller.norm.num_batches_tracked) > 0
    # Adam moves every weight by about the learning rate a step.
    assert float((controller.fc1.weight.detach() - weights).abs().median()) > 1e-3


def test_bad_requests_are_refused_and_change_nothing(model: nn.Module, images: Tensor) -> None:
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="temperature=0"):
        importance(model, [(images, None)], temperature=0)
    with pytest.raises(ValueError, match="no images"):
        importance(model, [])
    with pytest.raises(ValueError, match=r"target_macs=1\.5"):
        close_least_important(model, {}, 1.5)
    with pytest.raises(ValueError, match="n_rounds=0; at least 1"):
        close_in_rounds(model, lambda: [(images, None)], 0.5, 0)
    with pytest.raises(ValueError, match="needs a target in MACs"):
        decouple(model, images, None, DecouplingRecipe(0, target=0.5, start="importance"))
    with pytest.raises(ValueError, match="start='closed'"):
        DecouplingRecipe(1, start="closed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="optimizer='lion'"):
        DecouplingRecipe(1, optimizer="lion")  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())
