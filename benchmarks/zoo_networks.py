"""The networks of the coverage sweep: their names, how each is built without weights, the image it takes.

A name is ``registry:model`` or ``registry:model.part``. The part is there for torchvision's detection and optical-flow
models, which take lists or pairs of images: their convolutional backbone is what can be wrapped.
"""

from __future__ import annotations

import warnings
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torchvision import models as vision

__all__ = ["all_networks", "build", "image_size", "versions"]

#: Sizes (C, H, W) or (C, T, H, W) of networks that do not run on 224 x 224.
SIZES = {
    "torchvision:ssd300_vgg16.backbone": (3, 300, 300),
    "torchvision:ssdlite320_mobilenet_v3_large.backbone": (3, 320, 320),
}
VIDEO_SIZES = dict.fromkeys(("mvit_v1_b", "mvit_v2_s", "s3d"), (3, 16, 224, 224))
VIDEO_SIZE = (3, 16, 112, 112)


def all_networks() -> list[str]:
    """Every network for images and torchvision's for videos; timm's in turn from each of its families."""
    names = [*_models(vision), *_models(vision.segmentation), *_models(vision.quantization), *_models(vision.video)]
    names += [f"{name}.backbone" for name in _models(vision.detection)]
    names += [f"{name}.feature_encoder" for name in _models(vision.optical_flow)]
    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(timm.model_entrypoint(name).__module__, []).append(name)
    rounds = [
        models[i] for i in range(max(map(len, families.values()))) for models in families.values() if i < len(models)
    ]
    return [f"torchvision:{name}" for name in names] + [f"timm:{name}" for name in rounds]


def versions() -> dict[str, str]:
    return {package.__name__: package.__version__.split("+")[0] for package in (torch, torchvision, timm)}


def build(name: str, built_for: int | None = None) -> nn.Module:
    """A network with random weights; nothing is downloaded.

    Args:
        name: See ``all_networks``.
        built_for: Side in pixels of the images, for constructors that ask for it; None for their own default.

    Raises:
        TypeError: If the constructor does not ask for it.
    """
    registry, _, path = name.partition(":")
    if registry == "timm":
        return timm.create_model(path, pretrained=False, img_size=built_for)  # timm passes on what is not None
    model, _, part = path.partition(".")
    side = {} if built_for is None else {"input_size": (built_for, built_for)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old signatures of quantization and of weight initialisation
        whole = vision.get_model(model, weights=None, **_options(model), **side)
    return whole.get_submodule(part)


def _options(model: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if model.removeprefix("quantized_") in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # draws from scipy's truncated normal distribution, which takes a minute
    if model in _models(vision.segmentation) + _models(vision.detection):
        options["weights_backbone"] = None
    if model in _models(vision.quantization):
        options["quantize"] = False
    return options


def image_size(name: str) -> tuple[int, ...] | None:
    """The image a network takes, None if ``decouplify.inspect`` finds it out."""
    model = name.partition(":")[2]
    if name.startswith("torchvision:") and model in _models(vision.video):
        return VIDEO_SIZES.get(model, VIDEO_SIZE)
    return SIZES.get(name)


def _models(module: Any) -> list[str]:
    return vision.list_models(module=module)
