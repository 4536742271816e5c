"""Attack a decoupled network, detect it from paths, and everything that this must be compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from decouplify.adversarial.adaptive import AdaptiveAttack
from decouplify.adversarial.attacks import Attack, attack_named
from decouplify.adversarial.baselines import BASELINES, compare_original, compare_views
from decouplify.adversarial.detectors import DETECTORS
from decouplify.adversarial.experiment import Attacked, Experiment, Images, Mask, seen_as
from decouplify.adversarial.observations import OF_PATHS, Observation
from decouplify.adversarial.pixels import check_labels, check_pixels
from decouplify.adversarial.protocol import Protocol
from decouplify.adversarial.result import DetectionResult
from decouplify.decoupling import decoupling_of

__all__ = ["detect"]


def detect(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: str | Attack = "pgd",
    *,
    unseen: Sequence[str | Attack] = ("fgsm", "mifgsm"),
    adaptive_weight: float | None = AdaptiveAttack.weight,
    features: Sequence[str] = tuple(OF_PATHS),
    baselines: Sequence[str] = BASELINES,
    original: nn.Module | None = None,
    n_critical: int = 200,
    detectors: Sequence[str] = tuple(DETECTORS),
    n_per_class: Sequence[int] = (1, 5, 10),
    repeats: int = 5,
    batch_size: int = 128,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> DetectionResult:
    """How well paths tell adversarial images from clean ones, with every control and baseline on the same images.

    The network is attacked on the images that it classifies correctly; attacks that fail do not count. Detectors are
    trained on few images per class, each with its attacked twin, and tested on all others (Table 6 of the paper). Rows:

    - paths against the attack, and gate by gate how far it was from switching (margins), which the paper does not look
      at and which costs no more; all of what follows for both;
    - noise, seen by detectors trained on the attack: changes of the same size at every pixel, with random signs. Is the
      detector a detector of noise? A further row is trained on noise: can noise be detected at all?
    - unseen attacks, by detectors trained on the attack;
    - the adaptive attack, which pulls the path towards that of the new class, by detectors trained on the attack, and
      by detectors trained on it;
    - placebo: clean images against the same images, seen a second time in another order and in other batches. An AUC
      other than 1/2 means that the procedure is detected and not the attack. Every baseline has one, too;
    - baselines: the highest softmax probability; all logits; pooled features of all gated layers; pseudo-paths and
      critical data routing paths of the original network.

    Args:
        model: A wrapped model that reads pixels in [0, 1]: usually ``PixelModel(model, mean, std)``.
        images: Shape (N, C, H, W), in [0, 1]; best images that the network was not trained on. Repetitions are dropped.
        labels: Their classes, shape (N,).
        attack: A name for ``attack_named``, or any ``Attack``.
        unseen: Further attacks, for testing only.
        adaptive_weight: Weight of the path in the adaptive attack, whose ball is that of ``attack``, or 8/255 if that
            says none; ``None`` leaves it out.
        features: What detectors see of a path: ``"paths"``, its bits as in the paper, ``"margins"``, or both.
        baselines: Some of ``BASELINES``.
        original: The network before wrapping, reading what ``model.module`` reads; by default the wrapped one without
            its gates.
        n_critical: Critical paths take thirty passes per image and are computed for so many images; the table has a row
            of paths on the same images beside them.
        detectors: Some of ``random_forest``, ``adaboost``, ``gradient_boosting`` and ``prototype``.
        n_per_class: Training images per class; classes with less than twice as many give half of theirs, and the table
            says so.
        repeats: Independent draws of them.
        batch_size: Images at a time.
        seed: Of attacks, draws and detectors.
        progress: Called with the name of every stage when it begins.

    Raises:
        ImportError: If scikit-learn is not installed.
        TooFewImagesError: If no class has two images that are classified correctly and attacked with success.
        ValueError: If the model is not wrapped, a name is unknown, or images and labels are not as described.
    """
    decoupling_of(model, "detect")
    check_pixels(images, "detect")
    check_labels(labels, len(images), "detect")
    _check_names("baseline", baselines, BASELINES)
    _check_names("detector", detectors, tuple(DETECTORS))
    _check_names("feature of paths", features, tuple(OF_PATHS))
    if not features:
        raise ValueError(f"detect: no features given, some of {', '.join(OF_PATHS)} wanted")
    chosen = {name: DETECTORS[name] for name in detectors}
    protocol = Protocol(chosen, tuple(n_per_class), repeats, seed, torch.get_num_threads())
    given = Images(images.detach().cpu(), labels.cpu()).distinct()
    main_attack, *other_attacks = [attack_named(a) if isinstance(a, str) else a for a in (attack, *unseen)]
    experiment = Experiment(model, given, protocol, batch_size, tuple(features), progress)
    if adaptive_weight is not None:
        eps = float(getattr(main_attack, "eps", AdaptiveAttack.eps))
        other_attacks.append(experiment.adaptive(adaptive_weight, eps))
    main = experiment.attacked(main_attack)
    others = [experiment.attacked(other) for other in other_attacks]
    placebo = experiment.seen_again()
    noise = experiment.noise_like(main.crafted.images)
    for view in experiment.views:
        _compare_paths(experiment, view, main, others, noise)
        _compare(experiment, view, "noise", noise, main.success)
        _compare(experiment, view, "placebo", placebo, main.success)
        if adaptive_weight is not None:
            _compare(experiment, view, others[-1].name, others[-1].seen, others[-1].success)
    compare_views(experiment, main, placebo, baselines)
    compare_original(experiment, main, original, baselines, n_critical)
    n_classes = len(np.unique(experiment.labels))
    facts = {"n_given": len(images), "n_classes": n_classes, "repeats": repeats, "seed": seed}
    return experiment.result(main.name, facts)


def _check_names(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"detect: no {what} is called {unknown[0]!r}; there are {', '.join(known)}")


def _compare_paths(
    experiment: Experiment, view: str, main: Attacked, others: Sequence[Attacked], noise: Observation
) -> None:
    """Paths against the attack, and against what detectors of it were not trained on."""
    attacked = seen_as(view, main.seen)
    tests = {main.name: (attacked, main.success), "noise": (seen_as(view, noise), main.success)}
    tests |= {other.name: (seen_as(view, other.seen), other.success) for other in others}
    training = (seen_as(view, experiment.clean), attacked, main.success)
    experiment.compare(view, main.name, training, tests)


def _compare(experiment: Experiment, view: str, what: str, seen: Observation, counted: Mask) -> None:
    """Detectors of paths that are trained and tested on the same thing."""
    changed = seen_as(view, seen)
    experiment.compare(view, what, (seen_as(view, experiment.clean), changed, counted), {what: (changed, counted)})
