"""Networks side by side: before and after decoupling, and several trainings."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

import decouplify
from decouplify.paths import before_after, force, macs_of_paths, pseudo_paths, sweep


def test_before_and_after_are_compared_in_one_call(trained):
    result = before_after(trained.original, trained.wrapped, trained.batches, method="pca")
    np.testing.assert_array_equal(result.after.bits, decouplify.record(trained.wrapped, trained.batches).bits)
    wanted = pseudo_paths(trained.original, trained.batches, like=trained.wrapped)
    np.testing.assert_array_equal(result.before.bits, wanted.bits)
    numbers = result.numbers
    assert numbers["top-1 accuracy"] == (
        (result.before.preds == result.before.labels).mean(),
        (result.after.preds == result.after.labels).mean(),
    )
    assert numbers["class accuracy of the nearest paths"] == (
        result.before.knn_accuracy(10),
        result.after.knn_accuracy(10),
    )
    assert min(numbers["class accuracy of the nearest paths"]) > 0.3
    assert result.summary().startswith("Before (pseudo-paths, rule mean) and after decoupling")
    assert json.dumps(result.to_dict(), allow_nan=False)
    assert len(result.plot().patches) == 2 * 3
    left, right = result.plot_maps()
    left.figure.canvas.draw()
    assert (left.get_title(loc="left"), right.get_title(loc="left")) == ("Before", "After")


def test_the_unwrapped_network_serves_where_the_original_is_gone(trained):
    bare = decouplify.unwrap(copy.deepcopy(trained.wrapped))
    result = before_after(bare, trained.wrapped, trained.batches[:1], method="pca", rule="active")
    assert len(result.before) == len(result.after) == 100


def test_a_sweep_tells_accuracy_work_and_states_of_every_run(trained):
    site = trained.wrapped.decoupling.plan.sites[0].name

    def runs():
        yield {"name": "as trained", "sparsity": 0.1, "kl": 1}, trained.wrapped
        with force(trained.wrapped, site, off=range(8)):
            yield {"name": "half of a layer off", "sparsity": 10.0, "kl": 1}, trained.wrapped
        yield {"name": "other", "sparsity": 0.1, "kl": 2}, trained.wrapped

    result = sweep(runs(), trained.batches)
    paths = decouplify.record(trained.wrapped, trained.batches)
    first, second, _ = result.runs
    assert first.accuracy == (paths.preds == paths.labels).mean()
    assert first.macs == macs_of_paths(trained.wrapped, paths).executed.double().mean()
    assert first.dynamic == paths.filter_states().totals["dynamic"] / paths.n_filters
    assert first.dynamic + first.silent + first.energetic == pytest.approx(1)
    assert second.macs < first.macs
    assert second.silent > first.silent
    lines = result.summary().splitlines()
    assert lines[0].split()[:4] == ["name", "sparsity", "kl", "top-1"]
    assert len(lines) == 5
    assert json.dumps(result.to_dict(), allow_nan=False)
    assert len(result.plot().patches) == 9
    ax = result.plot(over="sparsity")
    assert [line.get_xdata().tolist() for line in ax.lines] == [[0.1, 10.0]] * 3
    with pytest.raises(ValueError, match="over='kl', wanted a setting with at least two different numbers"):
        sweep(list(runs())[:1], trained.batches[:1]).plot(over="kl")
    with pytest.raises(ValueError, match="sweep: got no runs"):
        sweep([], trained.batches)
