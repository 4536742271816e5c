"""Least squares for one layer: weights that return a teacher's outputs from what is left of the inputs."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Moments", "fitted", "relative_error", "rescaled"]

_MOST = 2.0  # times that a filter may grow or shrink; a larger factor would mean that little of its input is left


@dataclass
class Moments:
    """Sums over positions of a layer's inputs x and of the outputs y that it shall have, in g groups; float64.

    Attributes:
        n: Positions, a scalar.
        x: Sum of x, shape (g, c), for c inputs per filter: channels times kernel positions.
        y: Sum of y, shape (g, k).
        xx: Sum of x x^T, shape (g, c, c).
        yx: Sum of y x^T, shape (g, k, c).
        yy: Sum of y^2, shape (g, k).
    """

    n: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor

    @staticmethod
    def of(x: Tensor, y: Tensor) -> Moments:
        """Of some positions: x of shape (g, c, positions), y of shape (g, k, positions)."""
        x, y = x.float(), y.float()
        n = torch.tensor(float(x.shape[2]), dtype=torch.double, device=x.device)
        sums = (x.sum(2), y.sum(2), x @ x.mT, y @ x.mT, y.square().sum(2))
        return Moments(n, *(t.double() for t in sums))

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def add_those_of_other_processes(self) -> None:
        """Sums over the positions of all processes, which all have to call this."""
        if dist.is_initialized():
            for field in fields(self):
                dist.all_reduce(getattr(self, field.name))

    def centred(self) -> Moments:
        """Moments of what is left after subtracting the means; for a layer whose outputs can be shifted."""
        n, x, y = self.n, self.x, self.y
        return Moments(
            n,
            torch.zeros_like(x),
            torch.zeros_like(y),
            self.xx - x[:, :, None] * x[:, None] / n,
            self.yx - y[:, :, None] * x[:, None] / n,
            (self.yy - y.square() / n).clamp(min=0),
        )


def fitted(moments: Moments, weight: Tensor, ridge: float) -> Tensor:
    """``W + (<y x^T> - W <x x^T>) (<x x^T> + r I)^-1``: the least squares that stay near the weights there are.

    It minimises ``sum ||y - V x||^2 + r ||V - W||^2`` over V (He et al., *Channel pruning for accelerating very deep
    neural networks*, 2017, have r = 0 and some thousand images; fewer say little about rare directions of x, in which
    W then stays). Inputs that are always zero keep their weights.

    Args:
        moments: Of all positions.
        weight: W, shape (g, k, c).
        ridge: r relative to the mean of the diagonal of <x x^T>.

    Returns:
        V, shape (g, k, c).
    """
    level = moments.xx.diagonal(dim1=1, dim2=2).mean(1)
    level = torch.where(level > 0, level, 1.0)  # of inputs that are all zero
    identity = torch.eye(moments.xx.shape[1], dtype=torch.double, device=moments.xx.device)
    gap = moments.yx - weight @ moments.xx
    return weight + torch.linalg.solve(moments.xx + ridge * level[:, None, None] * identity, gap.mT).mT


def rescaled(moments: Moments, weight: Tensor) -> Tensor:
    """Weights whose outputs vary as much as y does, each filter by itself; by a factor of at most 2.

    Least squares return less than they should where the inputs do not tell y, layer by layer less.
    """
    factor = (moments.yy / _energy(moments, weight)).sqrt().nan_to_num(1.0, posinf=_MOST)
    return weight * factor.clamp(1 / _MOST, _MOST)[..., None]


def relative_error(moments: Moments, weight: Tensor) -> float:
    """``sum (y - W x)^2 / sum y^2`` of each filter, mean over those with y; 0 is exact, 1 as good as zeros."""
    errors = moments.yy - 2 * (weight * moments.yx).sum(2) + _energy(moments, weight)
    varies = moments.yy > 0
    return float((errors[varies] / moments.yy[varies]).mean()) if varies.any() else 0.0


def _energy(moments: Moments, weight: Tensor) -> Tensor:
    """Sum of (W x)^2, shape (g, k)."""
    return ((weight @ moments.xx) * weight).sum(2).clamp(min=0)
