"""What the tests of concepts share."""

from __future__ import annotations

import pytest
from torch import nn

from decouplify.concepts import ConceptImages, planted_concepts
from planted import SIZE, PlantedColors, red_squares, wrapped_chain


@pytest.fixture(scope="session")
def scenes() -> ConceptImages:
    return planted_concepts(80, SIZE, seed=3)


@pytest.fixture
def planted() -> nn.Module:
    return PlantedColors().eval()


@pytest.fixture
def chain() -> nn.Module:
    return wrapped_chain()


@pytest.fixture
def squares() -> ConceptImages:
    return red_squares()
