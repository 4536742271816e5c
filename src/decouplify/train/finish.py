"""What follows training: the norms' statistics under binary gates, and the last per cent to the target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from decouplify.decoupling import Decoupling, decoupling_of
from decouplify.modes import eval_mode
from decouplify.train.batches import Batch

__all__ = ["calibrate", "executed_share", "reestimate_norms"]

_N_HALVINGS = 25
_WIDEST = 8.0  # logits; farther than that no controller stands from its threshold for long


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Replace the running statistics of all batch norms by means over the given batches, with gates as in evaluation.

    Gates of training are noisy, so statistics gathered meanwhile are not those that evaluation meets.

    Args:
        model: Any network, wrapped or not; its modes are kept.
        batches: Images (N, C, H, W) and labels (not used), as in training.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model), _binary_gates(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a mean over all batches instead of one that forgets
            norm.train()
        try:
            for x, _ in batches:
                model(x)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@contextmanager
def _binary_gates(model: nn.Module) -> Iterator[None]:
    """Gates of evaluation, but controllers whose norms see the batch."""
    decoupling = getattr(model, "decoupling", None)
    if not isinstance(decoupling, Decoupling):
        yield
        return
    for controller in decoupling.controllers.values():
        controller.training = True  # it asks its own mode whether to use the batch's statistics
    yield


@torch.no_grad()
def executed_share(model: nn.Module, images: Iterable[Tensor]) -> float:
    """Executed / dense multiply-accumulates in evaluation, controllers included, mean over images, in (0, 1+].

    Args:
        model: A wrapped model; its modes are kept.
        images: Batches (N, C, H, W) on the model's device.
    """
    decoupling = decoupling_of(model, "executed_share")
    n_images, executed = 0, 0.0
    with eval_mode(model):
        for x in images:
            model(x)
            path = decoupling.path().double()
            executed += float(decoupling.costs.executed(path).sum())
            n_images += len(path)
    return executed / max(n_images, 1) / decoupling.costs.n_dense


@torch.no_grad()
def calibrate(model: nn.Module, images: Iterable[Tensor], target_macs: float) -> float:
    """Shift the logits of all gates by one number, so that the executed MACs of these images meet a target.

    The number is added to the controllers' output biases, so it stays with the model. Training steers to the target
    but need not hit it; the rest is usually a few hundredths of a logit.

    Args:
        model: A wrapped model; its modes are kept.
        images: Batches (N, C, H, W) on the model's device; iterated many times.
        target_macs: Share of the dense MACs that shall be executed, in (0, 1].

    Returns:
        The shift in logits; positive opens gates. 0 if no shift can reach the target, because even the widest leaves
        all the MACs on one side of it; the model is then unchanged.

    Raises:
        ValueError: If the model is not wrapped, or the target is not in (0, 1].
    """
    if not 0 < target_macs <= 1:
        raise ValueError(f"calibrate: target_macs={target_macs}; a share of the dense MACs in (0, 1] wanted")
    decoupling = decoupling_of(model, "calibrate")
    biases = [bias for name, bias in decoupling.controllers.named_parameters() if name.endswith("fc2.bias")]
    kept = [bias.clone() for bias in biases]

    def share(shift: float) -> float:
        for bias, value in zip(biases, kept, strict=True):
            bias.copy_(value + shift)
        return executed_share(model, images)

    low, high = -_WIDEST, _WIDEST
    if not share(low) <= target_macs <= share(high):
        share(0.0)
        return 0.0
    for _ in range(_N_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if share(middle) > target_macs else (middle, high)
    share(low)  # the side on which no more than the target is executed
    return low
