"""A small trainer for images that fit in memory: dense training, then decoupling.

Nothing here is needed to use the library in a loop of one's own; it is what the command line and the examples run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decouplify.decoupling import decoupling_of
from decouplify.losses import DecouplingLoss, parameter_groups
from decouplify.modes import eval_mode

__all__ = ["DecouplingRecipe", "History", "Recipe", "decouple", "evaluate", "train_dense"]

Augment = Callable[[Tensor], Tensor]
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Recipe:
    """How to train: stochastic gradient descent with momentum, a linear warm-up, then half a cosine down to 0.

    Attributes:
        epochs: Passes over the images.
        lr: Highest learning rate of the network.
        batch_size: Images per step.
        weight_decay: Weight decay of the network.
        momentum: Nesterov momentum.
        warmup_epochs: Epochs in which the learning rate rises to ``lr``.
        label_smoothing: Of the cross entropy, in [0, 1).
        seed: Of everything random in the run.
    """

    epochs: int
    lr: float = 0.05
    batch_size: int = 128
    weight_decay: float = 5e-4
    momentum: float = 0.9
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    seed: int = 0

    def lr_factor(self, progress: float) -> float:
        """Share of ``lr`` after a share ``progress`` of the run, both in [0, 1]."""
        warmup = min(self.warmup_epochs / max(self.epochs, 1), 0.5)
        if progress < warmup:
            return progress / warmup
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@dataclass(frozen=True)
class DecouplingRecipe(Recipe):
    """How to train gates, see ``DecouplingLoss`` for the weights.

    Attributes:
        mutual_information: lambda_m.
        kl: lambda_k.
        sparsity: lambda_s.
        target: What the sparse term aims at.
        gate_lr_factor: Learning rate of controllers and heads relative to the network's.
        anneal: Let the noise on the gates fall linearly from 1 to 0 until the hard phase begins.
        hard_share: Share of the run, at its end, in which gates are binary as in evaluation.
        ramp_share: Share of the run in which a MAC target is approached.
    """

    lr: float = 0.02
    mutual_information: float = 0.03
    kl: float = 0.01
    sparsity: float = 1e-3
    target: float | str | None = "2.0x"
    gate_lr_factor: float = 10.0
    anneal: bool = True
    hard_share: float = 0.25
    ramp_share: float = 0.3


@dataclass
class History:
    """What happened, one dictionary per epoch.

    Its keys: epoch, loss, accuracy (of training batches, in [0, 1]), seconds; for decoupling also keep_ratio and macs
    (executed / dense, of training batches).
    """

    epochs: list[dict[str, float]] = field(default_factory=list)


def train_dense(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    *,
    augment: Augment | None = None,
    progress: Progress | None = None,
) -> History:
    """Train a network on its task alone.

    Args:
        model: Any classifier; left in eval mode.
        images: Normalised images, shape (N, C, H, W), on the model's device.
        labels: Class indices, shape (N,).
        recipe: How.
        augment: Changes a batch of images at random; None: nothing.
        progress: Called with each epoch's dictionary.

    Raises:
        ValueError: If images and labels do not fit each other.
    """
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": recipe.lr}]
    groups[0]["weight_decay"] = recipe.weight_decay
    return _Run(model, images, labels, recipe, groups, None, augment, progress).run()


def decouple(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: DecouplingRecipe,
    *,
    augment: Augment | None = None,
    progress: Progress | None = None,
) -> History:
    """Train a wrapped network and its gates.

    Args:
        model: A wrapped classifier; left in eval mode.
        images: See ``train_dense``, as for the rest.
        labels: Class indices, shape (N,); also the attribute of the mutual-information loss.
        recipe: How.
        augment: Changes a batch of images at random; None: nothing.
        progress: Called with each epoch's dictionary.

    Raises:
        ValueError: If the model is not wrapped, or images and labels do not fit each other.
    """
    groups = parameter_groups(model, recipe.lr, recipe.weight_decay, recipe.lr * recipe.gate_lr_factor)
    criterion = DecouplingLoss(model, recipe.mutual_information, recipe.kl, recipe.sparsity, recipe.target)
    run = _Run(model, images, labels, recipe, groups, criterion, augment, progress)
    try:
        return run.run()
    finally:
        gates = decoupling_of(model)
        gates.noise, gates.hard = 1.0, False


@torch.no_grad()
def evaluate(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Top-1 accuracy in [0, 1] in eval mode.

    Args:
        model: A classifier: a module, whose modes are kept, or any function from images to logits.
        images: Normalised images, shape (N, C, H, W).
        labels: Class indices, shape (N,).
        batch_size: Images per forward.
    """
    if isinstance(model, nn.Module) and model.training:
        with eval_mode(model):
            return evaluate(model, images, labels, batch_size)
    n_right = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        n_right += int((model(x).argmax(1) == y).sum())
    return n_right / max(len(labels), 1)


class _Run:
    """One training run: the loop, and the schedules that move with it."""

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        recipe: Recipe,
        groups: list[dict[str, Any]],
        criterion: DecouplingLoss | None,
        augment: Augment | None,
        progress: Progress | None,
    ) -> None:
        if len(images) != len(labels) or len(images) < 2:
            raise ValueError(
                f"training: {len(images)} images and {len(labels)} labels given; equally many, at least 2, wanted"
            )
        self.model, self.images, self.labels, self.recipe = model, images, labels, recipe
        self.criterion, self.augment, self.progress = criterion, augment, progress
        self.optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
        self.peak_lr = [group["lr"] for group in self.optimizer.param_groups]
        self.n_batches = max(1, len(images) // recipe.batch_size)  # of almost equal size, none of a few images

    def run(self) -> History:
        history = History()
        devices = [self.images.device] if self.images.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.recipe.seed)
            for epoch in range(self.recipe.epochs):
                history.epochs.append({"epoch": epoch + 1, **self._epoch(epoch)})
                if self.progress is not None:
                    self.progress(history.epochs[-1])
        self.model.eval()
        return history

    def _epoch(self, epoch: int) -> dict[str, float]:
        start = time.perf_counter()
        self.model.train()
        order = torch.randperm(len(self.images), device=self.images.device)
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(order.tensor_split(self.n_batches)):
            self._schedule((epoch + i / self.n_batches) / self.recipe.epochs)
            for name, value in self._step(batch).items():
                sums[name] = sums.get(name, 0) + value
        means = {name: float(value) / self.n_batches for name, value in sums.items()}
        return {**means, "seconds": time.perf_counter() - start}

    def _schedule(self, progress: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peak_lr, strict=True):
            group["lr"] = peak * self.recipe.lr_factor(progress)
        if self.criterion is None or not isinstance(self.recipe, DecouplingRecipe):
            return
        gates = decoupling_of(self.model)
        hard_from = 1 - self.recipe.hard_share
        gates.hard = progress >= hard_from and self.recipe.hard_share > 0
        gates.noise = max(0.0, 1 - progress / max(hard_from, 1e-9)) if self.recipe.anneal else 1.0
        self.criterion.target_scale = min(1.0, progress / max(self.recipe.ramp_share, 1e-9))

    def _step(self, batch: Tensor) -> dict[str, Tensor]:
        x, y = self.images[batch], self.labels[batch]
        logits = self.model(x if self.augment is None else self.augment(x))
        loss = F.cross_entropy(logits, y, label_smoothing=self.recipe.label_smoothing)
        logged = {"loss": loss.detach(), "accuracy": (logits.argmax(1) == y).float().mean()}
        if self.criterion is not None:
            loss = loss + self.criterion(y)
            assert self.criterion.terms is not None
            logged.update(keep_ratio=self.criterion.terms.keep_ratio, macs=self.criterion.terms.macs)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return logged
