"""For loops that know one criterion of outputs and targets, such as timm's ``train.py``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from decouplify.losses import DecouplingLoss

__all__ = ["GatedCriterion"]


class GatedCriterion(nn.Module):
    """``task(output, target) + gates(target)``, to stand where the task's own loss stood.

    In timm's ``train.py`` this is one line after the criterion is made:
    ``train_loss_fn = GatedCriterion(train_loss_fn, DecouplingLoss(model))``. Evaluation keeps the task's loss.

    Args:
        task: The task's loss of outputs (N, classes) and targets: class indices (N,), or the soft labels (N, classes)
            that mixup makes.
        gates: The decoupling loss of the model that made the outputs.
    """

    def __init__(self, task: Callable[[Tensor, Tensor], Tensor], gates: DecouplingLoss) -> None:
        super().__init__()
        self.task, self.gates = task, gates

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum, a scalar."""
        return self.task(output, target) + self.gates(target)
