"""Schedules are functions of the run's progress; what cannot be trained is refused when the recipe is written."""

from __future__ import annotations

import pytest

from decouplify.train import DecouplingRecipe, Recipe


def test_the_learning_rate_rises_then_falls_along_half_a_cosine() -> None:
    recipe = Recipe(10, warmup_epochs=1.0)
    assert recipe.lr_factor(0.0) == 0.0
    assert recipe.lr_factor(0.05) == pytest.approx(0.5)
    assert recipe.lr_factor(0.1) == pytest.approx(1.0)
    assert recipe.lr_factor(0.55) == pytest.approx(0.5)
    assert recipe.lr_factor(1.0) == pytest.approx(0.0)


def test_the_papers_steps_divide_the_learning_rate_by_ten() -> None:
    recipe = Recipe(10, warmup_epochs=0.0, steps=(0.5, 0.75))
    assert [recipe.lr_factor(p) for p in (0.0, 0.49, 0.5, 0.8)] == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_noise_falls_to_zero_where_gates_become_hard() -> None:
    recipe = DecouplingRecipe(10, hard_share=0.2)
    assert [recipe.noise(p) for p in (0.0, 0.4, 0.8, 1.0)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert [recipe.is_hard(p) for p in (0.0, 0.79, 0.8)] == [False, False, True]


def test_ramps_end_at_one() -> None:
    recipe = DecouplingRecipe(10, ramp_share=0.5, information_ramp_share=0.0)
    assert [recipe.target_scale(p) for p in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert recipe.information_scale(0.01) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0; at least 1"),
        ({"accumulate": 0}, "accumulate=0; at least 1"),
        ({"epochs": -1}, "epochs=-1; at least 0"),
        ({"label_smoothing": 1.5}, r"label_smoothing=1.5 is not in \[0, 1\]"),
        ({"feature_weight": -1.0}, "feature_weight=-1.0; a number >= 0"),
        ({"start_rounds": 0}, "start_rounds=0; at least 1"),
        ({"start_rounds": 2, "start": "prediction"}, "start_rounds=2 with start='prediction'"),
        ({"reconstruct": True}, "start='importance' or 'prediction' wanted, start='open' given"),
        ({"image_reduction": 0.9}, "image_reduction=0.9; a factor >= 1"),
        ({"kl": float("nan")}, "kl=nan; a number >= 0"),
        ({"hard_share": -0.1}, r"hard_share=-0.1 is not in \[0, 1\]"),
        ({"cuda_graphs": True, "precision": "float16"}, "take bfloat16"),
        ({"cuda_graphs": True, "accumulate": 2}, "a larger batch_size"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecouplingRecipe(**{"epochs": 1, **changes})
