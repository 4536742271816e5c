"""One training run: passes over the images, and the schedules that move with them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decouplify.decoupling import Decoupling, decoupling_of
from decouplify.errors import NonFiniteError
from decouplify.losses import DecouplingLoss, parameter_groups
from decouplify.train.batches import Augment, Batches, batches_of
from decouplify.train.finish import calibrate, executed_share, norms_of, reestimate_norms
from decouplify.train.log import Progress
from decouplify.train.objective import Objective
from decouplify.train.recipe import DecouplingRecipe, Recipe
from decouplify.train.schedule import GateSchedule, put
from decouplify.train.start import begin
from decouplify.train.state import read_state, rng_state, set_rng_state, write_state
from decouplify.train.step import EagerStep, GraphedStep, Step

__all__ = ["History", "decouple", "train_dense"]

_N_MEASURED = 8  # batches on which the executed MACs are measured after an epoch


@dataclass
class History:
    """What happened.

    Attributes:
        epochs: One dictionary per epoch. Keys: epoch, loss, accuracy (of training batches, in [0, 1]), seconds; for
            decoupling also keep_ratio and macs (executed / dense, of training batches) and, with a target in MACs,
            measured (the same in evaluation).
        finished: False if the run stopped early and can be resumed.
        shift: What ``calibrate`` added to all gates' logits at the end.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False
    shift: float = 0.0


def train_dense(
    model: nn.Module,
    images: Tensor | Iterable[object],
    labels: Tensor | None,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    augment: Augment | None = None,
    progress: Progress | None = None,
    state: str | None = None,
    stop_after_s: float | None = None,
) -> History:
    """Train a network on its task alone.

    Args:
        model: Any classifier; left in eval mode.
        images: Normalised images, shape (N, C, H, W), on the model's device; or a loader of (images, labels).
        labels: Class indices, shape (N,); None with a loader.
        recipe: How.
        teacher: A network to learn from beside the labels, see ``recipe.distillation``; None: labels only.
        augment: Changes a batch of images at random; None: nothing.
        progress: Called with each epoch's dictionary, see ``log``.
        state: A file to write after each epoch; if it exists, the run goes on from there with the same numbers.
        stop_after_s: Stop before an epoch that would end later than so many seconds from now; needs ``state``.

    Raises:
        ValueError: If images and labels do not fit each other, or features are to be learnt and there is no teacher.
        NonFiniteError: If the loss of an epoch is not finite.
        CheckpointError: If the state is that of another run.
    """
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "lr": recipe.lr}]
    groups[0]["weight_decay"] = recipe.weight_decay
    batches = _batches(model, images, labels, recipe, augment, labelled=True)
    taught_by = _teacher(model, teacher, recipe)
    return _Run(model, batches, recipe, groups, None, taught_by, progress).run(state, stop_after_s)


def decouple(
    model: nn.Module,
    images: Tensor | Iterable[object],
    labels: Tensor | None,
    recipe: DecouplingRecipe,
    *,
    teacher: nn.Module | str | None = "original",
    augment: Augment | None = None,
    progress: Progress | None = None,
    state: str | None = None,
    stop_after_s: float | None = None,
) -> History:
    """Train a wrapped network and its gates.

    Without labels, everything is learnt from the teacher: gates close where its answers allow it, and the attribute of
    the mutual-information loss is what it answers.

    Args:
        model: A wrapped classifier; left in eval mode.
        images: See ``train_dense``, as for the rest; a loader of images alone will do if there are no labels.
        labels: Class indices, shape (N,); also the attribute of the mutual-information loss. None with a loader of
            (images, labels), or to learn from the teacher alone (``labels=None`` and images in memory, or
            ``recipe.distillation == 1``).
        recipe: How.
        teacher: Whose answers to learn: "original" is the network as it is now with all gates open; a network of one's
            own, in eval mode and on normalised images alike; None: labels only.
        augment: See ``train_dense``.
        progress: See ``train_dense``.
        state: See ``train_dense``.
        stop_after_s: See ``train_dense``.

    Raises:
        ValueError: If the model is not wrapped, images and labels do not fit each other, or there is neither label nor
            teacher.
        NonFiniteError: If the loss of an epoch is not finite.
        CheckpointError: If the state is that of another run.
    """
    decoupling = decoupling_of(model, "decouple")
    criterion = DecouplingLoss(
        model,
        recipe.mutual_information,
        recipe.kl,
        recipe.sparsity,
        recipe.target,
        steering=recipe.steering,
        check_finite=False,  # once an epoch is enough, and does not wait for the device at every step
    )
    labelled = labels is not None or not (isinstance(images, Tensor) or recipe.distillation == 1)
    taught_by = _teacher(model, teacher, recipe, labelled)
    if taught_by is None and not labelled:
        raise ValueError("decouple: neither labels nor a teacher to learn from; give labels, or teacher='original'")
    batches = _batches(model, images, labels, recipe, augment, labelled=labelled)
    schedule = GateSchedule(model, criterion, recipe)
    frozen = _freeze(model, decoupling, recipe)
    try:
        groups = parameter_groups(model, recipe.lr, recipe.weight_decay, recipe.lr * recipe.gate_lr_factor)
        return _Run(model, batches, recipe, groups, criterion, taught_by, progress, schedule).run(state, stop_after_s)
    finally:
        schedule.end()
        for parameter in frozen:
            parameter.requires_grad_(True)


def _batches(
    model: nn.Module,
    images: Tensor | Iterable[object],
    labels: Tensor | None,
    recipe: Recipe,
    augment: Augment | None,
    labelled: bool,
) -> Batches:
    device = next(model.parameters()).device
    return batches_of(
        images,
        labels,
        labelled=labelled,
        batch_size=recipe.batch_size,
        augment=augment,
        seed=recipe.seed,
        whole=recipe.cuda_graphs and device.type == "cuda",
        device=device,
    )


def _teacher(
    model: nn.Module, teacher: nn.Module | str | None, recipe: Recipe, labelled: bool = True
) -> nn.Module | None:
    """The network that is learnt from, in eval mode, or None where it is not needed."""
    if teacher is None and recipe.features:
        raise ValueError(f"training: features={recipe.features!r} are a teacher's, and teacher is None; give a network")
    if teacher is None or not (recipe.distillation > 0 or recipe.features or not labelled):
        return None
    if isinstance(teacher, str):
        if teacher != "original":
            raise ValueError(f"decouple: teacher={teacher!r}; 'original', a network, or None wanted")
        teacher = _original(model)
    return teacher.eval()


def _original(model: nn.Module) -> nn.Module:
    from decouplify.surgery import unwrap

    return unwrap(copy.deepcopy(model))


def _freeze(model: nn.Module, decoupling: Decoupling, recipe: DecouplingRecipe) -> list[nn.Parameter]:
    """Freeze what the recipe does not train; returns what was frozen."""
    if recipe.trained == "all":
        return []
    kept = {id(p) for p in decoupling.parameters()}
    if recipe.trained == "gates and norms":
        norms = [m for m in model.modules() if "Norm" in type(m).__name__]
        kept |= {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    frozen = [p for p in model.parameters() if p.requires_grad and id(p) not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


class _Run:
    """One run of either kind: what moves with its progress, and its file."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        recipe: Recipe,
        groups: list[dict[str, Any]],
        criterion: DecouplingLoss | None,
        teacher: nn.Module | None,
        progress: Progress | None,
        schedule: GateSchedule | None = None,
    ) -> None:
        self.model, self.batches, self.recipe = model, batches, recipe
        self.criterion, self.progress, self.schedule = criterion, progress, schedule
        self.device = next(model.parameters()).device
        graphed = recipe.cuda_graphs and self.device.type == "cuda" and not dist.is_initialized()
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)
        self.optimizer = self._optimizer(groups, graphed)
        self.peak_lr = [float(group["lr"]) for group in groups]
        eager = EagerStep(Objective(self._parallel(), recipe, criterion, teacher), self.optimizer)
        self.step: Step = GraphedStep(eager) if graphed else eager
        self.scaler = eager.scaler
        if graphed and schedule is not None:
            schedule.on_device(self.device)

    def _optimizer(self, groups: list[dict[str, Any]], graphed: bool) -> torch.optim.Optimizer:
        if graphed:  # a graph reads its learning rates from memory
            groups = [{**group, "lr": torch.tensor(group["lr"], device=self.device)} for group in groups]
        momentum, nesterov = self.recipe.momentum, self.recipe.momentum > 0
        fused = self.device.type == "cuda"
        if self.recipe.optimizer == "adam":
            betas = (momentum, 0.999)
            return torch.optim.AdamW(groups, lr=self.recipe.lr, betas=betas, fused=fused, capturable=graphed)
        return torch.optim.SGD(groups, lr=self.recipe.lr, momentum=momentum, nesterov=nesterov, fused=fused)

    def _parallel(self) -> nn.Module:
        """The model, in DistributedDataParallel if there are several processes."""
        if not dist.is_initialized() or isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model
        return nn.parallel.DistributedDataParallel(self.model)

    def run(self, state: str | None, stop_after_s: float | None) -> History:
        if stop_after_s is not None and state is None:
            raise ValueError("training: stop_after_s without state; name a file from which the run can go on")
        start, history = time.perf_counter(), History()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.recipe.seed + 7919 * (dist.get_rank() if dist.is_initialized() else 0))
            self._resume(state, history)
            if not history.epochs and not history.finished:
                self._begin()
            while len(history.epochs) < self.recipe.epochs:
                if stop_after_s is not None and self._ends_late(history, start, stop_after_s):
                    return history
                self._run_epoch(history)
                self._save(state, history)
            if not history.finished:
                self._finish(history)
                self._save(state, history)
        return history

    def _begin(self) -> None:
        if isinstance(self.recipe, DecouplingRecipe) and self.criterion is not None:
            begin(self.model, self.batches, self.recipe, self.criterion.target_macs)

    @staticmethod
    def _ends_late(history: History, start: float, stop_after_s: float) -> bool:
        last = history.epochs[-1]["seconds"] if history.epochs else 0.0
        return time.perf_counter() - start + last > stop_after_s

    def _run_epoch(self, history: History) -> None:
        epoch = len(history.epochs)
        start = time.perf_counter()
        numbers = {"epoch": epoch + 1, **self._epoch(epoch)}
        self._measure(numbers)
        numbers["seconds"] = time.perf_counter() - start
        if not math.isfinite(numbers["loss"]):
            raise NonFiniteError(
                f"training: the loss of epoch {epoch + 1} is {numbers['loss']}; look for NaN or infinity in the "
                "images, or lower the learning rate"
            )
        history.epochs.append(numbers)
        if self.progress is not None and (not dist.is_initialized() or dist.get_rank() == 0):
            self.progress(numbers)

    def _epoch(self, epoch: int) -> dict[str, float]:
        self._to_training()
        n_batches, sums = len(self.batches), dict[str, Tensor]()
        n_steps = math.ceil(n_batches / self.recipe.accumulate)
        source = self.batches.epoch(epoch)
        for i in range(n_steps):
            batches = list(islice(source, self.recipe.accumulate))
            if not batches:
                raise ValueError(f"training: the loader promised {n_batches} batches and ended after fewer")
            phase = self._schedule((epoch + i / n_steps) / self.recipe.epochs)
            for name, value in self.step(batches, phase).items():
                sums[name] = sums.get(name, 0) + value
        return {name: float(value) / n_steps for name, value in sums.items()}

    def _to_training(self) -> None:
        self.model.train()
        if self.recipe.frozen_norms:
            for norm in norms_of(self.model):
                norm.eval()

    def _schedule(self, progress: float) -> object:
        """Set what depends on progress; returns the phase, which changes when more than numbers do."""
        for group, peak in zip(self.optimizer.param_groups, self.peak_lr, strict=True):
            put(group, "lr", peak * self.recipe.lr_factor(progress))
        return None if self.schedule is None else self.schedule.set(progress)

    def _measure(self, numbers: dict[str, float]) -> None:
        """With a target in MACs: what evaluation executes, to steer by."""
        if self.schedule is None or self.criterion is None or self.criterion.target_macs is None:
            return
        epoch = int(numbers["epoch"])
        images = [x for x, _ in islice(self.batches.epoch(epoch, augmented=False), _N_MEASURED)]
        numbers["measured"] = executed_share(self.model, images, across_processes=dist.is_initialized())
        self.schedule.correct(epoch / self.recipe.epochs, numbers["measured"])

    def _finish(self, history: History) -> None:
        """Norms and thresholds for evaluation; also where the schedule stopped early."""
        if isinstance(self.recipe, DecouplingRecipe) and self.recipe.epochs > 0:
            together, frozen = dist.is_initialized(), self.recipe.frozen_norms
            images = islice(self.batches.epoch(self.recipe.epochs), self.recipe.norm_batches)
            reestimate_norms(self.model, images, controllers_only=frozen, across_processes=together)
            assert self.criterion is not None
            if self.recipe.calibrate and self.criterion.target_macs is not None and self.recipe.norm_batches > 0:
                # Shifted images have dark edges, which open gates: the target would be missed by a few per cent.
                batches = self.batches.epoch(self.recipe.epochs, augmented=False)
                chosen = [x for x, _ in islice(batches, min(self.recipe.norm_batches, 2 * _N_MEASURED))]
                target = self.criterion.target_macs
                history.shift = calibrate(self.model, chosen, target, across_processes=together)
        history.finished = True
        self.model.eval()

    def _fingerprint(self) -> str:
        shapes = sum(p.numel() for p in self.model.parameters())
        return f"{type(self.model).__name__} of {shapes} parameters, {asdict(self.recipe)}"

    def _save(self, path: str | None, history: History) -> None:
        if path is None or (dist.is_initialized() and dist.get_rank() != 0):
            return
        write_state(
            path,
            {
                "fingerprint": self._fingerprint(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": rng_state(self.device),
                "history": asdict(history),
                "aim": 1.0 if self.schedule is None else self.schedule.aim,
            },
        )

    def _resume(self, path: str | None, history: History) -> None:
        state = None if path is None else read_state(path, self._fingerprint())
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(_on(state["optimizer"], self.device))
        self.scaler.load_state_dict(state["scaler"])
        set_rng_state(state["rng"], self.device)
        if self.schedule is not None:
            self.schedule.aim = state["aim"]
        for name, value in state["history"].items():
            setattr(history, name, value)
        if history.finished:
            self.model.eval()


def _on(state: Any, device: torch.device) -> Any:
    """An optimiser's state with its learning rates on the device; momenta it moves itself."""
    for group in state["param_groups"]:
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].to(device)
    return state
