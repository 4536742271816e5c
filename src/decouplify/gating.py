"""What a gate does to a value while a loss also wants its pooled magnitude, as one operator with a lean gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decouplify.controller import pooled

__all__ = ["gate_and_pool", "gated", "magnitude"]


def gated(y: Tensor, z: Tensor, axis: int) -> Tensor:
    """``Y * z``, with one gate per channel.

    Args:
        y: Shape (N, K, H, W), or (N, H, W, K).
        z: Shape (N, K).
        axis: The channel axis of y, 1 or -1.
    """
    return y * _spread(z, axis)


def magnitude(y: Tensor, axis: int, *, non_negative: bool) -> Tensor:
    """Mean magnitude per channel, shape (N, K), float32: the paper's average pool where features are >= 0.

    Args:
        y: Shape (N, K, H, W), or (N, H, W, K).
        axis: Its channel axis, 1 or -1.
        non_negative: Whether y is known to be its own magnitude.
    """
    return pooled(y if non_negative else y.abs(), axis)


def gate_and_pool(y: Tensor, z: Tensor, axis: int, *, non_negative: bool) -> tuple[Tensor, Tensor]:
    """``gated`` and ``magnitude`` of the same value.

    Their gradients with respect to y are maps of its size, which autograd would compute one by one in memory of their
    own and then add. Here they are computed in one place, which for large maps takes a third of the time.
    """
    if torch.compiler.is_compiling():  # which joins them by itself
        return gated(y, z, axis), magnitude(y, axis, non_negative=non_negative)
    found: tuple[Tensor, Tensor] = _GateAndPool.apply(y, z, axis, non_negative)
    return found


class _GateAndPool(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, z: Tensor, axis: int, non_negative: bool) -> tuple[Tensor, Tensor]:
        if non_negative:
            return gated(y, z, axis), pooled(y, axis)
        product = y.abs()
        found = pooled(product, axis)
        return torch.mul(y, _spread(z, axis), out=product), found  # memory fresh from the system is slow

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        y, z, ctx.axis, ctx.non_negative = inputs
        ctx.save_for_backward(y, z)

    @staticmethod
    def backward(ctx: Any, of_gated: Tensor, of_pooled: Tensor) -> tuple[Tensor | None, ...]:
        y, z = ctx.saved_tensors
        positions = (2, 3) if ctx.axis == 1 else (1, 2)
        n_positions = y.shape[positions[0]] * y.shape[positions[1]]
        of_z = (of_gated * y).sum(positions) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_z, None, None
        factor = _spread((of_pooled / n_positions).to(y.dtype), ctx.axis)
        if ctx.non_negative:
            of_y = (of_gated * _spread(z, ctx.axis)).add_(factor)
        else:
            sign = y.sgn()
            # A gradient of this gradient reads the signs.
            of_magnitude = sign * factor if torch.is_grad_enabled() else sign.mul_(factor)
            of_y = of_magnitude.addcmul_(of_gated, _spread(z, ctx.axis))
        return of_y, of_z, None, None


def _spread(z: Tensor, axis: int) -> Tensor:
    return z[:, :, None, None] if axis == 1 else z[:, None, None, :]
