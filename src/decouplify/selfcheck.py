"""What ``wrap(verify=True)`` looks at: the same bits with open gates, zeros where closed gates promise them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from decouplify.costs import Reader
from decouplify.decoupling import Decoupling
from decouplify.errors import PlanError
from decouplify.modes import eval_mode
from decouplify.plan import Plan

__all__ = ["check_same_outputs", "check_zero_channels", "outputs", "random_images"]


def random_images(model: nn.Module, plan: Plan) -> Tensor | None:
    """Two images for verification; None if the model has no values to compute with."""
    sample = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if sample.device.type == "meta":
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, *plan.input_size, generator=generator).to(sample)


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """All tensors that a model returns in eval mode, in order."""
    with eval_mode(model), torch.no_grad():
        output = model(images.clone())  # a clone, because some models normalise their images in place
        return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]


def check_same_outputs(before: list[Tensor] | None, after: list[Tensor]) -> None:
    """Raise ``PlanError`` unless the outputs are the same bits; a model that returns NaN anyway is let through."""
    same = before is not None and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if not same and not any(t.isnan().any() for t in after):
        raise PlanError(
            "with all gates open the wrapped model does not give the output it gave before. Either the model is not "
            "deterministic, or its control flow differs from the recorded run; wrap(verify=False) skips this check."
        )


def check_zero_channels(model: nn.Module, decoupling: Decoupling, images: Tensor) -> None:
    """Close random gates and look: every input channel predicted to be zero must be exactly zero."""
    generator = torch.Generator().manual_seed(1)
    plan = decoupling.plan
    gates = {g.name: (torch.rand(g.n_filters, generator=generator) < 0.5).to(images) for g in plan.gates}
    path = torch.cat([gates[g.name] for g in plan.gates])
    wrong: list[str] = []
    handles = [
        model.get_submodule(reader.name).register_forward_pre_hook(_ZeroCheck(reader.name, expected, wrong))
        for reader, expected in _expected_zeros(decoupling, path)
    ]
    try:
        with decoupling.forced(gates), eval_mode(model), torch.no_grad():
            model(images.clone())
    finally:
        for handle in handles:
            handle.remove()
    if wrong:
        raise PlanError(
            f"closed gates leave features where none were expected, at the input of {', '.join(wrong)}. The model uses "
            "a value that its modules do not return; exclude the convolution before it with wrap(exclude=...)."
        )


def _expected_zeros(decoupling: Decoupling, path: Tensor) -> Iterator[tuple[Reader, Tensor]]:
    """Readers that are modules, with the indices of the channels that must be zero under a path."""
    names = [reader.name for reader in decoupling.costs.readers]
    for reader in decoupling.costs.readers:
        zero = [c for c, s in enumerate(reader.exists) if s is not None and not any(path[i] > 0 for i in s)]
        if zero and reader.name and names.count(reader.name) == 1:
            yield reader, torch.tensor(zero, device=path.device)


class _ZeroCheck:
    def __init__(self, name: str, channels: Tensor, wrong: list[str]) -> None:
        self.name, self.channels, self.wrong = name, channels, wrong

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        axis = -1 if isinstance(module, nn.Linear) else 1
        if isinstance(x, Tensor) and x.index_select(axis, self.channels).ne(0).any():
            self.wrong.append(self.name)
