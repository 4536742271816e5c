"""The whole experiment on a small network: counts, controls, baselines, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from decouplify.adversarial import DETECTORS, FGSM, PGD, DetectionResult, Protocol, TooFewImagesError, detect, observe
from decouplify.adversarial.experiment import Experiment, Images
from decouplify.adversarial.observations import Original

FAST = {"detectors": ("prototype",), "n_per_class": (1, 5), "repeats": 2}


@pytest.fixture(scope="module")
def result(trained) -> DetectionResult:
    return detect(
        trained.pixel, trained.images, trained.labels, original=trained.original, n_critical=60, batch_size=50, **FAST
    )


def test_every_row_that_was_promised_is_there(result) -> None:
    controls = [
        "pgd",
        "noise (trained on pgd)",
        "fgsm (trained on pgd)",
        "mifgsm (trained on pgd)",
        "adaptive (trained on pgd)",
        "noise",
        "placebo",
        "adaptive",
    ]
    baselines = ["softmax", "logits", "features", "pseudo-paths"]
    assert [row.name for row in result.rows] == [
        *(f"{view}: {control}" for view in ("paths", "margins") for control in controls),
        *(f"{baseline}: {what}" for baseline in baselines for what in ("pgd", "placebo")),
        "paths: pgd [60 images]",
        "margins: pgd [60 images]",
        "critical paths: pgd [60 images]",
        "critical paths: placebo [60 images]",
    ]
    assert result.skipped == {}


def test_placebo_is_a_half_everywhere(result) -> None:
    placebos = [row for row in result.rows if row.tested_on == "placebo"]
    assert len(placebos) == 7
    for row in placebos:
        for score in row.scores:
            assert 0.45 <= score.auc_mean <= 0.55, row.name


def test_a_placebo_shows_the_same_images_in_the_same_order(trained) -> None:
    given = Images(trained.images[:50], trained.labels[:50])
    experiment = Experiment(trained.pixel, given, Protocol(DETECTORS), batch_size=8)
    again = experiment.seen_again()
    np.testing.assert_allclose(again.logits, experiment.clean.logits, atol=1e-4)
    np.testing.assert_array_equal(again.path, experiment.clean.path)


def test_only_correct_images_and_successful_attacks_count(trained, result) -> None:
    correct = observe(trained.pixel, trained.images).preds == trained.labels.numpy()
    assert (result.n_images, result.n_correct) == (len(trained.images), int(correct.sum()))
    x, y = trained.images[torch.from_numpy(correct)], trained.labels[torch.from_numpy(correct)]
    fooled = int((observe(trained.pixel, FGSM()(trained.pixel, x, y)).preds != y.numpy()).sum())
    row = result.row("paths: fgsm (trained on pgd)")
    assert (row.n_success, row.n_attacked) == (fooled, len(x))
    main = result.row("paths: pgd")
    for score in main.scores:
        assert score.n_train + score.n_test == main.n_success
        assert score.n_train == 4 * score.n_per_class


def test_attacks_show_and_noise_shows_less(result) -> None:
    def auc(name: str) -> float:
        return result.row(name).score("prototype", 5).auc_mean

    assert auc("paths: pgd") > 0.6
    assert auc("paths: noise (trained on pgd)") < auc("paths: pgd")


def test_the_table_and_what_beats_paths(result) -> None:
    lines = result.table().splitlines()
    assert f"with success on {result.rows[0].n_success}" in lines[0]
    assert len(lines) == 3 + len(result.rows)
    assert lines[3].startswith("paths: pgd ")
    assert result.to_markdown("tpr").count("\n") == 1 + len(result.rows)
    better = {row.name for row in result.beaten_by("prototype", 5)}
    ours = result.row("paths: pgd").score("prototype", 5).auc_mean
    for name in ("softmax", "logits", "features", "pseudo-paths"):
        theirs = result.row(f"{name}: pgd").score("prototype", 5).auc_mean
        assert (f"{name}: pgd" in better) == (theirs > ours)


def test_margins_are_the_logits_of_the_bits(trained, result) -> None:
    seen = observe(trained.pixel, trained.images[:30])
    np.testing.assert_array_equal(seen.margins > 0, seen.path == 1)
    decoupling = trained.pixel.module.decoupling
    with torch.no_grad():
        trained.pixel(trained.images[:30])
    np.testing.assert_allclose(seen.margins, torch.cat(list(decoupling.margins().values()), 1).numpy(), atol=1e-4)
    kinds = {row.name: result.kind(row) for row in result.rows}
    assert (kinds["paths: pgd"], kinds["margins: pgd"], kinds["margins: noise"]) == ("attack", "attack", "control")
    assert all(row.features not in ("paths", "margins") for row in result.beaten_by("prototype", 5, "margins"))


def test_one_look_at_paths_is_enough_for_a_table(trained) -> None:
    settings = {**FAST, "n_per_class": (1,), "unseen": (), "adaptive_weight": None, "baselines": ("logits",)}
    x, y = trained.images[:80], trained.labels[:80]
    whole, part = (
        detect(trained.pixel, x, y, PGD(n_steps=3), features=features, **settings)
        for features in (("paths", "margins"), ("margins",))
    )
    assert {row.features for row in part.rows} == {"margins", "logits"}
    assert all(row == whole.row(row.name) for row in part.rows)
    ours = part.row("margins: pgd").score("prototype", 1).auc_mean
    theirs = part.row("logits: pgd").score("prototype", 1).auc_mean
    assert bool(part.beaten_by("prototype", 1)) == (theirs > ours)


def test_it_survives_json(result, tmp_path) -> None:
    described = json.loads(result.save(tmp_path / "table.json").read_text())
    assert {row["kind"] for row in described["rows"]} == {"attack", "control", "baseline"}
    assert DetectionResult.from_dict(described).to_dict() == described
    score = described["rows"][0]["scores"][0]
    assert {"detector", "n_per_class", "auc_mean", "auc_std", "tpr_mean", "auc_hard_mean"} <= set(score)


def test_it_can_be_drawn(result) -> None:
    ax = result.plot()
    assert [text.get_text() for text in ax.get_yticklabels()] == [row.name for row in reversed(result.rows)]


def test_the_same_seed_gives_the_same_table(trained) -> None:
    settings = {**FAST, "baselines": ("softmax",), "unseen": (), "adaptive_weight": None}
    first, second = (
        detect(trained.pixel, trained.images[:120], trained.labels[:120], PGD(n_steps=3), **settings) for _ in range(2)
    )
    assert first.rows == second.rows


def test_repeated_images_count_once(trained) -> None:
    settings = {**FAST, "n_per_class": (1,), "baselines": (), "unseen": (), "adaptive_weight": None}
    x, y = trained.images[:80], trained.labels[:80]
    once, twice = (
        detect(trained.pixel, torch.cat([x] * n), torch.cat([y] * n), PGD(n_steps=3), **settings) for n in (1, 2)
    )
    assert twice.n_images == once.n_images == 80
    assert twice.rows == once.rows


def test_attacks_of_one_name_are_numbered(trained) -> None:
    settings = {**FAST, "n_per_class": (1,), "features": ("paths",), "baselines": (), "adaptive_weight": None}
    attacks = {"attack": PGD(n_steps=3), "unseen": (PGD(n_steps=4), PGD(n_steps=5))}
    found = detect(trained.pixel, trained.images[:80], trained.labels[:80], **attacks, **settings)
    assert [row.tested_on for row in found.rows] == ["pgd", "noise", "pgd #2", "pgd #3", "noise", "placebo"]


def test_rows_with_too_few_images_are_named(trained) -> None:
    settings = {**FAST, "features": ("paths",), "baselines": (), "unseen": (FGSM(1e-6),), "adaptive_weight": None}
    found = detect(trained.pixel, trained.images[:80], trained.labels[:80], PGD(n_steps=5), **settings)
    assert list(found.skipped) == ["paths: fgsm (trained on pgd)"]
    assert "left out: paths: fgsm (trained on pgd): too few attacks had success" in found.table()
    few = detect(trained.pixel, trained.images[:12], trained.labels[:12], PGD(), **{**settings, "unseen": ()})
    assert "5 per class: 4 instead of 20 training images, classes had not enough" in few.table()
    with pytest.raises(TooFewImagesError, match="0 images are classified correctly and were attacked with success"):
        detect(trained.pixel, trained.images[:80], trained.labels[:80], FGSM(1e-6), **settings)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_critical_paths_do_not_depend_on_the_batch(trained, batch_size) -> None:
    x = trained.images[:14]
    together, apart = (Original(trained.pixel, trained.original, x, n).critical(x) for n in (14, batch_size))
    assert together.shape == (14, 60)
    assert 0.05 < (together == 0).mean() < 0.95
    np.testing.assert_allclose(together, apart, atol=2e-3)


def test_the_original_without_weights_of_its_own_is_the_network_without_gates(trained) -> None:
    x = trained.images[:20]
    found = Original(trained.pixel, None, x, 20)
    assert not hasattr(found.network, "decoupling")
    assert set(np.unique(found.pseudo(x))) == {0.0, 1.0}
    assert hasattr(trained.pixel.module, "decoupling")


def test_wrong_input_is_refused(trained) -> None:
    x, y = trained.images, trained.labels
    with pytest.raises(ValueError, match="no feature of paths is called 'gates'; there are paths, margins"):
        detect(trained.pixel, x, y, features=("gates",))
    with pytest.raises(ValueError, match="detect: no features given, some of paths, margins wanted"):
        detect(trained.pixel, x, y, features=())
    with pytest.raises(ValueError, match="detect: Net is not wrapped"):
        detect(trained.original, x, y)
    with pytest.raises(ValueError, match=r"detect: pixels from .* given, \[0, 1\] wanted"):
        detect(trained.pixel, 3 * x, y)
    with pytest.raises(ValueError, match=r"detect: labels of shape \(2,\)"):
        detect(trained.pixel, x, y[:2])
    with pytest.raises(ValueError, match="detect: no baseline is called 'odin'; there are softmax, logits"):
        detect(trained.pixel, x, y, baselines=("odin",))
    with pytest.raises(ValueError, match="detect: no detector is called 'svm'"):
        detect(trained.pixel, x, y, detectors=("svm",))
    with pytest.raises(ValueError, match="no attack is called 'cw'"):
        detect(trained.pixel, x, y, "cw")
