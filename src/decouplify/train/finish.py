"""What follows training: the norms' statistics under binary gates, and the last per cent to the target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from decouplify.decoupling import Decoupling, decoupling_of
from decouplify.modes import eval_mode
from decouplify.train.batches import Batch

__all__ = ["calibrate", "executed_share", "norms_of", "reestimate_norms"]

_NARROWEST = 0.02  # logits
_CLOSE = 1e-3  # relative distance from the target that is good enough
_N_HALVINGS = 20


@torch.no_grad()
def reestimate_norms(
    model: nn.Module, batches: Iterable[Batch], *, controllers_only: bool = False, across_processes: bool = False
) -> None:
    """Replace the running statistics of all batch norms by means over the given batches, with gates as in evaluation.

    Gates of training are noisy, so statistics gathered meanwhile are not those that evaluation meets.

    Args:
        model: Any network, wrapped or not; its modes are kept.
        batches: Images (N, C, H, W) and labels (not used), as in training.
        controllers_only: Leave the network's own norms alone, and replace those of the controllers' inputs.
        across_processes: Take the means over the batches of all processes, which then all have to call this.
    """
    of_controllers = norms_of(model, of_controllers=True)
    chosen = of_controllers if controllers_only else norms_of(model) + of_controllers
    norms = [norm for norm in chosen if norm.track_running_stats]
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
            if across_processes:
                _average([t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None])
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def norms_of(model: nn.Module, *, of_controllers: bool = False) -> list[_BatchNorm]:
    """The batch norms of the network, or those of the controllers if it is wrapped."""
    controllers = [m for m in model.modules() if isinstance(m, Decoupling)]
    theirs = {id(module) for decoupling in controllers for module in decoupling.modules()}
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if (id(norm) in theirs) == of_controllers]


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


def _average(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


@torch.no_grad()
def executed_share(model: nn.Module, images: Iterable[Tensor], *, across_processes: bool = False) -> float:
    """Executed / dense multiply-accumulates in evaluation, controllers included, mean over images, in (0, 1+].

    Args:
        model: A wrapped model; its modes are kept.
        images: Batches (N, C, H, W) on the model's device.
        across_processes: Count the images of all processes, which then all have to call this.
    """
    decoupling = decoupling_of(model, "executed_share")
    n_images, executed = 0, 0.0
    with eval_mode(model):
        for x in images:
            model(x)
            path = decoupling.path().double()
            executed += float(decoupling.costs.executed(path).sum())
            n_images += len(path)
    if across_processes:
        total = torch.tensor([executed, n_images], dtype=torch.double, device=next(model.parameters()).device)
        dist.all_reduce(total)
        executed, n_images = float(total[0]), int(total[1])
    return executed / max(n_images, 1) / decoupling.costs.n_dense


@torch.no_grad()
def calibrate(
    model: nn.Module,
    images: Iterable[Tensor],
    target_macs: float,
    largest: float = 0.5,
    *,
    across_processes: bool = False,
) -> float:
    """Shift the logits of all gates by one number, so that the executed MACs of these images meet a target.

    The number is added to the controllers' output biases, so it stays with the model. Training steers to the target
    but need not hit it; the rest is usually a few hundredths of a logit.

    Args:
        model: A wrapped model; its modes are kept.
        images: Batches (N, C, H, W) on the model's device; iterated many times.
        target_macs: Share of the dense MACs that shall be executed, in (0, 1].
        largest: Largest shift in logits. A network that is farther from its target was not trained to it, and would
            meet it at the price of its accuracy.
        across_processes: Count the images of all processes, which then all have to call this and shift alike.

    Returns:
        The shift in logits; positive opens gates. 0 if no shift of at most ``largest`` reaches the target; the model is
        then unchanged.

    Raises:
        ValueError: If the model is not wrapped, or the target is not in (0, 1].
    """
    if not 0 < target_macs <= 1:
        raise ValueError(f"calibrate: target_macs={target_macs}; a share of the dense MACs in (0, 1] wanted")
    decoupling = decoupling_of(model, "calibrate")
    biases = [bias for name, bias in decoupling.controllers.named_parameters() if name.endswith("fc2.bias")]
    kept = [bias.clone() for bias in biases]

    def excess(shift: float) -> float:
        for bias, value in zip(biases, kept, strict=True):
            bias.copy_(value + shift)
        return executed_share(model, images, across_processes=across_processes) / target_macs - 1

    shift = _root(excess, largest)
    if shift is None:
        excess(0.0)
        return 0.0
    return shift


def _root(excess: Callable[[float], float], largest: float) -> float | None:
    """A shift after which MACs are at most the target and close to it, or None if there is none within reach.

    Args:
        excess: MACs relative to the target minus 1, rising with the shift; the last shift it is called with stays.
        largest: Reach in logits.
    """
    here = excess(0.0)
    if -_CLOSE <= here <= 0:
        return 0.0
    sign = -1.0 if here > 0 else 1.0
    near, far = 0.0, sign * _NARROWEST
    while (there := excess(far)) * sign < 0:
        if abs(far) >= largest:
            return None
        near, far = far, sign * min(2 * abs(far), largest)
    low, high = (far, near) if sign < 0 else (near, far)
    for _ in range(_N_HALVINGS):
        middle = (low + high) / 2
        there = excess(middle)
        if -_CLOSE <= there <= 0:
            return middle
        low, high = (middle, high) if there < 0 else (low, middle)
    excess(low)
    return low
