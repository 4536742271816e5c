"""Where the numbers of each epoch go: JSON lines, TensorBoard, a progress bar, or a function of one's own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from decouplify._optional import import_optional

__all__ = ["Progress", "json_lines", "progress_bar", "tensorboard", "together"]

Progress = Callable[[dict[str, Any]], None]


def together(*loggers: Progress) -> Progress:
    """One logger that calls all of the given ones."""

    def log(epoch: dict[str, Any]) -> None:
        for logger in loggers:
            logger(epoch)

    return log


def json_lines(path: str | os.PathLike[str]) -> Progress:
    """Append each epoch as one line of JSON.

    Raises:
        FileNotFoundError: If the directory does not exist.
    """
    file = Path(path)
    if not file.resolve().parent.is_dir():
        raise FileNotFoundError(f"metrics: there is no directory {file.resolve().parent}")

    def log(epoch: Mapping[str, Any]) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(dict(epoch)) + "\n")

    return log


def tensorboard(directory: str | os.PathLike[str]) -> Progress:
    """Write each number of an epoch as a scalar for TensorBoard.

    Raises:
        ImportError: If tensorboard is not installed.
    """
    import_optional("tensorboard", "logging for TensorBoard", extra="train")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory))

    def log(epoch: Mapping[str, Any]) -> None:
        for name, value in epoch.items():
            if name != "epoch":
                writer.add_scalar(name, value, int(epoch["epoch"]))
        writer.flush()

    return log


class _Bar(Protocol):
    def update(self, n: int) -> object: ...
    def set_postfix_str(self, text: str) -> object: ...
    def close(self) -> object: ...


def progress_bar(n_epochs: int, label: str = "epochs") -> Progress:
    """A bar on stderr that moves with each epoch and shows its numbers.

    Raises:
        ImportError: If tqdm is not installed.
    """
    bar: _Bar = import_optional("tqdm", "a progress bar", extra="train").tqdm(
        total=n_epochs, desc=label, file=sys.stderr
    )

    def log(epoch: Mapping[str, Any]) -> None:
        bar.set_postfix_str("  ".join(f"{name} {value:.4g}" for name, value in epoch.items() if name != "epoch"))
        bar.update(1)
        if epoch["epoch"] == n_epochs:
            bar.close()

    return log
