"""From which value on a filter counts as active: a high quantile of its activations, in one pass and little memory.

Source: Bau et al., Network Dissection, CVPR 2017: the value T with P(activation > T) = 0.005 over all images and all
places of the feature map. Every filter of every layer has its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify._optional import new_axes, write_title
from decouplify.concepts.data import ConceptDataset
from decouplify.concepts.features import FeatureTap, layers_or_default, order_of, stream, to_input
from decouplify.paths._results import Result
from decouplify.paths._text import plain, text_table
from decouplify.paths.states import label_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Thresholds", "ValueHistogram", "collect_thresholds"]

# A float32 is cut after the first seven bits of its mantissa. Values of one bin then differ by less than 1/128, bins
# are found without a logarithm, and their lower edges are floats themselves: nothing is rounded at an edge.
_SHIFT = 16
_SMALLEST, _LARGEST = 2.0**-20, 2.0**20  # about 1e-6 to 1e6; smaller magnitudes count as 0
_FIRST = int(np.float32(_SMALLEST).view(np.int32)) >> _SHIFT
_N_BINS = (int(np.float32(_LARGEST).view(np.int32)) >> _SHIFT) - _FIRST
_N_AT_ONCE = 1 << 22  # counting takes some 30 bytes per value


class ValueHistogram:
    """How often each filter takes which value: logarithmic bins, 0.8 % wide at most.

    Histograms of parts of the data add up to the histogram of the whole, in any order, bit for bit.

    Args:
        n_filters: Number of filters K.

    Attributes:
        positive: Values per bin of magnitude, int64, shape (K, bins).
        zero: Values of magnitude below 1e-6, int64, shape (K,).
        negative: As ``positive`` for values below 0, or ``None`` while there was none.
    """

    def __init__(self, n_filters: int) -> None:
        self.positive = torch.zeros(n_filters, _N_BINS, dtype=torch.int64)
        self.zero = torch.zeros(n_filters, dtype=torch.int64)
        self.negative: Tensor | None = None

    @property
    def n_values(self) -> int:
        """Values seen per filter."""
        below = 0 if self.negative is None else int(self.negative[0].sum())
        return int(self.positive[0].sum()) + int(self.zero[0]) + below

    def update(self, features: Tensor) -> None:
        """Count feature maps (N, K, H, W).

        Raises:
            ValueError: If a value is beyond 1e6 in magnitude; the quantile might not be found then.
        """
        for part in features.split(max(1, _N_AT_ONCE // features[0].numel())):
            self._update(part.transpose(0, 1).flatten(1).float().contiguous())

    def _update(self, values: Tensor) -> None:
        """Count values (K, n)."""
        magnitude = values.abs()
        if float(magnitude.amax()) >= _LARGEST:
            raise ValueError(f"activations reach {float(magnitude.amax()):.3g}; thresholds are found up to 1e6")
        small = magnitude < _SMALLEST
        self.zero += small.sum(1).cpu()
        self.positive += _count(magnitude, (values > 0) & ~small)
        if bool((negative := (values < 0) & ~small).any()):
            below = _count(magnitude, negative)
            self.negative = below if self.negative is None else self.negative + below

    def merge(self, other: ValueHistogram) -> None:
        """Add what another histogram counted.

        Raises:
            ValueError: If it is about another number of filters.
        """
        if len(other.zero) != len(self.zero):
            raise ValueError(f"histograms of {len(self.zero)} and of {len(other.zero)} filters cannot be merged")
        self.zero += other.zero
        self.positive += other.positive
        if other.negative is not None:
            self.negative = other.negative.clone() if self.negative is None else self.negative + other.negative

    def upper_quantile(self, share: float) -> Tensor:
        """The value that a ``share`` of each filter's values exceeds, shape (K,), float32.

        Exact would be the value at position floor(share n) of the sorted ones, largest first. What comes back is just
        below the bin of that value, so at most 0.8 % smaller, and values equal to the exact one exceed it: a filter
        with few different values is active where it takes the highest, although the share is then larger.
        """
        counts, edges = self._ascending()
        n_above = counts.flip(1).cumsum(1)  # from the top
        wanted = int(share * self.n_values)
        position = (n_above <= wanted).sum(1)
        return edges.flip(0)[position]

    def _ascending(self) -> tuple[Tensor, Tensor]:
        """All counts (K, B) from the lowest bin to the highest, and just below which value each begins (B,)."""
        bits = (torch.arange(_N_BINS + 1, dtype=torch.int32) + _FIRST) << _SHIFT
        edges = bits.view(torch.float32)
        below = torch.nextafter(edges[:-1], torch.tensor(-torch.inf))
        counts, starts = [self.zero[:, None], self.positive], [torch.zeros(1), below]
        if self.negative is not None:  # mirrored, so the upper edge of a magnitude is the lower one of the value
            counts.insert(0, self.negative.flip(1))
            starts.insert(0, -edges[1:].flip(0))
        return torch.cat(counts, 1), torch.cat(starts)


def _count(magnitude: Tensor, which: Tensor) -> Tensor:
    """Magnitudes per bin, (K, n) to (K, bins)."""
    n_filters = len(magnitude)
    bins = (magnitude.view(torch.int32) >> _SHIFT) - _FIRST
    rows = torch.arange(n_filters, device=magnitude.device)[:, None] * _N_BINS
    flat = (bins + rows)[which]
    return torch.bincount(flat, minlength=n_filters * _N_BINS).view(n_filters, _N_BINS).cpu()


@dataclass(frozen=True, eq=False, repr=False)
class Thresholds(Result):
    """Values above which filters count as active.

    Attributes:
        values: Per layer the threshold of each filter, float32, shape (K,). 0 for a filter that is positive at fewer
            than ``quantile`` of the places: it then counts as active wherever it is positive.
        quantile: Share of the places at which a filter exceeds its threshold.
        n_images: Images they were computed from.
        fingerprint: Of the weights they belong to; those of another network or of other weights are refused.
        model: Name of the model, for titles.
    """

    values: Mapping[str, NDArray[np.float32]]
    quantile: float
    n_images: int
    fingerprint: str
    model: str = ""

    def headline(self) -> str:
        """One line: layers, filters, quantile, images."""
        n_filters = sum(map(len, self.values.values()))
        return (
            f"{n_filters} filters of {len(self.values)} layers, exceeded at {self.quantile:.2%} of the places of "
            f"{self.n_images} images"
        )

    def summary(self) -> str:
        """A table with a row per layer."""
        rows = [
            [name, str(len(t)), *(f"{value:.3g}" for value in np.quantile(t, (0, 0.5, 1))), str(int((t == 0).sum()))]
            for name, t in self.values.items()
        ]
        header = ["layer", "filters", "lowest", "median", "highest", "at 0"]
        return f"Thresholds{' of ' + self.model if self.model else ''}\n{text_table(header, rows)}\n{self.headline()}"

    def __repr__(self) -> str:
        return f"Thresholds({self.headline()})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists and numbers."""
        return {name: plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Axes | None = None) -> Axes:
        """The thresholds of each layer, sorted, as one line from the lowest to the highest filter.

        Args:
            ax: Where to draw; a new figure, unknown to pyplot, if not given.
        """
        ax = new_axes(min(16.0, max(5.0, 2.5 + 0.6 * len(self.values))), 4.0) if ax is None else ax
        for i, t in enumerate(self.values.values()):
            ax.plot(i + np.linspace(-0.4, 0.4, len(t)), np.sort(t), color="#35587f", linewidth=2)
        label_layers(ax, list(self.values))
        ax.set_ylabel("threshold")
        ax.spines[["top", "right"]].set_visible(False)
        write_title(ax, f"Activation thresholds{' of ' + self.model if self.model else ''}", self.headline())
        return ax

    def of(self, layers: Iterable[str], model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """The thresholds of some layers as tensors.

        Raises:
            ValueError: If they belong to other weights, or a layer is missing.
        """
        if self.fingerprint != fingerprint(model):
            raise ValueError(
                f"these thresholds belong to other weights than those of this {type(model).__name__}; compute them "
                "for it with collect_thresholds(model, dataset)"
            )
        if missing := [name for name in layers if name not in self.values]:
            raise ValueError(f"no thresholds for {', '.join(missing)}; there are some for {', '.join(self.values)}")
        return {name: torch.from_numpy(self.values[name]).to(device) for name in layers}


def collect_thresholds(
    model: nn.Module,
    dataset: ConceptDataset,
    layers: str | Iterable[str] | None = None,
    *,
    quantile: float = 0.005,
    max_images: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    seed: int = 0,
    progress: bool | None = None,
) -> Thresholds:
    """The threshold of every filter of some layers, in one pass over the images.

    Args:
        model: A wrapped model, or any other if ``layers`` names modules.
        dataset: The images.
        layers: Gated convolutions, or other modules that return feature maps; by default the last gated convolution of
            every resolution.
        quantile: Share of the places at which a filter shall exceed its threshold, in (0, 1).
        max_images: Use a random subset of this size.
        batch_size: Images per run.
        num_workers: Processes that load images.
        seed: Seed of the subset.
        progress: Show a progress bar; if not given, only on a terminal and with rich installed.

    Raises:
        ValueError: If the quantile is out of range, there are no images, or there is no such layer.
        NonFiniteError: If an image or a feature is not finite.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"collect_thresholds: quantile is {quantile}, wanted a share of the places in (0, 1)")
    order = order_of(dataset, max_images, seed, "collect_thresholds")
    chosen = layers_or_default(model, layers, dataset, "collect_thresholds")
    histograms: dict[str, ValueHistogram] = {}
    batches = stream(dataset, order, "thresholds", batch_size=batch_size, num_workers=num_workers, progress=progress)
    with FeatureTap(model, chosen) as tap:
        for images in batches:
            for name, features in tap(to_input(images, dataset.transform, tap.device)).items():
                histograms.setdefault(name, ValueHistogram(features.shape[1])).update(features)
    values = {name: histogram.upper_quantile(quantile).numpy() for name, histogram in histograms.items()}
    return Thresholds(values, quantile, len(order), fingerprint(model), type(model).__name__)


def fingerprint(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that change with the weights, the gates' included."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        # Sums are much faster than hashing all bytes, and no training step leaves all of them alone.
        total = tensor.sum(dtype=torch.float64)
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float64) if tensor.is_floating_point() else total
        digest.update(f"{name}{tuple(tensor.shape)}{float(total)}{float(norm)}".encode())
    return digest.hexdigest()[:16]
