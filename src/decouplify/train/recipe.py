"""How to train, as frozen records: everything that decides a run's numbers apart from the network and the images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from decouplify.losses import Target

__all__ = ["DecouplingRecipe", "Optimizer", "Precision", "Recipe", "Start", "Trained"]

Precision = Literal["float32", "bfloat16", "float16"]
Trained = Literal["all", "gates and norms", "gates"]
Optimizer = Literal["sgd", "adam"]
Start = Literal["open", "importance", "prediction"]

_MOMENT = 1e-9  # a phase of no length begins and ends at once


@dataclass(frozen=True)
class Recipe:
    """How to train: gradient descent, a linear warm-up, then a fall of the rate.

    Attributes:
        epochs: Passes over the images.
        lr: Highest learning rate of the network.
        batch_size: Images per step and process.
        weight_decay: Weight decay of the network.
        momentum: Nesterov momentum, or Adam's first beta.
        optimizer: "sgd"; or "adam" (AdamW), whose steps have the size of the learning rate whatever the gradient: for
            short runs, in which the small gradients of single gates would move nothing. With it, ``lr`` is 1e-4 or so.
        clip_norm: Largest norm of all gradients together; larger ones are scaled down. Infinity: never.
        warmup_epochs: Epochs in which the learning rate rises to ``lr``.
        steps: Shares of the run after which the learning rate falls to a tenth, the paper's (0.5, 0.75) for instance;
            empty: half a cosine down to 0.
        label_smoothing: Of the cross entropy, in [0, 1).
        distillation: Share of the task's loss that is the distance from the teacher, in [0, 1]; all of it without
            labels, none without a teacher.
        temperature: Of teacher and student in the distillation.
        features: Globs of modules, such as "layer[123]", that shall return what they return in the teacher; empty: its
            answers are all that is learnt.
        feature_weight: Weight of the distance from the teacher's features, see ``feature_distance``; it is added to the
            task's loss.
        frozen_norms: Keep the network's norms as in evaluation, with the statistics they came with: a few hundred
            images make worse ones than a pretrained network has.
        accumulate: Batches whose gradients are summed into one step.
        precision: What the network computes in; controllers stay in float32.
        channels_last: Keep images and weights as (N, H, W, C) in memory, which GPUs prefer.
        cuda_graphs: Replay the step as one CUDA graph: several times faster for small networks, whose kernels take less
            time than their launches. Without effect on a CPU; for one process with whole batches and no float16.
        seed: Of everything random in the run.
    """

    epochs: int
    lr: float = 0.05
    batch_size: int = 128
    weight_decay: float = 5e-4
    momentum: float = 0.9
    optimizer: Optimizer = "sgd"
    clip_norm: float = math.inf
    warmup_epochs: float = 1.0
    steps: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    distillation: float = 0.0
    temperature: float = 4.0
    features: str | tuple[str, ...] = ()
    feature_weight: float = 1.0
    frozen_norms: bool = False
    accumulate: int = 1
    precision: Precision = "float32"
    channels_last: bool = False
    cuda_graphs: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)}; at least 1 wanted")
        if self.epochs < 0:
            raise ValueError(f"{type(self).__name__}: epochs={self.epochs}; at least 0 wanted")
        self._check_weights("feature_weight")
        self._check_shares("label_smoothing", "distillation")
        if self.optimizer not in get_args(Optimizer):
            raise ValueError(f"{type(self).__name__}: optimizer={self.optimizer!r}; 'sgd' or 'adam' wanted")
        if self.cuda_graphs and (self.precision == "float16" or self.accumulate > 1):
            raise ValueError(
                f"{type(self).__name__}: cuda_graphs=True goes with neither precision='float16' (its loss scale needs "
                "the host) nor accumulate > 1; take bfloat16 and a larger batch_size"
            )

    def _check_weights(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= 0:
                raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)}; a number >= 0 wanted")

    def _check_shares(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)} is not in [0, 1]")

    def lr_factor(self, progress: float) -> float:
        """Share of ``lr`` after a share ``progress`` of the run, both in [0, 1]."""
        warmup = min(self.warmup_epochs / max(self.epochs, 1), 0.5)
        if progress < warmup:
            return progress / warmup
        if self.steps:
            return 0.1 ** sum(progress >= step for step in self.steps)
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@dataclass(frozen=True)
class DecouplingRecipe(Recipe):
    """How to train gates; see ``DecouplingLoss`` for the weights.

    Attributes:
        mutual_information: lambda_m.
        kl: lambda_k.
        sparsity: lambda_s.
        steering: Weight of a MAC target.
        target: What the sparse term aims at.
        gate_lr_factor: Learning rate of controllers relative to the network's; that of heads is the network's.
        anneal: Let the noise on the gates fall linearly from 1 to 0 until the hard phase begins.
        hard_share: Share of the run, at its end, in which gates are binary as in evaluation.
        ramp_share: Share of the run in which the target is approached.
        information_ramp_share: Share of the run in which lambda_m and lambda_k rise from 0.
        start: "open": all gates begin as ``wrap`` sets them. The others are for short runs, which would otherwise close
            filters that are merely close to their threshold; go on with ``hard_share=1`` and ``ramp_share=0``.
            "importance": the filters that matter least begin closed, as many as meet a MAC target (see
            ``close_least_important``). "prediction": for each image those that matter least for it (see
            ``predict_worth``).
        start_rounds: In how many shares the filters of least importance are closed, what is left being judged anew
            after each. More cost as many passes over ``norm_batches``, and the answers start nearer to the teacher's.
        reconstruct: Fit the weights to filters that start closed for every image, so that layers return what they did
            before (see ``Reconstruction``); on at most 512 of the images, as they are. Short runs then go best with
            controllers that move little, such as ``gate_lr_factor=2``.
        image_reduction: If gates start from "prediction" and ``reconstruct`` is set: the factor, at least 1, by which
            the MACs fall through filters that each image closes for itself. For the rest of the way to the target
            filters close for every image; to these the weights are fitted. If the target is no more than this factor,
            none close for every image, and nothing is fitted.
        trained: Which parameters learn in the epochs: all, gates and the affine parameters of norms, or gates alone.
        norm_batches: Batches from which the norms' statistics are estimated again at the end, with binary gates.
        calibrate: Shift all thresholds at the end, so that the executed MACs of training images meet a MAC target.
            This, and the steering on the way, looks at images without augmentation; those of a loader are taken as they
            come, so call ``calibrate`` yourself with others if it augments them.
    """

    lr: float = 0.02
    mutual_information: float = 0.03
    kl: float = 0.01
    sparsity: float = 1e-3
    steering: float = 2.0
    target: Target = "2.0x"
    distillation: float = 0.5
    gate_lr_factor: float = 10.0
    anneal: bool = True
    hard_share: float = 0.25
    ramp_share: float = 0.3
    information_ramp_share: float = 0.0
    start: Start = "open"
    start_rounds: int = 1
    reconstruct: bool = False
    image_reduction: float = 1.15
    trained: Trained = "all"
    norm_batches: int = 50
    calibrate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_weights("mutual_information", "kl", "sparsity", "steering", "gate_lr_factor")
        self._check_shares("hard_share", "ramp_share", "information_ramp_share")
        if self.start_rounds < 1:
            raise ValueError(f"{type(self).__name__}: start_rounds={self.start_rounds}; at least 1 wanted")
        if self.start not in get_args(Start):
            raise ValueError(
                f"{type(self).__name__}: start={self.start!r}; 'open', 'importance' or 'prediction' wanted"
            )
        if self.start_rounds > 1 and self.start != "importance" and not self.reconstruct:
            raise ValueError(
                f"{type(self).__name__}: start_rounds={self.start_rounds} with start={self.start!r}; only filters that "
                "close for every image close in rounds: start='importance' wanted, or 'prediction' with "
                "reconstruct=True"
            )
        if not self.image_reduction >= 1:
            raise ValueError(f"{type(self).__name__}: image_reduction={self.image_reduction}; a factor >= 1 wanted")
        if self.reconstruct and self.start == "open":
            raise ValueError(
                f"{type(self).__name__}: reconstruct=True fits the weights to filters that start closed for every "
                "image; start='importance' or 'prediction' wanted, start='open' given"
            )

    def is_hard(self, progress: float) -> bool:
        """Whether gates are binary after a share ``progress`` of the run."""
        return self.hard_share > 0 and progress >= 1 - self.hard_share

    def noise(self, progress: float) -> float:
        """Standard deviation of the noise on the gates' logits."""
        return max(0.0, 1 - progress / max(1 - self.hard_share, _MOMENT)) if self.anneal else 1.0

    def target_scale(self, progress: float) -> float:
        """How much of the way to the target is asked for, in [0, 1]."""
        return min(1.0, progress / max(self.ramp_share, _MOMENT))

    def information_scale(self, progress: float) -> float:
        """How much of lambda_m and lambda_k counts, in [0, 1]."""
        return min(1.0, progress / max(self.information_ramp_share, _MOMENT))
