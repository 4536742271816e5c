"""What a teacher's modules return on the way to its answers, for a student of the same shape to return as well."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["common_modules", "feature_distance", "outputs_of"]

Outputs = dict[str, Tensor]


def common_modules(student: nn.Module, teacher: nn.Module, patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the student's modules that match a glob, in the student's order.

    Args:
        student: The network that learns, wrapped or not.
        teacher: A network with modules of the same names.
        patterns: Globs of module names, such as "layer[123]"; a star matches dots, too.

    Raises:
        ValueError: If a glob matches nothing, or the teacher lacks a module.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    names = [name for name, _ in student.named_modules() if name and name.split(".")[0] != "decoupling"]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            top = ", ".join(name for name, _ in student.named_children() if name != "decoupling")
            raise ValueError(
                f"features={pattern!r} matches no module of {type(student).__name__}; names such as those of "
                f"named_modules() wanted, which begin with {top}"
            )
    chosen = tuple(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    if missing := set(chosen) - dict(teacher.named_modules()).keys():
        raise ValueError(
            f"features={patterns!r}: the teacher, {type(teacher).__name__}, has no module {min(missing)!r}; name "
            "modules of both networks, or leave features empty"
        )
    return chosen


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[Outputs]:
    """Collects what the named modules return while the context lasts; of one that runs several times, the last.

    Raises:
        ValueError: If a module returns something else than a tensor, or did not run by the end.
    """
    outputs: Outputs = {}

    def keep(name: str, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"features: {name!r} returns a {type(output).__name__}; a module that returns one tensor wanted"
            )
        outputs[name] = output

    with ExitStack() as hooks:
        for name in names:
            hook = model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: keep(name, output)
            )
            hooks.callback(hook.remove)
        yield outputs
    if missing := [name for name in names if name not in outputs]:
        mode = "training" if model.training else "eval"
        raise ValueError(f"features: {missing[0]!r} does not run in {mode} mode; name modules that do in both networks")


def feature_distance(features: Mapping[str, Tensor], taught: Mapping[str, Tensor]) -> Tensor:
    """``mean over modules of ||f - t||^2 / ||t||^2``, where 0 is equal and 1 as far as zeros are.

    Each layer counts relative to its size over the whole batch, not over each image: images of which nothing is left
    would otherwise count most (after Romero et al., *FitNets: hints for thin deep nets*, 2015).

    Args:
        features: Of the student, by module.
        taught: Of the teacher, likewise; no gradient goes there.

    Returns:
        Scalar >= 0, without unit.

    Raises:
        ValueError: If a module returns another shape in the teacher.
    """
    distances = []
    for name, feature in features.items():
        target = taught[name].detach().float()
        if feature.shape != target.shape:
            raise ValueError(
                f"features: {name!r} returns shape {tuple(feature.shape)} in the student and {tuple(target.shape)} in "
                "the teacher; equal shapes wanted, so name other modules"
            )
        tiny = torch.finfo(torch.float32).tiny
        distances.append((feature.float() - target).square().sum() / target.square().sum().clamp_min(tiny))
    return torch.stack(distances).mean()
