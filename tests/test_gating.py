"""A gate and the pool of what it gates: one operator must be what two are, gradients of gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decouplify.gating import gate_and_pool, gated, magnitude


def value_and_gates(axis: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    y = torch.randn((2, 3, 4, 5) if axis == 1 else (2, 4, 5, 3), dtype=dtype)
    return y.requires_grad_(), torch.rand(2, 3, dtype=dtype).round(decimals=1).requires_grad_()


@pytest.mark.parametrize("non_negative", [True, False])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_operator_is_what_two_are(dtype: torch.dtype, axis: int, non_negative: bool) -> None:
    y, z = value_and_gates(axis, dtype)
    apart = gated(y, z, axis), magnitude(y, axis, non_negative=non_negative)
    joined = gate_and_pool(y, z, axis, non_negative=non_negative)
    weights = [torch.randn_like(value) for value in apart]
    gradients = [torch.autograd.grad(pair, (y, z), weights) for pair in (apart, joined)]
    for found, expected in zip((*joined, *gradients[1]), (*apart, *gradients[0]), strict=True):
        assert found.dtype == expected.dtype
        tolerance = {"rtol": 0.016, "atol": 1e-3} if found.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("non_negative", [True, False])
@pytest.mark.parametrize("axis", [1, -1])
def test_its_gradient_has_a_gradient(axis: int, non_negative: bool) -> None:
    """As a penalty on gradients needs it."""
    y, z = value_and_gates(axis)

    def penalties(values: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        loss = (values[0] ** 2).sum() + (values[1] ** 2).sum()
        first = torch.autograd.grad(loss, (y, z), create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), (y, z))

    apart = penalties((gated(y, z, axis), magnitude(y, axis, non_negative=non_negative)))
    joined = penalties(gate_and_pool(y, z, axis, non_negative=non_negative))
    for found, expected in zip(joined, apart, strict=True):
        assert float(expected.abs().max()) > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learns", [0, 1])
def test_only_one_operand_may_learn(learns: int) -> None:
    operands = value_and_gates(1)
    operands[1 - learns].requires_grad_(False)
    sum(part.sum() for part in gate_and_pool(*operands, 1, non_negative=False)).backward()
    assert [operand.grad is not None for operand in operands] == [learns == 0, learns == 1]
