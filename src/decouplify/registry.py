"""Networks by name: those of timm, of torchvision, and of ``decouplify.cifar``; weights are never downloaded.

A name such as ``timm:resnet18`` is all a checkpoint needs to say about its network. Only names that a registry lists
are built, so a file can choose a network but cannot bring one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from decouplify._optional import import_optional
from decouplify.cifar import googlenet, resnet20, resnet56, vgg19
from decouplify.errors import CheckpointError

__all__ = ["build_model", "model_kwargs", "model_names", "rebuild_model"]

_REGISTRIES = ("timm", "torchvision", "cifar")
_CIFAR = {"resnet20": resnet20, "resnet56": resnet56, "vgg19": vgg19, "googlenet": googlenet}
# These would read weights from the network or from a file of any kind.
_LOADING = ("pretrained", "weights", "weights_backbone", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
# What a checkpoint may say about its network: numbers that shape it.
_RECORDED = ("num_classes", "n_classes", "inner", "width", "in_chans", "drop_rate", "drop_path_rate")
# Their own initialisation takes a minute and warns; their auxiliary heads make the training output a tuple.
_QUIET = {name: {"init_weights": False, "aux_logits": False} for name in ("googlenet", "inception_v3")}


def model_names(registry: str) -> list[str]:
    """Names of the networks for images that ``build_model`` accepts after ``timm:``, ``torchvision:`` or ``cifar:``.

    Raises:
        ImportError: If the registry's package is not installed.
        ValueError: If there is no such registry.
    """
    if registry not in _REGISTRIES:
        raise ValueError(f"no registry {registry!r}; there are {', '.join(_REGISTRIES)}")
    if registry == "cifar":
        return list(_CIFAR)
    package = import_optional(registry, f"a {registry} model", extra="zoo")
    names = package.list_models() if registry == "timm" else package.models.list_models(module=package.models)
    return [str(name) for name in names]


def build_model(spec: str, **kwargs: Any) -> nn.Module:
    """A freshly initialised network.

    Args:
        spec: ``timm:NAME``, ``torchvision:NAME`` or ``cifar:NAME``; a tag after the name of a timm model
            (``timm:resnet18.a1_in1k``) chooses its default image size, not its weights.
        **kwargs: Handed to the network's constructor: ``num_classes`` (``n_classes`` for cifar), and ``in_chans`` for
            timm.

    Raises:
        ImportError: If the registry's package is not installed.
        ValueError: If there is no such network, or it does not take these arguments.
    """
    registry, name = _split(spec)
    if loading := sorted(set(_LOADING) & kwargs.keys()):
        raise ValueError(f"build_model builds networks without weights, so it does not take {', '.join(loading)}")
    try:
        if registry == "cifar":
            return _CIFAR[name](**kwargs)
        if registry == "timm":
            return import_optional("timm", "a timm model", extra="zoo").create_model(name, pretrained=False, **kwargs)
        models = import_optional("torchvision.models", "a torchvision model", extra="zoo")
        return models.get_model(name, weights=None, **{**_QUIET.get(name, {}), **kwargs})
    except TypeError as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise ValueError(f"{spec} cannot be built with {given}: {error}") from error


def model_kwargs(spec: str, n_classes: int, n_channels: int) -> dict[str, int]:
    """Arguments for ``build_model`` that fit a network to a data set.

    Args:
        spec: See ``build_model``.
        n_classes: Number of classes.
        n_channels: Channels of the images, 1 or 3.

    Raises:
        ValueError: If there is no such network, or one that is not timm's shall read grey images.
    """
    registry, _ = _split(spec)
    if registry == "timm":
        return {"num_classes": n_classes, "in_chans": n_channels}
    if n_channels != 3:
        raise ValueError(f"{spec} reads images of 3 channels, these have {n_channels}; ask for 3 when loading them")
    return {"n_classes" if registry == "cifar" else "num_classes": n_classes}


def rebuild_model(extra: Mapping[str, Any]) -> nn.Module:
    """The network a checkpoint names, freshly initialised, ready for ``decouplify.load``.

    Args:
        extra: ``read_record(path)["extra"]`` with ``model`` and ``model_kwargs`` as ``decouplify train`` writes them.

    Raises:
        CheckpointError: If it names no network, or asks for more than numbers that shape it.
        ImportError: If the registry's package is not installed.
        ValueError: If there is no such network.
    """
    spec, kwargs = extra.get("model"), extra.get("model_kwargs", {})
    if not isinstance(spec, str) or not isinstance(kwargs, Mapping):
        raise CheckpointError(
            "the checkpoint does not say how to build its network. Build it in Python and call decouplify.load(model, "
            'path), or save it with extra={"model": "timm:resnet18", "model_kwargs": {...}, ...}'
        )
    for name, value in kwargs.items():
        if name not in _RECORDED or not isinstance(value, int | float):
            raise CheckpointError(
                f"the checkpoint asks for {spec} with {name}={value!r}; only numbers for {', '.join(_RECORDED)} are "
                "taken from a file"
            )
    return build_model(spec, **kwargs)


def _split(spec: str) -> tuple[str, str]:
    """Registry and name of a network that exists."""
    registry, colon, name = spec.partition(":")
    if not colon or registry not in _REGISTRIES:
        near = _installed_matches(spec.rpartition(":")[2])
        raise ValueError(
            f"{spec!r} names no registry: write timm:NAME, torchvision:NAME or cifar:NAME"
            + (f", for instance {' or '.join(near)}" if near else "")
        )
    names = model_names(registry)
    # A tag names weights and a default size; whether it exists is timm's to say.
    if (name.partition(".")[0] if registry == "timm" else name) not in names:
        near = [f"{registry}:{match}" for match in difflib.get_close_matches(name, names, n=3)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"it lists {len(names)} others"
        raise ValueError(f"{registry} has no model {name!r}; {hint}")
    return registry, name


def _installed_matches(name: str) -> list[str]:
    found = []
    for registry in _REGISTRIES:
        try:
            names = model_names(registry)
        except ImportError:
            continue
        found += [f"{registry}:{match}" for match in difflib.get_close_matches(name, names, n=1)]
    return found
