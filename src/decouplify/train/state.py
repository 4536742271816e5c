"""The file that lets a killed run go on with the same numbers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from decouplify.errors import CheckpointError

__all__ = ["read_state", "rng_state", "set_rng_state", "write_state"]


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a state to a file, which always holds a whole one: the last, or the one before."""
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def read_state(path: str | os.PathLike[str], fingerprint: str) -> dict[str, Any] | None:
    """The state in a file, or None if there is no file.

    Args:
        path: A file of ``write_state``.
        fingerprint: Of the run that wants to go on.

    Raises:
        CheckpointError: If the file is not a state, or that of a run with another recipe or network.
    """
    if not Path(path).exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what unpickling raises
        raise CheckpointError(f"{path} is not the state of a training run: {error}") from error
    if state.get("fingerprint") != fingerprint:
        raise CheckpointError(
            f"{path} belongs to another run:\n  {state.get('fingerprint')}\nand this one is\n  {fingerprint}\n"
            "Give the recipe and network of that run, or another file."
        )
    return state


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of torch's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put the generators where ``rng_state`` found them."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
