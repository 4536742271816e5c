"""Where gates start: open where the network's answers depend on a filter, closed where they do not."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from decouplify.decoupling import Decoupling, decoupling_of, module_key
from decouplify.modes import eval_mode, frozen
from decouplify.train.batches import Batch

__all__ = ["close_least_important", "importance"]

_LOWEST, _HIGHEST = -1.0, 2.0  # logits; an open gate starts where ``wrap`` puts it
_PER_NEPER = 0.5  # logits by which a gate starts higher if its filter matters e times as much


def importance(model: nn.Module, batches: Iterable[Batch], temperature: float = 2.0) -> dict[str, Tensor]:
    """How much the answers change if a filter is closed: the Fisher information of its gate.

    To second order the divergence between the answers of all filters and of all but one is half of
    ``F_k = mean over images of (d log p(y) / d z_k)^2``, with y drawn from the answer p itself, so no labels are
    needed (Theis et al., *Faster gaze prediction with dense networks and Fisher pruning*, 2018).

    Args:
        model: A wrapped classifier; its modes are kept. All gates are taken for open.
        batches: Images (N, C, H, W) and labels (not used), as in training.
        temperature: Of the answers; above 1, images of which the network is sure count as well.

    Returns:
        By gate, F_k >= 0, shape (K,), in nats^2.

    Raises:
        ValueError: If the model is not wrapped, there are no images, or the temperature is not positive.
    """
    decoupling = decoupling_of(model, "importance")
    if not temperature > 0:
        raise ValueError(f"importance: temperature={temperature}; above 0 wanted")
    totals = {gate.name: torch.zeros(gate.n_filters) for gate in decoupling.plan.gates}
    n_images = 0
    with eval_mode(model), frozen(model):
        for x, _ in batches:
            for name, gradient in _gradients(model, decoupling, x, temperature).items():
                totals[name] = totals[name].to(x.device) + gradient.square().sum(0)
            n_images += len(x)
    if n_images == 0:
        raise ValueError("importance: no images given; a hundred or more wanted")
    return _mean_over_processes(totals, n_images)


def _mean_over_processes(totals: dict[str, Tensor], n_images: int) -> dict[str, Tensor]:
    """Means over the images of all processes, so that they start alike."""
    count = torch.tensor(float(n_images), device=next(iter(totals.values())).device)
    if dist.is_initialized():
        for tensor in (*totals.values(), count):
            dist.all_reduce(tensor)
    return {name: total / count for name, total in totals.items()}


def _gradients(model: nn.Module, decoupling: Decoupling, x: Tensor, temperature: float) -> dict[str, Tensor]:
    """Of each image's log p(y) with respect to its own gates, shape (N, K)."""
    gates = {
        gate.name: torch.ones(len(x), gate.n_filters, device=x.device, requires_grad=True)
        for gate in decoupling.plan.gates
    }
    with torch.enable_grad(), decoupling.forced(gates):
        logits = model(x).float() / temperature
        answers = torch.distributions.Categorical(logits=logits.detach()).sample()
        loss = F.cross_entropy(logits, answers, reduction="sum")
        return dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))


@torch.no_grad()
def close_least_important(model: nn.Module, important: dict[str, Tensor], target_macs: float) -> int:
    """Set the output biases of all controllers so that the filters worth least per multiply-accumulate start closed.

    How far a gate starts from its threshold grows with the logarithm of what its filter is worth, so that training
    decides first about those in the middle.

    Args:
        model: A wrapped model whose controllers are new.
        important: See ``importance``.
        target_macs: Share of the dense MACs that shall be executed, in (0, 1].

    Returns:
        How many filters start closed: as few as meet the target, or all if none do.

    Raises:
        ValueError: If the model is not wrapped, or the target is not in (0, 1].
    """
    if not 0 < target_macs <= 1:
        raise ValueError(f"close_least_important: target_macs={target_macs}; a share of the dense MACs wanted")
    decoupling = decoupling_of(model, "close_least_important")
    values = torch.cat([important[gate.name] for gate in decoupling.plan.gates]).double().cpu()
    worth = (values / _savings(decoupling)).log()
    order = worth.argsort()
    n_closed = _n_to_close(decoupling, order, target_macs)
    threshold = worth[order[min(n_closed, len(order) - 1)]]
    logits = ((worth - threshold) * _PER_NEPER).nan_to_num(0.0).clamp(_LOWEST, _HIGHEST)
    # Of equal worth, those that come first in the order; a logit above 0 opens.
    logits[order[:n_closed]] = logits[order[:n_closed]].clamp(max=-1e-3)
    logits[order[n_closed:]] = logits[order[n_closed:]].clamp(min=1e-3)
    for gate, bias in zip(
        decoupling.plan.gates, logits.split([g.n_filters for g in decoupling.plan.gates]), strict=True
    ):
        controller = decoupling.controllers[module_key(gate.name)]
        controller.fc2.bias.copy_(bias)  # type: ignore[union-attr,operator]  # an ArchitectureController
    return n_closed


@torch.enable_grad()
def _savings(decoupling: Decoupling) -> Tensor:
    """What closing a filter saves while all others are open, in MACs, at least 1, shape (F,)."""
    gates = torch.ones(1, decoupling.plan.n_filters, dtype=torch.double, requires_grad=True)
    return torch.autograd.grad(decoupling.costs.executed(gates).sum(), gates)[0][0].clamp(min=1)


def _n_to_close(decoupling: Decoupling, order: Tensor, target_macs: float) -> int:
    """Filters to close, in this order, until the executed MACs are at most the target; by bisection."""
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        gates = torch.ones(1, len(order), dtype=torch.double)
        gates[0, order[:middle]] = 0
        met = float(decoupling.costs.executed(gates)) <= target_macs * decoupling.costs.n_dense
        low, high = (low, middle) if met else (middle + 1, high)
    return low
