"""What filters stand for: compare them with labelled concepts, one by one and together.

A concept data set gives images and, for each, where which concept is. ``load_broden``, ``load_voc``, ``load_masks`` and
``load_coco`` read some from disk, ``planted_concepts`` draws one. ``interpretability`` scores single filters,
``representation_ability`` compares single filters with those that a concept switches, ``occlude_concept`` looks at one
concept closely, ``filter_cards`` shows what a filter looks at.
"""

from decouplify.concepts.broden import Broden, load_broden
from decouplify.concepts.cards import CardImage, FilterCard, FilterCards, filter_cards
from decouplify.concepts.coco import CocoImages, load_coco
from decouplify.concepts.data import (
    IMAGENET,
    Concept,
    ConceptDataset,
    ConceptImage,
    ConceptImages,
    Scaled,
    find_concept,
)
from decouplify.concepts.masks import VOC_CLASSES, MaskFolder, load_masks, load_voc
from decouplify.concepts.occlusion import ConceptOcclusion, Example, LayerChanges, SwitchedFilter, occlude_concept
from decouplify.concepts.representation import ConceptCover, Representation, representation_ability
from decouplify.concepts.scores import FilterConcept, Interpretability, LayerScores, interpretability
from decouplify.concepts.synthetic import OBJECTS, planted_concepts, write_mini_broden
from decouplify.concepts.thresholds import Thresholds, ValueHistogram, collect_thresholds

__all__ = [
    "IMAGENET",
    "OBJECTS",
    "VOC_CLASSES",
    "Broden",
    "CardImage",
    "CocoImages",
    "Concept",
    "ConceptCover",
    "ConceptDataset",
    "ConceptImage",
    "ConceptImages",
    "ConceptOcclusion",
    "Example",
    "FilterCard",
    "FilterCards",
    "FilterConcept",
    "Interpretability",
    "LayerChanges",
    "LayerScores",
    "MaskFolder",
    "Representation",
    "Scaled",
    "SwitchedFilter",
    "Thresholds",
    "ValueHistogram",
    "collect_thresholds",
    "filter_cards",
    "find_concept",
    "interpretability",
    "load_broden",
    "load_coco",
    "load_masks",
    "load_voc",
    "occlude_concept",
    "planted_concepts",
    "representation_ability",
    "write_mini_broden",
]
