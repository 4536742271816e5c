"""`decouplify detect` end to end, on the checkpoint that all command-line tests share."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("sklearn")

FEW = ("--split", "train", "--max-images", 60, "--per-class", "1,2", "--repeats", 2, "--critical", 0)


def test_it_prints_every_detector_control_and_baseline_as_json(run, trained) -> None:
    printed = json.loads(run("detect", trained.checkpoint, "--data", trained.data, *FEW, "--eps", 0.3, "--json").stdout)
    rows = {row["name"]: row for row in printed["rows"]}
    assert {"paths: pgd", "paths: placebo", "paths: noise", "softmax: pgd", "pseudo-paths: pgd"} <= set(rows)
    assert printed["attack"] == "pgd"
    assert printed["n_images"] == 60
    assert printed["n_success"] <= printed["n_correct"] <= 60
    for row in rows.values():
        assert [(score["detector"], score["n_per_class"]) for score in row["scores"]] == [
            (detector, n)
            for detector in ("random_forest", "adaboost", "gradient_boosting", "prototype")
            for n in (1, 2)
        ]
        for score in row["scores"]:
            assert 0 <= score["auc_mean"] <= 1
            assert score["auc_std"] >= 0
    assert all(score["auc_mean"] == 0.5 for score in rows["paths: placebo"]["scores"])


def test_it_prints_a_table_and_its_stages(run, trained) -> None:
    result = run("detect", trained.checkpoint, "--data", trained.data, *FEW, "--eps", 0.3, "--no-adaptive")
    assert "paths: pgd" in result.stdout
    assert "adaptive" not in result.stdout
    assert "attack mifgsm" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--attack", "cw"), "no attack is called 'cw'"),
        (("--attack", "cdrp", "--eps", 0.1), "the cdrp attack has no ball"),
        (("--per-class", "1,x"), "--per-class 1,x: wanted positive integers"),
        (("--eps", 1e-7), "classified correctly and were attacked with success"),
    ],
)
def test_wrong_input_ends_with_a_line(run, trained, arguments, message) -> None:
    result = run("detect", trained.checkpoint, "--data", trained.data, *FEW, *arguments, exit_code=2)
    assert message in result.stderr
