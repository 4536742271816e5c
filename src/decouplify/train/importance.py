"""Where gates start: open where the network's answers depend on a filter, closed where they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from decouplify.decoupling import Decoupling, decoupling_of, module_key
from decouplify.modes import eval_mode, frozen
from decouplify.train.batches import Batch

__all__ = ["PER_NEPER", "close_in_rounds", "close_least_important", "importance", "log_worth"]

_LOWEST, _HIGHEST = -1.0, 2.0  # logits; an open gate starts where ``wrap`` puts it
PER_NEPER = 0.5  # logits by which a gate starts higher if its filter matters e times as much


def importance(
    model: nn.Module,
    batches: Iterable[Batch],
    temperature: float = 2.0,
    closed: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """How much the answers change if a filter is closed: the Fisher information of its gate.

    To second order the divergence between the answers of all open filters and of all but one is half of
    ``F_k = mean over images of (d log p(y) / d z_k)^2``, with y drawn from the answer p itself, so no labels are
    needed (Theis et al., *Faster gaze prediction with dense networks and Fisher pruning*, 2018).

    Args:
        model: A wrapped classifier; its modes are kept. What its controllers decide does not matter.
        batches: Images (N, C, H, W) and labels (not used), as in training.
        temperature: Of the answers; above 1, images of which the network is sure count as well.
        closed: By gate, which filters are closed already, booleans of shape (K,); None: all are open. Theirs is then
            what opening one would change.

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
            for name, gradient in _gradients(model, decoupling, x, temperature, closed or {}).items():
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


def _gradients(
    model: nn.Module, decoupling: Decoupling, x: Tensor, temperature: float, closed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Of each image's log p(y) with respect to its own gates, shape (N, K)."""
    gates = {gate.name: torch.ones(len(x), gate.n_filters, device=x.device) for gate in decoupling.plan.gates}
    for name, z in gates.items():
        if name in closed:
            z[:, closed[name].to(x.device)] = 0
        z.requires_grad_()
    with torch.enable_grad(), decoupling.forced(gates):
        logits = model(x).float() / temperature
        answers = torch.distributions.Categorical(logits=logits.detach()).sample()
        loss = F.cross_entropy(logits, answers, reduction="sum")
        return dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))


@torch.no_grad()
def close_least_important(
    model: nn.Module, important: Mapping[str, Tensor], target_macs: float, closed: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Set the output biases of all controllers so that the filters worth least per multiply-accumulate start closed.

    How far a gate starts from its threshold grows with the logarithm of what its filter is worth, so that training
    decides first about those in the middle.

    Args:
        model: A wrapped model whose controllers are new.
        important: See ``importance``.
        target_macs: Share of the dense MACs that shall be executed, in (0, 1].
        closed: What an earlier call returned: these filters stay closed as they are.

    Returns:
        By gate, which filters start closed, booleans of shape (K,): as few as meet the target, or all if none do.

    Raises:
        ValueError: If the model is not wrapped, or the target is not in (0, 1].
    """
    if not 0 < target_macs <= 1:
        raise ValueError(f"close_least_important: target_macs={target_macs}; a share of the dense MACs wanted")
    decoupling = decoupling_of(model, "close_least_important")
    gates = decoupling.plan.gates
    earlier = torch.cat([(closed or {}).get(g.name, torch.zeros(g.n_filters, dtype=torch.bool)).cpu() for g in gates])
    worth = log_worth(decoupling, important, ~earlier)
    order = worth.argsort(stable=True)
    order = torch.cat([order[earlier[order]], order[~earlier[order]]])
    n_closed = _n_to_close(decoupling, order, target_macs, int(earlier.sum()))
    threshold = worth[order[min(n_closed, len(order) - 1)]]
    logits = ((worth - threshold) * PER_NEPER).nan_to_num(0.0).clamp(_LOWEST, _HIGHEST)
    # Of equal worth, those that come first in the order; a logit above 0 opens.
    logits[order[:n_closed]] = logits[order[:n_closed]].clamp(max=-1e-3)
    logits[order[n_closed:]] = logits[order[n_closed:]].clamp(min=1e-3)
    now = torch.zeros_like(earlier)
    now[order[:n_closed]] = True
    sizes = [gate.n_filters for gate in gates]
    for gate, logit, kept in zip(gates, logits.split(sizes), earlier.split(sizes), strict=True):
        bias: Tensor = decoupling.controllers[module_key(gate.name)].fc2.bias  # type: ignore[union-attr,assignment]
        bias.copy_(torch.where(kept.to(bias.device), bias, logit.to(bias.device, bias.dtype)))
    return {gate.name: mask for gate, mask in zip(gates, now.split(sizes), strict=True)}


def close_in_rounds(
    model: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    target_macs: float,
    n_rounds: int = 1,
) -> dict[str, Tensor]:
    """Close filters a share at a time, and ask anew after each what those that are left are worth.

    What a filter is worth depends on which others are there.

    Args:
        model: See ``close_least_important``, as for what comes back.
        batches: Gives the images of a round, see ``importance``.
        target_macs: Share of the dense MACs that shall be executed in the end, in (0, 1].
        n_rounds: In how many shares of equal MACs.

    Raises:
        ValueError: If there are no rounds, and as ``importance`` and ``close_least_important``.
    """
    if n_rounds < 1:
        raise ValueError(f"close_in_rounds: n_rounds={n_rounds}; at least 1 wanted")
    closed: dict[str, Tensor] = {}
    for i in range(n_rounds):
        important = importance(model, batches(), closed=closed)
        closed = close_least_important(model, important, 1 - (1 - target_macs) * (i + 1) / n_rounds, closed)
    return closed


def log_worth(decoupling: Decoupling, important: Mapping[str, Tensor], is_open: Tensor) -> Tensor:
    """Logarithm of importance per multiply-accumulate that closing a filter saves while these are open, shape (F,)."""
    values = torch.cat([important[gate.name] for gate in decoupling.plan.gates]).double().cpu()
    return (values / _savings(decoupling, is_open)).log()


@torch.enable_grad()
def _savings(decoupling: Decoupling, is_open: Tensor) -> Tensor:
    """What closing a filter saves while these are open, in MACs, at least 1, shape (F,)."""
    gates = is_open.double()[None].requires_grad_()
    return torch.autograd.grad(decoupling.costs.executed(gates).sum(), gates)[0][0].clamp(min=1)


def _n_to_close(decoupling: Decoupling, order: Tensor, target_macs: float, least: int) -> int:
    """Filters to close, in this order and at least so many, until the executed MACs are at most the target."""
    low, high = least, len(order)
    while low < high:
        middle = (low + high) // 2
        gates = torch.ones(1, len(order), dtype=torch.double)
        gates[0, order[:middle]] = 0
        met = float(decoupling.costs.executed(gates)) <= target_macs * decoupling.costs.n_dense
        low, high = (low, middle) if met else (middle + 1, high)
    return low
