"""Which filters are open for the images a network has just read: its gates say so, or else its responses do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from decouplify.concepts.data import ConceptDataset
from decouplify.concepts.features import FeatureTap, order_of, stream, to_input
from decouplify.decoupling import Decoupling, is_wrapped
from decouplify.paths.pseudo import observable_copy
from decouplify.plan import Site

__all__ = ["GateSwitches", "ResponseSwitches", "Switches", "check_thresholds", "with_sites"]

_HELD_APART = 1e-6  # of the mean response: a filter that always responds alike is closed, however sums are rounded


class Switches(Protocol):
    """Margins by layer, shape (N, K): a filter is open where its margin is positive."""

    def margins(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the run that gave the feature maps (N, K, H, W)."""

    def path(self) -> dict[str, Tensor]:
        """What decided which filters computed in the last run, by gate, shape (N, K)."""

    def direct(self, tap: FeatureTap, images: Tensor, path: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Margins of the images, had each layer been reached on the given path of another image."""


def with_sites(model: nn.Module, dataset: ConceptDataset) -> nn.Module:
    """The model if it has gates; else a copy with the sites that ``wrap`` finds, which computes what the model does.

    Raises:
        ValueError: If it cannot be traced, or has no convolution that can be gated.
    """
    if is_wrapped(model):
        return model
    image = to_input([dataset[0]], dataset.transform, torch.device("cpu"))
    return observable_copy(model, None, {"input_size": tuple(image.shape[1:])})


def check_thresholds(fit: bool, caller: str, name: str) -> None:
    """Raise ``ValueError`` unless the thresholds fit, or there are none."""
    if not fit:
        raise ValueError(
            f"{caller}: {name} has no gates, so thresholds of its modules are not those of the sites looked at; leave "
            "thresholds out and they are collected"
        )


@dataclass(frozen=True)
class GateSwitches:
    """The gates of a wrapped network."""

    decoupling: Decoupling
    sites: Sequence[Site]

    def margins(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``Switches``; the logits of the run's gates."""
        logits = self.decoupling.margins()
        return {site.name: logits[site.gate] for site in self.sites}

    def path(self) -> dict[str, Tensor]:
        """See ``Switches``; all gates, not only those of the sites."""
        return self.decoupling.gates()

    def direct(self, tap: FeatureTap, images: Tensor, path: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``Switches``.

        Controllers decide before their layer runs and forced gates do not ask them, so one run with all gates held
        tells for every layer what its controller says when nothing before it has switched.
        """
        with self.decoupling.forced({name: z[0] for name, z in path.items()}):
            return self.margins(tap(images))


@dataclass(frozen=True)
class ResponseSwitches:
    """Pseudo-paths: a filter counts as open where its mean over the picture is above that of all pictures.

    Attributes:
        means: Mean response of each filter over many images by layer, shape (K,).
    """

    means: Mapping[str, Tensor]

    def margins(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``Switches``; how far responses are above their means."""
        limits = {name: mean + _HELD_APART * mean.abs() for name, mean in self.means.items()}
        return {name: maps[name].mean((2, 3)) - limit for name, limit in limits.items()}

    def path(self) -> dict[str, Tensor]:
        """See ``Switches``; nothing did, all filters computed."""
        return {}

    def direct(self, tap: FeatureTap, images: Tensor, path: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See ``Switches``; these filters compute whether they count as open or not, so none makes others switch."""
        return self.margins(tap(images))

    @classmethod
    def of(
        cls,
        model: nn.Module,
        dataset: ConceptDataset,
        layers: Sequence[str],
        *,
        max_images: int,
        batch_size: int,
        seed: int,
        progress: bool | None,
    ) -> ResponseSwitches:
        """Mean responses over some images of the data set."""
        order = order_of(dataset, max_images, seed, "pseudo-paths")
        sums: dict[str, Tensor] = {}
        with FeatureTap(model, layers) as tap:
            for images in stream(dataset, order, "mean responses", batch_size=batch_size, progress=progress):
                for name, maps in tap(to_input(images, dataset.transform, tap.device)).items():
                    total = maps.double().mean((2, 3)).sum(0)
                    sums[name] = sums[name] + total if name in sums else total
        return cls({name: (total / len(order)).float() for name, total in sums.items()})
