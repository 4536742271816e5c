"""What one batch is trained on: the labels, a teacher, and the losses of the gates."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decouplify.cpu import computes_in
from decouplify.losses import DecouplingLoss
from decouplify.train.features import common_modules, feature_distance, outputs_of
from decouplify.train.recipe import Precision, Recipe

__all__ = ["Objective", "distillation"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, in nats, mean over images (Hinton et al. 2015).

    Args:
        logits: Of the student, shape (N, classes).
        teacher_logits: Likewise; no gradient goes there.
        temperature: T.
    """
    log_p = F.log_softmax(logits.float() / temperature, 1)
    log_q = F.log_softmax(teacher_logits.detach().float() / temperature, 1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


class Objective:
    """The loss of one batch, and the numbers worth logging.

    Args:
        model: The network in training mode, possibly in DistributedDataParallel.
        recipe: Weights and precision.
        criterion: The decoupling loss, None for dense training.
        teacher: A network in eval mode whose logits the student shall have, and features if the recipe names any; or
            None.

    Raises:
        ValueError: If the recipe names features that student or teacher do not have.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        criterion: DecouplingLoss | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.model, self.recipe, self.criterion, self.teacher = model, recipe, criterion, teacher
        self._student = model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            self._student = model.module
        self._taught = () if teacher is None else common_modules(self._student, teacher, recipe.features)
        if next(model.parameters()).device.type == "cpu" and not computes_in(_DTYPES[recipe.precision]):
            warnings.warn(
                f"training: this processor has no instructions for precision={recipe.precision!r}, so torch takes many "
                "times longer than with precision='float32'",
                stacklevel=4,
            )

    def __call__(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and loss and accuracy (for gates also keep_ratio and macs) as detached scalars.

        Args:
            x: Images, shape (N, C, H, W).
            y: Class indices, shape (N,); None: the teacher's answers take their place.
        """
        if self.recipe.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        taught, theirs = (None, {}) if self.teacher is None else self._answers(self.teacher, x)
        with self._autocast(x), outputs_of(self._student, self._taught) as ours:
            logits = self.model(x)
        if y is None:
            assert taught is not None
            loss, told = self._distance(logits, taught), taught.argmax(1)
        else:
            loss, told = self._task(logits, taught, y), y
        if self._taught:
            loss = loss + self.recipe.feature_weight * feature_distance(ours, theirs)
        logged = {"loss": loss.detach(), "accuracy": (logits.argmax(1) == told).float().mean()}
        if self.criterion is not None:
            loss = loss + self.criterion(told)
            assert self.criterion.terms is not None
            logged.update(keep_ratio=self.criterion.terms.keep_ratio, macs=self.criterion.terms.macs)
        return loss, logged

    @torch.no_grad()
    def _answers(self, teacher: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self._autocast(x), outputs_of(teacher, self._taught) as features:
            return teacher(x), features

    def _autocast(self, x: Tensor) -> torch.autocast:
        precision: Precision = self.recipe.precision
        return torch.autocast(x.device.type, _DTYPES[precision], enabled=precision != "float32")

    def _task(self, logits: Tensor, taught: Tensor | None, y: Tensor) -> Tensor:
        loss = F.cross_entropy(logits.float(), y, label_smoothing=self.recipe.label_smoothing)
        if taught is None:
            return loss
        share = self.recipe.distillation
        return (1 - share) * loss + share * self._distance(logits, taught)

    def _distance(self, logits: Tensor, taught: Tensor) -> Tensor:
        return distillation(logits, taught, self.recipe.temperature)
