"""Adversarial images and the paths they take: attacks, detectors, controls, and a monitor for running systems.

``detect`` runs the experiment of the paper's Table 6 with its controls; the parts it is made of are here, too. Images
are pixels in [0, 1], so models that read normalised images go into a ``PixelModel``.
"""

from decouplify.adversarial.adapters import ArtAttack, FoolboxAttack, TorchattacksAttack
from decouplify.adversarial.adaptive import AdaptiveAttack
from decouplify.adversarial.attacks import (
    BIM,
    FGSM,
    MIFGSM,
    PGD,
    Attack,
    CDRPAttack,
    attack_named,
)
from decouplify.adversarial.baselines import BASELINES
from decouplify.adversarial.crafting import Crafted, craft, target_classes
from decouplify.adversarial.detection import detect
from decouplify.adversarial.detectors import DETECTORS, Detector, PrototypeDetector, SklearnDetector
from decouplify.adversarial.gradients import GateAware, soft_gates
from decouplify.adversarial.maps import AdversarialMap, adversarial_map
from decouplify.adversarial.monitor import PathMonitor, Verdicts
from decouplify.adversarial.observations import Observation, observe
from decouplify.adversarial.pixels import PixelModel
from decouplify.adversarial.protocol import Protocol, Score, Seen, TooFewImagesError, score_detectors
from decouplify.adversarial.result import DetectionResult, DetectionRow

__all__ = [
    "BASELINES",
    "BIM",
    "DETECTORS",
    "FGSM",
    "MIFGSM",
    "PGD",
    "AdaptiveAttack",
    "AdversarialMap",
    "ArtAttack",
    "Attack",
    "CDRPAttack",
    "Crafted",
    "DetectionResult",
    "DetectionRow",
    "Detector",
    "FoolboxAttack",
    "GateAware",
    "Observation",
    "PathMonitor",
    "PixelModel",
    "Protocol",
    "PrototypeDetector",
    "Score",
    "Seen",
    "SklearnDetector",
    "TooFewImagesError",
    "TorchattacksAttack",
    "Verdicts",
    "adversarial_map",
    "attack_named",
    "craft",
    "detect",
    "observe",
    "score_detectors",
    "soft_gates",
    "target_classes",
]
