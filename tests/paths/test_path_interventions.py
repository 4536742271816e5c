"""Filters switched by hand, on a network that was trained to choose them."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch

import decouplify
from decouplify.paths import contrast, counterfactual, force, gate_effect, transplant


def gates_of(model, images):
    with torch.no_grad():
        model(images)
    return {name: gate.clone() for name, gate in model.decoupling.gates().items()}


@pytest.fixture(scope="module")
def sites(trained):
    return [site.name for site in trained.wrapped.decoupling.plan.sites]


def test_forced_filters_are_switched_and_the_others_decide_as_before(trained, sites):
    model, images, site = trained.wrapped, trained.images[:40], sites[1]
    before = gates_of(model, images)
    with force(model, site, on=[0, 3], off=[1]):
        during = gates_of(model, images)
        assert decouplify.record(model, [images]).rates()[: before[sites[0]].shape[1]].tolist() == pytest.approx(
            before[sites[0]].mean(0).tolist()
        )
    assert during[site][:, [0, 3]].all()
    assert not during[site][:, 1].any()
    untouched = [i for i in range(before[site].shape[1]) if i not in (0, 1, 3)]
    assert torch.equal(during[site][:, untouched], before[site][:, untouched])
    assert torch.equal(during[sites[0]], before[sites[0]])
    after = gates_of(model, images)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_forcing_ends_with_the_context_also_after_an_error(trained, sites):
    before = gates_of(trained.wrapped, trained.images[:5])
    shut = None
    with contextlib.suppress(KeyError), force(trained.wrapped, sites[0], off="all"):
        shut = gates_of(trained.wrapped, trained.images[:5])[sites[0]]
        raise KeyError
    assert not shut.any()
    after = gates_of(trained.wrapped, trained.images[:5])
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_inner_of_two_contexts_wins(trained, sites):
    mask = torch.zeros(16, dtype=torch.bool)
    mask[2] = True
    with force(trained.wrapped, sites[0], off="all"), force(trained.wrapped, sites[0], on=mask):
        assert gates_of(trained.wrapped, trained.images[:3])[sites[0]].sum(1).tolist() == [1, 1, 1]


def test_force_refuses(trained, sites):
    model = trained.wrapped
    cases = [
        (("none",), {"on": [0]}, r"no gated convolution 'none'; the 3 sites are"),
        ((sites[0],), {}, "no filter of '.*' given"),
        ((sites[0],), {"on": [1], "off": [1, 2]}, r"filters \(1,\) of '.*' are in both on and off"),
        ((sites[0],), {"on": [16]}, "on has filters up to 16, '.*' has 0 to 15"),
        ((sites[0],), {"off": "every"}, "off is 'every', wanted indices"),
        ((sites[0],), {"off": [0.5]}, "wanted indices or a mask"),
    ]
    for args, filters, message in cases:
        with pytest.raises(ValueError, match=message), force(model, *args, **filters):
            pass
    with pytest.raises(ValueError, match="force: Sequential is not wrapped"), force(trained.original, "3", on=[0]):
        pass


def test_a_transplanted_path_is_taken_as_a_whole_or_at_some_sites(trained, sites):
    model, images = trained.wrapped, trained.images
    paths = decouplify.record(model, [images[:30]])
    donor = paths.subset([7])
    for source in (donor, images[[7]]):
        with transplant(model, source):
            assert (decouplify.record(model, [images[:30]]).bits == donor.bits).all()
    with transplant(model, donor, sites=sites[:1]):
        mixed = decouplify.record(model, [images[:30]])
    assert (mixed.unpack(sites[0]) == donor.unpack(sites[0])).all()
    with transplant(model, paths):  # each its own: nothing changes
        assert (decouplify.record(model, [images[:30]]).bits == paths.bits).all()
    with pytest.raises(ValueError, match="source has no image"), transplant(model, paths.subset([])):
        pass


def test_the_direct_effect_keeps_later_decisions_and_the_total_does_not(trained, sites):
    model, images = trained.wrapped, trained.images[:60]
    effect = gate_effect(model, images, sites[0], off="all", class_names=[f"digit {c}" for c in range(10)])
    with torch.no_grad():
        before = model(images)
        gates = gates_of(model, images)
        with force(model, sites[0], off="all"):
            total = model(images)
            with model.decoupling.forced({name: gates[name] for name in sites[1:]}):
                direct = model(images)
    np.testing.assert_array_equal(effect.before, before.numpy())
    np.testing.assert_array_equal(effect.total, total.numpy())
    np.testing.assert_array_equal(effect.direct, direct.numpy())
    assert not np.allclose(effect.total, effect.direct)
    np.testing.assert_array_equal(effect.n_changed, gates[sites[0]].sum(1).numpy())
    assert effect.flipped.mean() > 0.3
    assert "digit " in effect.summary()
    assert json.dumps(effect.to_dict(), allow_nan=False)
    assert len(effect.plot().patches) == 20


def test_switching_what_is_switched_already_has_no_effect(trained, sites):
    model, images = trained.wrapped, trained.images[:40]
    as_they_are = {}
    for site, gates in gates_of(model, images).items():
        constant = ((gates == gates[0]).all(0)).numpy()
        if constant.any():
            opened = gates[0].bool().numpy()
            as_they_are[site] = (constant & opened, constant & ~opened)
    assert as_they_are
    effect = gate_effect(model, images, as_they_are)
    assert effect.n_changed.sum() == 0
    np.testing.assert_array_equal(effect.total, effect.before)


def test_the_contrast_of_two_classes_is_that_of_their_rates(trained):
    paths = decouplify.record(trained.wrapped, trained.batches)
    found = contrast(paths, 3, 8, class_names=[f"digit {c}" for c in range(10)])
    a, b = (paths.subset(paths.labels == c).unpack().mean(0) for c in (3, 8))
    np.testing.assert_allclose(found.difference, a - b)
    name, index, difference = found.filters(1)[0]
    assert abs(difference) == pytest.approx(np.abs(a - b).max())
    column = paths.filter_slices[name].start + index
    assert difference == pytest.approx((a - b)[column])
    assert found.p_value[column] < 1e-4
    assert "digit 3" in found.summary()
    assert json.dumps(found.to_dict(), allow_nan=False)
    found.plot().figure.canvas.draw()


def test_the_contrast_of_two_images_is_where_their_paths_differ(trained):
    paths = decouplify.record(trained.wrapped, trained.batches)
    found = contrast(paths, 0, 1, by="ids")
    assert len(found.filters()) == paths.hamming()[0, 1]
    assert np.isnan(found.p_value).all()
    with pytest.raises(ValueError, match="contrast: a and b are both 3"):
        contrast(paths, 3, 3)
    with pytest.raises(ValueError, match="has no image with labels 12"):
        contrast(paths, 3, 12)


def test_a_counterfactual_gives_the_telling_filters_the_habit_of_the_other_class(trained):
    """Seen to fail when the signs of the switched filters are swapped."""
    paths = decouplify.record(trained.wrapped, trained.batches)
    found = contrast(paths, 0, 1)
    images = trained.images[trained.labels == 0]
    result = counterfactual(trained.wrapped, images, found, n_switched=(0, 2, 5))
    assert result.n_switched.tolist() == [0, 2, 5]
    assert result.margin[0] == result.control[0] > 0
    with contextlib.ExitStack() as forced, torch.no_grad():
        for name, index, difference in found.filters(5):  # filters that class 0 opens more often are closed
            switch = {"off": [index]} if difference > 0 else {"on": [index]}
            forced.enter_context(force(trained.wrapped, name, **switch))
        logits = trained.wrapped(images).double()
    assert result.margin[-1] == pytest.approx(float((logits[:, 0] - logits[:, 1]).mean()), abs=1e-5)
    assert "random ones" in result.headline()
    assert json.dumps(result.to_dict(), allow_nan=False)
    result.plot().figure.canvas.draw()
    with pytest.raises(ValueError, match="say which logits to compare with classes="):
        counterfactual(trained.wrapped, images, contrast(paths, 0, 1, by="ids"))
