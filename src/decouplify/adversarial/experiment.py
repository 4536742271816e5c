"""One detection experiment: its images, what is seen of them, and the rows of its table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify.adversarial.adaptive import AdaptiveAttack
from decouplify.adversarial.attacks import Attack, name_of
from decouplify.adversarial.crafting import Crafted, craft
from decouplify.adversarial.observations import OF_PATHS, Observation, observe
from decouplify.adversarial.protocol import Protocol, Seen, TooFewImagesError, score_detectors
from decouplify.adversarial.result import DetectionResult, DetectionRow
from decouplify.decoupling import decoupling_of

__all__ = ["Attacked", "Experiment", "Images", "Mask", "seen_as"]

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Images:
    """Pixels (N, C, H, W) and labels (N,), on the CPU."""

    pixels: Tensor
    labels: Tensor

    def rows(self, index: NDArray[np.intp]) -> Images:
        """The chosen images."""
        chosen = torch.from_numpy(index)
        return Images(self.pixels[chosen], self.labels[chosen])

    def distinct(self) -> Images:
        """Each image once: one image under two numbers could be drawn for training and for testing."""
        first = {image.numpy().tobytes(): i for i, image in reversed(list(enumerate(self.pixels)))}
        return self.rows(np.sort(np.fromiter(first.values(), np.intp)))


@dataclass(frozen=True, eq=False)
class Attacked:
    """An attack's images, what is seen of them, and on which it had success."""

    crafted: Crafted
    seen: Observation

    @property
    def name(self) -> str:
        """Name of the attack."""
        return self.crafted.name

    @property
    def success(self) -> Mask:
        """Shape (N,)."""
        return self.crafted.success.numpy()


def seen_as(view: str, seen: Observation) -> Seen:
    """Paths, as detectors see them: "paths", their bits, or "margins"."""
    return Seen(OF_PATHS[view](seen), seen.preds)


@dataclass(eq=False)
class Experiment:
    """The images that a model classifies correctly, and the rows computed from them so far.

    Attributes:
        model: A wrapped model that reads pixels in [0, 1].
        given: All images.
        protocol: How detectors are compared.
        batch_size: Images at a time.
        views: What paths are looked at as, see ``OF_PATHS``.
        progress: Called with the name of every stage when it begins.
        images: The correctly classified ones; all that follows is about these N.
        clean: What is seen of them.
        rows: Rows of the table.
        skipped: Rows that could not be computed, with the reason.
        seconds: Time by stage.
    """

    model: nn.Module
    given: Images
    protocol: Protocol
    batch_size: int
    views: Sequence[str] = ("paths",)
    progress: Callable[[str], None] | None = None
    images: Images = field(init=False)
    clean: Observation = field(init=False)
    rows: list[DetectionRow] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with self.stage("clean images"):
            seen = observe(self.model, self.given.pixels, self.batch_size)
        correct = np.flatnonzero(seen.preds == self.given.labels.numpy())
        self.images, self.clean = self.given.rows(correct), seen.rows(correct)

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of each image, shape (N,)."""
        return self.images.labels.numpy()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Says what begins, the first time, and keeps how long it took."""
        if self.progress is not None and name not in self.seconds:
            self.progress(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)

    def attacked(self, attack: Attack) -> Attacked:
        """The attack on every image, and what is seen of its result."""
        name = self._name(attack)
        with self.stage(f"attack {name}"):
            settings = {"batch_size": self.batch_size, "seed": self.protocol.seed}
            crafted = craft(attack, self.model, self.images.pixels, self.images.labels, **settings)
            return Attacked(replace(crafted, name=name), observe(self.model, crafted.images, self.batch_size))

    def _name(self, attack: Attack) -> str:
        """The attack's name, numbered if another one has it: rows are told apart by it."""
        name, number = name_of(attack), 1
        while f"attack {name}" in self.seconds:
            number += 1
            name = f"{name_of(attack)} #{number}"
        return name

    def adaptive(self, weight: float, eps: float) -> AdaptiveAttack:
        """The adaptive attack, which knows the class rates of all clean images, those of the test included."""
        n_classes, n_filters = self.clean.logits.shape[1], self.clean.path.shape[1]
        rates = np.full((n_classes, n_filters), 0.5, np.float32)  # of classes without an image nothing is known
        for c in np.unique(self.clean.preds):
            rates[c] = self.clean.path[self.clean.preds == c].mean(0)
        return AdaptiveAttack(torch.from_numpy(rates), weight, eps=eps, step=eps / 4)

    def seen_again(self) -> Observation:
        """The clean images once more, in the opposite order and in batches of another size."""
        with self.stage("placebo"):
            seen = observe(self.model, self.images.pixels.flip(0), self.batch_size // 2 + 1)
            return seen.rows(np.arange(len(self))[::-1])

    def noise_like(self, attacked: Tensor) -> Observation:
        """Images changed as much at every pixel as by an attack, but with random signs."""
        with self.stage("noise"):
            generator = torch.Generator().manual_seed(self.protocol.seed)
            signs = 2 * torch.randint(2, attacked.shape, generator=generator) - 1
            noisy = self.images.pixels + signs * (attacked - self.images.pixels).abs()
            return observe(self.model, noisy.clamp(0, 1), self.batch_size)

    def compare(
        self,
        features: str,
        trained_on: str,
        training: tuple[Seen, Seen, Mask],
        tests: Mapping[str, tuple[Seen, Mask]],
        note: str = "",
    ) -> None:
        """Rows for detectors trained on one thing and tested on several.

        Args:
            features: What is seen.
            trained_on: What the attacked images of the training are.
            training: Clean images, attacked images, and which may be drawn.
            tests: Attacked images by name, and which of them count.
            note: Which part of the images, empty if all.

        Raises:
            TooFewImagesError: If there is not even a first row.
        """
        with self.stage("detectors"):
            try:
                scores = score_detectors(self.protocol, self.labels, *training, tests)
            except TooFewImagesError as error:
                if not self.rows:
                    raise
                scores, reason = {}, str(error)
            else:
                reason = "too few attacks had success to leave images for testing"
        for tested_on, (_, counted) in tests.items():
            n_attacked = int(training[2].sum()) if note else len(self)
            row = DetectionRow(features, trained_on, tested_on, n_attacked, int(counted.sum()), (), note)
            if tested_on in scores:
                self.rows.append(replace(row, scores=scores[tested_on]))
            else:
                self.skipped[row.name] = reason

    def result(self, attack: str, facts: Mapping[str, Any]) -> DetectionResult:
        """Everything so far."""
        described = {"model": decoupling_of(self.model).plan.model, **facts, "seconds": self.seconds}
        n_images = len(self.given.pixels)
        return DetectionResult(attack, n_images, len(self), tuple(self.rows), self.skipped, described)
