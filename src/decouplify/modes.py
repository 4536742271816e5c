"""Eval mode for a while, and no garbage collection for a while."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_mode", "uncollected"]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the duration, then every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # Not by train(), which would set all submodules alike: users freeze some of them.
        for module, training in modes:
            module.training = training


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for reference cycles for the duration.

    Recording a network makes a million small objects that all stay alive, and each search looks at all of them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
