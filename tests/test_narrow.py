"""A network without channels that nobody reads is the same network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from decouplify import aten
from decouplify.bench.dense import dense_module
from decouplify.bench.twin import static_twin
from decouplify.narrow import ChannelClasses, narrow
from decouplify.sites import n_macs
from decouplify.trace import Trace, trace
from toynets import SIZE, TOYS, leaves, random_images, randomise_statistics

# Some of their tensors are copied by the recorder of folded or fixed weights; what they test lies elsewhere.
NAMES = list(TOYS)


def recorded(name: str, width: int = 8) -> tuple[nn.Module, Trace]:
    torch.manual_seed(0)
    model = randomise_statistics(TOYS[name].build(width)).eval()
    return model, trace(model, SIZE)


def counted(run: Trace) -> int:
    nodes = [n for n in run.graph.nodes if aten.name_of(n) in aten.COUNTED and n not in run.static]
    return sum(n_macs(node) for node in nodes)


def any_half(classes: ChannelClasses) -> set[int]:
    """About half of the classes that may leave, while each layer keeps at least one filter."""
    free = sorted({classes.find(c) for layer in classes.layers for c in layer.outputs.ids} - {0})
    coins = torch.rand(len(free), generator=torch.Generator().manual_seed(1)).tolist()
    removed = {c for c, coin in zip(free, coins, strict=True) if coin < 0.5}
    for layer in classes.layers:
        if not classes.kept(layer.outputs, removed):
            removed.discard(classes.find(layer.outputs.ids[0]))
    return removed


def run_dense(run: Trace, image: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return leaves(dense_module(run)(image.clone()))


@pytest.mark.parametrize("name", NAMES)
def test_channels_that_nobody_reads_can_leave(name: str) -> None:
    image = random_images(1)
    _, silenced = recorded(name)
    classes = ChannelClasses(silenced)
    removed = any_half(classes)
    for cut in classes.slices:  # the oracle: the same channels are there, and every weight that reads them is zero
        if cut.dim == 1:
            dead = torch.tensor([classes.find(c) in removed for c in cut.ids])
            tensor = silenced.tensors[str(cut.tensor.target)].detach().clone()
            tensor[:, dead] = 0
            silenced.tensors[str(cut.tensor.target)] = tensor
    _, run = recorded(name)
    narrower = narrow(ChannelClasses(run), removed)
    for found, expected in zip(run_dense(narrower, image), run_dense(silenced, image), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_cost_is_known_before_anything_is_removed(name: str) -> None:
    _, run = recorded(name)
    classes = ChannelClasses(run)
    assert classes.n_macs(set()) == counted(run)
    removed = any_half(classes)
    predicted = classes.n_macs(removed)
    assert counted(narrow(classes, removed)) == predicted


@pytest.mark.parametrize(
    ("name", "n_free"),
    [
        ("Plain", 3 * 8),  # stem, a, b
        ("DepthwiseChain", None),
        ("SharedRelu", None),
        ("LayerNormPermuted", None),
        ("DenseConcat", 4 * 8),  # stem, a, b, c: a concatenation ties nothing
    ],
)
def test_what_is_tied_together(name: str, n_free: int | None) -> None:
    _, run = recorded(name)
    classes = ChannelClasses(run)
    free = {classes.find(c) for layer in classes.layers for c in layer.outputs.ids} - {0}
    n_filters = sum(len(layer.outputs.ids) for layer in classes.layers)
    assert len(free) == n_free if n_free is not None else 0 < len(free) < n_filters


def test_the_logits_stay() -> None:
    _, run = recorded("Plain")
    classes = ChannelClasses(run)
    assert all(classes.is_fixed(channel) for channel in classes.layers[-1].outputs.ids)


def test_a_layer_keeps_a_filter_and_fixed_channels_stay() -> None:
    _, run = recorded("Plain")
    classes = ChannelClasses(run)
    with pytest.raises(ValueError, match=r"'stem\.0' would lose all of its filters"):
        narrow(classes, {classes.find(c) for c in classes.layers[0].outputs.ids})
    with pytest.raises(ValueError, match="that must stay"):
        narrow(classes, {0})


@pytest.mark.parametrize("name", ["Plain", "SharedRelu", "DepthwiseChain", "SqueezeExcite", "DenseConcat"])
def test_the_static_twin_costs_what_it_should(name: str) -> None:
    model, run = recorded(name, 32)
    n_dense = counted(run)
    twin = static_twin(run, n_dense / 2)
    assert twin.n_macs == pytest.approx(n_dense / 2, rel=0.1)
    assert 0.4 < twin.width < 0.9
    with torch.no_grad():
        assert twin.module(random_images(1)).shape == (1, 5)
    full = static_twin(trace(model, SIZE), n_dense)
    assert full.width == 1
    assert torch.allclose(full.module(random_images(1)), model(random_images(1)), atol=1e-5)
