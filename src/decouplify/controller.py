"""The architecture controller decides which filters of a convolution an image uses (paper, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ArchitectureController", "binarise", "improved_semhash", "pooled"]


def improved_semhash(g: Tensor, noise: float | Tensor = 1.0) -> Tensor:
    """Gate values for training: soft for one half of the images, binary for the other (Eq. 3-4).

    ``t = g + noise * N(0, 1)``; ``v1 = clip(1.2 sigmoid(t) - 0.1, 0, 1)``; ``v2 = 1[t > 0]``. A random half of the
    images gets v1, the other v2; with an odd number a coin decides about the odd one. The gradient is that of v1 for
    all: v1 is flat beyond |t| = 2.4, so gates far on one side stop learning.

    Args:
        g: Logits, shape (N, K).
        noise: Standard deviation of the noise; 1 in the paper, annealed to 0 near the end of training. A number, or a
            tensor of no dimensions, whose value may change under a recorded graph.

    Returns:
        Shape (N, K), in [0, 1].
    """
    t = g + noise * torch.randn_like(g) if isinstance(noise, Tensor) or noise > 0 else g
    soft = (1.2 * torch.sigmoid(t) - 0.1).clamp(0, 1)
    mixed = torch.where(_random_half(len(g), g.device)[:, None], soft.detach(), binarise(t.detach()))
    return _with_gradient_of(soft, mixed)


def straight_through(t: Tensor, soft: Tensor) -> Tensor:
    """``1[t > 0]`` with the gradient of ``soft``; NaN where ``t`` is."""
    return _with_gradient_of(soft, binarise(t.detach()))


def _with_gradient_of(soft: Tensor, values: Tensor) -> Tensor:
    """Values without a gradient of their own, of which the gradient arrives at ``soft``."""
    if torch.compiler.is_compiling():  # which computes both in one kernel
        return soft + (values - soft).detach()
    found: Tensor = _Substitute.apply(soft, values)
    return found


class _Substitute(torch.autograd.Function):
    """Other values in place of a tensor's, without a kernel forth or back."""

    @staticmethod
    def forward(soft: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor, None]:
        return of_output, None


def _random_half(n: int, device: torch.device) -> Tensor:
    """A boolean mask with n // 2 ones, or one more with probability 1/2 if n is odd."""
    rank = torch.rand(n, device=device).argsort()
    coin = torch.randint(2, (), device=device)
    return 2 * rank + coin < n


def binarise(g: Tensor) -> Tensor:
    """Gate values for evaluation, ``1[g > 0]`` (Eq. 5). NaN stays NaN, so that a broken input does not pass unseen."""
    return torch.where(g.isnan(), g, (g > 0).to(g.dtype))


def pooled(x: Tensor, axis: int) -> Tensor:
    """Mean over all positions, shape (N, C), float32.

    Args:
        x: Shape (N, C, H, W), or (N, H, W, C).
        axis: Its channel axis, 1 or -1.
    """
    dims = (2, 3) if axis == 1 else (1, 2)
    # Not ``mean``, which is the same bits, but whose gradient divides at every position instead of once per channel.
    return x.sum(dim=dims, dtype=torch.float32) / (x.shape[dims[0]] * x.shape[dims[1]])


class ArchitectureController(nn.Module):
    """Pools a convolution's input and decides about its filters, ``g = W2 relu(W1 s) + b`` (Eq. 2).

    Everything is computed in float32, whatever autocast says and whatever the parameters' type: near the threshold
    half precision flips gates.

    Args:
        n_inputs: Channels C of the convolution's input.
        n_filters: Filters K to decide about.
        reduction: Input channels per hidden unit.
        bias: Initial output bias in logits. A positive bias starts with W2 = 0: g equals the bias for *every* image,
            all gates are open and the network is unchanged. W2 learns from the first step, W1 from the second.
        input_norm: Normalise s over the batch first (not in the paper).
        input_axis: Channel axis of the input: 1 for (N, C, H, W), -1 for (N, H, W, C).
    """

    def __init__(
        self, n_inputs: int, n_filters: int, reduction: int, bias: float, input_norm: bool, input_axis: int = 1
    ) -> None:
        super().__init__()
        hidden = max(1, n_inputs // reduction)
        self.input_axis = input_axis
        self.norm = nn.BatchNorm1d(n_inputs, affine=False) if input_norm else None
        self.fc1 = nn.Linear(n_inputs, hidden)
        if bias > 0:  # in the largest networks random numbers that zeros replace cost seconds
            self.fc2 = nn.utils.skip_init(nn.Linear, hidden, n_filters)
            nn.init.zeros_(self.fc2.weight)
        else:
            self.fc2 = nn.Linear(hidden, n_filters)
        nn.init.constant_(self.fc2.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits g, shape (N, K), float32.

        Args:
            x: The convolution's input, shape (N, C, H, W), or (N, H, W, C) if ``input_axis`` is -1.
        """
        return self.decide(pooled(x, self.input_axis))

    def decide(self, s: Tensor) -> Tensor:
        """Logits g, shape (N, K), float32, from a pooled input s, shape (N, C)."""
        with torch.autocast(s.device.type, enabled=False):
            s = s if self.norm is None else self._normalise(s)
            hidden = torch.relu(F.linear(s, self.fc1.weight.float(), self.fc1.bias.float()))
            return F.linear(hidden, self.fc2.weight.float(), self.fc2.bias.float())

    def _normalise(self, s: Tensor) -> Tensor:
        assert self.norm is not None
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None and var is not None
        # One image has no batch statistics: use the running ones rather than fail.
        if not self.training or len(s) == 1:
            return (s - mean.float()) * torch.rsqrt(var.float() + self.norm.eps)
        if mean.dtype == torch.float32:
            return self.norm(s)
        # The norm's own forward refuses statistics of another precision than its input.
        exact = mean.float(), var.float()
        y = F.batch_norm(s, *exact, training=True, momentum=self.norm.momentum or 0.0, eps=self.norm.eps)
        mean.copy_(exact[0])
        var.copy_(exact[1])
        return y
