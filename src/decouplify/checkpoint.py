"""Save and load models: a safetensors file whose metadata repeats the surgery. Nothing in it is code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from decouplify._version import __version__
from decouplify.decoupling import Decoupling, decoupling_of
from decouplify.errors import CheckpointError, PlanError, TraceError
from decouplify.plan import Plan
from decouplify.surgery import unwrap, wrap

__all__ = ["load", "read_record", "save"]

_FORMAT = 1


def save(
    model: nn.Module, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None, *, half: bool = False
) -> None:
    """Write a wrapped model to a file, which appears whole or not at all.

    Args:
        model: A wrapped model; or one without gates, a dense twin for instance, which ``load`` then leaves unwrapped.
        path: Where to; a ``.safetensors`` file.
        extra: More facts for the record (data set, accuracy, ...), anything JSON can hold.
        half: Store the network's weights in float16. Biases, norms and everything that decides about gates stay as
            they are: near the threshold half precision flips gates.

    Raises:
        FileNotFoundError: If the directory does not exist.
    """
    wrapped = any(isinstance(module, Decoupling) for module in model.modules())
    decoupling = decoupling_of(model, "save") if wrapped else None
    owner = model if decoupling is None else _owner(model, decoupling)
    record = {
        "format": _FORMAT,
        "decouplify": __version__,
        "torch": torch.__version__,
        "n_classes": None if decoupling is None else decoupling.n_classes,
        "plan": None if decoupling is None else decoupling.plan.to_dict(),
        "extra": dict(extra or {}),
    }
    # Tensors may share memory (tied weights); a file holds each by itself.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in owner.state_dict().items()}
    if half:
        tensors = {name: _halved(name, tensor) for name, tensor in tensors.items()}
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"save: no directory {target.parent}; create it first")
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata={"decouplify": json.dumps(record)})
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _owner(model: nn.Module, decoupling: Decoupling) -> nn.Module:
    """The wrapped module itself, inside of DistributedDataParallel and the like."""
    return next(module for module in model.modules() if getattr(module, "decoupling", None) is decoupling)


def _halved(name: str, tensor: Tensor) -> Tensor:
    keep = name.startswith("decoupling.") or tensor.dim() < 2 or not tensor.is_floating_point()
    return tensor if keep else tensor.half()


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts stored with a checkpoint: format, versions, ``n_classes``, ``plan`` (None without gates), ``extra``.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is not a decouplify checkpoint.
    """
    return _read(path)[0]


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """The given model, wrapped as the saved one was (if it was) and with its weights.

    Args:
        model: A fresh, unwrapped model of the saved architecture; changed in place.
        path: A file written by ``save``.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is not a decouplify checkpoint or does not fit. The model is then unchanged.
        PlanError: If the model is wrapped already.
    """
    record, tensors = _read(path)
    if record.get("plan") is None:
        if any(isinstance(module, Decoupling) for module in model.modules()):
            raise PlanError(f"{path} has no gates and {type(model).__name__} is wrapped; load into a fresh model")
        _check_tensors(model.state_dict(), tensors, path)
        model.load_state_dict(tensors)
        return model
    plan = _saved_plan(record, path)
    _wrap_as_saved(model, plan, record["n_classes"], path)
    try:
        _check_plan(model, plan, path)
        _check_tensors(model.state_dict(), tensors, path)
    except CheckpointError:
        unwrap(model)
        raise
    model.load_state_dict(tensors)
    return model


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if "decouplify" not in metadata:
        raise CheckpointError(
            f"{path} holds tensors but no record of a surgery, so it was not written by decouplify.save; load plain "
            "weights into the model before wrapping it"
        )
    try:
        record: dict[str, Any] = json.loads(metadata["decouplify"])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: the record of the surgery cannot be read ({error})") from error
    if record.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} has format {record.get('format')} of decouplify {record.get('decouplify')}; this is "
            f"{__version__}, which reads format {_FORMAT}"
        )
    return record, tensors


def _saved_plan(record: Mapping[str, Any], path: Any) -> Plan:
    try:
        return Plan.from_dict(record["plan"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: the record of the surgery is incomplete ({type(error).__name__}: {error})"
        ) from error


def _wrap_as_saved(model: nn.Module, plan: Plan, n_classes: int | None, path: Any) -> None:
    if any(isinstance(module, Decoupling) for module in model.modules()):
        raise PlanError(f"{type(model).__name__} is wrapped already; load into a fresh model of the saved architecture")
    options = {name: getattr(plan.options, name) for name in plan.options.__dataclass_fields__}
    try:
        wrap(model, plan.input_size, **options, n_classes=n_classes, frozen_ok=True, verify=False)
    except (PlanError, TraceError) as error:
        raise CheckpointError(
            f"{path} was saved from {plan.model}; the same surgery on {type(model).__name__} fails: {error}"
        ) from error


def _check_plan(model: nn.Module, saved: Plan, path: Any) -> None:
    decoupling = model.decoupling
    assert isinstance(decoupling, Decoupling)
    ours = {(gate.name, gate.n_inputs, gate.n_filters) for gate in decoupling.plan.gates}
    theirs = {(gate.name, gate.n_inputs, gate.n_filters) for gate in saved.gates}
    if ours != theirs:
        missing, added = sorted(theirs - ours), sorted(ours - theirs)
        raise CheckpointError(
            f"{path} was saved from {saved.model} with {len(theirs)} gates, {decoupling.plan.model} has {len(ours)}. "
            f"Only in the file: {_some(missing)}; only in the model: {_some(added)}. Build the model that was saved."
        )


def _check_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], path: Any) -> None:
    missing, unknown = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    shapes = [
        f"{name} {tuple(theirs[name].shape)} instead of {tuple(ours[name].shape)}"
        for name in ours.keys() & theirs.keys()
        if ours[name].shape != theirs[name].shape
    ]
    if missing or unknown or shapes:
        raise CheckpointError(
            f"{path} does not fit the model. Missing in the file: {_some(missing)}; not in the model: "
            f"{_some(unknown)}; of another shape: {_some(sorted(shapes))}. Build the model that was saved, with as "
            "many classes."
        )


def _some(items: list[Any]) -> str:
    if not items:
        return "nothing"
    return ", ".join(str(item) for item in items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
