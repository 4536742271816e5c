"""What ``wrap(verify=True)`` looks at: the same bits with open gates, zeros or constants where closed gates promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from decouplify.costs import Reader
from decouplify.decoupling import Decoupling
from decouplify.errors import PlanError
from decouplify.modes import eval_mode
from decouplify.plan import Plan

__all__ = ["check_known_channels", "check_same_outputs", "outputs", "random_images"]


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


def check_known_channels(model: nn.Module, decoupling: Decoupling, images: Tensor) -> None:
    """Close random gates and look: what is predicted to be zero must be exactly zero, what is constant the constant.

    The constants are those found with all gates closed.
    """
    generator = torch.Generator().manual_seed(1)
    plan = decoupling.plan
    gates = {g.name: (torch.rand(g.n_filters, generator=generator) < 0.5).to(images) for g in plan.gates}
    path = torch.cat([gates[g.name] for g in plan.gates])
    wrong: list[str] = []
    zeros = [(r, _ZeroCheck(r.name, channels, wrong)) for r, channels in _expected(decoupling, path, "exists")]
    constants = [
        (r, _ConstantCheck(r.name, channels, wrong)) for r, channels in _expected(decoupling, path, "constant")
    ]
    if constants:
        _run(model, decoupling, {name: torch.zeros_like(z) for name, z in gates.items()}, images, constants)
    _run(model, decoupling, gates, images, [*zeros, *constants])
    if wrong:
        raise PlanError(
            f"closed gates leave features where none were expected, at the input of {', '.join(wrong)}. The model uses "
            "a value that its modules do not return; exclude the convolution before it with wrap(exclude=...)."
        )


def _run(
    model: nn.Module,
    decoupling: Decoupling,
    gates: dict[str, Tensor],
    images: Tensor,
    checks: Sequence[tuple[Reader, Callable[[nn.Module, tuple[Any, ...]], None]]],
) -> None:
    """One forward with given gates and checks of what readers receive."""
    handles = [model.get_submodule(reader.name).register_forward_pre_hook(check) for reader, check in checks]
    try:
        with decoupling.forced(gates), eval_mode(model), torch.no_grad():
            model(images.clone())
    finally:
        for handle in handles:
            handle.remove()


def _expected(decoupling: Decoupling, path: Tensor, what: str) -> Iterator[tuple[Reader, Tensor]]:
    """Readers that are modules, with the indices of the channels that a path makes zero or constant."""
    names = [reader.name for reader in decoupling.costs.readers]
    is_open = path.tolist()
    for reader in decoupling.costs.readers:
        sets = getattr(reader, what)
        known = [c for c, s in enumerate(sets) if s is not None and not any(is_open[i] for i in s)]
        if known and reader.name and names.count(reader.name) == 1:
            yield reader, torch.tensor(known, device=path.device)


class _ZeroCheck:
    def __init__(self, name: str, channels: Tensor, wrong: list[str]) -> None:
        self.name, self.channels, self.wrong = name, channels, wrong

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(args[0], Tensor) and self.features(module, args[0]).ne(0).any():
            self.wrong.append(self.name)

    def features(self, module: nn.Module, x: Tensor) -> Tensor:
        """The channels in question, shape (positions, channels)."""
        axis = -1 if isinstance(module, nn.Linear) else 1
        return x.index_select(axis, self.channels).movedim(axis, -1).flatten(0, -2)


class _ConstantCheck(_ZeroCheck):
    """Whether channels hold at all positions of all forwards what they held at the first of the first."""

    expected: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        found = self.features(module, args[0])
        self.expected = found[:1].clone() if self.expected is None else self.expected
        tolerance = 100 * torch.finfo(found.dtype).eps * float(self.expected.abs().max())
        if not float((found - self.expected).abs().max()) <= tolerance:
            self.wrong.append(self.name)
