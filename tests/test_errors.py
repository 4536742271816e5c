"""Mistakes: every message says what was given, what was wanted, and what to do; nothing is changed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import decouplify
from decouplify.decoupling import Decoupling
from decouplify.errors import CheckpointError, NonFiniteError, PlanError, TraceError, VerificationError
from toynets import SIZE, TOYS, random_images


def build(name: str = "Plain") -> nn.Module:
    return TOYS[name].build()


def check_refused(model: nn.Module, match: str, size: Any = SIZE, error: Any = PlanError, **options: Any) -> None:
    """``wrap`` and ``inspect`` refuse alike, and the model stays what it was."""
    keys = list(model.state_dict())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with pytest.raises(error, match=match):
        decouplify.wrap(model, size, **options)
    assert list(model.state_dict()) == keys
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_errors_are_value_errors_except_for_a_wrong_result() -> None:
    assert all(issubclass(e, ValueError) for e in (CheckpointError, NonFiniteError, PlanError, TraceError))
    assert issubclass(VerificationError, RuntimeError)


# Models that cannot be wrapped ----------------------------------------------------------------------------------------


def test_a_model_without_convolutions() -> None:
    check_refused(nn.ReLU(), "ReLU runs no convolution, so there is nothing to gate$")
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    check_refused(
        perceptron, r"nothing to gate; its linear layers on \(N, H, W, C\) maps can be gated with linear_as_conv"
    )


def test_a_model_of_which_no_convolution_can_be_gated_gets_the_table_of_reasons() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    model(random_images())
    check_refused(model, r"no convolution of Sequential can be gated:\n(?s:.*)0 .*first convolution \(skip_first\)")
    check_refused(build(), "(?s)no convolution of Plain can be gated.*in exclude=", exclude="*")


def test_a_model_that_is_wrapped_already() -> None:
    model = TOYS["Plain"].wrapped()
    check_refused(model, r"Plain is wrapped already; decouplify.unwrap\(model\) gives the original back")
    check_refused(nn.Sequential(model), "Sequential is wrapped already")
    with pytest.raises(PlanError, match="Plain is wrapped already"):
        decouplify.inspect(model, SIZE)
    assert isinstance(model.decoupling, Decoupling)


def test_a_model_with_an_attribute_of_that_name() -> None:
    model = build()
    model.decoupling = "mine"
    check_refused(model, "Plain has an attribute 'decoupling' of its own, the name that wrap needs")
    assert model.decoupling == "mine"


def test_a_frozen_model() -> None:
    check_refused(
        build().requires_grad_(False),
        r"all 11 parameters of Plain are frozen.*Call model.requires_grad_\(True\), or pass frozen_ok=True",
    )


@pytest.mark.parametrize(
    ("size", "match"),
    [
        (
            (3, 2, 2),
            r"NoNorm does not run on one image of size \(3, 2, 2\): .*Give the size of your images as input_size=",
        ),
        ((1, 16, 16), r"size \(1, 16, 16\): RuntimeError: .*to have 3 channels, but got 1 channels instead"),
        ((16, 16), r"does not run on one image of size \(16, 16\)"),
    ],
)
def test_a_size_on_which_the_model_does_not_run(size: tuple[int, ...], match: str) -> None:
    check_refused(build("NoNorm"), match, size, TraceError)


def test_a_controller_without_hidden_units() -> None:
    check_refused(build(), "reduction=0: a controller needs at least one", error=ValueError, reduction=0)


def test_control_flow_that_depends_on_values() -> None:
    class Branching(TOYS["Plain"].build):
        def body(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if x.mean() > 0 else self.b(x)

    check_refused(Branching(), "reads values of the features .*Wrap a part of the model", error=TraceError)


def test_control_flow_that_differs_from_the_recording() -> None:
    class Alternating(TOYS["Plain"].build):
        n_calls = 0

        def body(self, x: Tensor) -> Tensor:
            self.n_calls += 1
            return self.b(self.a(x)) if self.n_calls % 2 else self.b(x)

    check_refused(Alternating(), r"does not give the output it gave before.*wrap\(verify=False\) skips this check")


# Unwrapped models -----------------------------------------------------------------------------------------------------


def test_functions_for_wrapped_models_refuse_others() -> None:
    with pytest.raises(ValueError, match="unwrap: Plain is not wrapped"):
        decouplify.unwrap(build())
    with pytest.raises(ValueError, match=r"count_macs: Plain is not wrapped; call decouplify.wrap\(model\) first"):
        decouplify.count_macs(build(), random_images())
    fast = decouplify.sparsify(TOYS["Plain"].wrapped())
    with pytest.raises(ValueError, match="verify: Plain is not wrapped"):
        decouplify.verify(build(), fast, random_images())


def test_a_wrapped_part_is_unwrapped_at_the_part() -> None:
    outer = nn.Sequential(TOYS["Plain"].wrapped())
    with pytest.raises(ValueError, match="unwrap: Sequential is not wrapped"):
        decouplify.unwrap(outer)
    decouplify.unwrap(outer[0])


# Images ---------------------------------------------------------------------------------------------------------------


def test_images_to_count_must_be_finite() -> None:
    images = random_images()
    images[1, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="count_macs: 1 values of the images are NaN or infinite"):
        decouplify.count_macs(TOYS["Plain"].wrapped(), images)


def test_images_to_count_must_have_the_size_of_the_plan() -> None:
    match = r"images of size \(3, 8, 8\) given, the model was wrapped for \(3, 16, 16\); wrap it with input_size="
    with pytest.raises(ValueError, match=match):
        decouplify.count_macs(TOYS["Plain"].wrapped(), torch.zeros(1, 3, 8, 8))
