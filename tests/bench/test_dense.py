"""The network that baselines run is the network."""

from __future__ import annotations

import pytest
import torch

from decouplify import aten
from decouplify.bench.dense import dense_module
from decouplify.trace import trace
from toynets import SIZE, TOYS, random_images, randomise_statistics, run


@pytest.mark.parametrize("name", TOYS)
def test_the_dense_module_computes_what_the_model_does(name: str) -> None:
    model = randomise_statistics(TOYS[name].build(8)).eval()
    dense = dense_module(trace(model, SIZE))
    for found, expected in zip(run(dense, random_images(1)), run(model, random_images(1)), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_norms_after_convolutions_are_folded_and_others_are_not() -> None:
    def n_norms(name: str) -> int:
        dense = dense_module(trace(TOYS[name].build(8).eval(), SIZE))
        return sum(aten.name_of(node) == "batch_norm" for node in dense.graph.nodes)

    assert n_norms("Plain") == 0
    assert n_norms("PreActivation") > 0
