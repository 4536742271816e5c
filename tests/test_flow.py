"""Which channels are zero: what is predicted from the recording against what the model computes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import decouplify
from decouplify import aten
from decouplify.costs import Reader
from decouplify.errors import PlanError
from decouplify.flow import GateSet
from decouplify.modes import eval_mode
from toynets import SIZE, TOYS, random_gates, random_images, run


def visible_readers(model: nn.Module) -> list[Reader]:
    """Readers that are modules called once, whose inputs a hook can look at."""
    readers = model.decoupling.costs.readers
    names = Counter(reader.name for reader in readers)
    return [r for r in readers if r.name and names[r.name] == 1 and r.name not in ("dynamic", "named")]


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


def is_zero(gates: GateSet, path: Sequence[float]) -> bool:
    """The definition: all gates of the set are closed."""
    return gates is not None and not any(path[column] for column in gates)


def columns_of(model: nn.Module) -> dict[str, range]:
    columns, start = {}, 0
    for gate in model.decoupling.plan.gates:
        columns[gate.name] = range(start, start + gate.n_filters)
        start += gate.n_filters
    return columns


# Predictions against the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_channels_predicted_to_be_zero_are_exactly_zero(name: str) -> None:
    model = TOYS[name].wrapped(verify=False)
    n_zero = 0
    for _ in range(5):
        gates = random_gates(model)
        seen = inputs_of_readers(model, gates, random_images())
        path = torch.cat([gates[gate.name] for gate in model.decoupling.plan.gates]).tolist()
        for reader in visible_readers(model):
            for channel, gate_set in enumerate(reader.exists):
                if is_zero(gate_set, path):
                    n_zero += 1
                    assert not seen[reader.name][..., channel].any(), (reader.name, channel)
    assert n_zero > 0


@pytest.fixture
def no_dead_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rectifiers that are zero at zero only, so that a channel is zero because of gates or not at all."""
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.leaky_relu(x, 0.1, inplace))
    monkeypatch.setattr(F, "hardtanh", lambda x, low, high, inplace=False: F.leaky_relu(x, 0.1, inplace))


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.usefixtures("no_dead_filters")
def test_on_all_paths_of_a_narrow_network_exactly_the_predicted_channels_are_zero(name: str) -> None:
    """Brute force: every path, and every channel of every reader."""
    model = TOYS[name].wrapped(width=2, verify=False)
    for reader, zero, predicted in zeros_on_all_paths(model):
        assert not (predicted & ~zero).any(), f"{reader.name}: predicted to be zero, but is not"
        if TOYS[name].exact:
            assert not (zero & ~predicted).any(), f"{reader.name}: zero, but not predicted"


def zeros_on_all_paths(model: nn.Module) -> Iterator[tuple[Reader, Tensor, Tensor]]:
    """For each reader, with a row for each path: which input channels are zero, and which are predicted to be."""
    paths = torch.tensor(list(itertools.product((0.0, 1.0), repeat=model.decoupling.plan.n_filters)))
    gates = {gate: paths[:, columns.start : columns.stop] for gate, columns in columns_of(model).items()}
    seen = inputs_of_readers(model, gates, random_images(1).expand(len(paths), -1, -1, -1))
    for reader in visible_readers(model):
        zero = ~seen[reader.name].reshape(len(paths), -1, len(reader.exists)).any(1)
        yield reader, zero, torch.tensor([[is_zero(s, path) for s in reader.exists] for path in paths.tolist()])


# Gate sets in literals ------------------------------------------------------------------------------------------------


def sets_of(model: nn.Module, reader: str) -> list[list[str] | None]:
    """The gates that must be closed for each input channel to be zero, as "gate[filter]"; None for dense."""
    return named_sets(model, reader, "exists")


def constants_of(model: nn.Module, reader: str) -> list[list[str] | None]:
    """As ``sets_of``, for channels that are then another constant."""
    return named_sets(model, reader, "constant")


def named_sets(model: nn.Module, reader: str, kind: str) -> list[list[str] | None]:
    names = [f"{gate}[{i}]" for gate, columns in columns_of(model).items() for i in range(len(columns))]
    (found,) = (r for r in model.decoupling.costs.readers if r.name == reader)
    return [None if s is None else [names[column] for column in sorted(s)] for s in getattr(found, kind)]


def narrow(name: str, width: int = 2) -> nn.Module:
    return TOYS[name].wrapped(width=width)


def test_a_gated_value_has_one_gate_per_channel() -> None:
    assert sets_of(narrow("Plain"), "b.0") == [["a.0[0]"], ["a.0[1]"]]


def test_a_sum_needs_the_gates_of_both_operands_closed() -> None:
    expected = [["expand.0[0]", "shortcut.0[0]"], ["expand.0[1]", "shortcut.0[1]"]]
    assert sets_of(narrow("NormBeforeAdd"), "after.0") == expected


def test_a_sum_with_a_dense_operand_is_dense() -> None:
    assert sets_of(narrow("SharedRelu"), "fc") == [None, None]


def test_a_concatenation_joins_and_a_shuffle_moves() -> None:
    joined = [None, None, ["a.0[0]"], ["a.0[1]"], ["b.0[0]"], ["b.0[1]"]]
    assert sets_of(narrow("DenseConcat"), "c.0") == joined
    moved = [["a.0[0]"], ["branch.0[0]"], ["a.0[1]"], ["branch.0[1]"]]
    assert sets_of(narrow("ChannelShuffle", width=4), "after.0") == moved


def test_padded_channels_need_nothing_to_be_zero() -> None:
    model = narrow("ZeroPaddedShortcut")
    assert sets_of(model, "c.0") == [None, None, ["b.0[2]"], ["b.0[3]"]]
    assert sets_of(model, "last") == [["c.0[0]"], ["c.0[1]"], [], []]


def test_a_norm_that_moves_zero_makes_dense_and_a_gate_behind_a_sigmoid_does_not() -> None:
    assert sets_of(narrow("ActivationBeforeNorm"), "after.0") == [None, None]
    assert sets_of(narrow("SigmoidActivation"), "conv2") == [["conv1[0]"], ["conv1[1]"]]


def test_a_pad_with_another_number_makes_dense_and_a_mirror_does_not() -> None:
    assert sets_of(narrow("Padding"), "mirror") == [["same[0]"], ["same[1]"]]
    assert sets_of(narrow("Padding"), "ones") == [None, None]


def test_flattened_maps_repeat_the_gate_of_their_channel() -> None:
    body = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3, 4), nn.Flatten(), nn.Linear(18, 5)
    model = decouplify.wrap(nn.Sequential(*body), SIZE)
    assert sets_of(model, "3") == [["1[0]"]] * 9 + [["1[1]"]] * 9


def test_a_norm_makes_constants_for_readers_without_a_border() -> None:
    model = narrow("NormOfGated")
    for reader in ("one", "grouped"):
        assert sets_of(model, reader) == [None, None]
        assert constants_of(model, reader) == [["a[0]"], ["a[1]"]]
    for reader in ("padded", "pooled"):  # around the map, and in the mean with what is around it, the constant ends
        assert sets_of(model, reader) == constants_of(model, reader) == [None, None]


def test_a_reader_of_one_position_reads_constants_as_they_are() -> None:
    assert constants_of(decouplify.wrap(nn.Sequential(*single_position()), SIZE), "5") == [None, None]


def single_position() -> list[nn.Module]:
    """The last layer would need as many multiply-accumulates to fold a constant as to read it."""
    norm = nn.BatchNorm2d(2)
    return [nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3), norm, nn.MaxPool2d(12), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)]


# Single operators -----------------------------------------------------------------------------------------------------

OPERATORS = {
    "relu": lambda x, y: x.relu(),
    "gelu": lambda x, y: F.gelu(x),
    "sigmoid": lambda x, y: x.sigmoid(),
    "clamp 0 to 6": lambda x, y: x.clamp(0, 6),
    "clamp 1 to 6": lambda x, y: x.clamp(1, 6),
    "add": lambda x, y: x + y,
    "add a number": lambda x, y: x + 1,
    "add zero": lambda x, y: x + 0,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "multiply by sigmoid": lambda x, y: x * y.sigmoid(),
    "scale by a map": lambda x, y: x * y.mean(1, keepdim=True),
    "divide": lambda x, y: x / (y.abs() + 1),
    "maximum": torch.maximum,
    "mean over channels": lambda x, y: x.mean(1, keepdim=True).expand(-1, 2, -1, -1),
    "mean over positions": lambda x, y: x.mean((2, 3), keepdim=True),
    "max pool": lambda x, y: F.max_pool2d(x, 2),
    "max pool with indices": lambda x, y: F.adaptive_max_pool2d(x, 2, return_indices=True)[0],
    "average pool": lambda x, y: F.avg_pool2d(x, 3, 1, 1),
    "upsample": lambda x, y: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "concatenate": lambda x, y: torch.cat([x, y], 1),
    "stack and sum": lambda x, y: torch.stack([x, y]).sum(0),
    "flip channels": lambda x, y: x.flip(1),
    "roll channels": lambda x, y: x.roll(1, 1),
    "split and swap": lambda x, y: torch.cat(x.split([1, 3], 1)[::-1], 1),
    "every second channel": lambda x, y: x[:, ::2],
    "index channels": lambda x, y: x[:, [3, 1]],
    "repeat": lambda x, y: x.repeat(1, 2, 1, 1),
    "interleave": lambda x, y: x.repeat_interleave(2, 1),
    "shuffle": lambda x, y: F.channel_shuffle(x, 2),
    "pixel shuffle": lambda x, y: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x, y: F.pixel_unshuffle(x, 2),
    "pad rows": lambda x, y: F.pad(x, (1, 0, 2, 0)),
    "pad channels": lambda x, y: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "pad channels with ones": lambda x, y: F.pad(x, (0, 0, 0, 0, 1, 2), value=1.0),
    "pad rows with ones": lambda x, y: F.pad(x, (1, 0), value=1.0),
    "mirror rows": lambda x, y: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "crop": lambda x, y: F.pad(x, (-1, 0, 0, -1)),
    "drop channels": lambda x, y: F.pad(x, (0, 0, 0, 0, -1, 1)),
    "new zeros": lambda x, y: torch.cat([x, torch.zeros_like(y)], 1),
    "written through a view": lambda x, y: write_through_view(x + y),
    "windows and back": lambda x, y: x.view(-1, 4, 2, 4, 8).permute(0, 2, 1, 3, 4).transpose(1, 2).flatten(2, 3),
    "channels become positions": lambda x, y: x.transpose(1, 3),
    "softmax over channels": lambda x, y: x.softmax(1),
    "matmul over positions": lambda x, y: x @ y,
    "norm": lambda x, y: four_norm(x),
    "norm and relu": lambda x, y: four_norm(x).relu(),
    "norm of two": lambda x, y: four_norm(x + y),
    "norms added": lambda x, y: four_norm(x) + four_norm(y),
    "norm plus zero": lambda x, y: four_norm(x) + y,
    "norm times another": lambda x, y: four_norm(x) * y,
    "norm with statistics of the image": lambda x, y: F.batch_norm(x, None, None, training=True),
    "frozen norm": lambda x, y: x * PER_CHANNEL + PER_CHANNEL,
    "shift by a map": lambda x, y: x + torch.linspace(0, 1, 8),
    "divide a norm by a number": lambda x, y: four_norm(x) / 2,
    "divide by a norm": lambda x, y: x / four_norm(x),
    "prelu of a norm": lambda x, y: F.prelu(four_norm(x), PER_CHANNEL.flatten()),
    "sigmoid and norm": lambda x, y: four_norm(x.sigmoid()),
    "norm, average pool": lambda x, y: F.avg_pool2d(four_norm(x), 3, 1, 1),
    "norm, average pool of what is there": lambda x, y: F.avg_pool2d(four_norm(x), 3, 1, 1, count_include_pad=False),
    "norm, max pool": lambda x, y: F.max_pool2d(four_norm(x), 3, 1, 1),
    "norm, upsample": lambda x, y: F.interpolate(four_norm(x), scale_factor=2.0),
    "norm, pad": lambda x, y: F.pad(four_norm(x), (1, 1)),
    "norm, mirror": lambda x, y: F.pad(four_norm(x), (1, 1, 1, 1), mode="reflect"),
    "norm, pad channels": lambda x, y: F.pad(four_norm(x), (0, 0, 0, 0, 1, 2)),
    "norm, sum of rows": lambda x, y: four_norm(x).sum(2, keepdim=True).expand(-1, -1, 8, -1),
    "norm, pixel shuffle": lambda x, y: F.pixel_shuffle(four_norm(x), 2),
    "norm, shuffle": lambda x, y: F.channel_shuffle(four_norm(x), 2),
    "norm, concatenate": lambda x, y: torch.cat([four_norm(x), y], 1),
    "norm, mean over channels": lambda x, y: four_norm(x).mean(1, keepdim=True),
    "norm of a norm": lambda x, y: four_norm(four_norm(x)),
    "norm, channels become positions": lambda x, y: four_norm(x).transpose(1, 3),
}
#: Operators whose zeros are found only in part, or not at all.
CAUTIOUS = {
    "index channels",
    "matmul over positions",
    "multiply",
    "pad channels with ones",
    "scale by a map",
    "divide by a norm",
    "norm and relu",  # a negative constant is zero after it, until training changes it
    "norm times another",
    "written through a view",
}
#: Operators whose constants are found only in part, or not at all.
CAUTIOUS_ABOUT_CONSTANTS = CAUTIOUS - {"norm and relu"} | {
    "clamp 1 to 6",  # of small features
    "mean over channels",
    "norm with statistics of the image",
    "norm, mean over channels",
    "norm, sum of rows",
    "softmax over channels",
}
PER_CHANNEL = torch.tensor([0.7, -0.4, 1.3, 0.6]).view(4, 1, 1)


def four_norm(x: Tensor) -> Tensor:
    """A batch norm of four channels with statistics."""
    mean, variance = PER_CHANNEL.flatten(), PER_CHANNEL.flatten().square()
    return F.batch_norm(x, mean, variance, mean.flip(0), variance.flip(0))


def write_through_view(y: Tensor) -> Tensor:
    y[:, :2].mul_(2)
    return y


class TwoMaps(nn.Module):
    """Two gated maps of four channels, an operator on them, and a convolution that reads the result."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(3, 4, 1, 2, bias=False) for _ in range(2))
        self.x, self.y = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.operator = operator
        n_channels = operator(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)).shape[1]
        self.reader, self.other = nn.Conv2d(n_channels, 1, 1), nn.Conv2d(4, 1, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.x(self.stems[0](image)), self.y(self.stems[1](image))
        return self.reader(self.operator(x, y)), self.other(y)


@pytest.mark.parametrize("name", OPERATORS)
def test_labels_pass_an_operator_as_zeros_do(name: str) -> None:
    model = TwoMaps(OPERATORS[name])
    model = decouplify.wrap(model, SIZE, only=["x", "y"], verify=False)
    (zero, predicted) = next((z, p) for reader, z, p in zeros_on_all_paths(model) if reader.name == "reader")
    assert not (predicted & ~zero).any()
    if name not in CAUTIOUS:
        assert torch.equal(predicted, zero)


@pytest.mark.parametrize("name", OPERATORS)
def test_labels_pass_an_operator_as_constants_do(name: str) -> None:
    model = decouplify.wrap(TwoMaps(OPERATORS[name]), SIZE, only=["x", "y"], verify=False)
    paths, maps = maps_on_all_paths(model)
    (reader,) = (r for r in visible_readers(model) if r.name == "reader")
    uniform = (maps.amax(1) - maps.amin(1)) < 1e-6  # (paths, channels)
    known = torch.zeros_like(uniform)
    for channel, (zero, constant) in enumerate(zip(reader.exists, reader.constant, strict=True)):
        closed = torch.tensor([is_zero(constant, path) for path in paths.tolist()])
        values = maps[closed, :, channel]
        assert not len(values) or torch.allclose(values, values[:1, :1], atol=1e-6), channel
        known[:, channel] = closed | torch.tensor([is_zero(zero, path) for path in paths.tolist()])
    assert not (known & ~uniform).any()
    if name not in CAUTIOUS_ABOUT_CONSTANTS and maps.shape[1] > 1:
        assert torch.equal(known, uniform)


def maps_on_all_paths(model: nn.Module) -> tuple[Tensor, Tensor]:
    """All paths, and what the reader reads under each, shape (paths, positions, channels)."""
    paths = torch.tensor(list(itertools.product((0.0, 1.0), repeat=model.decoupling.plan.n_filters)))
    gates = {gate: paths[:, columns.start : columns.stop] for gate, columns in columns_of(model).items()}
    maps = inputs_of_readers(model, gates, random_images(1).expand(len(paths), -1, -1, -1))["reader"]
    return paths, maps.flatten(1, 2)


def test_wrap_looks_at_the_constants_it_predicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "averages_padding", lambda node: False)  # the mean is another one at the border
    with pytest.raises(PlanError, match="closed gates leave features where none were expected, at the input of pooled"):
        TOYS["NormOfGated"].wrapped()
