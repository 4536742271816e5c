"""Feature maps of chosen layers while a model runs, one batch at a time: nothing is kept."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from decouplify.concepts.data import ConceptDataset, ConceptImage, Transform
from decouplify.decoupling import Decoupling, decoupling_of
from decouplify.errors import NonFiniteError
from decouplify.modes import eval_mode
from decouplify.paths._progress import progress_bar
from decouplify.plan import End, Site

__all__ = ["FeatureTap", "layers_or_default", "order_of", "stream", "to_input"]


def stream(
    dataset: ConceptDataset,
    order: Sequence[int],
    title: str,
    *,
    batch_size: int,
    num_workers: int = 0,
    progress: bool | None = None,
) -> Iterator[list[ConceptImage]]:
    """Images of a data set in the given order, in lists of ``batch_size``, with a progress bar over them."""
    loader: Iterable[list[ConceptImage]] = DataLoader(
        dataset,  # type: ignore[arg-type]  # is no Dataset but has the two methods a loader calls
        batch_size=batch_size,
        sampler=order,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # or the loader would draw from the caller's
    )
    with progress_bar(progress, title, len(order)) as advance:
        for images in loader:
            yield images
            advance(len(images))


def order_of(dataset: ConceptDataset, max_images: int | None, seed: int, caller: str) -> list[int]:
    """Indices of at most ``max_images`` images, in random order.

    Raises:
        ValueError: If there are no images, or ``max_images`` is not positive.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"{caller}: max_images is {max_images}, wanted at least 1, or None for all")
    if len(dataset) == 0:
        raise ValueError(f"{caller}: the data set has no images")
    order = np.random.default_rng(seed).permutation(len(dataset))[:max_images]
    return [int(i) for i in order]


def to_input(images: Sequence[ConceptImage], transform: Transform, device: torch.device) -> Tensor:
    """What the model reads, (N, C, H, W).

    Raises:
        ValueError: If the images differ in size.
        NonFiniteError: If an image holds NaN or infinity after the transform.
    """
    inputs = [transform(image.pixels) for image in images]
    if len(sizes := {tuple(x.shape) for x in inputs}) > 1:
        raise ValueError(
            f"images of one batch have the sizes {sorted(sizes)}; scale them in the reader (size=224) or in the "
            "transform, or use batch_size=1"
        )
    for image, x in zip(images, inputs, strict=True):
        if not bool(x.isfinite().all()):
            raise NonFiniteError(f"image {image.name!r} has NaN or infinity after the transform")
    return torch.stack(inputs).to(device)


def layers_or_default(
    model: nn.Module, layers: str | Iterable[str] | None, dataset: ConceptDataset, caller: str
) -> tuple[str, ...]:
    """The layers asked for, or of a wrapped model the last gated convolution of every resolution.

    Raises:
        ValueError: If none is given for a model that is not wrapped, or a layer is given twice.
    """
    if layers is not None:
        chosen = (layers,) if isinstance(layers, str) else tuple(layers)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"{caller}: layers are {chosen}, wanted at least one, none of them twice")
        return chosen
    if _decoupling_or_none(model) is None:
        raise ValueError(f"{caller}: {type(model).__name__} is not wrapped, so name the layers: layers=['layer4', ...]")
    names = [site.name for site in decoupling_of(model).plan.sites]
    with FeatureTap(model, names) as tap:
        maps = tap(to_input([dataset[0]], dataset.transform, tap.device))
    last_of_size = {tuple(features.shape[-2:]): name for name, features in maps.items()}
    return tuple(name for name in names if name in last_of_size.values())


@dataclass
class FeatureTap:
    """A context in which calling it with images gives the feature maps of the named layers.

    A layer of a wrapped model is a gated convolution, and its features are those after norm, activation and gate: what
    the next layer reads. Any other module may be named too, in a model that is not wrapped as well; then the features
    are what the module returns. The model is in eval mode inside the context, without gradients.

    Attributes:
        model: The model.
        layers: Names of the layers.

    Raises:
        ValueError: On entering, if there is no such layer; on calling, if a layer does not return one (N, K, H, W)
            tensor once per run.
    """

    model: nn.Module
    layers: Sequence[str]
    _maps: dict[str, Tensor] = field(default_factory=dict, init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)

    @property
    def device(self) -> torch.device:
        """Where the images must be: the device of the model's first parameter."""
        return next(self.model.parameters(), torch.empty(0)).device

    def __enter__(self) -> FeatureTap:
        decoupling = _decoupling_or_none(self.model)
        sites = {site.name: site for site in decoupling.plan.sites} if decoupling is not None else {}
        hooked = [name for name in self.layers if name not in sites]
        modules = dict(self.model.named_modules())
        for name in hooked:
            if name not in modules or name == "":
                raise ValueError(_no_such_layer(self.model, name, list(sites) or list(modules)))
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self.model))
            stack.enter_context(torch.no_grad())
            for name in hooked:
                stack.callback(modules[name].register_forward_hook(_Keep(self, name)).remove)
            if decoupling is not None:
                wanted = [sites[name] for name in self.layers if name in sites]
                stack.enter_context(decoupling.observed(_Observer(self, wanted)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._maps = {}
        self._stack.close()

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps by layer, float32, shape (N, K, H, W), in the order of ``layers``."""
        self._maps = {}
        self.model(images)
        if missing := [name for name in self.layers if name not in self._maps]:
            raise ValueError(f"the forward pass did not run {', '.join(missing)}")
        maps, self._maps = self._maps, {}
        return {name: maps[name] for name in self.layers}

    def keep(self, name: str, features: Any, axis: int = 1) -> None:
        """Take what a layer returned."""
        if not isinstance(features, Tensor) or features.dim() != 4:
            given = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"layer {name!r} returns {given}, wanted feature maps (N, K, H, W)")
        if name in self._maps:
            raise ValueError(f"layer {name!r} runs more than once per image; name the modules around it instead")
        features = features.movedim(axis, 1).float()
        if not bool(features.isfinite().all()):
            raise NonFiniteError(f"layer {name!r} returns NaN or infinity")
        self._maps[name] = features


class _Keep:
    """Forward hook of a module that is no site."""

    def __init__(self, tap: FeatureTap, name: str) -> None:
        self.tap, self.name = tap, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.tap.keep(self.name, output)


class _Observer:
    """Picks the wanted sites out of all gated values; sites of one end share its features."""

    def __init__(self, tap: FeatureTap, sites: Iterable[Site]) -> None:
        self.tap = tap
        self.names: dict[tuple[str, End], list[str]] = {}
        for site in sites:
            self.names.setdefault((site.gate, site.end), []).append(site.name)

    def __call__(self, gate: str, end: End, features: Tensor) -> None:
        for name in self.names.get((gate, end), ()):
            self.tap.keep(name, features, end.axis)


def _decoupling_or_none(model: nn.Module) -> Decoupling | None:
    try:
        return decoupling_of(model)
    except ValueError:
        return None


def _no_such_layer(model: nn.Module, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known[:8])}, ..."
    return f"{type(model).__name__} has no layer {name!r}; {hint}"
