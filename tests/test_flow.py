"""Which channels are zero: what is predicted from the recording against what the model computes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import decouplify
from decouplify import aten
from decouplify.costs import Reader
from decouplify.flow import Flow, GateSet, gate_columns
from decouplify.plan import Options
from decouplify.surgery import eval_mode, record_and_match
from toynets import SIZE, TOYS, Classifier, random_gates, random_images, randomise_statistics, run, toy

N_IMAGES = 4


def visible_readers(model: nn.Module) -> list[Reader]:
    """Readers that are modules called once, whose inputs a hook can look at."""
    readers = model.decoupling.costs.readers
    names = Counter(reader.name for reader in readers)
    return [r for r in readers if r.name and names[r.name] == 1 and r.name not in ("inner", "blur", "dynamic", "named")]


def inputs_of_readers(model: nn.Module, gates: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """What each convolution and linear layer reads in the masked form, channels last."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].movedim(-1 if isinstance(module, nn.Linear) else 1, -1).clone()

        return hook

    handles = [model.get_submodule(r.name).register_forward_pre_hook(look(r.name)) for r in visible_readers(model)]
    with model.decoupling.forced(gates), eval_mode(model):
        run(model, images)
    for handle in handles:
        handle.remove()
    return seen


def is_zero(gates: GateSet, path: Tensor) -> bool:
    """The definition: all gates of the set are closed."""
    return gates is not None and not any(path[column] for column in gates)


def path_of(model: nn.Module, gates: dict[str, Tensor]) -> Tensor:
    return torch.cat([gates[gate.name] for gate in model.decoupling.plan.gates], -1)


# Predictions against the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_channels_predicted_to_be_zero_are_exactly_zero(name: str) -> None:
    model = TOYS[name].wrapped(verify=False)
    n_zero = 0
    for _ in range(5):
        gates = random_gates(model)
        seen, path = inputs_of_readers(model, gates, random_images()), path_of(model, gates)
        for reader in visible_readers(model):
            for channel, gate_set in enumerate(reader.exists):
                if is_zero(gate_set, path):
                    n_zero += 1
                    assert not seen[reader.name][..., channel].any(), (reader.name, channel)
    assert n_zero > 0


@pytest.mark.parametrize("name", TOYS)
def test_on_all_paths_of_a_narrow_network_exactly_the_predicted_channels_are_zero(name: str) -> None:
    """Brute force: every path at once, one per row of a batch, and every channel of every reader."""
    model = TOYS[name].wrapped(width=2, verify=False)
    plan = model.decoupling.plan
    paths = torch.tensor(list(itertools.product((0.0, 1.0), repeat=plan.n_filters)))
    assert len(paths) <= 1024
    columns = gate_columns_of(model)
    found = torch.zeros(0)
    zero: dict[str, Tensor] = {}
    for seed in range(N_IMAGES):  # a ReLU may be dead for one image, so a channel counts as zero if it is for all
        gates = {name: paths[:, range_.start : range_.stop] for name, range_ in columns.items()}
        images = random_images(1, seed=seed).expand(len(paths), -1, -1, -1)
        for reader, x in inputs_of_readers(model, gates, images).items():
            found = ~x.reshape(len(paths), -1, x.shape[-1]).any(1)
            zero[reader] = found & zero.get(reader, True)
    for reader in visible_readers(model):
        predicted = torch.tensor([[is_zero(s, path) for s in reader.exists] for path in paths])
        assert not (predicted & ~zero[reader.name]).any(), f"{reader.name}: predicted zero, but is not"
        if TOYS[name].exact:
            assert not (zero[reader.name] & ~predicted).any(), f"{reader.name}: zero, but not predicted"


def gate_columns_of(model: nn.Module) -> dict[str, range]:
    columns, start = {}, 0
    for gate in model.decoupling.plan.gates:
        columns[gate.name] = range(start, start + gate.n_filters)
        start += gate.n_filters
    return columns


# Gate sets in literals ------------------------------------------------------------------------------------------------


def sets_of(name: str, reader: str, width: int = 2) -> list[list[str] | None]:
    """The gate set of each input channel as "gate[filter]", None for dense."""
    model = TOYS[name].wrapped(width=width, verify=False)
    names = [f"{gate}[{i}]" for gate, columns in gate_columns_of(model).items() for i in range(len(columns))]
    (found,) = (r for r in model.decoupling.costs.readers if r.name == reader)
    return [None if s is None else [names[column] for column in sorted(s)] for s in found.exists]


def test_a_gated_value_has_one_gate_per_channel() -> None:
    assert sets_of("Plain", "b.0") == [["a.0[0]"], ["a.0[1]"]]


def test_a_sum_needs_the_gates_of_both_operands_closed() -> None:
    assert sets_of("NormBeforeAdd", "after.0") == [
        ["expand.0[0]", "shortcut.0[0]"],
        ["expand.0[1]", "shortcut.0[1]"],
    ]


def test_a_sum_with_a_dense_operand_is_dense() -> None:
    assert sets_of("SharedRelu", "fc") == [None, None]


def test_a_concatenation_joins_and_a_shuffle_moves() -> None:
    assert sets_of("DenseConcat", "c.0") == [None, None, ["a.0[0]"], ["a.0[1]"], ["b.0[0]"], ["b.0[1]"]]
    assert sets_of("ChannelShuffle", "after.0", width=4) == [
        ["a.0[0]"],
        ["branch.0[0]"],
        ["a.0[1]"],
        ["branch.0[1]"],
    ]


def test_padded_channels_need_nothing_to_be_zero() -> None:
    assert sets_of("ZeroPaddedShortcut", "c.0") == [None, None, ["b.0[2]"], ["b.0[3]"]]
    assert sets_of("ZeroPaddedShortcut", "last") == [["c.0[0]"], ["c.0[1]"], [], []]


def test_a_norm_or_an_activation_that_moves_zero_makes_dense() -> None:
    assert sets_of("ActivationBeforeNorm", "after.0") == [None, None]
    assert sets_of("SigmoidActivation", "conv2") == [["conv1[0]"], ["conv1[1]"]]  # the gate is behind the sigmoid


def test_a_pad_with_another_number_makes_dense_and_a_mirror_does_not() -> None:
    assert sets_of("Padding", "mirror") == [["same[0]"], ["same[1]"]]
    assert sets_of("Padding", "ones") == [None, None]


def test_flattened_maps_repeat_the_gate_of_their_channel() -> None:
    @toy({})
    class Flattened(Classifier):
        def __init__(self, width: int = 2) -> None:
            super().__init__(width, 16 * width)
            self.a = nn.Conv2d(width, width, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.a(self.stem(x)).flatten(1))

    found = sets_of(TOYS.pop("Flattened") and "Flattened", "fc") if "Flattened" in TOYS else _flattened(Flattened)
    assert found == [["a[0]"]] * 16 + [["a[1]"]] * 16
