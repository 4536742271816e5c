"""Hide a part of an image, and see which gates switch: in all, at once and because others did, and by chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from decouplify.concepts._switches import GateSwitches, ResponseSwitches, Switches
from decouplify.concepts.data import Concept, ConceptDataset, ConceptImage, Pixels, resize_nearest
from decouplify.concepts.features import FeatureTap, stream
from decouplify.decoupling import decoupling_of

Fill: TypeAlias = Literal["black", "mean", "blur", "noise"]
FILLS: tuple[Fill, ...] = ("black", "mean", "blur", "noise")
Mask: TypeAlias = NDArray[np.bool_]
_N_SHIFTS = 32
# What is hidden shall be seen by the network, and something shall be left to see.
AREA = (0.002, 0.8)


class Reading(TypedDict):
    """How images are read for what all of them together say: at most how many, how many at a time, which of them."""

    max_images: int
    batch_size: int
    seed: int
    progress: bool | None


class Changes(NamedTuple):
    """Gates of one layer before and after hiding each of m concepts in one image.

    Attributes:
        before: Gates of the whole image, bool, shape (K,).
        after: With the concept hidden, shape (m, K).
        direct: The same, with the gates of all layers before held as they were in the whole image.
        control: With another part of the same shape hidden instead.
        margin_before: Gate logits of the whole image, float32, shape (K,).
        margin_after: With the concept hidden, shape (m, K).
    """

    before: Tensor
    after: Tensor
    direct: Tensor
    control: Tensor
    margin_before: Tensor
    margin_after: Tensor


def hide(pixels: Pixels, mask: Mask, fill: Fill, rng: np.random.Generator) -> Pixels:
    """The image with the places of a mask (h, w) filled.

    Args:
        pixels: Shape (H, W, C).
        mask: What to hide, on any grid.
        fill: "black"; "mean", the mean colour of the image; "blur", the image itself, blurred; or "noise", uniform.
        rng: For noise.
    """
    where = resize_nearest(mask, (pixels.shape[0], pixels.shape[1]))
    hidden = pixels.copy()
    if fill == "black":
        hidden[where] = 0
    elif fill == "mean":
        hidden[where] = pixels.mean(axis=(0, 1))
    elif fill == "noise":
        hidden[where] = rng.integers(0, 256, (int(where.sum()), pixels.shape[2]))
    else:
        hidden[where] = _blur(pixels)[where]
    return hidden


def _blur(pixels: Pixels) -> Pixels:
    """The image as if seen through an eighth of its resolution."""
    image = torch.from_numpy(pixels).movedim(-1, 0)[None].float()
    coarse = F.interpolate(image, size=[max(1, side // 8) for side in image.shape[2:]], mode="area")
    blurred = F.interpolate(coarse, size=image.shape[2:], mode="bilinear", align_corners=False)
    return blurred[0].movedim(0, -1).round().to(torch.uint8).numpy()


def control_mask(mask: Mask, rng: np.random.Generator) -> Mask:
    """A mask of the same shape and size elsewhere: of some random shifts, the one that overlaps least.

    What leaves the image on one side comes in on the other, so that the area stays.
    """
    shifts = rng.integers(0, mask.shape, (_N_SHIFTS, 2))
    shifted = [np.roll(mask, tuple(shift), axis=(0, 1)) for shift in shifts]
    return min(shifted, key=lambda other: int((other & mask).sum()))


def images_with(
    dataset: ConceptDataset, concept: Concept, order: Sequence[int], batch_size: int, progress: bool | None
) -> Iterator[ConceptImage]:
    """Images in which something of a concept can be hidden and something else remains."""
    for images in stream(dataset, order, f"images with {concept.name}", batch_size=batch_size, progress=progress):
        yield from (image for image in images if is_hideable(image, concept.number))


def is_hideable(image: ConceptImage, number: int) -> bool:
    """Whether a concept covers between 0.2 and 80 % of the labels' grid."""
    return number in image.numbers and AREA[0] <= float(image.mask(number).mean()) <= AREA[1]


def changes(
    tap: FeatureTap,
    switches: Switches,
    image: ConceptImage,
    masks: Sequence[Mask],
    dataset: ConceptDataset,
    fill: Fill,
    rng: np.random.Generator,
) -> tuple[Mapping[str, Tensor], Mapping[str, Changes]]:
    """Feature maps of the whole image by site, shape (K, H, W), and what hiding each mask changes, by site."""

    def read(pixels: Sequence[Pixels]) -> Tensor:
        return torch.stack([dataset.transform(p) for p in pixels]).to(tap.device)

    whole = tap(read([image.pixels]))
    before, path = switches.margins(whole), switches.path()
    controls = [control_mask(mask, rng) for mask in masks]
    control = switches.margins(tap(read([hide(image.pixels, mask, fill, rng) for mask in controls])))
    hidden = read([hide(image.pixels, mask, fill, rng) for mask in masks])
    after = switches.margins(tap(hidden))
    direct = switches.direct(tap, hidden, path)
    return {name: features[0] for name, features in whole.items()}, {
        name: Changes(
            before=margin[0] > 0,
            after=after[name] > 0,
            direct=direct[name] > 0,
            control=control[name] > 0,
            margin_before=margin[0].float(),
            margin_after=after[name].float(),
        )
        for name, margin in before.items()
    }


def switches_of(
    model: nn.Module,
    dataset: ConceptDataset,
    layers: Sequence[str],
    caller: str,
    *,
    real: bool,
    **reading: Unpack[Reading],
) -> Switches:
    """What says which filters of the layers are open.

    Args:
        model: A wrapped model, or a copy with open gates of one that has none.
        dataset: The images, for mean responses.
        layers: Names of sites.
        caller: For messages.
        real: Whether the gates decide, rather than the responses.
        **reading: For the means.

    Raises:
        ValueError: If a layer is not gated.
    """
    decoupling = decoupling_of(model, caller)
    sites = {site.name: site for site in decoupling.plan.sites}
    if other := [name for name in layers if name not in sites]:
        raise ValueError(f"{caller}: {other[0]!r} is not a gated convolution; those are {', '.join(sites)}")
    if real:
        return GateSwitches(decoupling, [sites[name] for name in layers])
    return ResponseSwitches.of(model, dataset, layers, **reading)


def check_fill(fill: str, caller: str) -> None:
    """Raise ``ValueError`` unless there is such a filling."""
    if fill not in FILLS:
        raise ValueError(f"{caller}: fill is {fill!r}, wanted one of {', '.join(map(repr, FILLS))}")
